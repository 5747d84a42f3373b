//! The program of the README: 256 MiB of data in 64 MiB of RAM, with pages pinned in between.

use pgmap::{Device, Memory, Pin};

fn main() -> Result<(), Box<dyn core::error::Error>> {
    let memory = Memory::builder()
        .ram(64 << 20) // at most 64 MiB are resident
        .device(Device::compressed(1 << 30)) // the rest is compressed
        .build()?;
    let mut map = memory.map(256 << 20)?; // 256 MiB that read as zeros
    for (page, bytes) in map.as_mut_slice().chunks_mut(4096).enumerate() {
        bytes[..8].copy_from_slice(&page.to_le_bytes());
    }
    // These pages stay where they are while a device works on them.
    let start = map.range().start;
    let pin = memory
        .space()
        .pin_user_pages(start..start + (1 << 20), &Pin::READ.label("rx ring"))?;
    for holder in memory.holders() {
        let kib = holder.range.len() >> 10;
        println!("{} holds {kib} KiB in RAM", holder.label);
    }
    drop(pin);
    for (page, bytes) in map.as_slice().chunks(4096).enumerate() {
        assert_eq!(bytes[..8], page.to_le_bytes());
    }
    let faults = memory.stats().faults();
    println!("all pages are as they were written; {faults} faults served");
    Ok(())
}
