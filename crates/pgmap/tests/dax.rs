//! Memory of devices in the program's own address space: mapped, pinned by address, taken away.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use core::time::Duration;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;

use common::{Scratch, child, fork, told};

use pgmap::pmem::{
    AccessError, Afterwards, HoldKind, Patience, Pmem, Region, Sharing, UnbindError,
};
use pgmap::{DaxMapping, MapDaxError, Memory, Pin, PinError, Prot};
use pgmap_core::addr::VirtAddr;
use pgmap_drivers::block::BlockDevice;
use pgmap_sync::atomic::{AtomicBool, Ordering};

const MIB: usize = 1 << 20;
const SIGBUS: i32 = 7;
const SIGSEGV: i32 = 11;
const PAGE: usize = 4096;

/// A memory of 8 MiB; none where the machine does not allow it.
fn memory() -> Option<Memory> {
    match Memory::builder().ram(8 << 20).build() {
        Ok(memory) => Some(memory),
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

/// A region with one namespace, bound in the memory's own map of frames.
fn bind(memory: &Memory, text: &str) -> (Arc<Region>, Arc<Pmem>) {
    let region = Region::open(&text.parse().unwrap(), 0).unwrap();
    let pmem = region.bind(memory.map_of_frames(), 0).unwrap();
    (region, pmem)
}

fn map(memory: &Memory, pmem: &Arc<Pmem>, bytes: core::ops::Range<usize>) -> DaxMapping {
    let bytes = bytes.start as u64..bytes.end as u64;
    let (space, prot) = (memory.space(), Prot::ReadWrite);
    let mapped = space.map_dax(pmem, bytes, Sharing::Shared, prot, "test");
    mapped.unwrap()
}

fn references(pmem: &Pmem) -> u64 {
    pmem.pagemap().unwrap().users_now()
}

/// PMEM-1: what is stored through a mapping is on the device, and the other way round.
#[test]
fn a_mapping_shows_the_device() {
    let Some(memory) = memory() else { return };
    let (_region, pmem) = bind(&memory, "memory,size=8M");
    let mapping = map(&memory, &pmem, 2 * MIB..4 * MIB);
    mapping.write(5, b"stored");
    let mut bytes = [0; 6];
    pmem.read(2 * MIB as u64 + 5, &mut bytes).unwrap();
    assert_eq!(&bytes, b"stored");
    pmem.write(4 * MIB as u64 - 7, b"written").unwrap();
    let mut bytes = [0; 7];
    mapping.read(2 * MIB - 7, &mut bytes);
    assert_eq!(&bytes, b"written");
}

/// DAX-1: a private mapping, and one that is not aligned as the namespace is, is refused, and the error says what to do; the
/// addresses of the others are aligned as well.
#[test]
fn mappings_are_shared_and_aligned() {
    let Some(memory) = memory() else { return };
    for (align, unit) in [("4K", 4096), ("2M", 2 << 20), ("1G", 1 << 30)] {
        let (_region, pmem) = bind(&memory, &format!("memory,size=2G,align={align}"));
        let try_map = |bytes, sharing| {
            let (space, prot) = (memory.space(), Prot::Read);
            let mapped = space.map_dax(&pmem, bytes, sharing, prot, "test");
            mapped.map(|mapping| mapping.range())
        };
        let mapped = try_map(unit..2 * unit, Sharing::Shared);
        if let Err(error) = &mapped {
            panic!("{align}: {error}");
        }
        assert!(
            (mapped.unwrap().start as u64).is_multiple_of(unit),
            "{align}"
        );
        let refused = try_map(0..unit, Sharing::Private).unwrap_err();
        assert_eq!(refused, MapDaxError::Refused(AccessError::NotShared));
        assert!(refused.to_string().contains("map the device shared"));
        for bytes in [unit / 2..unit, 0..unit / 2, unit / 2..unit + unit / 2] {
            let refused = try_map(bytes, Sharing::Shared).unwrap_err();
            let align = pmem.namespace().align;
            assert_eq!(
                refused,
                MapDaxError::Refused(AccessError::NotAligned(align))
            );
            assert!(
                refused
                    .to_string()
                    .contains("must begin and end at a multiple")
            );
        }
        let gone = pmem.unbind(&Patience::new(None), Afterwards::Forget, |_| ());
        gone.unwrap();
    }
}

/// GUP-1: pages are pinned in the device's own units, one hold for each, however many bytes of it are asked for.
#[test]
fn a_huge_page_is_pinned_as_one() {
    let Some(memory) = memory() else { return };
    for (align, huge_pages, base_pages) in [("4K", 512, 1), ("2M", 1, 1)] {
        let (_region, pmem) = bind(&memory, &format!("memory,size=8M,align={align}"));
        let mapping = map(&memory, &pmem, 0..8 * MIB);
        let (start, space) = (mapping.range().start, memory.space());
        let pin = Pin::WRITE.label("rx ring");
        let pinned = space.pin_user_pages(start + 2 * MIB..start + 4 * MIB, &pin);
        let pinned = pinned.unwrap();
        assert_eq!(
            (references(&pmem), pinned.len_bytes()),
            (huge_pages, 2 * MIB)
        );
        let holds = pmem.holds();
        let hold = holds
            .iter()
            .find(|hold| hold.kind == HoldKind::Pinned)
            .unwrap();
        assert_eq!(
            (&*hold.label, hold.bytes.clone()),
            ("rx ring", 2 << 20..4 << 20)
        );
        assert_eq!(
            space.holders_of(&(start..start + 8 * MIB))[0].label,
            "rx ring"
        );
        drop(pinned);
        let beyond = space.pin_user_pages(start + 6 * MIB..start + 9 * MIB, &pin);
        let at = VirtAddr::new(start + 8 * MIB);
        assert_eq!(beyond.unwrap_err(), PinError::BadAddress { at });
        assert_eq!(references(&pmem), 0);
        let pinned = space.pin_user_pages(start + MIB..start + MIB + 1, &pin);
        assert_eq!(references(&pmem), base_pages);
        drop(pinned);
        assert_eq!(references(&pmem), 0);
        assert!(space.holders_of(&(start..start + 8 * MIB)).is_empty());
    }
}

/// GUP-2: memory of a file system is not pinned for long, and the error says what to do; that of a devdax is. What is mapped to be
/// read is not pinned to be written.
#[test]
fn long_pins_are_for_devdax() {
    let Some(memory) = memory() else { return };
    for mode in ["fsdax", "devdax"] {
        let (_region, pmem) = bind(&memory, &format!("memory,size=8M,mode={mode}"));
        let mapping = map(&memory, &pmem, 0..2 * MIB);
        let (range, space) = (mapping.range(), memory.space());
        let long = Pin::WRITE.label("registered").long_term();
        let pinned = space.pin_user_pages(range.clone(), &long);
        if mode == "devdax" {
            drop(pinned.unwrap());
        } else {
            let refused = pinned.unwrap_err().to_string();
            assert!(refused.contains("mode devdax"), "{refused}");
        }
        drop(space.pin_user_pages(range, &Pin::WRITE).unwrap());
        drop(mapping);
        let read_only = space.map_dax(&pmem, 0..2 << 20, Sharing::Shared, Prot::Read, "test");
        let range = read_only.as_ref().unwrap().range();
        drop(space.pin_user_pages(range.clone(), &Pin::READ).unwrap());
        let refused = space.pin_user_pages(range, &Pin::WRITE).unwrap_err();
        assert!(matches!(refused, PinError::NotWritable { .. }));
    }
}

/// PMEM-2, MAP-6: taking the device away waits for pins by address, even if nobody maps it any more, and names them; afterwards
/// nobody can pin.
#[test]
fn unbinding_names_the_pins_and_waits_for_them() {
    let Some(memory) = memory() else { return };
    let (_region, pmem) = bind(&memory, "memory,size=8M");
    let mapping = map(&memory, &pmem, 0..4 * MIB);
    let range = mapping.range();
    let pin = Pin::WRITE.label("nic 3");
    let pinned = memory
        .space()
        .pin_user_pages(range.start..range.start + 4096, &pin);
    let pinned = pinned.unwrap();
    let soon = Patience::new(Some(Duration::from_millis(20)));
    let held = pmem.unbind(&soon, Afterwards::Forget, |_| ()).unwrap_err();
    assert!(matches!(held, UnbindError::Held(_)));
    assert!(held.to_string().contains("nic 3"), "{held}");
    mapping.write(0, b"works as before");
    let other = map(&memory, &pmem, 4 * MIB..8 * MIB);
    drop(mapping);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(30));
            drop(pinned);
        });
        let patience = Patience::new(None);
        pmem.unbind(&patience, Afterwards::Forget, |_| ()).unwrap();
    });
    let late = memory
        .space()
        .pin_user_pages(other.range(), &pin)
        .unwrap_err();
    assert!(matches!(late, PinError::DeviceLeaving { .. }), "{late}");
}

/// PMEM-2: who maps volatile memory in this very process gets SIGBUS when it has been taken away for ever.
#[test]
fn who_maps_revoked_memory_gets_sigbus() {
    let name = "who_maps_revoked_memory_gets_sigbus";
    if std::env::var_os("PGMAP_TEST_CHILD").is_none() {
        if memory().is_none() {
            return;
        }
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args([name, "--exact", "--nocapture"]);
        let status = child.env("PGMAP_TEST_CHILD", "1").status().unwrap();
        assert_eq!(status.signal(), Some(SIGBUS));
        return;
    }
    let memory = memory().unwrap();
    let (_region, pmem) = bind(&memory, "memory,size=8M");
    let mapping = map(&memory, &pmem, 0..8 * MIB);
    mapping.write(0, &[1]);
    let patience = Patience::new(None);
    pmem.unbind(&patience, Afterwards::Forget, |_| ()).unwrap();
    let mut byte = [0];
    mapping.read(0, &mut byte);
    // Whatever it sees is wrong: then the parent finds no signal.
}

/// WB-6: lost bytes of a device are not pinned, and its error says where; what is beside them is. When they have been written anew they
/// can be pinned again.
#[test]
fn lost_bytes_are_not_pinned_until_they_are_mended() {
    let Some(memory) = memory() else { return };
    let (_region, pmem) = bind(&memory, "memory,size=8M,align=4K");
    let mapping = map(&memory, &pmem, 0..2 * MIB);
    let (start, space) = (mapping.range().start, memory.space());
    pmem.inject_error(2 * 4096..2 * 4096 + 512).unwrap();
    let refused = space
        .pin_user_pages(mapping.range(), &Pin::WRITE)
        .unwrap_err();
    let at = VirtAddr::new(start + 2 * 4096);
    assert_eq!(refused, PinError::Poisoned { at });
    assert_eq!(references(&pmem), 0);
    drop(
        space
            .pin_user_pages(start..start + 2 * 4096, &Pin::WRITE)
            .unwrap(),
    );
    pmem.write(2 * 4096, &[7; 512]).unwrap();
    drop(space.pin_user_pages(mapping.range(), &Pin::WRITE).unwrap());
    let mut byte = [0];
    mapping.read(2 * 4096, &mut byte);
    assert_eq!(byte, [7]);
}

/// What is done to a mapping of which a page has lost sectors, and whether who does it lives.
const TOUCHES: [(&str, Option<i32>); 7] = [
    ("load", Some(SIGBUS)),
    ("store", Some(SIGBUS)),
    ("half cleared", Some(SIGBUS)),
    ("lost again", Some(SIGBUS)),
    ("neighbours", None),
    ("cleared", None),
    ("written", None),
];

/// WB-6: who touches a page that is mapped and has lost a sector gets SIGBUS, be it memory, huge memory or an image; neighbours keep
/// their bytes. After `clear_error` it can be touched again, with the bytes that the medium has, and after a write of the sector with those.
#[test]
fn who_touches_lost_bytes_gets_sigbus_until_they_are_mended() {
    const NAME: &str = "who_touches_lost_bytes_gets_sigbus_until_they_are_mended";
    if let Some(what) = told() {
        let (spec, touch) = what.split_once(';').unwrap();
        lose_and_touch(spec, touch);
        return;
    }
    let Some(memory) = memory() else { return };
    let image = Scratch::new("dax-lost", 0);
    fs::remove_file(&image.0).unwrap();
    let specs = [
        "memory,size=8M,align=4K".to_owned(),
        "memory,size=8M,align=2M".to_owned(),
        "memory,size=8M,huge=2M".to_owned(),
        format!("{},size=16M", image.0.display()),
    ];
    for spec in specs {
        let region = Region::open(&spec.parse().unwrap(), 0).unwrap();
        if let Err(error) = region.bind(memory.map_of_frames(), 0) {
            eprintln!("SKIPPED {spec}: {error}");
            continue;
        }
        drop(region);
        for (touch, signal) in TOUCHES {
            // Its label remembers what is lost.
            let _ = fs::remove_file(&image.0);
            let status = child(NAME, &format!("{spec};{touch}")).status().unwrap();
            assert_eq!(status.signal(), signal, "{spec}: {touch}");
            assert!(signal.is_some() || status.success(), "{spec}: {touch}");
        }
    }
}

/// In a process of its own: the second of the mapping's three units is the one with lost bytes.
fn lose_and_touch(spec: &str, touch: &str) {
    let memory = memory().unwrap();
    let (_region, pmem) = bind(&memory, spec);
    let unit = if spec.contains("huge") { 2 * MIB } else { PAGE };
    let lost = (2 * MIB + unit) as u64;
    let mapping = map(&memory, &pmem, 2 * MIB..8 * MIB);
    mapping.write(0, &vec![5; 3 * unit]);
    let look = |offset: usize, len: usize, byte: u8| {
        let mut bytes = vec![0; len];
        mapping.read(offset, &mut bytes);
        assert!(bytes.iter().all(|there| *there == byte), "{touch}");
    };
    pmem.inject_error(lost..lost + 1024).unwrap();
    match touch {
        "load" => look(unit + PAGE - 1, 1, 5),
        "store" => mapping.write(unit + 2048, &[1]),
        "half cleared" => {
            pmem.clear_error(lost..lost + 512).unwrap();
            look(unit, 1, 5);
        }
        "lost again" => {
            pmem.clear_error(lost..lost + 1024).unwrap();
            pmem.inject_error(lost..lost + 1).unwrap();
            look(unit, 1, 5);
        }
        "neighbours" => {
            look(0, unit, 5);
            look(2 * unit, unit, 5);
            mapping.write(2 * unit, &[6]);
        }
        "cleared" => {
            pmem.clear_error(lost..lost + 1024).unwrap();
            look(0, 3 * unit, 5);
            mapping.write(unit, &[6]);
            let mut byte = [0];
            pmem.read(lost, &mut byte).unwrap();
            assert_eq!(byte, [6]);
        }
        "written" => {
            pmem.write(lost, &[7; 1024]).unwrap();
            look(unit, 1024, 7);
            look(unit + 1024, 2 * unit - 1024, 5);
        }
        other => panic!("{other}"),
    }
}

/// WB-6: a page that is back in service is still none that a fork's child has.
#[test]
fn a_mended_page_is_not_inherited() {
    if told().is_none() {
        // Alone in its process: a fork waits for all pagers of its process.
        let mut alone = child("a_mended_page_is_not_inherited", "fork");
        assert!(alone.status().unwrap().success());
        return;
    }
    let Some(memory) = memory() else { return };
    let (_region, pmem) = bind(&memory, "memory,size=8M,align=4K");
    let mapping = map(&memory, &pmem, 0..MIB);
    pmem.inject_error(4096..4608).unwrap();
    pmem.clear_error(4096..4608).unwrap();
    for page in 0..3 {
        let child = fork::fork(|| {
            mapping.read(page * PAGE, &mut [0]);
            true
        });
        assert_eq!(fork::wait(child) & 0x7f, SIGSEGV, "page {page}");
    }
}

/// WB-6: sectors that are lost and mended while others are, and while mappings come and go, harm nobody: in the end what is lost
/// gives SIGBUS (a pin says so), and what is not has its bytes.
#[test]
fn mappings_come_and_go_while_sectors_are_lost() {
    let Some(memory) = memory() else { return };
    let (_region, pmem) = bind(&memory, "memory,size=8M,align=4K");
    let kept = map(&memory, &pmem, 0..MIB);
    kept.write(0, &vec![9; MIB]);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Relaxed, here and below: it says nothing about anything else.
            while !done.load(Ordering::Relaxed) {
                let bytes = 4 * MIB as u64..5 * MIB as u64;
                let (space, prot) = (memory.space(), Prot::ReadWrite);
                drop(space.map_dax(&pmem, bytes, Sharing::Shared, prot, "passer-by"));
            }
        });
        let (ours, pmem) = (&memory, &pmem);
        let lose_and_mend = |lost| {
            for base in [0, 4 << 20] {
                pmem.inject_error(base + lost..base + lost + 512).unwrap();
                pmem.clear_error(base + lost..base + lost + 512).unwrap();
            }
        };
        let workers = [0_u64, 1].map(|half| {
            scope.spawn(move || {
                (0..200).for_each(|nth| lose_and_mend(half * 4096 + nth % 7 * 8192));
                assert!(ours.holders().is_empty());
            })
        });
        for worker in workers {
            worker.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    let mut bytes = vec![0; MIB];
    kept.read(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 9));
}
