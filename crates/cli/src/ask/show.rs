//! Answers, as people like to read them.

use core::fmt::Write as _;

use pgmap_server::control::protocol::{
    Block, Device, Holder, Kind, Listing, ManagerInfo, Memory, Namespace, Region, Resource,
};

/// Bytes in the largest unit that leaves them above one, with one digit after the point.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    #[allow(
        clippy::cast_precision_loss,
        reason = "one digit after the point is shown"
    )]
    let mut size = bytes as f64 / 1024.0;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    // 1024.0 of what is shown with one digit is one of the next unit.
    while size >= 2048.0 || (size >= 1024.0 && (size / 1024.0).fract() == 0.0) {
        size /= 1024.0;
        unit = units.next();
    }
    format!("{size:.1} {}", unit.copied().unwrap_or("EiB"))
}

/// A power of two as people write it: 4K, 2M, 1G.
pub(crate) fn short(bytes: u64) -> String {
    let units = [(30, "G"), (20, "M"), (10, "K")];
    for (shift, unit) in units {
        if bytes >= 1 << shift && bytes.trailing_zeros() >= shift {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// One manager's listing, a line for each thing that it has.
pub(super) fn listing(manager: &ManagerInfo, listing: &Listing) -> String {
    let mut text = format!("{}\n", self::manager(manager));
    for region in &listing.regions {
        let _ = writeln!(text, "  {}", self::region(region));
        for namespace in &region.namespaces {
            let own = namespace.metadata_size;
            let _ = writeln!(text, "    {}", self::namespace(namespace, own));
            for uri in namespace.uris() {
                let _ = writeln!(text, "      {uri}");
            }
        }
    }
    for device in &listing.devices {
        let _ = writeln!(text, "  {}", self::device(device));
    }
    text
}

/// A manager in one line.
pub(super) fn manager(manager: &ManagerInfo) -> String {
    /// What is shown of a command.
    const MOST_CHARS: usize = 60;
    let pid = manager.pid;
    match manager.kind {
        Kind::Serve => format!("serve, process {pid}"),
        Kind::Run => {
            let line = manager.command.lines().next().unwrap_or_default();
            let mut shown: String = line.chars().take(MOST_CHARS).collect();
            if shown.len() < manager.command.len() {
                shown += " ...";
            }
            format!("run, process {pid}: {}", shown.escape_default())
        }
    }
}

fn region(region: &Region) -> String {
    let map_sync = match region.map_sync {
        Some(true) => "  map_sync",
        Some(false) | None => "",
    };
    let metadata = match region_metadata(region) {
        0 => String::new(),
        metadata => format!("  metadata {}", bytes(metadata)),
    };
    format!(
        "{}  {}  {}  available {}{metadata}{map_sync}",
        region.dev,
        region.image.as_deref().unwrap_or("volatile memory"),
        bytes(region.size),
        bytes(region.available_size),
    )
}

/// Bytes of a region that hold metadata. What is in memory is nothing that anybody would miss.
pub(crate) fn region_metadata(region: &Region) -> u64 {
    region.image.as_ref().map_or(0, |_| region.metadata_size)
}

/// A namespace in one line, and how much metadata there is for it.
pub(crate) fn namespace(namespace: &Namespace, metadata_bytes: u64) -> String {
    let mut text = format!(
        "{}  {}  {}",
        namespace.device(),
        namespace.mode,
        bytes(namespace.size)
    );
    if namespace.map.is_some() {
        let _ = write!(text, "  align {}", short(namespace.align));
    }
    if metadata_bytes > 0 {
        let _ = write!(text, "  metadata {} on the device", bytes(metadata_bytes));
    }
    if namespace.badblock_count > 0 {
        let _ = write!(text, "  {} bad blocks", namespace.badblock_count);
    }
    if !namespace.name.is_empty() {
        let _ = write!(text, "  \"{}\"", namespace.name);
    }
    if namespace.state != "enabled" {
        let _ = write!(text, "  {}", namespace.state);
    }
    text
}

fn device(device: &Device) -> String {
    let mut text = format!(
        "{}  {}  {} pages in {} of {}",
        device.dev,
        device.spec,
        device.pages,
        bytes(device.bytes),
        bytes(device.capacity)
    );
    if device.state != "enabled" {
        let _ = write!(text, "  {}", device.state);
    }
    text
}

/// Those who hold something, a line each.
pub(crate) fn holders(holders: &[Holder]) -> String {
    let mut text = String::new();
    for holder in holders {
        text += &holder.kind;
        if !holder.label.is_empty() {
            let _ = write!(text, " \"{}\"", holder.label.escape_default());
        }
        if let Some(pid) = holder.pid {
            let _ = write!(text, ", process {pid}");
        }
        if holder.length > 0 {
            let _ = write!(text, ": {}", bytes(holder.length));
        }
        if let Some(offset) = holder.offset {
            let _ = write!(text, " at {offset:#x}");
        }
        if let Some(ms) = holder.age_ms {
            let _ = write!(text, ", for {}", age(ms));
        }
        text += "\n";
    }
    text
}

fn age(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..120_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        _ => format!("{} min", ms / 60_000),
    }
}

/// As `/proc/iomem` shows it: first and last byte, and the name; what lies inside is indented.
pub(super) fn iomem(resources: &[Resource]) -> String {
    fn show(text: &mut String, level: &[Resource], indent: usize) {
        for resource in level {
            let first = resource.start;
            let last = first.saturating_add(resource.size.saturating_sub(1));
            let name = &resource.name;
            let _ = writeln!(text, "{:indent$}{first:08x}-{last:08x} : {name}", "");
            show(text, &resource.children, indent + 2);
        }
    }
    let mut text = String::new();
    show(&mut text, resources, 0);
    text
}

/// The blocks of RAM; neighbours that are alike in one line.
pub(super) fn memory(memory: &Memory) -> String {
    let mut text = format!(
        "{} online, {} in use; blocks of {}\n",
        bytes(memory.online),
        bytes(memory.in_use),
        bytes(memory.block_size)
    );
    let alike = |a: &Block, b: &Block| a.state == b.state && a.zone == b.zone;
    for blocks in memory.blocks.chunk_by(alike) {
        let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else {
            continue;
        };
        let numbers = match blocks.len() {
            1 => format!("{}", first.block),
            _ => format!("{}-{}", first.block, last.block),
        };
        let size = bytes(memory.block_size * blocks.len() as u64);
        let zone = first.zone.as_deref().unwrap_or("");
        let line = format!("  {numbers:9} {size:>10}  {}  {zone}", first.state);
        text += line.trim_end();
        text += "\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let cases = [
            (512, "512 B"),
            (4096, "4.0 KiB"),
            (1022 << 20, "1022.0 MiB"),
            (1 << 30, "1.0 GiB"),
            (1 << 40, "1.0 TiB"),
            ((1 << 30) + (1 << 29), "1536.0 MiB"),
            (8 << 20, "8.0 MiB"),
        ];
        for (size, text) in cases {
            assert_eq!(bytes(size), text);
        }
    }
}
