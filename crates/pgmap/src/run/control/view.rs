//! What a run looks like from outside: its devices and its RAM.

use pgmap_drivers::spec::DeviceSpec;
use pgmap_mm::stats::Stats;
use pgmap_sync::atomic::AtomicU64;

use super::error::Held;
use super::{Control, State};
use crate::shared::{Process, Wish};

/// Where a device is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceState {
    /// Pages go there and come back.
    Live,
    /// Its pages are being brought back.
    Unplugging,
    /// It has been unplugged.
    Gone,
}

/// One device, in numbers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceView {
    /// The name by which [`Control::unplug`] knows it.
    pub name: String,
    /// What the user wrote.
    pub spec: DeviceSpec,
    /// Where it is in its life.
    pub state: DeviceState,
    /// Pages there, as the processes last said.
    pub pages: u64,
    /// Bytes that they take there.
    pub bytes: u64,
    /// Bytes that they may take.
    pub capacity_bytes: u64,
    /// The most pages that were there.
    pub peak_pages: u64,
    /// The most bytes that they took.
    pub peak_bytes: u64,
    /// Whose pages they are.
    pub holders: Vec<Held>,
}

/// The RAM of a run, in bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RamView {
    /// The budget.
    pub budget_bytes: u64,
    /// The highest that it has been.
    pub highest_bytes: u64,
    /// In RAM now, as the processes last said.
    pub resident_bytes: u64,
    /// The processes.
    pub processes: Vec<ProcessView>,
}

/// One process of a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ProcessView {
    /// Its number.
    pub pid: u32,
    /// Its part of the budget, in bytes.
    pub granted_bytes: u64,
    /// Its pages in RAM, in bytes, as it last said.
    pub resident_bytes: u64,
}

impl Control {
    /// The devices that there are, in the order in which they are tried.
    #[must_use]
    pub fn devices(&self) -> Vec<DeviceView> {
        let state = self.state();
        let seats = state.seats.iter().enumerate();
        let mut live: Vec<_> = seats
            .filter_map(|(nth, seat)| Some((seat.as_ref()?, nth)))
            .filter(|(seat, _)| !seat.is_gone())
            .collect();
        live.sort_unstable_by_key(|(seat, _)| seat.config.number);
        let views = live.into_iter().filter_map(|(_, nth)| {
            let shown = match self.region.devices()[nth].order().wish {
                Wish::Live => DeviceState::Live,
                Wish::Leaving | Wish::Absent => DeviceState::Unplugging,
            };
            self.view(&state, nth, shown)
        });
        views.collect()
    }

    /// The devices that were unplugged, with the most that they held, in the order in which that was done.
    #[must_use]
    pub fn unplugged(&self) -> Vec<DeviceView> {
        self.state().unplugged.clone()
    }

    /// The budget, and who has how much of it.
    #[must_use]
    pub fn ram(&self) -> RamView {
        let processes = self.processes().map(|process| ProcessView {
            pid: process.pid(),
            granted_bytes: Stats::get(&process.granted),
            resident_bytes: Stats::get(&process.resident),
        });
        RamView {
            budget_bytes: Stats::get(self.region.ram_bytes()),
            highest_bytes: self.state().highest_ram_bytes,
            resident_bytes: self.region.resident(),
            processes: processes.collect(),
        }
    }

    pub(super) fn view(&self, state: &State, nth: usize, shown: DeviceState) -> Option<DeviceView> {
        let config = &state.seats[nth].as_ref()?.config;
        let sum = |count: fn(&Process, usize) -> &AtomicU64| {
            self.processes()
                .map(|process| Stats::get(count(process, nth)))
                .sum()
        };
        let holders = self.processes().filter_map(|process| {
            let pages = Stats::get(&process.devices[nth].pages);
            let pid = process.pid();
            (pages > 0).then_some(Held {
                pid,
                pages: Some(pages),
            })
        });
        let peak = &self.region.devices()[nth].usage;
        Some(DeviceView {
            name: config.name(),
            spec: config.spec.clone(),
            state: shown,
            pages: sum(|process, nth| &process.devices[nth].pages),
            bytes: sum(|process, nth| &process.devices[nth].bytes),
            capacity_bytes: config.spec.capacity_bytes(),
            peak_pages: Stats::get(&peak.pages),
            peak_bytes: Stats::get(&peak.bytes),
            holders: holders.collect(),
        })
    }
}
