//! What a `pgmap run` answers over its control socket: its devices and its RAM, which change while its program runs.
//!
//! The supervisor lends its [`Control`] to this. Its RAM is shown in blocks, as the memory map has them: taking one off line
//! lowers the budget of all processes together (HOT-5). What must never happen here: the supervisor's own work waiting
//! for somebody who asks.

use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::Arc;

use pgmap::run::{Change, Control, DeviceState, Failed, Held, Refused};
use pgmap::spec::DeviceSpec;
use pgmap_core::addr::{PAGE_SIZE, Pfn, PfnRange};
use pgmap_core::resource::{Descriptor, Flags, Resource};
use pgmap_core::sparse::BlockSize;
use pgmap_sync::Mutex;

use crate::control::protocol::{
    Answer, Block, Code, Counters, Device, Failure, Holder, Kind, Listing, ManagerInfo, Memory,
    Request, Zone,
};
use crate::control::{Manager, Session};
use crate::iomem;

/// How often a change is looked at.
const LOOK: Duration = Duration::from_millis(10);

/// A run, as others see it.
#[derive(Debug)]
pub struct Running {
    control: Arc<Control>,
    command: String,
    blocks: Blocks,
}

/// The RAM in blocks. What the budget has beyond whole blocks is always on line.
#[derive(Debug)]
struct Blocks {
    bytes: u64,
    count: u64,
    turned: Mutex<Turned>,
    /// Blocks on line at the start.
    first: u64,
}

/// What became of the blocks.
#[derive(Debug, Default)]
struct Turned {
    /// Blocks whose state is not what it was at the start, and what it is.
    states: BTreeMap<u64, State>,
    /// Somebody is turning one: then the budget is theirs.
    under_way: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Online,
    Offline,
}

impl Running {
    /// A run of this command, on a machine with so many bytes of RAM.
    #[must_use]
    pub fn new(control: Arc<Control>, command: String, machine_bytes: u64) -> Self {
        let budget = control.ram().budget_bytes;
        let bytes = BlockSize::of_budget(budget / PAGE_SIZE as u64).frames() * PAGE_SIZE as u64;
        let first = budget / bytes;
        let blocks = Blocks {
            bytes,
            count: first.max(machine_bytes / bytes),
            turned: Mutex::default(),
            first,
        };
        Self {
            control,
            command,
            blocks,
        }
    }

    fn listing(&self) -> Listing {
        let devices = self.control.devices().into_iter().map(|device| Device {
            dev: device.name,
            spec: device.spec.to_string(),
            state: match device.state {
                DeviceState::Live => "enabled".into(),
                DeviceState::Unplugging => "unplugging".into(),
                DeviceState::Gone => "gone".into(),
            },
            pages: device.pages,
            bytes: device.bytes,
            capacity: device.capacity_bytes,
        });
        Listing {
            regions: Vec::new(),
            devices: devices.collect(),
        }
    }

    fn holders_of(&self, name: &str) -> Result<Answer, Failure> {
        let devices = self.control.devices();
        let found = devices.into_iter().find(|device| device.name == name);
        let device = found.ok_or_else(|| {
            let text = format!("there is no `{name}`: `pgmap list` shows what there is");
            Failure::new(Code::NotFound, text)
        })?;
        Ok(Answer::Holders(device.holders.iter().map(holder).collect()))
    }

    fn plug(&self, spec: &str, session: &Session) -> Result<Answer, Failure> {
        let spec: DeviceSpec = spec
            .parse()
            .map_err(|error| Failure::new(Code::Invalid, error))?;
        let (name, change) = self.control.add(&spec).map_err(|error| refused(&error))?;
        self.wait(change, session)?;
        Ok(Answer::Name(name))
    }

    fn unplug(
        &self,
        name: &str,
        patience: Option<Duration>,
        session: &Session,
    ) -> Result<Answer, Failure> {
        let change = self.control.unplug(name, patience.unwrap_or(Duration::MAX));
        self.wait(change.map_err(|error| refused(&error))?, session)
    }

    fn memory(&self) -> Memory {
        let ram = self.control.ram();
        let turned = self.blocks.turned.lock();
        let block = |number| {
            let state = self.blocks.state(&turned, number);
            Block {
                block: number,
                start: number * self.blocks.bytes,
                state: state.word().into(),
                zone: (state == State::Online).then(|| "Movable".into()),
            }
        };
        Memory {
            block_size: self.blocks.bytes,
            online: ram.budget_bytes,
            in_use: ram.resident_bytes,
            blocks: (0..self.blocks.count).map(block).collect(),
        }
    }

    /// One map for the whole run, with the blocks of its RAM in it.
    fn iomem(&self) -> Result<Answer, Failure> {
        let failed = |error: &dyn core::fmt::Display| Failure::new(Code::Failed, error);
        let mut tree = self.control.iomem().map_err(|error| failed(&error))?;
        let turned = self.blocks.turned.lock();
        let blocks: Vec<_> = (0..self.blocks.count)
            .map(|number| (number, self.blocks.state(&turned, number)))
            .collect();
        drop(turned);
        for alike in blocks.chunk_by(|a, b| a.1 == b.1) {
            let (first, state) = alike[0];
            let (frames, count) = (self.blocks.bytes / PAGE_SIZE as u64, alike.len() as u64);
            let start = Pfn::new(first * frames);
            let range = start.and_then(|start| PfnRange::new(start, count * frames));
            let Some(range) = range else { continue };
            let which = match count {
                1 => format!("block {first}"),
                _ => format!("blocks {first}-{}", first + count - 1),
            };
            let (flags, name) = (Flags::SYSTEM_RAM, format!("{which} {}", state.word()));
            let blocks = Resource::new(range, flags, Descriptor::None, &name);
            tree.insert(blocks).map_err(|error| failed(&error))?;
        }
        Ok(Answer::Iomem(iomem::view(tree.roots())))
    }

    fn turn(
        &self,
        block: u64,
        to: State,
        patience: Option<Duration>,
        session: &Session,
    ) -> Result<Answer, Failure> {
        if block >= self.blocks.count {
            let last = self.blocks.count - 1;
            let text = format!("there is no block {block}: they are numbered 0 to {last}");
            return Err(Failure::new(Code::NotFound, text));
        }
        {
            let mut turned = self.blocks.turned.lock();
            if turned.under_way {
                return Err(refused(&Refused::Busy));
            }
            if self.blocks.state(&turned, block) == to {
                return Ok(Answer::Done);
            }
            turned.under_way = true;
        }
        // Nobody who asks waits for this: the lock is free meanwhile.
        let done = self.move_budget(to, patience, session);
        let mut turned = self.blocks.turned.lock();
        turned.under_way = false;
        if done.is_ok() {
            turned.states.insert(block, to);
        }
        done
    }

    /// Changes the budget by a block.
    fn move_budget(
        &self,
        to: State,
        patience: Option<Duration>,
        session: &Session,
    ) -> Result<Answer, Failure> {
        let budget = self.control.ram().budget_bytes;
        let wanted = match to {
            State::Online => budget + self.blocks.bytes,
            State::Offline => budget.saturating_sub(self.blocks.bytes),
        };
        let change = self
            .control
            .set_ram(wanted, patience.unwrap_or(Duration::MAX));
        self.wait(change.map_err(|error| refused(&error))?, session)
    }

    /// Waits for the end of a change. If nobody waits for the answer any more, it is given up.
    fn wait(&self, change: Change, session: &Session) -> Result<Answer, Failure> {
        loop {
            match self.control.outcome(change) {
                Some(Ok(())) => return Ok(Answer::Done),
                Some(Err(error)) => return Err(failed(&error)),
                None if session.is_hung_up() => self.control.give_up(change),
                None => {}
            }
            std::thread::sleep(LOOK);
        }
    }

    fn counters(&self) -> Vec<Counters> {
        let (stats, ram) = (self.control.region().stats(), self.control.ram());
        let mut counters: Vec<_> = stats
            .counters()
            .map(|(name, count)| (name.to_owned(), count))
            .collect();
        counters.sort_by(|a, b| a.0.cmp(&b.0));
        let mut all = vec![Counters {
            of: "ram".into(),
            counters,
            gauges: vec![
                ("budget_bytes".into(), ram.budget_bytes),
                ("resident_bytes".into(), ram.resident_bytes),
                ("processes".into(), ram.processes.len() as u64),
            ],
        }];
        all.extend(self.control.devices().into_iter().map(|device| Counters {
            of: device.name,
            counters: Vec::new(),
            gauges: vec![
                ("pages".into(), device.pages),
                ("used_bytes".into(), device.bytes),
                ("capacity_bytes".into(), device.capacity_bytes),
            ],
        }));
        all
    }
}

impl State {
    /// As people read it.
    const fn word(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Offline => "offline",
        }
    }
}

impl Blocks {
    fn state(&self, turned: &Turned, block: u64) -> State {
        let first = if block < self.first {
            State::Online
        } else {
            State::Offline
        };
        turned.states.get(&block).copied().unwrap_or(first)
    }
}

impl Manager for Running {
    fn info(&self) -> ManagerInfo {
        ManagerInfo {
            kind: Kind::Run,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            command: self.command.clone(),
        }
    }

    fn answer(&self, request: Request, session: &mut Session) -> Result<Answer, Failure> {
        let time = |ms: Option<u64>| ms.map(Duration::from_millis);
        match request {
            Request::List => Ok(Answer::Listing(self.listing())),
            Request::Holders { device } => self.holders_of(&device),
            Request::Counters => Ok(Answer::Counters(self.counters())),
            Request::Plug { spec } => self.plug(&spec, session),
            Request::Unplug { device, timeout_ms } => {
                self.unplug(&device, time(timeout_ms), session)
            }
            Request::Memory => Ok(Answer::Memory(self.memory())),
            Request::Online {
                zone: Zone::Normal, ..
            } => {
                let text = "all RAM of a run can be moved away: its zone is movable";
                Err(Failure::new(Code::Invalid, text))
            }
            Request::Online { block, .. } => self.turn(block, State::Online, None, session),
            Request::Offline { block, timeout_ms } => {
                self.turn(block, State::Offline, time(timeout_ms), session)
            }
            Request::Iomem => self.iomem(),
            Request::Release { id } => session.release(id),
            Request::CreateNamespace(_)
            | Request::DestroyNamespace { .. }
            | Request::Enable { .. }
            | Request::Disable { .. }
            | Request::InjectError { .. }
            | Request::ClearError { .. }
            | Request::Scrub { .. }
            | Request::Map(_)
            | Request::Lost { .. }
            | Request::Pin { .. } => {
                let text = "a `pgmap run` has no namespaces: ask a `pgmap serve`";
                Err(Failure::new(Code::Unsupported, text))
            }
        }
    }
}

fn refused(error: &Refused) -> Failure {
    let code = match error {
        Refused::Busy => Code::Busy,
        Refused::NoSuchDevice { .. } => Code::NotFound,
        Refused::TooManyDevices
        | Refused::TooLarge
        | Refused::BadPath
        | Refused::TooLittleRam { .. }
        | Refused::TooMuchRam { .. } => Code::Invalid,
        Refused::File(_) | Refused::Region(_) => Code::Failed,
    };
    Failure::new(code, error)
}

fn failed(error: &Failed) -> Failure {
    match error {
        Failed::StillHeld { name, holders } => Failure {
            code: Code::Busy,
            message: format!(
                "{name} is in use, and stays: its pages have no other place; add a device, or raise the budget"
            ),
            holders: holders.iter().map(holder).collect(),
        },
        Failed::NoRoomForRam { .. } | Failed::CannotUse { .. } => Failure::new(Code::Busy, error),
    }
}

fn holder(held: &Held) -> Holder {
    Holder {
        kind: match held.pages {
            Some(_) => "pages".into(),
            None => "no answer".into(),
        },
        label: String::new(),
        pid: Some(held.pid),
        age_ms: None,
        offset: None,
        length: held.pages.unwrap_or(0) * PAGE_SIZE as u64,
    }
}
