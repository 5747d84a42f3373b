//! The file device, on whatever file system the temporary directory is on.

use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;

fn options(pages: u64) -> FileOptions {
    let size_bytes = pages * PAGE_SIZE as u64;
    FileOptions {
        size_bytes,
        keep: true,
        slots: None,
        direct: Direct::Auto,
    }
}

fn scratch() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cold.pgmap");
    (dir, path)
}

fn page(seed: usize) -> Page {
    let mut page = Page::ZERO;
    for (index, byte) in page.0.iter_mut().enumerate() {
        *byte = (seed * 31 + index * 7 + index / 256).to_le_bytes()[0];
    }
    page
}

fn store(device: &FileDevice, pages: &[Page]) -> Vec<Result<DeviceData, DeviceError>> {
    let mut batch: Vec<_> = pages.iter().map(Store::new).collect();
    device.migrate_to_device(&mut batch);
    batch.into_iter().map(|store| store.outcome).collect()
}

fn load(device: &FileDevice, data: &[DeviceData]) -> Vec<Result<Page, DeviceError>> {
    let mut pages = vec![Page([0xa5; PAGE_SIZE]); data.len()];
    let loads = data
        .iter()
        .zip(&mut pages)
        .map(|(data, page)| Load::new(*data, page));
    let mut batch: Vec<_> = loads.collect();
    device.migrate_to_ram(&mut batch);
    let outcomes: Vec<_> = batch.into_iter().map(|load| load.outcome).collect();
    outcomes
        .into_iter()
        .zip(pages)
        .map(|(outcome, page)| outcome.map(|()| page))
        .collect()
}

fn store_all(device: &FileDevice, pages: &[Page]) -> Vec<DeviceData> {
    store(device, pages)
        .into_iter()
        .map(Result::unwrap)
        .collect()
}

fn assert_same(loaded: Vec<Result<Page, DeviceError>>, expected: &[Page]) {
    assert_eq!(loaded.len(), expected.len());
    for (loaded, expected) in loaded.into_iter().zip(expected) {
        assert!(loaded.unwrap().0 == expected.0);
    }
}

#[test]
fn pages_come_back_in_any_order_through_either_path() {
    for direct in [Direct::Auto, Direct::Off] {
        let (_dir, path) = scratch();
        let device = FileDevice::open(
            &path,
            FileOptions {
                direct,
                ..options(300)
            },
        )
        .unwrap();
        let pages: Vec<Page> = (0..200).map(page).collect();
        let data = store_all(&device, &pages);
        assert_same(load(&device, &data), &pages);
        let (reversed, expected): (Vec<_>, Vec<_>) = data
            .iter()
            .rev()
            .copied()
            .zip(pages.iter().rev().cloned())
            .unzip();
        assert_same(load(&device, &reversed), &expected);
        assert_eq!(device.usage().pages, 200);
    }
}

#[test]
fn scattered_free_slots_are_used_too() {
    let (_dir, path) = scratch();
    let device = FileDevice::open(&path, options(64)).unwrap();
    let data = store_all(&device, &(0..64).map(page).collect::<Vec<_>>());
    data.iter()
        .step_by(3)
        .for_each(|data| device.page_free(*data));
    let pages: Vec<Page> = (100..122).map(page).collect();
    let data = store_all(&device, &pages);
    assert_same(load(&device, &data), &pages);
}

#[test]
fn a_full_device_refuses_pages_and_loses_none() {
    let (_dir, path) = scratch();
    let device = FileDevice::open(&path, options(10)).unwrap();
    let pages: Vec<Page> = (0..12).map(page).collect();
    let outcomes = store(&device, &pages);
    assert_eq!(outcomes[10..], [Err(DeviceError::Full); 2]);
    let data: Vec<_> = outcomes[..10]
        .iter()
        .map(|outcome| outcome.unwrap())
        .collect();
    assert_same(load(&device, &data), &pages[..10]);
    device.page_free(data[3]);
    assert!(store(&device, &pages[..1])[0].is_ok());
}

#[test]
fn a_changed_byte_is_corrupt_and_its_neighbours_are_not() {
    let (_dir, path) = scratch();
    let device = FileDevice::open(
        &path,
        FileOptions {
            direct: Direct::Off,
            ..options(8)
        },
    )
    .unwrap();
    let pages: Vec<Page> = (0..8).map(page).collect();
    let data = store_all(&device, &pages);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let at = Place::decode(data[5]).offset() + 4095;
    file.write_all_at(&[pages[5].0[4095] ^ 1], at).unwrap();
    let loaded = load(&device, &data);
    assert_eq!(loaded[5].as_ref().unwrap_err(), &DeviceError::Corrupt);
    assert_eq!(loaded.iter().filter(|page| page.is_err()).count(), 1);
}

#[test]
fn a_page_in_the_wrong_slot_is_corrupt() {
    let (_dir, path) = scratch();
    let device = FileDevice::open(&path, options(8)).unwrap();
    let data = store_all(&device, &[page(1), page(2)]);
    let [one, two] = [Place::decode(data[0]), Place::decode(data[1])];
    let moved = Place {
        slot: two.slot,
        ..one
    }
    .encode();
    let beyond = Place { slot: 7, ..one }.encode();
    let nowhere = Place {
        slot: u32::MAX,
        ..one
    }
    .encode();
    for outcome in load(&device, &[moved, beyond]) {
        assert_eq!(outcome.unwrap_err(), DeviceError::Corrupt);
    }
    assert!(load(&device, &[nowhere])[0].is_err());
}

#[test]
fn a_truncated_file_gives_errors_and_never_wrong_bytes() {
    let (_dir, path) = scratch();
    let device = FileDevice::open(&path, options(8)).unwrap();
    let pages: Vec<Page> = (0..8).map(page).collect();
    let data = store_all(&device, &pages);
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(Place::decode(data[3]).offset() + 512).unwrap();
    // In a row, and scattered: those are two ways through the kernel.
    for order in [[0, 1, 2, 3, 4, 5, 6, 7], [7, 2, 4, 1, 6, 0, 5, 3]] {
        let loaded = load(&device, &order.map(|index| data[index]));
        for (index, outcome) in order.into_iter().zip(loaded) {
            match outcome {
                Ok(loaded) => assert!(index < 3 && loaded.0 == pages[index].0),
                Err(DeviceError::Io(_)) => assert!(index >= 3),
                Err(error) => panic!("page {index}: {error}"),
            }
        }
    }
}

#[test]
fn a_write_error_is_that_pages_outcome_and_gives_back_its_slot() {
    let (_dir, path) = scratch();
    drop(FileDevice::open(&path, options(8)).unwrap());
    // A file that can only be read: every write fails with EBADF.
    let file = std::fs::File::open(&path).unwrap();
    let device = FileDevice::from_fd(file.into(), Slots::private(8).unwrap(), "read-only");
    let outcomes = store(&device, &[page(1), page(2)]);
    assert_eq!(outcomes, [Err(DeviceError::Io(9)); 2]);
    assert_eq!(device.usage().pages, 0);
}

fn store_load_and_free(device: &FileDevice, thread: usize) {
    for round in 0..20 {
        let pages: Vec<Page> = (0..30).map(|i| page(thread * 999 + round + i)).collect();
        let data = store_all(device, &pages);
        assert_same(load(device, &data), &pages);
        for data in data {
            device.page_free(data);
        }
    }
}

#[test]
fn threads_store_and_load_at_once() {
    let (_dir, path) = scratch();
    let device = &FileDevice::open(&path, options(256)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || store_load_and_free(device, thread));
        }
    });
    assert_eq!(device.usage().pages, 0);
}

#[test]
fn the_name_is_gone_unless_it_is_to_be_kept() {
    let (_dir, path) = scratch();
    let device = FileDevice::open(
        &path,
        FileOptions {
            keep: false,
            ..options(8)
        },
    )
    .unwrap();
    assert!(!path.exists());
    let data = store_all(&device, &[page(1)]);
    assert_same(load(&device, &data), &[page(1)]);
    drop(device);
    drop(FileDevice::open(&path, options(8)).unwrap());
    assert_eq!(path.metadata().unwrap().len(), 9 * PAGE_SIZE as u64);
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    // A kept file can be used again, with another size.
    drop(FileDevice::open(&path, options(4)).unwrap());
    assert_eq!(path.metadata().unwrap().len(), 5 * PAGE_SIZE as u64);
}

#[test]
fn two_runs_do_not_share_a_file_by_accident() {
    let (_dir, path) = scratch();
    let first = FileDevice::open(&path, options(8)).unwrap();
    assert_eq!(
        FileDevice::open(&path, options(8)).unwrap_err(),
        FileError::InUse(path.clone())
    );
    drop(first);
    assert!(FileDevice::open(&path, options(8)).is_ok());
}

#[test]
fn somebody_elses_file_is_not_touched() {
    let (dir, path) = scratch();
    std::fs::write(&path, "my thesis").unwrap();
    let link = dir.path().join("link");
    symlink(&path, &link).unwrap();
    for path in [&path, &link] {
        let error = FileDevice::open(
            path,
            FileOptions {
                keep: false,
                ..options(8)
            },
        )
        .unwrap_err();
        assert_eq!(error, FileError::NotOurs(path.clone()));
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"my thesis");
}

#[test]
fn what_is_no_file_is_refused_in_one_line() {
    let (dir, path) = scratch();
    let refused = |path: &Path| FileDevice::open(path, options(8)).unwrap_err();
    assert_eq!(
        refused(dir.path()),
        FileError::Directory(dir.path().to_owned())
    );
    assert_eq!(
        refused(Path::new("/dev/null")),
        FileError::NotRegular("/dev/null".into())
    );
    let missing = dir.path().join("no/such/dir");
    assert!(matches!(refused(&missing), FileError::Open { .. }));
    assert_eq!(
        FileDevice::open(&path, options(0)).unwrap_err(),
        FileError::Size(0)
    );
    for error in [
        refused(dir.path()),
        refused(Path::new("/dev/null")),
        refused(&missing),
    ] {
        let text = error.to_string();
        assert!(
            text.contains("name a file") && !text.contains('\n'),
            "{text}"
        );
    }
}

#[test]
fn a_file_system_without_room_is_an_error_at_open_and_leaves_nothing() {
    let (dir, path) = scratch();
    let size_bytes = 15 << 40;
    let system = rustix::fs::statvfs(dir.path()).unwrap();
    if system.f_blocks == 0 || system.f_bavail * system.f_frsize > size_bytes {
        println!("SKIPPED: the temporary directory's file system has room for 15 TiB");
        return;
    }
    let error = FileDevice::open(
        &path,
        FileOptions {
            size_bytes,
            ..options(0)
        },
    )
    .unwrap_err();
    let text = error.to_string();
    assert_eq!(
        error,
        FileError::NoRoom {
            path: path.clone(),
            size_bytes
        }
    );
    assert!(text.contains("give a smaller size"), "{text}");
    assert_eq!(dir.path().read_dir().unwrap().count(), 0);
}

#[test]
fn a_slot_that_was_given_back_is_not_read() {
    let (_dir, path) = scratch();
    let device = FileDevice::open(&path, options(8)).unwrap();
    let data = store_all(&device, &[page(1)]);
    device.page_free(data[0]);
    assert_eq!(
        load(&device, &data)[0].as_ref().unwrap_err(),
        &DeviceError::Corrupt
    );
}
