//! How the scenarios are explored.

/// Orders that are tried for each scenario, twice.
const ORDERS: usize = 2000;
/// Where a thread is stopped for long, at most, in one order: bugs that need more such places are not looked for.
const STOPS: usize = 3;

/// Runs a scenario in random orders: first with a coin at every step, then with threads that run as long as they can but
/// for a few stops, which finds what needs one thread to sleep long.
pub(crate) fn explore(scenario: impl Fn() + Send + Sync + Copy + 'static) {
    let asked_for = std::env::var("ORDERS").ok();
    let orders = asked_for.map_or(ORDERS, |orders| orders.parse().expect("a number"));
    shuttle::check_random(scenario, orders);
    shuttle::check_pct(scenario, orders, STOPS);
}
