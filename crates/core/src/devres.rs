//! A stack of things to take back.
//!
//! Whoever builds something in steps pushes for each step the action that undoes it. If a step fails, dropping the stack undoes
//! the others, the last first; if all went well, [`Devres::keep`] forgets them. Drivers use it for what they hold until they are
//! unbound. An action must not fail, and must not panic.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

/// Actions that are undone together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Group(u32);

/// Actions in the order in which they were pushed. Dropping it runs them in reverse.
#[derive(Default)]
#[must_use = "dropping it undoes everything"]
pub struct Devres<'a> {
    actions: Vec<(Group, Box<dyn FnOnce() + Send + 'a>)>,
    groups: u32,
}

impl<'a> Devres<'a> {
    /// Nothing to take back.
    pub const fn new() -> Self {
        Self {
            actions: Vec::new(),
            groups: 0,
        }
    }

    /// Adds an action that belongs to no group of its own.
    pub fn push(&mut self, action: impl FnOnce() + Send + 'a) {
        self.push_in(Group(0), action);
    }

    /// A group for actions that can be undone apart from the others.
    pub const fn open_group(&mut self) -> Group {
        self.groups += 1;
        Group(self.groups)
    }

    /// Adds an action to a group.
    pub fn push_in(&mut self, group: Group, action: impl FnOnce() + Send + 'a) {
        self.actions.push((group, Box::new(action)));
    }

    /// Undoes a group, its last action first; the others stay. Each action runs once.
    pub fn release_group(&mut self, group: Group) {
        // From the end: what was visited and kept stands behind what is still to be visited.
        for nth in (0..self.actions.len()).rev() {
            if self.actions[nth].0 == group {
                let (_, action) = self.actions.remove(nth);
                action();
            }
        }
    }

    /// Forgets everything: what was built stays.
    pub fn keep(mut self) {
        self.actions.clear();
    }
}

impl Drop for Devres<'_> {
    fn drop(&mut self) {
        while let Some((_, action)) = self.actions.pop() {
            action();
        }
    }
}

impl fmt::Debug for Devres<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Devres")
            .field("actions", &self.actions.len())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use pgmap_sync::Mutex;

    /// MAP-3, REMAP-2: everything is undone once, the last first.
    #[test]
    fn a_dropped_stack_is_undone_in_reverse() {
        let done = Mutex::new(Vec::new());
        let mut stack = Devres::new();
        for step in 0..3 {
            let done = &done;
            stack.push(move || done.lock().push(step));
        }
        drop(stack);
        assert_eq!(*done.lock(), [2, 1, 0]);
    }

    /// A kept stack undoes nothing.
    #[test]
    fn a_kept_stack_undoes_nothing() {
        let done = Mutex::new(0);
        let mut stack = Devres::new();
        stack.push(|| *done.lock() += 1);
        stack.keep();
        assert_eq!(*done.lock(), 0);
    }

    /// REMAP-2, devm-slot: a group takes back what belongs to it, and nothing else.
    #[test]
    fn a_group_is_undone_alone() {
        let done = Mutex::new(Vec::new());
        let mut stack = Devres::new();
        let group = stack.open_group();
        let done = &done;
        let note = |step| move || done.lock().push(step);
        stack.push(note("first"));
        stack.push_in(group, note("a"));
        stack.push(note("second"));
        stack.push_in(group, note("b"));
        stack.release_group(group);
        assert_eq!(*done.lock(), ["b", "a"]);
        stack.release_group(group);
        drop(stack);
        assert_eq!(*done.lock(), ["b", "a", "second", "first"]);
    }
}
