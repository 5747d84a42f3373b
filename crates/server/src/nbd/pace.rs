//! How a client sends its requests, and what that means for its replies.
//!
//! A client that has several requests under way gets its replies by groups: each time it is told of one it looks at its
//! socket, and each time it has to be woken we pay for that. Groups that are too large leave it idle meanwhile. A client
//! that waits for each reply gets it at once.

/// Replies of a group.
const GROUP: u32 = 8;
/// Requests in a row that came alone, after which a client is one that sends them one by one.
const ALONE: u32 = 64;
/// Requests after a wait that brought none, until the next one.
const HOPELESS: u32 = 64;

/// The last requests of a client, and the replies that it has not been sent.
#[derive(Debug)]
pub(super) struct Pace {
    /// Requests in a row with no other behind them.
    alone: u32,
    /// Replies since the last ones were sent.
    held: u32,
    /// Requests until it may be worth while to wait.
    hopeless: u32,
}

/// Whether there is more from a client behind a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Behind {
    Nothing,
    More,
}

impl Pace {
    pub(super) const fn new() -> Self {
        Self {
            alone: ALONE,
            held: 0,
            hopeless: 0,
        }
    }

    /// Notes a request that is to be answered.
    pub(super) const fn note(&mut self, behind: Behind) {
        self.alone = match behind {
            Behind::Nothing => self.alone.saturating_add(1),
            Behind::More => 0,
        };
        self.held += 1;
        self.hopeless = self.hopeless.saturating_sub(1);
    }

    /// Whether the client sends requests without waiting for replies.
    pub(super) const fn is_pipelining(&self) -> bool {
        self.alone < ALONE
    }

    /// Whether it is time to send the replies, though more requests are here.
    pub(super) const fn is_group(&self) -> bool {
        self.held >= GROUP
    }

    /// Whether more requests are likely to come within microseconds, for which replies may wait that are no group yet.
    pub(super) const fn is_worth_waiting(&self) -> bool {
        self.is_pipelining() && self.held > 0 && self.hopeless == 0
    }

    /// Notes that none came: the client waits for the replies that we hold.
    pub(super) const fn waited_in_vain(&mut self) {
        self.hopeless = HOPELESS;
    }

    /// Notes that all replies were sent.
    pub(super) const fn sent(&mut self) {
        self.held = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(pace: &mut Pace, behind: Behind, count: u32) {
        for _ in 0..count {
            pace.note(behind);
        }
    }

    /// A client that waits for each reply is not kept waiting, not even at its first.
    #[test]
    fn requests_that_come_alone_are_answered_at_once() {
        let mut pace = Pace::new();
        for _ in 0..3 * ALONE {
            pace.note(Behind::Nothing);
            assert!(!pace.is_worth_waiting() && !pace.is_group());
            pace.sent();
        }
    }

    /// Replies are sent when a group of them is there, and not before, as long as requests come.
    #[test]
    fn replies_go_by_groups() {
        let mut pace = Pace::new();
        note(&mut pace, Behind::More, GROUP - 1);
        assert!(pace.is_worth_waiting() && !pace.is_group());
        pace.note(Behind::Nothing);
        assert!(pace.is_group());
        pace.sent();
        assert!(!pace.is_group() && !pace.is_worth_waiting());
    }

    /// A client with fewer requests than a group is waited for once in many requests.
    #[test]
    fn a_wait_in_vain_is_not_repeated_soon() {
        let mut pace = Pace::new();
        let mut waits = 0;
        for _ in 0..HOPELESS {
            pace.note(Behind::More);
            pace.note(Behind::Nothing);
            if pace.is_worth_waiting() {
                waits += 1;
                pace.waited_in_vain();
            }
            pace.sent();
        }
        assert_eq!(waits, 2);
    }

    /// A client that ceases to send many at a time is known as one that does.
    #[test]
    fn a_client_may_change() {
        let mut pace = Pace::new();
        pace.note(Behind::More);
        assert!(pace.is_pipelining());
        note(&mut pace, Behind::Nothing, ALONE);
        assert!(!pace.is_pipelining());
    }
}
