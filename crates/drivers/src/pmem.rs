//! Persistent memory: regions, their namespaces, and what a namespace is while it is used.
//!
//! A [`Region`] is opened from a [`PmemSpec`]: an image file or a device-dax with a crash-safe label, a file served as it is, or memory. Its
//! namespaces are bound as [`Pmem`], which the servers use as a block device and hand out to be mapped and pinned.
//! What must never happen here: a label that is neither the old one nor the new one, a load or store through a
//! mapping (it could be a SIGBUS), or frames taken away from under somebody.

mod altmap;
pub mod area;
pub mod badblocks;
mod bind;
mod dax;
mod device;
mod failure;
mod hold;
mod image;
pub mod label;
mod made;
mod medium;
mod namespace;
mod patience;
mod place;
mod punch;
mod region;
mod scrub;
pub mod spec;
mod storage;
mod unbind;
mod uuid;

pub use bind::BindError;
pub use dax::{AccessError, Client, DirectAccess, MapGuard, PinGuard, Sharing};
pub use device::Pmem;
pub use failure::Mapper;
pub use hold::{Hold, HoldKind};
pub use image::ImageError;
pub use medium::Medium;
pub use namespace::{
    Activation, Align, HugePage, LABEL_AREA_BYTES, MAX_NAMESPACES, MapLocation, Mode, Namespace,
    NoNamespace, UnknownWord, Wanted,
};
pub use patience::Patience;
pub use punch::PunchError;
pub use region::{OpenError, Region, RegionError};
pub use scrub::{Generation, Progress, ScrubError};
pub use spec::PmemSpec;
pub use unbind::{Afterwards, Holders, UnbindError, Unbinding};
pub use uuid::{NoUuid, Uuid};
