//! How long somebody waits for others to let go of a device.
//!
//! Who takes a device away says so once, for all that has to be waited for; and may lose interest: then nobody waits for nobody.

use core::fmt;
use core::time::Duration;
use std::time::Instant;

/// How often is looked whether anybody still wants to wait.
const LOOK: Duration = Duration::from_millis(100);

/// Until when to wait, and whether anybody still wants to.
pub struct Patience<'a> {
    deadline: Option<Instant>,
    give_up: Option<&'a dyn Fn() -> bool>,
}

impl fmt::Debug for Patience<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Patience")
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

impl<'a> Patience<'a> {
    /// So long from now, or without end.
    #[must_use]
    pub fn new(patience: Option<Duration>) -> Self {
        Self {
            // What no clock can tell is without end, too.
            deadline: patience.and_then(|patience| Instant::now().checked_add(patience)),
            give_up: None,
        }
    }

    /// The same, but no longer than until this says so. It is asked several times a second, on the waiting thread.
    #[must_use]
    pub fn or_until(self, give_up: &'a dyn Fn() -> bool) -> Self {
        Self {
            give_up: Some(give_up),
            ..self
        }
    }

    /// Waits by `wait`, which waits at most as long as it is told, and says whether it has what it waits for. Says whether it had.
    pub(super) fn wait_for(&self, mut wait: impl FnMut(Option<Duration>) -> bool) -> bool {
        loop {
            let now = Instant::now();
            let left = self
                .deadline
                .map(|deadline| deadline.saturating_duration_since(now));
            let Some(give_up) = self.give_up else {
                return wait(left);
            };
            if wait(Some(left.map_or(LOOK, |left| left.min(LOOK)))) {
                return true;
            }
            let late = self
                .deadline
                .is_some_and(|deadline| Instant::now() >= deadline);
            if late || give_up() {
                return false;
            }
        }
    }
}
