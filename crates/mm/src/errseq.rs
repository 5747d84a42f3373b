//! Errors of writeback: each who must know is told of each once, as `fsync` does (the kernel's `errseq_t`).

use pgmap_sync::Mutex;

use crate::backing::BackingError;

/// The errors of one file so far.
#[derive(Debug, Default)]
pub struct ErrSeq {
    /// How many there were, and the last.
    last: Mutex<(u64, Option<BackingError>)>,
}

/// How many errors somebody has been told of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen(u64);

impl ErrSeq {
    /// Notes an error.
    pub fn set(&self, error: BackingError) {
        let mut last = self.last.lock();
        *last = (last.0 + 1, Some(error));
    }

    /// What somebody has seen who opens the file now: everything.
    #[must_use]
    pub fn sample(&self) -> Seen {
        Seen(self.last.lock().0)
    }

    /// Tells somebody of the last error that they have not been told of.
    ///
    /// # Errors
    ///
    /// That error.
    pub fn check_and_advance(&self, seen: &mut Seen) -> Result<(), BackingError> {
        let last = self.last.lock();
        if seen.0 == last.0 {
            return Ok(());
        }
        seen.0 = last.0;
        last.1.map_or(Ok(()), Err)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// Each who had the file open is told once; who opens it later is not.
    #[test]
    fn each_is_told_once() {
        let errors = ErrSeq::default();
        let (mut first, mut second) = (errors.sample(), errors.sample());
        assert_eq!(errors.check_and_advance(&mut first), Ok(()));
        errors.set(BackingError::Io(5));
        let mut late = errors.sample();
        assert_eq!(
            errors.check_and_advance(&mut first),
            Err(BackingError::Io(5))
        );
        assert_eq!(errors.check_and_advance(&mut first), Ok(()));
        assert_eq!(
            errors.check_and_advance(&mut second),
            Err(BackingError::Io(5))
        );
        assert_eq!(errors.check_and_advance(&mut late), Ok(()));
    }
}
