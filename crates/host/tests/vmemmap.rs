//! What the frames' own metadata costs on the machine, and how it lives on a device.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use core::fmt;
use core::ptr::{self, NonNull};
use core::time::Duration;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use pgmap_core::addr::{PAGE_SIZE, Pfn, PfnRange};
use pgmap_core::altmap::Altmap;
use pgmap_core::driver::{AltmapOps, DeviceError};
use pgmap_core::iomem::Remapper;
use pgmap_core::memremap::{DevPagemap, MapError, MemoryMap, MemoryType, Order, Request};
use pgmap_core::memtype::CacheMode;
use pgmap_core::platform::{BackError, DeviceFile, DevicePages, OutOfAddressSpace, Platform};
use pgmap_host::platform::HostPlatform;
use pgmap_host::remap::FileRemapper;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// The host, and what it reserved: so that a test can ask how much of it is in RAM.
#[derive(Debug, Default)]
struct Watched {
    reserved: Mutex<Vec<(usize, usize)>>,
}

// SAFETY: everything is the host's.
unsafe impl Platform for Watched {
    fn reserve_zeroed(&self, bytes: usize) -> Result<NonNull<u8>, OutOfAddressSpace> {
        let memory = HostPlatform.reserve_zeroed(bytes)?;
        let place = (memory.as_ptr().addr(), bytes);
        self.reserved.lock().unwrap().push(place);
        Ok(memory)
    }
    unsafe fn release(&self, memory: NonNull<u8>, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { HostPlatform.release(memory, bytes) };
    }
    unsafe fn discard(&self, memory: NonNull<u8>, bytes: usize) -> bool {
        // SAFETY: the caller's promise.
        unsafe { HostPlatform.discard(memory, bytes) }
    }
    unsafe fn back(
        &self,
        memory: NonNull<u8>,
        bytes: usize,
        pages: DevicePages,
    ) -> Result<(), BackError> {
        // SAFETY: the caller's promise.
        unsafe { HostPlatform.back(memory, bytes, pages) }
    }
    unsafe fn unback(&self, memory: NonNull<u8>, bytes: usize) -> Result<(), BackError> {
        // SAFETY: the caller's promise.
        unsafe { HostPlatform.unback(memory, bytes) }
    }
    fn now_ns(&self) -> u64 {
        HostPlatform.now_ns()
    }
}

impl Watched {
    fn new() -> &'static Self {
        Box::leak(Box::default())
    }

    /// Bytes of all tables that are in RAM.
    fn resident_bytes(&self) -> usize {
        const STEP: usize = 1 << 30;
        let reserved = self.reserved.lock().unwrap();
        let mut pages = vec![0; STEP / PAGE_SIZE];
        let mut resident = 0;
        for (start, bytes) in reserved.iter().copied() {
            for offset in (0..bytes).step_by(STEP) {
                let step = STEP.min(bytes - offset).next_multiple_of(PAGE_SIZE);
                let at = ptr::without_provenance_mut(start + offset);
                // SAFETY: `pages` has a byte for each page of the step.
                let asked = unsafe { libc::mincore(at, step, pages.as_mut_ptr()) };
                assert_eq!(asked, 0);
                let there = &pages[..step / PAGE_SIZE];
                resident += there.iter().filter(|page| **page & 1 != 0).count() * PAGE_SIZE;
            }
        }
        resident
    }
}

fn range(start: u64, count: u64) -> PfnRange {
    PfnRange::new(Pfn::new(start).unwrap(), count).unwrap()
}

fn remove(device: DevPagemap) {
    device.kill().drain(None).unwrap().remove();
}

const TIB_FRAMES: u64 = 1 << 28;

/// MAP-7: mapping 1 TiB takes no time and no memory, wherever it begins. (Wanted: 1 ms and 1 MiB. A machine that does other things as
/// well is given ten times as long; the best of a few counts.)
#[test]
fn mapping_a_tib_takes_no_time_and_no_memory() {
    let platform = Watched::new();
    let map = MemoryMap::new(platform, 3 * TIB_FRAMES).unwrap();
    let before = platform.resident_bytes();
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        let device = map.memremap_pages(&[range(512 * 3, TIB_FRAMES)], MemoryType::Generic);
        let device = device.unwrap();
        best = best.min(start.elapsed());
        assert!(map.get_dev_pagemap(Pfn::new(TIB_FRAMES).unwrap()).is_some());
        remove(device);
    }
    let resident = platform.resident_bytes() - before;
    println!("mapping 1 TiB: {best:?}, {resident} bytes");
    assert!(best < Duration::from_millis(10), "{best:?}");
    assert!(resident < 1 << 20, "{resident} bytes");
}

/// MAP-7, GUP-1: of a 1 GiB page only the head costs memory, whichever frames of it are used.
#[test]
fn a_compound_page_costs_its_head() {
    let platform = Watched::new();
    let map = MemoryMap::new(platform, TIB_FRAMES).unwrap();
    let frames = Order::Pud.frames();
    let all = range(0, 64 * frames);
    let device = map.memremap_request(Request {
        order: Order::Pud,
        ..Request::at("dax0.0", &[all], MemoryType::Generic)
    });
    let device = device.unwrap();
    let before = platform.resident_bytes();
    device.get_pages(all).unwrap();
    device.pin_pages(all).unwrap();
    for giant in 0..64 {
        device
            .get_page(Pfn::new(giant * frames + 77_777).unwrap())
            .unwrap();
    }
    let resident = platform.resident_bytes() - before;
    println!("64 pages of 1 GiB: {resident} bytes");
    assert_eq!(device.users_now(), 64);
    assert!(resident <= 64 * PAGE_SIZE, "{resident} bytes");
}

/// REF-4, MAP-3: what the frames of a removed device took is given back, and nothing of it is seen by the next.
#[test]
fn removed_frames_give_their_memory_back() {
    let platform = Watched::new();
    let map = MemoryMap::new(platform, TIB_FRAMES).unwrap();
    let all = [range(0, 1 << 20)];
    let before = platform.resident_bytes();
    let device = map.memremap_pages(&all, MemoryType::Generic).unwrap();
    device.get_pages(all[0]).unwrap();
    device.put_pages(all[0]);
    device.poison_page(Pfn::from_u32(5));
    assert!(platform.resident_bytes() - before >= 32 << 20);
    remove(device);
    assert!(platform.resident_bytes() - before < 1 << 20);
    let device = map.memremap_pages(&all, MemoryType::Generic).unwrap();
    assert_eq!(device.get_page(Pfn::from_u32(5)), Ok(()));
}

/// A device in a memfd, whose first pages are its metadata area.
struct Memfd {
    file: File,
    first: u64,
    bad: Mutex<Vec<Pfn>>,
}

impl fmt::Debug for Memfd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Memfd")
    }
}

impl Memfd {
    /// `frames` pages, all full of stale bytes.
    fn new(first: u64, frames: u64) -> Arc<Self> {
        let fd: OwnedFd = memfd_create("device", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, frames * PAGE_SIZE as u64).unwrap();
        let file = File::from(fd);
        for page in 0..frames {
            file.write_all_at(&[0xa5; PAGE_SIZE], page * PAGE_SIZE as u64)
                .unwrap();
        }
        Arc::new(Self {
            file,
            first,
            bad: Mutex::default(),
        })
    }

    fn offset(&self, page: Pfn) -> u64 {
        (page.get() - self.first) * PAGE_SIZE as u64
    }

    fn bytes(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE_SIZE];
        self.file
            .read_exact_at(&mut bytes, page * PAGE_SIZE as u64)
            .unwrap();
        bytes
    }
}

impl AltmapOps for Memfd {
    fn pages(&self, first: Pfn) -> DevicePages {
        DevicePages {
            file: DeviceFile(self.file.as_raw_fd()),
            offset_bytes: self.offset(first),
        }
    }
    fn clear(&self, first: Pfn, count: u64) -> Result<(), DeviceError> {
        let bad = self.bad.lock().unwrap();
        let range = range(first.get(), count);
        if bad.iter().any(|page| range.contains(*page)) {
            return Err(DeviceError::Io(5));
        }
        let zeros = vec![0; usize::try_from(count).unwrap() * PAGE_SIZE];
        self.file.write_all_at(&zeros, self.offset(first)).unwrap();
        Ok(())
    }
}

/// Pages of the one, cleared through the other.
#[derive(Debug)]
struct Mixed(Arc<Memfd>, Arc<Memfd>);
impl AltmapOps for Mixed {
    fn pages(&self, first: Pfn) -> DevicePages {
        self.0.pages(first)
    }
    fn clear(&self, first: Pfn, count: u64) -> Result<(), DeviceError> {
        self.1.clear(first, count)
    }
}

const FIRST: u64 = 4096;
const FRAMES: u64 = 2048;
const RESERVE: u64 = 3;

fn request<'a>(device: &Arc<Memfd>, ranges: &'a [PfnRange]) -> Request<'a> {
    let area = range(FIRST, RESERVE + FRAMES / Altmap::FRAMES_PER_PAGE);
    Request {
        altmap: Altmap::new(Arc::clone(device) as _, area, RESERVE),
        ..Request::at("pmem0", ranges, MemoryType::Generic)
    }
}

/// MAP-8: the frames' metadata is on the device, between what is reserved there and its data; stale bytes were cleared before, and its
/// pages are the device's again when it is removed.
#[test]
fn metadata_lives_on_the_device() {
    let platform = Watched::new();
    let map = MemoryMap::new(platform, TIB_FRAMES).unwrap();
    let memfd = Memfd::new(FIRST, FRAMES);
    let ranges = [range(FIRST, FRAMES)];
    let device = map.memremap_request(request(&memfd, &ranges)).unwrap();
    let page = Pfn::new(FIRST + 256).unwrap();
    assert_eq!(device.get_page(page), Ok(()), "stale bytes are no frame");
    map.frame(page).set_private(0x1122_3344);
    // Frame 256 of the device: 32 bytes each, 128 to a page, behind the reserved pages.
    let bytes = memfd.bytes(RESERVE + 2);
    assert_eq!(
        (bytes[0], &bytes[8..12]),
        (1, &[0x44, 0x33, 0x22, 0x11][..])
    );
    for page in (0..RESERVE).chain(RESERVE + 16..FRAMES) {
        assert_eq!(memfd.bytes(page), [0xa5; PAGE_SIZE], "not the map's");
    }
    assert_eq!(device.altmap().unwrap().allocated(), 16);
    device.put_page(page);
    let last = device.clone();
    remove(device);
    assert_eq!(last.altmap().unwrap().allocated(), 0);
    assert_eq!(map.frame(page).private(), 0, "the map's own page again");
    memfd.file.write_all_at(&[0xa5; 4096], 0).unwrap();
    let again = map.memremap_pages(&ranges, MemoryType::Generic).unwrap();
    assert_eq!(again.get_page(page), Ok(()));
    assert_eq!(
        memfd.bytes(RESERVE + 2)[8],
        0x44,
        "nothing goes to a removed device"
    );
}

/// MAP-8: no data is kept where the metadata is.
#[test]
fn metadata_pages_are_not_given_out() {
    let map = MemoryMap::new(Watched::new(), TIB_FRAMES).unwrap();
    let memfd = Memfd::new(FIRST, FRAMES);
    let ranges = [range(FIRST, FRAMES)];
    let device = map.memremap_request(request(&memfd, &ranges)).unwrap();
    let page = |nth| Pfn::new(FIRST + nth).unwrap();
    assert!(device.get_page(page(0)).is_err());
    assert!(device.get_page(page(RESERVE + 15)).is_err());
    assert_eq!(device.get_page(page(RESERVE + 16)), Ok(()));
}

/// MAP-3, MAP-8: an area that the device cannot clear, or the machine cannot use, leaves everything as it was.
#[test]
fn an_area_that_cannot_be_used_leaves_nothing_behind() {
    let map = MemoryMap::new(Watched::new(), TIB_FRAMES).unwrap();
    let memfd = Memfd::new(FIRST, FRAMES);
    let ranges = [range(FIRST, FRAMES)];
    memfd
        .bad
        .lock()
        .unwrap()
        .push(Pfn::new(FIRST + 10).unwrap());
    let refused = map.memremap_request(request(&memfd, &ranges));
    let io = DeviceError::Io(5);
    assert_eq!(refused.unwrap_err(), MapError::AltmapNotCleared(io));
    memfd.bad.lock().unwrap().clear();
    // A file that is opened for reading only cannot be mapped for writing.
    let path = format!("/proc/self/fd/{}", memfd.file.as_raw_fd());
    let readable = Arc::new(Memfd {
        file: File::open(path).unwrap(),
        first: FIRST,
        bad: Mutex::default(),
    });
    let mixed = Arc::new(Mixed(readable, Arc::clone(&memfd)));
    let refused = map.memremap_request(Request {
        altmap: Altmap::new(mixed, range(FIRST, RESERVE + 16), RESERVE),
        ..Request::at("pmem0", &ranges, MemoryType::Generic)
    });
    let not_permitted = MapError::AltmapNotUsed(BackError::Refused(13));
    assert_eq!(refused.unwrap_err(), not_permitted);
    remove(map.memremap_request(request(&memfd, &ranges)).unwrap());
}

/// REMAP-1, REMAP-2: a mapped range is the device's bytes, and its neighbours are left alone.
#[test]
fn a_mapped_range_is_the_file() {
    let map = MemoryMap::new(Watched::new(), TIB_FRAMES).unwrap();
    let memfd = Memfd::new(FIRST, 4);
    let file = OwnedFd::from(memfd.file.try_clone().unwrap());
    let remapper: Arc<dyn Remapper> = Arc::new(FileRemapper::new(file, Pfn::new(FIRST).unwrap()));
    let asked = CacheMode::WriteThrough | CacheMode::WriteBack;
    let mapped = map.memremap(range(FIRST + 1, 2), asked, &remapper).unwrap();
    assert_eq!(mapped.mode(), CacheMode::WriteBack);
    // SAFETY: the mapping is there, and nobody else writes to it.
    unsafe { mapped.address().write(7) };
    assert_eq!((memfd.bytes(1)[0], memfd.bytes(0)[0]), (7, 0xa5));
    let elsewhere = map.memremap(range(0, 1), asked, &remapper);
    assert!(elsewhere.is_err(), "before the file's first frame");
}
