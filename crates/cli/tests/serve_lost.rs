//! What becomes of processes that map bytes which are lost (WB-6).
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod serving;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Stdio};

use pgmap_server::control::Client;
use pgmap_server::control::protocol::{Answer, BadBlocks, RangeOf, Request};
use serving::Place;

/// What a mapping program begins with; `m` is the memory.
const MAPS: &str = "import mmap,os,signal,sys
f=os.open(os.environ['PGMAP_FILE'],os.O_RDWR)
m=mmap.mmap(f,int(os.environ['PGMAP_LENGTH']),offset=int(os.environ['PGMAP_OFFSET']))
";

/// A program that maps the second half of a namespace, and has said so.
fn program(place: &Place, script: &str) -> Child {
    let script = format!("{MAPS}{script}");
    let mut command = place.pgmap(&[
        "map", "pmem0", "--offset", "8M", "--", "python3", "-c", &script,
    ]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut said = [0; 7];
    let output = child.stdout.as_mut().unwrap();
    output.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"mapped\n");
    child
}

/// WB-6: a program that maps bytes which are lost gets SIGBUS, and dies of it unless it has said otherwise; one that maps others, or
/// that knows better, goes on.
#[test]
fn a_program_that_maps_lost_bytes_gets_sigbus() {
    let place = Place::new();
    let _server = place.serve(&["memory,size=16M"]);
    let naive = program(&place, "print('mapped',flush=True)\nsignal.pause()");
    let script = "lost=[]
signal.signal(signal.SIGBUS,lambda *_: print('lost',flush=True))
print('mapped',flush=True)
sys.stdin.readline()";
    let mut wary = program(&place, script);
    place.ok(&["inject-error", "pmem0", "--block", "8"]);
    place.ok(&["inject-error", "pmem0", "--block", "16384", "--count", "2"]);
    let output = naive.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(libc::SIGBUS));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("2 blocks from 16384 on are bad"), "{said}");
    assert!(!said.contains("from 8 on"), "{said}");
    let mut lines = BufReader::new(wary.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "lost");
    // Mended and lost once more is told once more.
    place.ok(&["clear-error", "pmem0", "--block", "16384", "--count", "2"]);
    place.ok(&["inject-error", "pmem0", "--block", "16384"]);
    assert_eq!(lines.next().unwrap().unwrap(), "lost");
    wary.stdin.as_mut().unwrap().write_all(b"enough\n").unwrap();
    assert!(wary.wait().unwrap().success());
}

/// WB-6: who copies a range by `pgmap map` never takes what was lost meanwhile for the bytes.
#[test]
fn what_is_lost_while_it_is_copied_is_an_error() {
    let place = Place::new();
    let _server = place.serve(&["memory,size=16M"]);
    let mut command = place.pgmap(&["map", "pmem0"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut reader = command.spawn().unwrap();
    let mut byte = [0];
    let output = reader.stdout.as_mut().unwrap();
    output.read_exact(&mut byte).unwrap();
    // It waits in the middle of the first MiB, which nobody has read.
    place.ok(&["inject-error", "pmem0", "--block", "30000"]);
    let output = reader.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("block 30000 is bad since it was mapped"),
        "{said}"
    );
}

/// WB-6: a client of the socket can ask what is lost of its mapping: it is told each block once.
#[test]
fn a_client_is_told_each_lost_block_once() {
    let place = Place::new();
    let server = place.serve(&["memory,size=16M"]);
    let mut client = Client::connect(&server.control()).unwrap();
    let range = RangeOf {
        namespace: "pmem0".into(),
        offset: 0,
        length: Some(2 << 20),
    };
    let Ok(Answer::Mapped { id, .. }) = client.ask(&Request::Map(range)) else {
        panic!("not mapped");
    };
    let mut lost = |wait| client.ask(&Request::Lost { id, wait }).unwrap();
    assert_eq!(lost(false), Answer::Lost(Vec::new()));
    place.ok(&["inject-error", "pmem0", "--block", "5", "--count", "3"]);
    let told = |offset, length| Answer::Lost(vec![BadBlocks { offset, length }]);
    assert_eq!(lost(false), told(5, 3));
    place.ok(&["inject-error", "pmem0", "--block", "4", "--count", "2"]);
    assert_eq!(lost(true), told(4, 1));
    assert_eq!(lost(false), Answer::Lost(Vec::new()));
    let unknown = client.ask(&Request::Lost {
        id: id + 1,
        wait: true,
    });
    assert!(unknown.is_err());
}
