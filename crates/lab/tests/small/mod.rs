//! A machine with less RAM than its program uses, and somebody who reclaims it.

use std::sync::Arc;

use pgmap_lab::device::{self, ModelDevice};
use pgmap_lab::machine::{Machine, Setup};
use pgmap_lab::model::{self, ModelMmu};
use shuttle::thread;

/// Staging slots.
const SLOTS: u32 = 4;

/// What is wrong with the machine on purpose.
#[derive(Clone, Copy)]
pub(crate) struct Flaws {
    pub(crate) mmu: model::Flaw,
    pub(crate) device: device::Flaw,
}

/// Nothing is.
pub(crate) const SOUND: Flaws = Flaws {
    mmu: model::Flaw::None,
    device: device::Flaw::None,
};

/// Two frames of RAM for three pages, and `devices` devices.
pub(crate) fn machine(devices: usize, flaws: Flaws) -> Arc<Machine> {
    let machine = Machine::new(Setup {
        pages: 64,
        frames: 2,
        slots: SLOTS,
        mmu: ModelMmu::new(SLOTS, flaws.mmu),
        devices: (0..devices)
            .map(|_| ModelDevice::new(8, flaws.device))
            .collect(),
    });
    let machine = machine.unwrap();
    machine.space.map(3, 1).unwrap();
    machine
}

/// Somebody who frees frames all the time, or nearly.
pub(crate) fn reclaimer(machine: &Arc<Machine>) -> thread::JoinHandle<()> {
    let machine = Arc::clone(machine);
    thread::spawn(move || {
        let cpu = machine.cpu();
        for _ in 0..3 {
            cpu.reclaim(1);
        }
    })
}
