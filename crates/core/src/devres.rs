//! A stack of things to take back.
//!
//! Whoever builds something in steps pushes for each step the action that undoes it. If a step fails, dropping the stack undoes
//! the others, the last first; if all went well, [`Devres::keep`] forgets them. `memremap_request` builds its mappings so. An
//! action must not fail, and must not panic.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

/// Actions in the order in which they were pushed. Dropping it runs them in reverse.
#[derive(Default)]
#[must_use = "dropping it undoes everything"]
pub struct Devres<'a> {
    actions: Vec<Box<dyn FnOnce() + Send + 'a>>,
}

impl<'a> Devres<'a> {
    /// Nothing to take back.
    pub const fn new() -> Self {
        Self {
            actions: Vec::new(),
        }
    }

    /// Adds an action.
    pub fn push(&mut self, action: impl FnOnce() + Send + 'a) {
        self.actions.push(Box::new(action));
    }

    /// Forgets everything: what was built stays.
    pub fn keep(mut self) {
        self.actions.clear();
    }
}

impl Drop for Devres<'_> {
    fn drop(&mut self) {
        while let Some(action) = self.actions.pop() {
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
}
