//! How a change comes to its end: made, or taken back.
//!
//! Every look asks whether all processes have followed; when the patience ends, or a program waits for memory that it would have
//! but for the change, what was begun is taken back.

use std::time::Instant;

use pgmap_mm::stats::Stats;
use pgmap_sync::atomic::Ordering;

use super::error::{Failed, Held};
use super::seat::Seat;
use super::view::DeviceState;
use super::{Control, State, UnderWay};
use crate::shared::{Answer, Wish};

impl Control {
    /// Whether a program has waited for memory for long: what is taken away has to be given back.
    fn is_starved(&self) -> bool {
        // Relaxed: a hint.
        self.processes()
            .any(|process| process.starved.load(Ordering::Relaxed))
    }

    /// Carries on with what is under way, if it is time.
    pub(super) fn carry_on(&self, state: &mut State) {
        let Some((change, under_way)) = state.under_way.take() else {
            return;
        };
        let outcome = match under_way {
            UnderWay::Add { nth, until } => self.adding(state, nth, until),
            UnderWay::Leave { nth, until } => match self.leaving(state, nth, until) {
                Some(Ok(())) => {
                    let under_way = UnderWay::Remove { nth, until };
                    state.under_way = Some((change, under_way));
                    return;
                }
                other => other,
            },
            UnderWay::Remove { nth, until } => {
                // Nothing is there any more: who does not answer only keeps the slot.
                self.clear_seats(state);
                let gone = state.seats[nth].is_none() || Instant::now() >= until;
                gone.then_some(Ok(()))
            }
            UnderWay::Lower { until } => self.lowering(until),
        };
        match outcome {
            Some(outcome) => state.outcomes.push((change, outcome)),
            None => state.under_way = Some((change, under_way)),
        }
    }

    fn adding(&self, state: &State, nth: usize, until: Instant) -> Option<Result<(), Failed>> {
        let missing = self.missing(state, nth);
        let failed = |(pid, answer): &(u32, Answer)| (*answer == Answer::Failed).then_some(*pid);
        let pids: Vec<u32> = missing.iter().filter_map(failed).collect();
        if pids.len() < missing.len() && Instant::now() < until {
            return None;
        }
        Some(if pids.is_empty() {
            Ok(())
        } else {
            Err(Failed::CannotUse { pids })
        })
    }

    fn leaving(&self, state: &mut State, nth: usize, until: Instant) -> Option<Result<(), Failed>> {
        let missing = self.missing(state, nth);
        if missing.is_empty() {
            self.want(state, nth, Wish::Absent);
            let view = self.view(state, nth, DeviceState::Gone);
            state.unplugged.extend(view);
            state.seats[nth].iter_mut().for_each(Seat::go);
            return Some(Ok(()));
        }
        let starved = self.is_starved();
        if !starved && Instant::now() < until {
            return None;
        }
        self.want(state, nth, Wish::Live);
        let holders = missing.into_iter().map(|(pid, answer)| Held {
            pid,
            pages: match answer {
                Answer::Left(pages) => Some(u64::from(pages)),
                Answer::None | Answer::Done | Answer::Failed => None,
            },
        });
        Some(Err(Failed::StillHeld {
            name: state.name(nth),
            holders: holders.collect(),
        }))
    }

    fn lowering(&self, until: Instant) -> Option<Result<(), Failed>> {
        // Relaxed, all: numbers that change now and then.
        let (budget, before) = (self.region.ram_bytes(), self.region.ram_before());
        let wanted = budget.load(Ordering::Relaxed);
        let granted = || self.processes().map(|process| Stats::get(&process.granted));
        if granted().sum::<u64>() <= wanted || before.load(Ordering::Relaxed) == 0 {
            before.store(0, Ordering::Relaxed);
            return Some(Ok(()));
        }
        if !self.is_starved() && Instant::now() < until {
            return None;
        }
        let used_bytes = granted().sum();
        let restored_bytes = before.swap(0, Ordering::Relaxed);
        budget.store(restored_bytes, Ordering::Relaxed);
        Some(Err(Failed::NoRoomForRam {
            used_bytes,
            restored_bytes,
        }))
    }
}
