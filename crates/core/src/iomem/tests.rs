#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use alloc::vec::Vec;

use pgmap_sync::Mutex;

use super::*;
use crate::addr::Pfn;
use crate::devres::Devres;
use crate::platform::HeapPlatform;
use CacheMode::{WriteBack, WriteCombining, WriteThrough};

/// Memory that has some modes, and RAM that may have addresses.
#[derive(Debug)]
struct Model {
    has: CacheModes,
    direct: Option<NonNull<u8>>,
    mapped: Mutex<Vec<(usize, PfnRange, CacheMode)>>,
    tried: Mutex<Vec<CacheMode>>,
}

// SAFETY: the addresses are only compared.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}

// SAFETY: nobody uses the addresses.
unsafe impl Remapper for Model {
    fn map(&self, range: PfnRange, mode: CacheMode) -> Result<NonNull<u8>, BackError> {
        self.tried.lock().push(mode);
        if !self.has.contains(mode) {
            return Err(BackError::Unsupported);
        }
        let mut mapped = self.mapped.lock();
        let address = NonNull::without_provenance((mapped.len() + 1).try_into().unwrap());
        mapped.push((address.addr().get(), range, mode));
        Ok(address)
    }
    unsafe fn unmap(&self, address: NonNull<u8>, range: PfnRange, mode: CacheMode) {
        let mut mapped = self.mapped.lock();
        let place = (address.addr().get(), range, mode);
        let nth = mapped.iter().position(|other| *other == place);
        mapped.remove(nth.expect("what is unmapped was mapped"));
    }
    fn direct(&self, _: PfnRange) -> Option<NonNull<u8>> {
        self.direct
    }
}

fn model(has: impl Into<CacheModes>) -> (Arc<Model>, Arc<dyn Remapper>) {
    let model = Arc::new(Model {
        has: has.into(),
        direct: Some(NonNull::dangling()),
        mapped: Mutex::default(),
        tried: Mutex::default(),
    });
    (Arc::clone(&model), model)
}

fn range(start: u64, count: u64) -> PfnRange {
    PfnRange::new(Pfn::new(start).unwrap(), count).unwrap()
}

fn map() -> Arc<MemoryMap> {
    MemoryMap::new(&HeapPlatform, 8192).unwrap()
}

/// REMAP-1: of the modes that will do, write-back is tried before write-through before write-combining, and no others.
#[test]
fn modes_are_tried_in_order() {
    let map = map();
    let (model, remapper) = model(WriteCombining);
    let asked = WriteCombining | WriteBack;
    let mapped = map.memremap(range(4096, 4), asked, &remapper).unwrap();
    assert_eq!(mapped.mode(), WriteCombining);
    assert_eq!(*model.tried.lock(), [WriteBack, WriteCombining]);
    assert_eq!(asked, WriteBack | WriteCombining, "the caller's modes stay");
}

/// REMAP-1, devm-null: what cannot be mapped is an error that says why, and leaves no reservation.
#[test]
fn a_mode_that_is_not_there_is_an_error() {
    let map = map();
    let (_, none) = model(WriteBack);
    let refused = map.memremap(range(4096, 4), WriteThrough, &none);
    assert_eq!(refused.unwrap_err(), RemapError::NoMode);
    let outside = map.memremap(range(8190, 4), WriteBack, &none);
    assert_eq!(outside.unwrap_err(), RemapError::Outside);
    assert!(map.memremap(range(4096, 4), WriteBack, &none).is_ok());
}

/// REMAP-1: RAM is served from where it is, write-back only, if the platform lets it; ranges that are half RAM are refused.
#[test]
fn ram_is_served_from_where_it_is() {
    let map = map();
    let _ram = map.add_ram(1024).unwrap();
    let (direct, remapper) = model(WriteBack | WriteThrough);
    let mapped = map.memremap(range(100, 4), WriteThrough | WriteBack, &remapper);
    let mapped = mapped.unwrap();
    assert_eq!(Some(mapped.address()), direct.direct);
    drop(mapped);
    assert!(direct.tried.lock().is_empty());
    let through = map.memremap(range(100, 4), WriteThrough, &remapper);
    assert_eq!(through.unwrap_err(), RemapError::RamIsWriteBack);
    let mixed = map.memremap(range(1020, 8), WriteBack, &remapper);
    assert_eq!(mixed.unwrap_err(), RemapError::Mixed);
    let encrypted: Arc<dyn Remapper> = Arc::new(Model {
        has: WriteBack.into(),
        direct: None,
        mapped: Mutex::default(),
        tried: Mutex::default(),
    });
    let vetoed = map.memremap(range(100, 4), WriteBack, &encrypted);
    assert_eq!(vetoed.unwrap_err(), RemapError::NotDirect);
}

/// REMAP-3, memtype: an overlapping range is mapped in the same mode or not at all, until the first is unmapped.
#[test]
fn a_conflicting_mode_is_refused() {
    let map = map();
    let (_, remapper) = model(WriteBack | WriteCombining);
    let first = map
        .memremap(range(4096, 4), WriteCombining, &remapper)
        .unwrap();
    let same = map
        .memremap(range(4098, 4), WriteCombining, &remapper)
        .unwrap();
    let other = map.memremap(range(4099, 1), WriteBack, &remapper);
    assert!(matches!(
        other,
        Err(RemapError::Conflict(Conflict {
            mode: WriteCombining,
            ..
        }))
    ));
    let either = map
        .memremap(range(4099, 1), WriteBack | WriteCombining, &remapper)
        .unwrap();
    assert_eq!(either.mode(), WriteCombining);
    assert!(map.memremap(range(4102, 1), WriteBack, &remapper).is_ok());
    drop((first, either));
    assert!(map.memremap(range(4099, 1), WriteBack, &remapper).is_err());
    drop(same);
    assert!(map.memremap(range(4099, 1), WriteBack, &remapper).is_ok());
}

/// REMAP-2, devm-slot: what is managed releases exactly what it mapped, once, also among mappings that look alike.
#[test]
fn a_managed_mapping_is_released_once() {
    let map = map();
    let (model, remapper) = model(WriteBack);
    let mut devres = Devres::new();
    let kept = map.memremap(range(4096, 4), WriteBack, &remapper).unwrap();
    let managed = map.memremap(range(4096, 4), WriteBack, &remapper).unwrap();
    devres.push(move || drop(managed));
    assert_eq!(model.mapped.lock().len(), 2);
    drop(devres);
    let left = kept.address().addr().get();
    assert_eq!(*model.mapped.lock(), [(left, range(4096, 4), WriteBack)]);
    drop(kept);
    assert!(model.mapped.lock().is_empty());
}
