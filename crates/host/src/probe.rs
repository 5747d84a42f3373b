//! What this machine has of what pgmap needs: the checks behind `pgmap doctor`.
//!
//! Pure data: the caller prints it. Nothing here changes the machine, beyond an unnamed file that is gone at once.

use std::fs;
use std::path::Path;

use pgmap_core::addr::{PAGE_SIZE, Page};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mm::ProtFlags;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{MembarrierQuery, membarrier_query, sched_getaffinity};

use crate::area::{Area, OnFork};
use crate::uffd::{FEATURE_EVENT_FORK, FEATURE_MOVE, FEATURE_POISON, FEATURE_WP, Uffd};
use crate::uring::Ring;

/// Who needs what was checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// Nothing works without it.
    Always,
    /// `pgmap run` refuses without it.
    Run,
    /// It makes things faster or wider.
    Better,
}

/// How a check went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finding {
    /// As it should be.
    Ok,
    /// There, but not as good as it could be.
    Degraded,
    /// Not there.
    Missing,
}

/// One check.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Check {
    /// What was looked for.
    pub name: &'static str,
    /// Who needs it.
    pub need: Need,
    /// How it went.
    pub finding: Finding,
    /// What was seen, for people.
    pub seen: String,
    /// How to mend it, if it is not [`Finding::Ok`].
    pub mend: Option<&'static str>,
}

impl From<bool> for Finding {
    /// Whether something is there.
    fn from(there: bool) -> Self {
        if there { Self::Ok } else { Self::Missing }
    }
}

impl Check {
    /// Whether `pgmap run` can work in spite of this.
    #[must_use]
    pub fn allows_run(&self) -> bool {
        self.finding != Finding::Missing || self.need == Need::Better
    }

    fn new(name: &'static str, need: Need, finding: Finding, seen: impl Into<String>) -> Self {
        Self {
            name,
            need,
            finding,
            seen: seen.into(),
            mend: None,
        }
    }

    fn or_mend(mut self, how: &'static str) -> Self {
        if self.finding != Finding::Ok {
            self.mend = Some(how);
        }
        self
    }
}

/// Looks at the machine. `directory` is where device files would be.
#[must_use]
pub fn checks(directory: &Path) -> Vec<Check> {
    let mut checks = vec![kernel()];
    checks.extend(userfaultfd());
    checks.extend([
        addresses(),
        io_uring(),
        direct(directory),
        membarrier(),
        locked_memory(),
        cpus(),
    ]);
    checks
}

fn kernel() -> Check {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || -> u32 { numbers.next().and_then(|n| n.parse().ok()).unwrap_or(0) };
    let recent = (number(), number()) >= (6, 8);
    Check::new(
        "kernel",
        Need::Always,
        Finding::from(recent),
        format!("Linux {release}"),
    )
    .or_mend("pages are moved with UFFDIO_MOVE: use Linux 6.8 or later")
}

fn userfaultfd() -> Vec<Check> {
    const NAME: &str = "userfaultfd";
    const MEND: &str = "run as root; or `sysctl vm.unprivileged_userfaultfd=1`; or let your user open \
                        /dev/userfaultfd (`setfacl -m u:NAME:rw /dev/userfaultfd`); in a container, its seccomp profile \
                        must allow userfaultfd too";
    let features = Uffd::open().and_then(|uffd| uffd.handshake(0));
    let features = match features {
        Ok(features) => features,
        Err(errno) => {
            let sysctl = setting("/proc/sys/vm/unprivileged_userfaultfd");
            let seen = format!("{errno}; vm.unprivileged_userfaultfd is {sysctl}");
            return vec![Check::new(NAME, Need::Always, Finding::Missing, seen).or_mend(MEND)];
        }
    };
    let feature = |name, bit, what: &str| {
        Check::new(name, Need::Always, Finding::from(features & bit != 0), what)
            .or_mend("use Linux 6.8 or later, built with CONFIG_USERFAULTFD")
    };
    vec![
        Check::new(
            NAME,
            Need::Always,
            Finding::Ok,
            "faults of programs and of system calls",
        ),
        feature(
            "userfaultfd move",
            FEATURE_MOVE,
            "pages leave without a copy, never a pinned one",
        ),
        feature(
            "userfaultfd write-protect",
            FEATURE_WP,
            "the first write to a clean page is seen",
        ),
        feature(
            "userfaultfd poison",
            FEATURE_POISON,
            "lost pages answer with SIGBUS",
        ),
        fork_events(features),
    ]
}

fn fork_events(features: u64) -> Check {
    let answer = if features & FEATURE_EVENT_FORK == 0 {
        Err(Errno::INVAL)
    } else {
        Uffd::open().and_then(|uffd| uffd.handshake(FEATURE_EVENT_FORK))
    };
    let seen = match answer {
        Ok(_) => "children of fork get their pages".to_owned(),
        Err(errno) => format!("{errno}; before a fork all pages are brought into RAM"),
    };
    let finding = if answer.is_ok() {
        Finding::Ok
    } else {
        Finding::Degraded
    };
    Check::new("userfaultfd fork events", Need::Better, finding, seen)
        .or_mend("run as root, or with the capability CAP_SYS_PTRACE")
}

fn addresses() -> Check {
    /// What a program's addresses and the tables for them take, about.
    const WANTED: usize = 5 << 38;
    let mode = setting("/proc/sys/vm/overcommit_memory");
    let reserved = Area::reserve(WANTED, ProtFlags::READ | ProtFlags::WRITE, OnFork::Inherit);
    let (finding, seen) = match reserved {
        Ok(_) => (
            Finding::Ok,
            format!("1.25 TiB can be reserved; vm.overcommit_memory is {mode}"),
        ),
        Err(errno) => {
            let seen = format!("1.25 TiB: {errno}; vm.overcommit_memory is {mode}");
            (Finding::Degraded, seen)
        }
    };
    Check::new("addresses", Need::Run, finding, seen)
        .or_mend("`sysctl vm.overcommit_memory=0`, `ulimit -v unlimited`")
}

fn io_uring() -> Check {
    let (finding, seen) = if Ring::new(1).is_queued() {
        (
            Finding::Ok,
            "file devices work on many pages at once".to_owned(),
        )
    } else {
        let disabled = setting("/proc/sys/kernel/io_uring_disabled");
        let seen = format!("not available; kernel.io_uring_disabled is {disabled}");
        (Finding::Degraded, seen)
    };
    Check::new("io_uring", Need::Better, finding, seen)
        .or_mend("`sysctl kernel.io_uring_disabled=0`; in a container, its seccomp profile must allow io_uring")
}

fn direct(directory: &Path) -> Check {
    let place = directory.display();
    let (finding, seen) = match write_direct(directory) {
        Ok(()) => (Finding::Ok, format!("{place}: past the page cache")),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => (
            Finding::Degraded,
            format!("{place}: only through the page cache"),
        ),
        Err(errno) => (Finding::Missing, format!("{place}: {errno}")),
    };
    Check::new("direct I/O", Need::Better, finding, seen)
        .or_mend("put file devices into a writable directory on a local disk (ext4, xfs)")
}

fn write_direct(directory: &Path) -> Result<(), Errno> {
    let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let file = openat(CWD, directory, flags, Mode::RUSR | Mode::WUSR)?;
    match rustix::io::pwrite(&file, &Page::ZERO.0, 0)? {
        PAGE_SIZE => Ok(()),
        _ => Err(Errno::NOSPC),
    }
}

fn membarrier() -> Check {
    let there = membarrier_query().contains(MembarrierQuery::PRIVATE_EXPEDITED);
    let finding = if there {
        Finding::Ok
    } else {
        Finding::Degraded
    };
    Check::new(
        "membarrier",
        Need::Better,
        finding,
        "reference counts without locked instructions",
    )
    .or_mend("build the kernel with CONFIG_MEMBARRIER, and let seccomp allow membarrier")
}

fn locked_memory() -> Check {
    /// Enough for the buffers that a program registers for I/O.
    const ENOUGH: u64 = 8 << 20;
    let limit = getrlimit(Resource::Memlock).current;
    let finding = if limit.is_none_or(|bytes| bytes >= ENOUGH) {
        Finding::Ok
    } else {
        Finding::Degraded
    };
    let limit = limit.map_or("unlimited".to_owned(), |bytes| {
        format!("{} KiB", bytes >> 10)
    });
    Check::new("locked memory", Need::Better, finding, limit)
        .or_mend("`ulimit -l unlimited`, for programs that register buffers with io_uring")
}

fn cpus() -> Check {
    let count = sched_getaffinity(None).map_or(1, |allowed| allowed.count());
    let finding = if count > 1 {
        Finding::Ok
    } else {
        Finding::Degraded
    };
    Check::new("CPUs", Need::Better, finding, count.to_string())
        .or_mend("with a second CPU, pages leave while the program runs")
}

fn setting(path: &str) -> String {
    fs::read_to_string(path).map_or("not there".to_owned(), |text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::{Children, HostMmu};

    #[test]
    fn every_check_that_fails_says_how_to_mend_it() {
        for check in checks(Path::new("/does/not/exist")) {
            assert_eq!(
                check.mend.is_some(),
                check.finding != Finding::Ok,
                "{check:?}"
            );
            assert!(!check.seen.is_empty(), "{check:?}");
        }
    }

    /// `doctor` promises what `run` then finds.
    #[test]
    fn the_checks_agree_with_the_arena() {
        let checks = checks(Path::new("/tmp"));
        let missing = |need| {
            checks
                .iter()
                .any(|check| check.need == need && check.finding == Finding::Missing)
        };
        match HostMmu::new(PAGE_SIZE, 1) {
            Ok(mmu) => {
                assert!(!missing(Need::Always));
                assert!(!missing(Need::Run));
                let degraded = checks
                    .iter()
                    .any(|check| check.name.contains("fork") && check.finding == Finding::Degraded);
                assert_eq!(degraded, mmu.children() == Children::Announced);
            }
            Err(_) => assert!(missing(Need::Always)),
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_missing() {
        let check = direct(Path::new("/does/not/exist"));
        assert_eq!(check.finding, Finding::Missing);
        assert!(check.allows_run());
    }
}
