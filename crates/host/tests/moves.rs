//! Pages leave the arena and come back.

mod common;

use common::{arena, at, bytes, install, page, poke};
use pgmap_core::addr::PAGE_SIZE;
use pgmap_mm::mmu::{Mmu, Progress, Protect, Slot, Stop};

#[test]
fn pages_come_back_with_their_bytes() {
    let Some(mmu) = arena(64) else { return };
    install(&mmu, 3, 0..40, Protect::ReadWrite);
    assert_eq!(
        mmu.take_out(at(&mmu, 3), 40, Slot(5)),
        Progress::complete(40)
    );
    for number in 0..40u8 {
        // SAFETY: `take_out` has just filled the slot.
        let staged = unsafe { mmu.staged(Slot(5 + u32::from(number))) };
        assert_eq!(staged.0, page(number).0);
    }
    assert_eq!(
        mmu.give_back(Slot(5), 40, at(&mmu, 3)),
        Progress::complete(40)
    );
    for number in 0..40u8 {
        assert_eq!(bytes(&mmu, 3 + usize::from(number)).0, page(number).0);
        poke(&mmu, 3 + usize::from(number), 1);
    }
}

#[test]
fn the_first_hole_stops_a_batch() {
    let Some(mmu) = arena(16) else { return };
    install(&mmu, 0, 0..2, Protect::ReadWrite);
    install(&mmu, 3, 3..5, Protect::ReadWrite);
    let progress = mmu.take_out(at(&mmu, 0), 5, Slot(0));
    assert_eq!((progress.done, progress.stop), (2, Some(Stop::Hole)));
    assert_eq!(bytes(&mmu, 3).0, page(3).0);
}

#[test]
fn a_page_that_is_there_is_never_overwritten() {
    let Some(mmu) = arena(16) else { return };
    install(&mmu, 1, 1..2, Protect::ReadWrite);
    let progress = mmu.install(at(&mmu, 0), &[page(8), page(9)], Protect::ReadWrite);
    assert_eq!((progress.done, progress.stop), (1, Some(Stop::Exists)));
    assert_eq!(bytes(&mmu, 1).0, page(1).0);
    install(&mmu, 5, 5..6, Protect::ReadWrite);
    assert_eq!(mmu.take_out(at(&mmu, 5), 1, Slot(0)), Progress::complete(1));
    let progress = mmu.give_back(Slot(0), 1, at(&mmu, 1));
    assert_eq!((progress.done, progress.stop), (0, Some(Stop::Exists)));
    let progress = mmu.install_zero(at(&mmu, 1), 1);
    assert_eq!((progress.done, progress.stop), (0, Some(Stop::Exists)));
}

#[test]
fn a_protected_page_leaves_and_comes_back_writable() {
    let Some(mmu) = arena(16) else { return };
    install(&mmu, 0, 7..8, Protect::ReadOnly);
    assert_eq!(mmu.take_out(at(&mmu, 0), 1, Slot(2)), Progress::complete(1));
    // SAFETY: `take_out` has just filled the slot.
    assert_eq!(unsafe { mmu.staged(Slot(2)) }.0, page(7).0);
    assert_eq!(
        mmu.give_back(Slot(2), 1, at(&mmu, 0)),
        Progress::complete(1)
    );
    // Nobody serves faults here: a protected page would hang the test.
    poke(&mmu, 0, 55);
    assert_eq!(bytes(&mmu, 0).0[0], 55);
}

#[test]
fn an_emptied_slot_takes_another_page() {
    let Some(mmu) = arena(16) else { return };
    install(&mmu, 0, 0..2, Protect::ReadWrite);
    assert_eq!(mmu.take_out(at(&mmu, 0), 1, Slot(0)), Progress::complete(1));
    let progress = mmu.take_out(at(&mmu, 1), 1, Slot(0));
    assert_eq!(progress.stop, Some(Stop::Exists));
    mmu.empty(Slot(0), 1);
    assert_eq!(mmu.take_out(at(&mmu, 1), 1, Slot(0)), Progress::complete(1));
}

#[test]
fn zeros_are_installed_in_any_number() {
    let Some(mmu) = arena(256) else { return };
    assert_eq!(mmu.install_zero(at(&mmu, 0), 200), Progress::complete(200));
    for number in [0, 63, 64, 128, 199] {
        assert_eq!(bytes(&mmu, number).0, [0; PAGE_SIZE]);
        poke(&mmu, number, 1);
    }
    let progress = mmu.take_out(at(&mmu, 200), 1, Slot(0));
    assert_eq!(progress.stop, Some(Stop::Hole));
}

#[test]
fn a_zapped_page_is_a_hole() {
    let Some(mmu) = arena(16) else { return };
    install(&mmu, 0, 0..4, Protect::ReadOnly);
    mmu.zap(at(&mmu, 1), 2);
    let progress = mmu.take_out(at(&mmu, 0), 4, Slot(0));
    assert_eq!((progress.done, progress.stop), (1, Some(Stop::Hole)));
    install(&mmu, 1, 9..11, Protect::ReadWrite);
    assert_eq!(bytes(&mmu, 2).0, page(10).0);
    poke(&mmu, 1, 1);
}

/// GUP-3: the kernel's own pins are respected, though nobody told us of them.
#[test]
fn a_page_that_io_uring_has_pinned_stays() {
    let Some(mmu) = arena(16) else { return };
    let Ok(ring) = io_uring::IoUring::new(1) else {
        eprintln!("SKIPPED, because this machine lacks what the test needs: io_uring");
        return;
    };
    install(&mmu, 0, 0..4, Protect::ReadWrite);
    let buffer = libc::iovec {
        iov_base: at(&mmu, 2).get() as *mut _,
        iov_len: PAGE_SIZE,
    };
    // SAFETY: the buffer stays mapped as long as the ring lives.
    unsafe { ring.submitter().register_buffers(&[buffer]) }.unwrap();
    let progress = mmu.take_out(at(&mmu, 0), 4, Slot(0));
    assert_eq!((progress.done, progress.stop), (2, Some(Stop::Busy)));
    assert_eq!(bytes(&mmu, 2).0, page(2).0);
    ring.submitter().unregister_buffers().unwrap();
    while mmu.take_out(at(&mmu, 2), 2, Slot(2)) != Progress::complete(2) {
        std::thread::yield_now();
    }
}

#[test]
fn a_locked_page_is_unevictable() {
    let Some(mmu) = arena(16) else { return };
    install(&mmu, 0, 0..1, Protect::ReadWrite);
    // SAFETY: locking changes no bytes.
    unsafe { rustix::mm::mlock(at(&mmu, 0).get() as *mut _, PAGE_SIZE) }.unwrap();
    let progress = mmu.take_out(at(&mmu, 0), 1, Slot(0));
    assert_eq!(progress.stop, Some(Stop::Unevictable));
}
