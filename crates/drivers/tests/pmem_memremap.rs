//! Namespaces as device mappings: the resource tree, compound pages, metadata on the image.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::fs;
use std::sync::Arc;

use common::{client, map, spec};
use pgmap_core::memremap::{MemoryMap, Order};
use pgmap_drivers::block::BlockDevice;
use pgmap_drivers::pmem::{Afterwards, Patience, Pmem, Region, Sharing};

const MIB: u64 = 1 << 20;

fn bind(map: &Arc<MemoryMap>, text: &str, number: u32) -> (Arc<Region>, Arc<Pmem>) {
    let region = Region::open(&spec(text), number).unwrap();
    let pmem = region.bind(map, 0).unwrap();
    (region, pmem)
}

fn unbind(pmem: &Pmem) {
    pmem.unbind(&Patience::new(None), Afterwards::Keep, |_| ())
        .unwrap();
}

/// HOT-1: a region is a range of its own, with its namespaces inside, until it is closed.
#[test]
fn regions_are_resources() {
    let map = map();
    let (first, pmem) = bind(&map, "memory,size=1022M", 0);
    let second = bind(&map, "memory,size=6M", 1);
    let both = "40000000-7fffffff : Persistent Memory\n  40200000-7fffffff : pmem0\n\
                80000000-807fffff : Persistent Memory\n  80200000-807fffff : pmem1\n";
    assert_eq!(map.iomem().to_string(), both);
    unbind(&pmem);
    drop(pmem);
    assert!(!map.iomem().to_string().contains("pmem0"));
    let pmem = first.bind(&map, 0).unwrap();
    assert_eq!(map.iomem().to_string(), both);
    drop((first, pmem));
    assert_eq!(
        map.iomem().to_string(),
        both.split_inclusive('\n').skip(2).collect::<String>()
    );
    drop(second);
    assert_eq!(map.iomem().to_string(), "");
}

/// MAP-7: a namespace of 2 MiB pages has one head for each.
#[test]
fn the_alignment_is_the_order() {
    let map = map();
    for (align, order, pages) in [("4K", Order::Base, 1024), ("2M", Order::Pmd, 2)] {
        let (_region, pmem) = bind(&map, &format!("memory,size=8M,align={align}"), 0);
        let pagemap = pmem.pagemap().unwrap();
        assert_eq!((pagemap.order(), pagemap.name()), (order, "pmem0"));
        let mapped = pmem.pin(0..4 * MIB, client("pins")).unwrap();
        assert_eq!(pagemap.users_now(), pages);
        drop(mapped);
        assert_eq!(pagemap.users_now(), 0);
    }
}

/// MAP-8: base pages' metadata is on the image, behind the namespace's bytes and not among them, and it is cleared before it
/// is used.
#[test]
fn metadata_of_base_pages_is_on_the_image() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.img");
    let map = map();
    let (region, pmem) = bind(
        &map,
        &format!("{},size=16M,align=4K,map=dev", path.display()),
        0,
    );
    let namespace = pmem.namespace().clone();
    let (data, metadata) = (namespace.data.clone(), namespace.metadata.clone());
    assert_eq!((data.end, metadata.end), (metadata.start, 16 * MIB));
    let on_image = || {
        let bytes = fs::read(&path).unwrap();
        let at = |offset: u64| usize::try_from(offset).unwrap();
        bytes[at(metadata.start)..at(metadata.end)].to_vec()
    };
    pmem.write(namespace.size_bytes() - 4096, &[7; 4096])
        .unwrap();
    let altmap = pmem.pagemap().unwrap().altmap().unwrap();
    assert_eq!(altmap.allocated(), altmap.free());
    assert!(on_image().iter().all(|byte| *byte == 0));
    let mapped = pmem
        .map(0..2 * MIB, Sharing::Shared, client("maps"))
        .unwrap();
    assert!(on_image().iter().any(|byte| *byte != 0));
    drop(mapped);
    unbind(&pmem);
    let stale = vec![0xff; usize::try_from(metadata.end - metadata.start).unwrap()];
    let image = fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&image, &stale, metadata.start).unwrap();
    let pmem = region.bind(&map, 0).unwrap();
    drop(pmem.pin(0..namespace.size_bytes(), client("all")).unwrap());
    let mut last = [0; 4096];
    pmem.read(namespace.size_bytes() - 4096, &mut last).unwrap();
    assert_eq!(last, [7; 4096]);
}
