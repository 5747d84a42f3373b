//! What is served, under changes that take their time.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use core::time::Duration;
use std::os::fd::AsRawFd;
use std::thread;

use pgmap_server::control::protocol::{Answer, CreateNamespace, Request};
use pgmap_server::control::{Client, Listener};
use pgmap_server::nbd::Exports;
use pgmap_server::service::Service;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::pwrite;

const MIB: usize = 1 << 20;
/// Reading as much takes a good part of a second.
const IMAGE_MIB: u64 = 512;

/// A region whose image takes long to look at holds nobody up who asks for another.
#[test]
fn who_looks_for_a_device_does_not_wait_for_a_plug() {
    let file = memfd_create("image", MemfdFlags::CLOEXEC).unwrap();
    for nth in 0..IMAGE_MIB {
        pwrite(&file, &vec![0; MIB], nth * MIB as u64).unwrap();
    }
    let service = Service::new().unwrap();
    service.plug(&"memory,size=4M".parse().unwrap()).unwrap();
    let spec = format!("/proc/self/fd/{}", file.as_raw_fd());
    let spec = spec.parse().unwrap();
    let looks = thread::scope(|scope| {
        let plug = scope.spawn(|| service.plug(&spec).unwrap());
        let mut looks = 0;
        while !plug.is_finished() {
            thread::sleep(Duration::from_millis(2));
            assert!(service.find("pmem0").is_ok());
            looks += 1;
        }
        looks
    });
    assert!(looks >= 5, "{looks}");
    assert!(service.find("pmem1").is_ok());
}

/// A plug that failed leaves neither a file nor a gap in the numbers, wherever it failed.
#[test]
fn a_failed_plug_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let service = Service::new().unwrap();
    let plug = |spec: &str| service.plug(&spec.parse().unwrap());
    // There are addresses for 16 TiB.
    plug("memory,size=10T").unwrap();
    for size in ["9999999T", "8T"] {
        plug(&format!("{},size={size}", image.display())).unwrap_err();
        assert!(!image.exists(), "{size}");
    }
    let name = plug(&format!("{},size=8M", image.display())).unwrap();
    assert_eq!(name, "region1");
    assert!(service.find("pmem1").is_ok());
    // A start that failed takes back what it made.
    service.give_up();
    assert!(!image.exists());
    assert!(service.find("pmem1").is_err());
}

/// A namespace that cannot be taken into use is not made: after a refusal everything is as it was.
#[test]
fn a_namespace_without_frames_is_not_made() {
    let directory = tempfile::tempdir().unwrap();
    let service = Service::new().unwrap();
    let path = directory.path().join("socket");
    let _listener = Listener::start(&path, service).unwrap();
    let mut client = Client::connect(&path).unwrap();
    let mut ask = |request| client.ask(&request);
    let plug = |spec: String| Request::Plug { spec };
    let image = format!("{},size=8T", directory.path().join("disk.img").display());
    ask(plug(image.clone())).unwrap();
    let namespace = || "namespace0.0".to_owned();
    ask(Request::Disable {
        namespace: namespace(),
        timeout_ms: None,
    })
    .unwrap();
    ask(Request::DestroyNamespace {
        namespace: namespace(),
    })
    .unwrap();
    ask(Request::Unplug {
        device: "region0".into(),
        timeout_ms: None,
    })
    .unwrap();
    // There are addresses for 16 TiB.
    ask(plug("memory,size=10T".into())).unwrap();
    ask(plug(image)).unwrap();
    let wanted = CreateNamespace {
        region: Some("region2".into()),
        ..CreateNamespace::default()
    };
    let refused = ask(Request::CreateNamespace(wanted)).unwrap_err();
    assert!(refused.to_string().contains("no frames"), "{refused}");
    let Answer::Listing(listing) = ask(Request::List).unwrap() else {
        panic!("no listing")
    };
    assert!(listing.regions[1].namespaces.is_empty(), "{listing:?}");
}
