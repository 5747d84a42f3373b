//! Why a run could not be made, or not be changed.

use core::fmt;

use crate::shared::{DEVICES, RegionError};
use pgmap_drivers::file::FileError;

/// Why a run could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The shared memory could not be had.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// A device cannot be used.
    #[error(transparent)]
    Device(#[from] Refused),
}

/// Why a change was not begun. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Another change is under way.
    #[error("another change is under way: try again when it is done")]
    Busy,
    /// No device has this name.
    #[error("no device is called `{name}`: there is {}", if .known.is_empty() { "none" } else { .known })]
    NoSuchDevice {
        /// What was asked for.
        name: String,
        /// The devices that there are.
        known: String,
    },
    /// There are as many devices as there can be.
    #[error("{DEVICES} devices can be used at once: unplug one first")]
    TooManyDevices,
    /// There are not so many frame numbers.
    #[error(
        "the budget and the devices are larger together than pgmap can address (15T; a compressed pool counts 8 times): \
         give less"
    )]
    TooLarge,
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The processes could not find the file by what they would be told.
    #[error(
        "a device's path has a character in it that cannot be passed on, or is too long: name another"
    )]
    BadPath,
    /// The shared memory could not grow.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The processes could not work with so little.
    #[error("the processes of this run need {least} bytes at least")]
    TooLittleRam {
        /// The least, in bytes.
        least: u64,
    },
    /// The machine has not so much.
    #[error("the budget can be {most} bytes at most: all that this machine has")]
    TooMuchRam {
        /// The most, in bytes.
        most: u64,
    },
}

/// A process that still has pages of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// The process.
    pub pid: u32,
    /// Its pages there, at least; `None` if it has not answered: it is stopped, or just starting.
    pub pages: Option<u64>,
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pages {
            Some(pages) => write!(f, "process {} has {pages} pages there", self.pid),
            None => write!(f, "process {} does not answer", self.pid),
        }
    }
}

/// Why a change was not made. What was begun of it has been taken back, unless the variant says otherwise.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Failed {
    /// Pages of the device have no other place: it works on.
    #[error(
        "{name} is still in use, and stays: {}; add a device, raise the budget, or wait longer",
        .holders.iter().map(Held::to_string).collect::<Vec<_>>().join(", ")
    )]
    StillHeld {
        /// The device.
        name: String,
        /// Who has pages there.
        holders: Vec<Held>,
    },
    /// The devices have no room for what would have to leave RAM: the budget is what it was.
    #[error(
        "{used_bytes} bytes are in use, and cannot leave RAM: the budget stays {restored_bytes} bytes; add a device, or \
         wait longer"
    )]
    NoRoomForRam {
        /// What processes had when the patience ended.
        used_bytes: u64,
        /// The budget.
        restored_bytes: u64,
    },
    /// The device was added, but these processes go on without it.
    #[error(
        "the device was added, but these processes cannot use it: {pids:?}; unplug it, or let them be"
    )]
    CannotUse {
        /// The processes.
        pids: Vec<u32>,
    },
}
