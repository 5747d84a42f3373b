//! The devices, as NBD clients find them.

use std::sync::Arc;

use super::Service;
use crate::nbd::{Export, Exports, Refused};

impl Exports for Service {
    fn find(&self, name: &str) -> Result<Arc<Export>, Refused> {
        let regions = self.regions.lock();
        let mut exports = regions.devices.values().map(|device| &device.export);
        let found = match name {
            "" => exports.next(),
            name => exports.find(|export| export.name == name),
        };
        found.cloned().ok_or_else(|| {
            Refused(match name {
                "" => "nothing is served at the moment".to_owned(),
                name => format!("there is no `{name}`, or it is out of use"),
            })
        })
    }

    fn list(&self) -> Vec<Arc<Export>> {
        let regions = self.regions.lock();
        let exports = regions.devices.values().map(|device| &device.export);
        exports.cloned().collect()
    }
}
