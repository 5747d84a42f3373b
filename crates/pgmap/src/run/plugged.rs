//! The run's devices as one process has them, and how it follows the supervisor's wishes while its program runs.
//!
//! The reclaimer calls [`Plugged::follow`] between its other work; a step brings back a few hundred pages at most, so frames are
//! freed meanwhile. What must never happen here: a device removed that a page is on (the types of `core::memremap`
//! hold that), or a page given up because a device is wanted away (MAP-6, FLT-4).

use core::mem;
use core::time::Duration;

use pgmap_core::memremap::{DevPagemap, Killed};
use pgmap_mm::space::{AddressSpace, Worker};
use pgmap_mm::unplug::{Evacuation, NoRoom, Step};

use crate::device::{Device, Part};
use crate::run::config::DeviceConfig;
use crate::shared::{Answer, DEVICES, DeviceSlot, Order, Process, Region, Wish};

/// How long one look waits for stores that are under way to a device that is otherwise empty.
const DRAIN: Duration = Duration::from_millis(5);
/// When to try again if there is no room for what comes back.
const NO_ROOM: Duration = Duration::from_millis(2);
/// When to look again if nothing is to be done.
const CALM: Duration = Duration::from_secs(1);

/// What this process has of one slot's device.
#[derive(Debug, Default)]
enum Plug {
    #[default]
    Out,
    In(DevPagemap),
    Leaving(Box<Leaving>),
    /// Nothing is there, and nothing goes there; it can still be taken up again.
    Empty(Killed),
}

/// A device whose pages are being brought back.
#[derive(Debug)]
struct Leaving {
    killed: Killed,
    evacuation: Evacuation,
    worker: Worker,
}

#[derive(Debug)]
struct Seat {
    plug: Plug,
    /// The last order that was followed to its end.
    followed: Option<Order>,
}

/// The devices of one process.
#[derive(Debug)]
pub(crate) struct Plugged {
    region: Region,
    process: &'static Process,
    number: usize,
    seats: [Seat; DEVICES],
    /// The frames of each device that is in.
    frames: [u64; DEVICES],
}

impl Plugged {
    /// No devices yet, for the process with this number.
    pub(crate) fn new(region: Region, number: usize, process: &'static Process) -> Self {
        let seat = || Seat {
            plug: Plug::Out,
            followed: None,
        };
        Self {
            region,
            process,
            number,
            seats: core::array::from_fn(|_| seat()),
            frames: [0; DEVICES],
        }
    }

    /// Takes all devices that are there when the process starts, in their order.
    ///
    /// # Errors
    ///
    /// A sentence for people: why one of them cannot be used.
    pub(crate) fn take_all(&mut self, space: &AddressSpace) -> Result<(), String> {
        let mut wanted = Vec::new();
        for (nth, slot) in self.region.devices().iter().enumerate() {
            let order = slot.order();
            if order.wish == Wish::Live {
                wanted.push((config(slot)?.number, nth, order));
            }
        }
        wanted.sort_unstable_by_key(|(number, ..)| *number);
        for (_, nth, order) in wanted {
            let device = self.add(space, nth)?;
            self.seats[nth].plug = Plug::In(device);
            self.finish(nth, order, Answer::Done);
        }
        Ok(())
    }

    /// Pages that all devices of this process can hold.
    pub(crate) fn capacity_frames(&self) -> u64 {
        self.frames.iter().sum()
    }

    /// What a slot's device holds for this process, if there is one.
    pub(crate) fn device(&self, nth: usize) -> Option<&DevPagemap> {
        match &self.seats[nth].plug {
            Plug::Out => None,
            Plug::In(device) => Some(device),
            Plug::Leaving(leaving) => Some(leaving.killed.device()),
            Plug::Empty(killed) => Some(killed.device()),
        }
    }

    /// Does a part of what the supervisor wants. Answers when to call again at the latest.
    pub(crate) fn follow(&mut self, space: &AddressSpace) -> Duration {
        let mut again = CALM;
        for (nth, slot) in self.region.devices().iter().enumerate() {
            let order = slot.order();
            if self.seats[nth].followed != Some(order) {
                again = again.min(self.follow_one(space, nth, order));
            }
        }
        again
    }

    fn follow_one(&mut self, space: &AddressSpace, nth: usize, order: Order) -> Duration {
        let plug = mem::take(&mut self.seats[nth].plug);
        let (plug, answer, again) = match order.wish {
            Wish::Live => self.take_up(space, nth, plug),
            Wish::Leaving => bring_back(space, plug),
            Wish::Absent => remove(space, plug),
        };
        if matches!(plug, Plug::Out) {
            self.frames[nth] = 0;
        }
        self.seats[nth].plug = plug;
        match answer {
            Answer::Done | Answer::Failed => self.finish(nth, order, answer),
            Answer::None | Answer::Left(_) => {
                self.process.answers[nth].set(order.generation, answer);
            }
        }
        again
    }

    fn finish(&mut self, nth: usize, order: Order, answer: Answer) {
        self.seats[nth].followed = Some(order);
        self.process.answers[nth].set(order.generation, answer);
    }

    /// The device is wanted: it is added, or taken up again.
    fn take_up(
        &mut self,
        space: &AddressSpace,
        nth: usize,
        plug: Plug,
    ) -> (Plug, Answer, Duration) {
        let device = match plug {
            Plug::Out => self.add(space, nth),
            Plug::In(device) => Ok(device),
            Plug::Leaving(leaving) => Ok(leaving.killed.resurrect()),
            Plug::Empty(killed) => Ok(killed.resurrect()),
        };
        match device {
            Ok(device) => (Plug::In(device), Answer::Done, CALM),
            // The program goes on without it, and its supervisor hears of that.
            Err(_) => (Plug::Out, Answer::Failed, CALM),
        }
    }

    fn add(&mut self, space: &AddressSpace, nth: usize) -> Result<DevPagemap, String> {
        let slot = &self.region.devices()[nth];
        let part = Part {
            taken: &slot.usage.taken,
            mine: &self.process.devices[nth].taken,
            region: self.region,
            number: self.number,
        };
        let Device { ops, frames } = Device::shared(&config(slot)?, &part)?;
        let mapped = space.map_of_frames().memremap_private(ops, frames);
        let device = mapped.map_err(|error| error.to_string())?;
        space.devices().add(device.clone());
        self.frames[nth] = frames;
        Ok(device)
    }
}

fn config(slot: &DeviceSlot) -> Result<DeviceConfig, String> {
    let config = slot.description().parse();
    config.map_err(|error: crate::run::config::Unreadable| error.to_string())
}

/// The device is to go: nothing goes there any more, and its pages come back, a few at a time.
fn bring_back(space: &AddressSpace, plug: Plug) -> (Plug, Answer, Duration) {
    let mut leaving = match plug {
        Plug::Out | Plug::Empty(_) => return (plug, Answer::Done, CALM),
        Plug::In(device) => Box::new(Leaving {
            killed: device.kill(),
            evacuation: Evacuation::default(),
            worker: Worker::new(),
        }),
        Plug::Leaving(leaving) => leaving,
    };
    let Leaving {
        killed,
        evacuation,
        worker,
    } = &mut *leaving;
    let (left, again) = match space.evacuate_some(worker, killed.device(), evacuation) {
        Ok(Step::More) => (killed.device().users_now(), Duration::ZERO),
        Ok(Step::Done) => return (Plug::Empty(leaving.killed), Answer::Done, CALM),
        Err(NoRoom { left_pages }) => (left_pages, NO_ROOM),
    };
    let left = u32::try_from(left).unwrap_or(u32::MAX);
    (Plug::Leaving(leaving), Answer::Left(left), again)
}

/// The device goes.
fn remove(space: &AddressSpace, plug: Plug) -> (Plug, Answer, Duration) {
    match bring_back(space, plug) {
        (Plug::Empty(killed), ..) => match killed.drain(Some(DRAIN)) {
            Ok(drained) => {
                space.devices().forget(drained.device());
                drained.remove();
                (Plug::Out, Answer::Done, CALM)
            }
            Err(held) => (Plug::Empty(held.killed), Answer::None, NO_ROOM),
        },
        unfinished => unfinished,
    }
}
