//! How the scenarios are explored.
//!
//! The orders are drawn by chance, and are the same ones in every run, so that a test that finds something finds it again. A
//! test that fails says in which order. `ORDERS=100000` tries more of them, `SEED=7` others.

use std::cell::Cell;

use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, Runner};

/// Orders that are tried for each scenario, twice.
const ORDERS: usize = 2000;
/// Where a thread is stopped for long, at most, in one order: bugs that need more such places are not looked for.
const STOPS: usize = 3;
/// What the first draw begins with.
const SEED: usize = 1;

std::thread_local! {
    // The models run all their threads on one of the machine's, which is this test's.
    static TRIED: Cell<usize> = const { Cell::new(0) };
}

/// Says in which order a scenario failed.
struct Found;

impl Drop for Found {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("found in order {}", TRIED.get());
        }
    }
}

/// Runs a scenario in many orders: first with a coin at every step, then with threads that run as long as they can but
/// for a few stops, which finds what needs one thread to sleep long.
pub(crate) fn explore(scenario: impl Fn() + Send + Sync + Copy + 'static) {
    let orders = asked_for("ORDERS").unwrap_or(ORDERS);
    let seed = asked_for("SEED").unwrap_or(SEED) as u64;
    TRIED.set(0);
    let _found = Found;
    run(RandomScheduler::new_from_seed(seed, orders), scenario);
    run(PctScheduler::new_from_seed(seed, STOPS, orders), scenario);
}

fn run(scheduler: impl Scheduler + 'static, scenario: impl Fn() + Send + Sync + 'static) {
    let counted = move || {
        TRIED.set(TRIED.get() + 1);
        scenario();
    };
    Runner::new(scheduler, Config::default()).run(counted);
}

fn asked_for(name: &str) -> Option<usize> {
    let number = std::env::var(name).ok()?;
    Some(number.parse().expect("a number"))
}
