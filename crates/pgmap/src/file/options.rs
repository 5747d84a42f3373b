//! How files are opened: what their mappings may allow, and whose RAM their pages are charged to.
//!
//! What must never happen here: an option that changes what another file's pages may do.

use std::sync::Arc;

use pgmap_core::memcg::Memcg;
use pgmap_host::file_memory::Prot;

/// How a file is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    pub(super) prot: Option<Prot>,
    pub(super) memcg: Option<Arc<Memcg>>,
}

impl OpenOptions {
    /// For reading and writing, within the whole budget.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            prot: None,
            memcg: None,
        }
    }

    /// For reading only: several may have it open so.
    #[must_use]
    pub const fn read_only(mut self) -> Self {
        self.prot = Some(Prot::Read);
        self
    }

    /// Its pages in RAM are charged to a group, and give way to each other when the group is at its limit (HMM-8). The group is
    /// the same for all files that are to share it. Who touches a page while none of the group can give way (all are pinned, or
    /// cannot be written) waits some seconds; then the process is killed, as by a full machine.
    #[must_use]
    pub fn memcg(mut self, memcg: &Arc<Memcg>) -> Self {
        self.memcg = Some(Arc::clone(memcg));
        self
    }
}
