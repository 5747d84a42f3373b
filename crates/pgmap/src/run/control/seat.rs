//! One device, as the supervisor has it: its description, its open file, and its table's place.

use core::ops::Range;

use pgmap_drivers::spec::DeviceSpec;
use pgmap_sync::atomic::Ordering;

use super::error::Refused;
use super::{Control, State, path_of};
use crate::FileDevice;
use crate::device::open_backing;
use crate::run::DeviceConfig;
use crate::shared::{DEVICES, Region, TABLE_WORDS, Wish};

/// Bytes of pages that frames have numbers for, with room to align each device.
const MOST_BYTES: u64 = 15 << 40;
/// Bytes of pages that are numbered for each byte of a pool, at most.
const PAGES_OF_A_POOL: u64 = 8;

/// A slot that has a device, or has had one until a moment ago.
#[derive(Debug)]
pub(super) struct Seat {
    pub(super) config: DeviceConfig,
    /// The file, which every process opens through us.
    _backing: Option<FileDevice>,
    /// The processes that there were when something was last wanted of it.
    pub(super) followers: Vec<u32>,
    /// Nobody is to have it any more; the slot is free when everybody has said so.
    gone: bool,
}

impl Seat {
    pub(super) const fn go(&mut self) {
        self.gone = true;
    }

    pub(super) const fn is_gone(&self) -> bool {
        self.gone
    }
}

impl Control {
    /// Opens a device and gives it a slot. Answers which.
    pub(super) fn seat(&self, state: &mut State, spec: &DeviceSpec) -> Result<usize, Refused> {
        self.clear_seats(state);
        let free = state.seats.iter().position(Option::is_none);
        let nth = free.ok_or(Refused::TooManyDevices)?;
        let others = state.seats.iter().flatten();
        let numbered = others.map(|seat| numbered_bytes(&seat.config.spec));
        let ram = state.most_ram_bytes();
        let all = numbered.fold(ram, u64::saturating_add);
        if all.saturating_add(numbered_bytes(spec)) > MOST_BYTES {
            return Err(Refused::TooLarge);
        }
        let mut config = DeviceConfig {
            number: state.next_number,
            spec: spec.clone(),
            opened: None,
        };
        // What is told to people is told in lines. And before a file is made that is not used then.
        let name = spec.to_string();
        if name.contains('\n') || name.parse().as_ref() != Ok(spec) {
            return Err(Refused::BadPath);
        }
        let backing = open_backing(spec)?;
        if let Some(file) = &backing {
            config.opened = Some((path_of(file), 0));
            let pages = config.table().map_or(0, |table| table.len());
            let table = room_for(state, pages).ok_or(Refused::TooLarge)?;
            Region::grow(&self.file, table.end)?;
            config.opened = Some((path_of(file), table.start));
        }
        let text = config.to_string();
        let slot = &self.region.devices()[nth];
        if text.parse().as_ref() != Ok(&config) || !slot.describe(&text) {
            return Err(Refused::BadPath);
        }
        state.next_number += 1;
        state.seats[nth] = Some(Seat {
            config,
            _backing: backing,
            followers: Vec::new(),
            gone: false,
        });
        self.want(state, nth, Wish::Live);
        Ok(nth)
    }

    /// Frees the slots of devices that nobody has any more.
    pub(super) fn clear_seats(&self, state: &mut State) {
        for nth in 0..DEVICES {
            let gone = state.seats[nth].as_ref().is_some_and(Seat::is_gone);
            if !gone || !self.missing(state, nth).is_empty() {
                continue;
            }
            let Some(seat) = state.seats[nth].take() else {
                continue;
            };
            if let Some(table) = seat.config.table() {
                self.region
                    .clear_table(&self.file, table.start, table.len());
            }
            let usage = &self.region.devices()[nth].usage;
            // Relaxed, both: figures for people. What is taken of the capacity is counted by those who take and give.
            usage.pages.store(0, Ordering::Relaxed);
            usage.bytes.store(0, Ordering::Relaxed);
        }
    }
}

/// The lowest words that have room for a table.
fn room_for(state: &State, words: usize) -> Option<Range<usize>> {
    let seats = || state.seats.iter().flatten();
    let tables = || seats().filter_map(|seat| seat.config.table());
    let ends = tables().map(|table| table.end);
    let rooms = ends
        .chain([0])
        .filter_map(|start| Some(start..start.checked_add(words)?));
    rooms
        .filter(|room| room.end <= TABLE_WORDS)
        .filter(|room| tables().all(|table| table.end <= room.start || room.end <= table.start))
        .min_by_key(|room| room.start)
}

/// What a device takes of the frames' numbers, in bytes of pages.
pub(super) fn numbered_bytes(spec: &DeviceSpec) -> u64 {
    match spec {
        DeviceSpec::Compressed { capacity_bytes, .. } => {
            capacity_bytes.saturating_mul(PAGES_OF_A_POOL)
        }
        DeviceSpec::File { size_bytes, .. } => *size_bytes,
        DeviceSpec::Faulty { device, .. } => numbered_bytes(device),
    }
}
