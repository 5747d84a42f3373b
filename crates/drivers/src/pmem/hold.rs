//! Who maps and who pins which bytes of a namespace (REF-7), as people are told.
//!
//! The one register is core's, which counts frames; here they become bytes of the namespace.

use core::fmt;
use core::ops::Range;
use core::time::Duration;
use std::borrow::Cow;

use pgmap_core::addr::{PAGE_SIZE, PfnRange};
use pgmap_core::holders::{FrameHolder, Who};
use pgmap_core::memremap;

/// How somebody holds bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HoldKind {
    /// They are mapped in a client's address space.
    Mapped,
    /// They may not move or go: somebody reads or writes them directly.
    Pinned,
}

/// Somebody who holds bytes of a namespace.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Hold {
    /// How.
    pub kind: HoldKind,
    /// The client's process, if it is another.
    pub pid: Option<u32>,
    /// What they say they are.
    pub label: Cow<'static, str>,
    /// Since when, on the platform's clock, in nanoseconds.
    pub since_ns: u64,
    /// Which bytes, counted from the namespace's start.
    pub bytes: Range<u64>,
}

impl Hold {
    /// What core knows about a hold on a device with these frames.
    pub(super) fn of(holder: FrameHolder, device: PfnRange) -> Self {
        let byte = |frame: u64| frame.saturating_sub(device.start().get()) * PAGE_SIZE as u64;
        let frames = holder.frames;
        Self {
            kind: match holder.how {
                memremap::Hold::Reference => HoldKind::Mapped,
                memremap::Hold::Pin => HoldKind::Pinned,
            },
            pid: match holder.who {
                Who::Process(pid) => Some(pid),
                Who::Site(_) => None,
            },
            label: holder.label,
            since_ns: holder.since_ns,
            bytes: byte(frames.start().get())..byte(frames.end()),
        }
    }

    /// How long they have held it, at this time of the platform's clock.
    #[must_use]
    pub const fn age(&self, now_ns: u64) -> Duration {
        Duration::from_nanos(now_ns.saturating_sub(self.since_ns))
    }
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.kind {
            HoldKind::Mapped => "maps",
            HoldKind::Pinned => "pins",
        };
        let Self { label, bytes, .. } = self;
        f.write_str(label)?;
        if let Some(pid) = self.pid {
            write!(f, " (pid {pid})")?;
        }
        write!(f, " {verb} bytes {:#x}-{:#x}", bytes.start, bytes.end)
    }
}
