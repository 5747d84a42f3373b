//! A medium that knows what a power cut would leave of it.
//!
//! Stores and flushes are recorded. After a cut, whatever was flushed is there; of what came later, each sector of 512
//! bytes is there or not, on its own, in any order.

use std::sync::Mutex;

use pgmap_drivers::pmem::Medium;
use pgmap_host::shared::SharedFrames;
use rustix::io::Errno;

const SECTOR: usize = 512;

#[derive(Debug)]
enum Event {
    Write { offset: usize, bytes: Vec<u8> },
    Flush,
}

#[derive(Debug, Default)]
struct State {
    start: Vec<u8>,
    live: Vec<u8>,
    events: Vec<Event>,
    lost: Vec<core::ops::Range<u64>>,
    refusal: Option<Errno>,
}

/// The medium.
#[derive(Debug, Default)]
pub(crate) struct PowerCut {
    state: Mutex<State>,
}

/// Numbers that look random and are the same in each run.
#[derive(Debug)]
pub(crate) struct Dice(pub u64);

impl Dice {
    pub(crate) fn throw(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % sides.max(1)
    }
}

impl PowerCut {
    pub(crate) fn new(start: Vec<u8>) -> Self {
        let live = start.clone();
        let state = State {
            start,
            live,
            ..State::default()
        };
        let state = Mutex::new(state);
        Self { state }
    }

    /// How many stores and flushes there were.
    pub(crate) fn events(&self) -> usize {
        self.state.lock().unwrap().events.len()
    }

    /// Bytes that cannot be read from now on.
    pub(crate) fn lose(&self, bytes: core::ops::Range<u64>) {
        self.state.lock().unwrap().lost.push(bytes);
    }

    /// What every store and flush answers from now on.
    pub(crate) fn refuse(&self, errno: Option<Errno>) {
        self.state.lock().unwrap().refusal = errno;
    }

    /// What is left after a cut that comes after the first `cut` events.
    pub(crate) fn cut(&self, cut: usize, dice: &mut Dice) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        let events = &state.events[..cut];
        let flushed = events
            .iter()
            .rposition(|event| matches!(event, Event::Flush))
            .unwrap_or(0);
        let mut left = state.start.clone();
        // All, none, or each sector as it happens.
        let mood = dice.throw(4);
        for (nth, event) in events.iter().enumerate() {
            let Event::Write { offset, bytes } = event else {
                continue;
            };
            let mut there = |_: &usize| match mood {
                _ if nth < flushed => true,
                0 => true,
                1 => false,
                _ => dice.throw(2) == 0,
            };
            let sectors = offset / SECTOR..(offset + bytes.len()).div_ceil(SECTOR);
            for sector in sectors.filter(|sector| there(sector)) {
                let start = (sector * SECTOR).max(*offset);
                let end = ((sector + 1) * SECTOR).min(offset + bytes.len());
                left[start..end].copy_from_slice(&bytes[start - offset..end - offset]);
            }
        }
        left
    }
}

impl Medium for PowerCut {
    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), Errno> {
        let state = self.state.lock().unwrap();
        let end = offset + to.len() as u64;
        if state
            .lost
            .iter()
            .any(|lost| lost.start < end && offset < lost.end)
        {
            return Err(Errno::IO);
        }
        let offset = usize::try_from(offset).unwrap();
        let from = state.live.get(offset..offset + to.len());
        to.copy_from_slice(from.ok_or(Errno::IO)?);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Errno> {
        let mut state = self.state.lock().unwrap();
        let end = offset + from.len() as u64;
        if let Some(errno) = state.refusal {
            return Err(errno);
        }
        state
            .lost
            .retain(|lost| lost.start < offset || end < lost.end);
        let offset = usize::try_from(offset).unwrap();
        state.live[offset..offset + from.len()].copy_from_slice(from);
        let bytes = from.to_vec();
        state.events.push(Event::Write { offset, bytes });
        Ok(())
    }

    fn flush(&self) -> Result<(), Errno> {
        let mut state = self.state.lock().unwrap();
        state.events.push(Event::Flush);
        state.refusal.map_or(Ok(()), Err)
    }

    fn present_bytes(&self) -> Result<u64, Errno> {
        Ok(self.state.lock().unwrap().live.len() as u64)
    }

    fn frames(&self) -> Option<&SharedFrames> {
        None
    }
}
