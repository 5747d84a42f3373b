//! `pgmap serve` under load, with devices that are taken away at random moments: NBD clients write and read, other
//! processes map, pin and die, a scrub runs, and people ask.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod serving;

use core::time::Duration;
use pgmap_sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::Instant;

use pgmap_server::control::Client;
use pgmap_server::control::protocol::{Answer, RangeOf, Request};
use serving::nbd::{BLOCK, Nbd, Writer};
use serving::{Place, Random, Server, pattern};

const MIB: u64 = 1 << 20;
/// How long each load lasts.
const LOAD: Duration = Duration::from_secs(5);
/// Blocks of each writer.
const BLOCKS: u64 = 256;
/// Where the ranges begin that are mapped directly.
const DIRECT: u64 = 16 * MIB;

/// What all who make the load see of each other.
struct Load<'a> {
    place: &'a Place,
    server: &'a Server,
    /// How the device is taken away.
    verbs: &'a [&'a str],
    until: Instant,
    /// Somebody holds a pin, and knows it.
    pinned: AtomicBool,
    pins: AtomicU64,
}

impl Load<'_> {
    fn goes_on(&self) -> bool {
        Instant::now() < self.until
    }

    /// Takes the device away and brings it back, at random moments.
    fn take_away(&self) -> (u64, u64) {
        let mut random = Random::new(11);
        let (mut taken, mut refused) = (0, 0);
        while self.goes_on() {
            thread::sleep(random.sleep_below(60));
            let nth = usize::try_from(random.below(self.verbs.len() as u64)).unwrap();
            let patience =
                ["0ms", "10ms", "100ms", "400ms"][usize::try_from(random.below(4)).unwrap()];
            let arguments = [self.verbs[nth], "pmem0", "--timeout", patience];
            let output = self.place.pgmap(&arguments).output().unwrap();
            if output.status.success() {
                assert!(!self.pinned.load(SeqCst), "a pin was not waited for");
                taken += 1;
                thread::sleep(random.sleep_below(30));
                self.place.ok(&["enable", "pmem0"]);
            } else {
                let said = String::from_utf8(output.stderr).unwrap();
                let named = ["pin \"", "map \"", "request \"", "references"];
                assert!(said.contains("pmem0 is in use"), "{said}");
                assert!(named.iter().any(|who| said.contains(who)), "{said}");
                refused += 1;
            }
        }
        (taken, refused)
    }

    /// An NBD client that connects again whenever its connection ended.
    fn write(&self, id: u64) -> Writer {
        let mut writer = Writer::new(id, id * BLOCKS * BLOCK as u64, BLOCKS);
        while self.goes_on() {
            let Ok(mut nbd) = connect(self.server.nbd()) else {
                thread::sleep(Duration::from_millis(2));
                continue;
            };
            let mut round = Ok(());
            while self.goes_on() && round.is_ok() {
                round = round_and_pause(&mut writer, &mut nbd);
            }
            if let Err(error) = round {
                assert!(is_an_end(error.kind()), "{error}");
            }
        }
        writer
    }

    /// Maps and pins a range, uses it, and lets go: what is pinned stays where it is.
    fn pin(&self) {
        let mut random = Random::new(5);
        let range = RangeOf {
            namespace: "pmem0".into(),
            offset: DIRECT,
            length: Some(2 * MIB),
        };
        while self.goes_on() {
            thread::sleep(random.sleep_below(40));
            let mut client = Client::connect(&self.server.control()).unwrap();
            let Ok(Answer::Mapped { id, offset, .. }) = client.ask(&Request::Map(range.clone()))
            else {
                continue;
            };
            let file = File::from(client.take_file().unwrap());
            let label = "rings".to_owned();
            let range = range.clone();
            if client.ask(&Request::Pin { range, label }).is_err() {
                continue;
            }
            // The pin alone is to be waited for.
            client.ask(&Request::Release { id }).unwrap();
            self.pinned.store(true, SeqCst);
            let bytes = pattern(BLOCK, random.below(1 << 30));
            file.write_all_at(&bytes, offset).unwrap();
            thread::sleep(random.sleep_below(30));
            let mut found = vec![0; BLOCK];
            file.read_exact_at(&mut found, offset).unwrap();
            assert!(found == bytes, "what was pinned has changed");
            self.pins.fetch_add(1, SeqCst);
            // Before the manager can know.
            self.pinned.store(false, SeqCst);
        }
    }

    /// Processes that map and pin, and are killed at random moments with all that they started.
    fn die(&self) {
        let mut random = Random::new(6);
        let program = "import mmap,os,time
f=os.open(os.environ['PGMAP_FILE'],os.O_RDWR)
m=mmap.mmap(f,int(os.environ['PGMAP_LENGTH']),offset=int(os.environ['PGMAP_OFFSET']))
while True:
    for at in range(0,len(m),4096): m[at]=7
    time.sleep(0.001)";
        while self.goes_on() {
            let arguments = [
                "map", "pmem0", "--offset", "20M", "--length", "2M", "--pin", "doomed", "--",
                "python3", "-c", program,
            ];
            let mut command = self.place.pgmap(&arguments);
            command.process_group(0).stderr(Stdio::null());
            let mut child = command.spawn().unwrap();
            thread::sleep(random.sleep_below(150));
            serving::signal_group(child.id(), libc::SIGKILL);
            child.wait().unwrap();
            thread::sleep(random.sleep_below(100));
        }
    }

    /// People who ask, and those who scrub.
    fn ask(&self) {
        let scrubber = |client: &mut Client| {
            let (namespace, wait) = (None, true);
            // It is refused when the device goes meanwhile.
            let _ = client.ask(&Request::Scrub { namespace, wait });
        };
        let mut client = Client::connect(&self.server.control()).unwrap();
        while self.goes_on() {
            scrubber(&mut client);
            self.place.ok(&["list", "--json", "-NRM"]);
            scrubber(&mut client);
            self.place.ok(&["top", "-n", "1", "--interval", "10ms"]);
            // Refused while the device is away.
            let output = self.place.pgmap(&["holders", "pmem0"]).output().unwrap();
            assert!(matches!(output.status.code(), Some(0 | 2)), "{output:?}");
        }
    }

    /// All of it; then the device is there, nobody holds it, and nothing is lost.
    fn run(&self) {
        let writers = thread::scope(|scope| {
            let writers = [0, 1, 2].map(|id| scope.spawn(move || self.write(id)));
            let others = [
                scope.spawn(|| self.pin()),
                scope.spawn(|| self.die()),
                scope.spawn(|| self.ask()),
            ];
            let (taken, refused) = self.take_away();
            for other in others {
                other.join().unwrap();
            }
            let pins = self.pins.load(SeqCst);
            eprintln!("taken away {taken} times, refused {refused} times, {pins} pins");
            assert!(taken > 5 && pins > 5, "this was no load");
            writers.map(|writer| writer.join().unwrap())
        });
        self.place.ok(&["enable", "pmem0"]);
        self.place
            .wait_for(&["holders", "pmem0"], "nobody holds pmem0");
        let mut nbd = connect(self.server.nbd()).unwrap();
        for writer in &writers {
            eprintln!("{} writes done, {} refused", writer.done, writer.refused);
            assert!(writer.done > 50 && writer.refused > 0, "this was no load");
            writer.check(&mut nbd);
        }
    }
}

/// What is refused may have been done (the flush that was asked for with it was not): nothing is known of it. A writer that
/// did not pause would soon know nothing at all.
fn round_and_pause(writer: &mut Writer, nbd: &mut Nbd) -> std::io::Result<()> {
    let refused = writer.refused;
    let round = writer.round(nbd);
    if writer.refused > refused {
        thread::sleep(Duration::from_millis(20));
    }
    round
}

fn connect(socket: &Path) -> std::io::Result<Nbd> {
    Nbd::connect(socket, "pmem0")
}

/// Whether this is how a connection ends when the other side ends it.
fn is_an_end(kind: ErrorKind) -> bool {
    let ends = [
        ErrorKind::UnexpectedEof,
        ErrorKind::ConnectionReset,
        ErrorKind::BrokenPipe,
    ];
    ends.contains(&kind)
}

fn under_load(region: &str, verbs: &[&str]) {
    let place = Place::new();
    let server = place.serve(&[region]);
    let load = Load {
        place: &place,
        server: &server,
        verbs,
        until: Instant::now() + LOAD,
        pinned: AtomicBool::new(false),
        pins: AtomicU64::new(0),
    };
    load.run();
    let output = server.end(libc::SIGTERM);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

/// PMEM-2, MAP-6, GUP-3: an image is taken away and brought back under load: each request is answered once, or its
/// connection ends; pins are waited for, or named; what was acknowledged is there.
#[test]
fn an_image_is_taken_away_under_load() {
    under_load("disk.img,size=32M", &["unplug", "disable"]);
}

/// PMEM-2, MAP-6, GUP-3: the same for volatile memory, which keeps its bytes when it is disabled.
#[test]
fn volatile_memory_is_disabled_under_load() {
    under_load("memory,size=32M", &["disable"]);
}

/// PMEM-4: when a device is enabled and disabled at once, its label says in the end what is so.
#[test]
fn enabling_and_disabling_do_not_cross() {
    let place = Place::new();
    let mut server = place.serve(&["disk.img,size=16M"]);
    let namespace = || "pmem0".to_owned();
    let enable = || Request::Enable {
        namespace: namespace(),
    };
    let disable = || Request::Disable {
        namespace: namespace(),
        timeout_ms: None,
    };
    for _ in 0..8 {
        let until = Instant::now() + Duration::from_millis(100);
        let control = server.control();
        let ask = |request: &dyn Fn() -> Request| {
            let mut client = Client::connect(&control).unwrap();
            while Instant::now() < until {
                // Refused if the other comes in between.
                let _ = client.ask(&request());
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| ask(&enable));
            scope.spawn(|| ask(&enable));
            scope.spawn(|| ask(&disable));
        });
        let is_enabled = |server: &Server| {
            let listed = place.ok(&["list"]).contains("nbd+unix");
            assert_eq!(connect(server.nbd()).is_ok(), listed);
            listed
        };
        let before = is_enabled(&server);
        drop(server.end(libc::SIGKILL));
        server = place.serve(&["disk.img"]);
        assert_eq!(is_enabled(&server), before, "the label says otherwise");
    }
}
