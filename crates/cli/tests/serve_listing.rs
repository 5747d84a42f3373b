//! What `pgmap serve` and `pgmap list` tell of regions, namespaces and their addresses.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod serving;

use serving::Place;

/// MAP-8: a namespace that has its region to itself is told with all of its metadata, labels included; in the list what is its own, and
/// what is the region's, are told apart; where there is none, nothing is said of it.
#[test]
fn metadata_is_told_where_it_is() {
    let place = Place::new();
    let regions = ["disk.img,size=64M,align=4K,map=dev", "memory,size=8M"];
    let server = place.serve(&regions);
    let mut lines = server.announced.lines();
    let line = lines.find(|line| line.starts_with("pmem0")).unwrap();
    assert!(
        line.ends_with("align 4K  metadata 2.5 MiB on the device"),
        "{line}"
    );
    let line = lines.find(|line| line.starts_with("pmem1")).unwrap();
    assert!(!line.contains("metadata"), "{line}");
    let listed = place.ok(&["list", "-NR", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let own = listed[0]["namespaces"][0]["metadata_size"]
        .as_u64()
        .unwrap();
    let whole = listed[0]["metadata_size"].as_u64().unwrap();
    assert_eq!(own, 496 << 10);
    assert_eq!(whole, own + (2 << 20));
    assert_eq!(listed[1]["namespaces"][0]["metadata_size"], 0);
}

/// Each export is told at all places where clients find it, and is found there.
#[test]
fn each_address_is_told() {
    let place = Place::new();
    let pmem = [
        "serve",
        "--pmem",
        "memory,size=4M",
        "--pmem",
        "memory,size=8M",
    ];
    let nbd = [
        "--nbd",
        "unix:a.sock",
        "--nbd",
        "127.0.0.1:0",
        "--nbd",
        "unix:b.sock",
    ];
    let server = place.serve_with(&[&pmem[..], &nbd].concat());
    let uris = server.announced.lines().filter(|line| line.contains("nbd"));
    let uris: Vec<&str> = uris.map(str::trim).collect();
    let (first, second) = uris.split_at(uris.len() / 2);
    for (name, uris) in [("pmem0", first), ("pmem1", second)] {
        let found = |part: &str| {
            uris.iter()
                .any(|uri| uri.contains(name) && uri.contains(part))
        };
        assert!(
            found("/a.sock") && found("/b.sock") && found("nbd://127.0.0.1:"),
            "{uris:?}"
        );
        assert_eq!(uris.len(), 3, "{uris:?}");
    }
    let listed = place.ok(&["list"]);
    assert!(uris.iter().all(|uri| listed.contains(uri)), "{listed}");
    for socket in ["a.sock", "b.sock"] {
        serving::nbd::Nbd::connect(&place.path(socket), "pmem1").unwrap();
    }
}

/// PMEM-4: who wants to flush by the CPU learns whether that is enough; it is no question of memory, which nothing makes durable.
#[test]
fn list_says_where_the_cpu_makes_stores_durable() {
    let place = Place::new();
    let _server = place.serve(&["disk.img,size=16M", "memory,size=8M"]);
    let listed = place.ok(&["list", "-R", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    // Where the test's directory is on persistent memory, it may be.
    assert!(listed[0]["map_sync"].is_boolean(), "{listed}");
    assert!(listed[1]["map_sync"].is_null(), "{listed}");
}

/// A manager that has nothing of what was asked for is not listed.
#[test]
fn list_names_nobody_without_what_was_asked_for() {
    let place = Place::new();
    let _server = place.serve(&["memory,size=8M"]);
    assert!(place.ok(&["list", "-N"]).contains("serve, process"));
    assert_eq!(place.ok(&["list", "-D"]), "");
    place.ok(&["unplug", "region0"]);
    assert!(place.ok(&["list"]).contains("serve, process"));
}
