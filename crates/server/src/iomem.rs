//! The resource tree, as it is answered to those who ask a manager for it.

use pgmap_core::addr::PAGE_SHIFT;
use pgmap_core::resource;

use crate::control::protocol::Resource;

/// Resources, in bytes.
pub(crate) fn view(level: &[resource::Resource]) -> Vec<Resource> {
    let view = |resource: &resource::Resource| Resource {
        name: resource.name().to_owned(),
        start: resource.range().start().get() << PAGE_SHIFT,
        size: resource.range().count() << PAGE_SHIFT,
        children: view(resource.children()),
    };
    level.iter().map(view).collect()
}
