//! Handles on an address space for those who pin: each has a count of its own, so that threads which pin side by side do not
//! meet there. What must never happen here: a pin that outlives its address space.

use alloc::sync::Arc;
use core::array;
use core::fmt;
use core::ops::Deref;

use crate::space::AddressSpace;

/// Handles; threads beyond this many share.
const HANDLES: usize = 16;

/// A handle on an address space that a pin keeps.
#[derive(Clone)]
pub struct Pinning(Arc<Apart>);

/// With cache lines of its own, and so is the count.
#[repr(align(128))]
struct Apart(Arc<AddressSpace>);

impl Pinning {
    /// One more handle, with one more count.
    #[must_use]
    pub fn new(space: &Arc<AddressSpace>) -> Self {
        Self(Arc::new(Apart(Arc::clone(space))))
    }
}

impl fmt::Debug for Pinning {
    /// Whose it is, its owner says: there are many of them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pinning")
    }
}

impl Deref for Pinning {
    type Target = Arc<AddressSpace>;

    fn deref(&self) -> &Arc<AddressSpace> {
        &self.0.0
    }
}

/// A handle for each of some threads.
#[derive(Debug)]
pub struct Pinnings([Pinning; HANDLES]);

impl Pinnings {
    /// Handles on this address space.
    #[must_use]
    pub fn new(space: &Arc<AddressSpace>) -> Self {
        Self(array::from_fn(|_| Pinning::new(space)))
    }

    /// This thread's.
    #[must_use]
    pub fn mine(&self) -> &Pinning {
        &self.0[pgmap_sync::thread_number() % HANDLES]
    }
}
