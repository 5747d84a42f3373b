//! `pgmap serve` of memory that is made of huge pages. Root reserves some for each test; others skip, and say so.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

#[path = "../../host/tests/common/huge.rs"]
mod huge;
mod serving;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use huge::{HUGE, HugePages};
use pgmap_host::hugetlb;
use pgmap_host::shared::SharedFrames;
use serving::{Place, has, pattern};

const MIB: usize = 1 << 20;
/// What is served.
const SPEC: &str = "memory,size=16M,huge=2M";

/// PMEM-1: what a client writes over NBD is what is mapped, in huge pages, and the other way round; what is discarded reads
/// as zeros, and is another's if it was a whole page.
#[test]
fn what_clients_write_is_in_huge_pages() {
    let (true, Some(_pages)) = (has("nbdcopy") && has("qemu-io"), HugePages::reserve(8)) else {
        return;
    };
    let free = || hugetlb::pool(HUGE).unwrap().available;
    let before = free();
    let place = Place::new();
    let server = place.serve(&[SPEC]);
    assert_eq!(free(), before - 8, "the room is taken at the start");
    let (from, to) = (place.path("from"), place.path("to"));
    let mut bytes = pattern(16 * MIB, 3);
    fs::write(&from, &bytes).unwrap();
    let uri = server.uri("pmem0");
    let copy = |from: &str, to: &str| {
        let copied = Command::new("nbdcopy").args(["--flush", from, to]).status();
        assert!(copied.unwrap().success());
    };
    copy(from.to_str().unwrap(), &uri);
    assert!(place.read("pmem0") == bytes, "not what was copied in");
    place.write("pmem0", "6M", b"directly");
    bytes[6 * MIB..][..8].copy_from_slice(b"directly");
    copy(&uri, to.to_str().unwrap());
    assert!(fs::read(&to).unwrap() == bytes, "not what was mapped");
    let steps = [
        "-c",
        "discard 8M 2M",
        "-c",
        "write -z -u 11M 4M",
        "-c",
        "flush",
    ];
    let mut io = Command::new("qemu-io");
    io.args(["-f", "raw"]).args(steps);
    assert!(
        io.arg(&uri)
            .stdout(Stdio::null())
            .status()
            .unwrap()
            .success()
    );
    bytes[8 * MIB..10 * MIB].fill(0);
    bytes[11 * MIB..15 * MIB].fill(0);
    copy(&uri, to.to_str().unwrap());
    assert!(fs::read(&to).unwrap() == bytes, "not zeros, or too many");
    assert_eq!(free(), before - 6, "whole pages are given back");
    // Who maps has pages for all of his range, or maps nothing.
    let other = SharedFrames::huge("test", 2 * HUGE, HUGE).unwrap();
    let refused = place.refused(&["map", "pmem0"]);
    assert!(
        refused.contains("no room for all of the range"),
        "{refused}"
    );
    drop(other);
    assert!(place.read("pmem0") == bytes, "not zeros, or too many");
    assert_eq!(free(), before - 8);
    drop(server);
    assert_eq!(free(), before);
}

/// DAX-1: a client's mapping is of huge pages, and begins at one.
#[test]
fn mappings_are_of_whole_huge_pages() {
    let (true, Some(_pages)) = (has("python3"), HugePages::reserve(8)) else {
        return;
    };
    let place = Place::new();
    let _server = place.serve(&[&format!("{SPEC},align=4K")]);
    let refused = place.refused(&["map", "pmem0", "--offset", "4K", "--length", "2M"]);
    assert!(refused.contains("multiple of 2M"), "{refused}");
    let refused = place.refused(&["create-namespace", "--size", "4K", "--align", "4K"]);
    assert!(refused.contains("multiple of 2M"), "{refused}");
    let script = "import mmap,os\n\
        f=os.open(os.environ['PGMAP_FILE'],os.O_RDWR)\n\
        m=mmap.mmap(f,int(os.environ['PGMAP_LENGTH']),offset=int(os.environ['PGMAP_OFFSET']))\n\
        m[5]=9\n\
        print([l for l in open('/proc/self/smaps') if l.startswith('KernelPageSize') and '2048' in l])";
    let arguments = [
        "map", "pmem0", "--offset", "4M", "--", "python3", "-c", script,
    ];
    assert!(place.ok(&arguments).contains("2048 kB"));
    assert_eq!(place.read("pmem0")[4 * MIB + 5], 9);
}

/// PMEM-2: an unplug takes huge pages from who maps them, who gets SIGBUS, and gives all of them back; others live on.
#[test]
fn an_unplug_takes_huge_pages_away() {
    let (true, Some(_pages)) = (has("python3"), HugePages::reserve(8)) else {
        return;
    };
    let before = hugetlb::pool(HUGE);
    let place = Place::new();
    let server = place.serve(&[SPEC, "memory,size=4M"]);
    let script = "import mmap,os,time\n\
        f=os.open(os.environ['PGMAP_FILE'],os.O_RDWR)\n\
        m=mmap.mmap(f,int(os.environ['PGMAP_LENGTH']))\n\
        m[0]=7\n\
        print('ready',flush=True)\n\
        while m[0]==7: time.sleep(0.01)\n";
    let mut client = place.pgmap(&["map", "pmem0", "--", "python3", "-c", script]);
    let mut client = client.stdout(Stdio::piped()).spawn().unwrap();
    let mut ready = [0; 6];
    std::io::Read::read_exact(client.stdout.as_mut().unwrap(), &mut ready).unwrap();
    assert_eq!(place.read("pmem0")[0], 7);
    place.ok(&["unplug", "pmem0", "--timeout", "5s"]);
    let status = client.wait().unwrap();
    let died = status.signal() == Some(libc::SIGBUS) || status.code() == Some(128 + libc::SIGBUS);
    assert!(died, "{status}");
    place.write("pmem1", "0", b"alive");
    assert_eq!(hugetlb::pool(HUGE), before);
    place.ok(&["enable", "pmem0"]);
    assert!(place.read("pmem0").iter().all(|&byte| byte == 0));
    drop(server);
    assert_eq!(hugetlb::pool(HUGE), before);
}

/// Too few huge pages are an error at the start, which says where to ask for more, and takes none; a running server goes on.
#[test]
fn too_few_huge_pages_are_refused() {
    let Some(_pages) = HugePages::reserve(4) else {
        return;
    };
    let before = hugetlb::pool(HUGE).unwrap();
    let place = Place::new();
    let needed = before.available + 4;
    let spec = format!("memory,size={}M,huge=2M", needed * 2);
    let said = place.refused(&["serve", "--pmem", &spec]);
    let free = before.available;
    assert!(
        said.contains(&format!("{needed} needed, {free} free")),
        "{said}"
    );
    let advice = format!("write {} to {}", before.pages + 4, before.file.display());
    assert!(said.contains(&advice), "{said}");
    let server = place.serve(&["memory,size=4M"]);
    assert!(place.refused(&["plug", &spec]).contains(&advice));
    assert_eq!(place.ok(&["list"]).matches("region").count(), 1);
    assert_eq!(hugetlb::pool(HUGE), Some(before));
    drop(server);
}
