//! The compressed device: what goes in comes out, and nothing else does.

use proptest::prelude::*;

use super::*;

fn device(capacity_bytes: u64, algorithm: Algorithm) -> CompressedDevice {
    let quota = Quota::private(u64::MAX);
    let options = CompressedOptions {
        capacity_bytes,
        algorithm,
        max_pages: 1 << 20,
        quota,
    };
    CompressedDevice::new(options).unwrap()
}

fn store(device: &CompressedDevice, page: &Page) -> Result<DeviceData, DeviceError> {
    let mut batch = [Store::new(page)];
    device.migrate_to_device(&mut batch);
    batch[0].outcome
}

fn load(device: &CompressedDevice, data: DeviceData) -> Result<Page, DeviceError> {
    let mut page = Page([0xa5; PAGE_SIZE]);
    let mut batch = [Load::new(data, &mut page)];
    device.migrate_to_ram(&mut batch);
    batch[0].outcome.map(|()| page)
}

/// `random` random bytes, then one byte over and over.
fn mixed(random: usize, rest: u8, seed: u64) -> Page {
    let mut state = seed | 1;
    let mut page = Page([rest; PAGE_SIZE]);
    for byte in &mut page.0[..random] {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state.to_le_bytes()[3];
    }
    page
}

const ALGORITHMS: [Algorithm; 3] = [
    Algorithm::Lz4,
    Algorithm::Zstd { level: 1 },
    Algorithm::Zstd { level: 19 },
];

proptest! {
    #[test]
    fn every_page_comes_back_whole(
        random in 0..=PAGE_SIZE, rest: u8, seed: u64, algorithm in prop::sample::select(&ALGORITHMS[..2]),
    ) {
        let device = device(1 << 20, algorithm);
        let page = mixed(random, rest, seed);
        let data = store(&device, &page).unwrap();
        prop_assert_eq!(load(&device, data).unwrap().0, page.0);
        prop_assert_eq!(device.usage().pages, 1);
        device.page_free(data);
        prop_assert_eq!(device.usage().pages, 0);
        prop_assert_eq!(device.usage().bytes, 0);
    }

    #[test]
    fn a_word_from_nowhere_is_corrupt(kind in 2_u64..6, block in 0_u64..3, object: u8, len in 0_u64..8192) {
        let device = device(1 << 20, Algorithm::Lz4);
        let stored = store(&device, &mixed(2000, 0, 1)).unwrap();
        // The same class as the stored page's, and places about there.
        let payload = stored.0 & !0xff_ffff_u64 & (u64::MAX >> 8);
        let word = kind << PAYLOAD_BITS | payload ^ (block << 31 | u64::from(object) << 13 | len);
        prop_assume!(word != stored.0);
        prop_assert_eq!(load(&device, DeviceData(word)).unwrap_err(), DeviceError::Corrupt);
    }
}

#[test]
fn a_page_of_one_repeated_word_takes_no_room() {
    let device = device(1 << 20, Algorithm::Lz4);
    for value in [
        0,
        1,
        0x7f12_3456_7890,
        u64::MAX,
        u64::MAX - 7,
        0x00ff_ffff_ffff_ffff >> 1,
    ] {
        let mut page = Page::ZERO;
        page.0.as_chunks_mut().0.fill(value.to_le_bytes());
        let data = store(&device, &page).unwrap();
        assert_eq!(Entry::decode(data), Some(Entry::Filled(value)));
        assert_eq!(load(&device, data).unwrap().0, page.0, "{value:#x}");
    }
    assert_eq!(device.usage().bytes, 0);
}

#[test]
fn a_repeated_word_that_the_entry_cannot_hold_is_compressed() {
    let device = device(1 << 20, Algorithm::Lz4);
    for value in [0x0102_0304_0506_0708, 1 << 55, 1 << 63] {
        let mut page = Page::ZERO;
        page.0.as_chunks_mut().0.fill(u64::to_le_bytes(value));
        let data = store(&device, &page).unwrap();
        assert!(
            matches!(Entry::decode(data), Some(Entry::Smaller(_))),
            "{value:#x}"
        );
        assert_eq!(load(&device, data).unwrap().0, page.0);
    }
}

#[test]
fn a_page_that_differs_in_its_last_byte_is_not_filled() {
    let device = device(1 << 20, Algorithm::Lz4);
    let mut page = Page::ZERO;
    page.0[PAGE_SIZE - 1] = 1;
    let data = store(&device, &page).unwrap();
    assert_eq!(load(&device, data).unwrap().0, page.0);
}

#[test]
fn a_page_that_does_not_shrink_is_stored_as_it_is() {
    for algorithm in ALGORITHMS {
        let device = device(1 << 20, algorithm);
        let data = store(&device, &mixed(PAGE_SIZE, 0, 7)).unwrap();
        assert!(
            matches!(Entry::decode(data), Some(Entry::Raw(_))),
            "{algorithm:?}"
        );
        let data = store(&device, &mixed(PAGE_SIZE / 2, 0, 7)).unwrap();
        assert!(
            matches!(Entry::decode(data), Some(Entry::Smaller(_))),
            "{algorithm:?}"
        );
    }
}

#[test]
fn damaged_bytes_are_corrupt() {
    let device = device(1 << 20, Algorithm::Lz4);
    // A piece that the compressor never made, and one that makes half a page.
    let mut half = [0; PAGE_SIZE];
    let len = lz4_flex::block::compress_into(&[3; PAGE_SIZE / 2], &mut half).unwrap();
    for piece in [&[0xff; 700][..], &half[..len]] {
        let handle = device.pool.alloc(piece).unwrap();
        let data = Entry::Smaller(handle).encode();
        assert_eq!(load(&device, data).unwrap_err(), DeviceError::Corrupt);
        let data = Entry::Raw(handle).encode();
        assert_eq!(load(&device, data).unwrap_err(), DeviceError::Corrupt);
    }
}

#[test]
fn a_full_device_refuses_pages_and_loses_none() {
    let device = device(256 << 10, Algorithm::Lz4);
    let mut held = Vec::new();
    let error = loop {
        let page = mixed(2048, 0, held.len() as u64);
        match store(&device, &page) {
            Ok(data) => held.push((data, page)),
            Err(error) => break error,
        }
    };
    assert_eq!(error, DeviceError::Full);
    assert!(held.len() > 100, "{}", held.len());
    assert_eq!(device.usage().pages, held.len() as u64);
    assert_eq!(device.usage().bytes, 256 << 10);
    for (data, page) in &held {
        assert_eq!(load(&device, *data).unwrap().0, page.0);
    }
    device.page_free(held[0].0);
    assert!(store(&device, &mixed(2048, 0, 1)).is_ok());
}

#[test]
fn pages_are_counted_even_if_they_take_no_room() {
    let quota = Quota::private(1 << 20);
    let algorithm = Algorithm::Lz4;
    let options = CompressedOptions {
        capacity_bytes: 1 << 20,
        algorithm,
        max_pages: 3,
        quota,
    };
    let device = CompressedDevice::new(options).unwrap();
    let outcomes: Vec<_> = (0..4).map(|_| store(&device, &Page::ZERO)).collect();
    assert_eq!(outcomes[3], Err(DeviceError::Full));
    device.page_free(outcomes[0].unwrap());
    assert!(store(&device, &Page::ZERO).is_ok());
}

fn store_load_and_free(device: &CompressedDevice, thread: u64) {
    for round in 0..100 {
        let page = mixed(1500, 0, thread << 32 | round);
        let data = store(device, &page).unwrap();
        assert_eq!(load(device, data).unwrap().0, page.0);
        device.page_free(data);
    }
}

#[test]
fn more_threads_than_scratch_states_get_their_own_bytes() {
    for algorithm in ALGORITHMS {
        let device = &device(64 << 20, algorithm);
        std::thread::scope(|scope| {
            for thread in 0..6 {
                scope.spawn(move || store_load_and_free(device, thread));
            }
        });
        assert_eq!(device.usage().pages, 0);
    }
}
