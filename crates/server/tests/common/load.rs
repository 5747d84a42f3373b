//! Writers that check what they wrote, and a device that is frozen under them.

use core::time::Duration;
use std::io::{Read, Write};

use pgmap_sync::atomic::{AtomicBool, Ordering};

use super::{Client, FUA, MIB, READ, Rig, WRITE, pattern};

/// Freezes the device and thaws it, at moments that never repeat.
pub(crate) fn freeze_and_thaw(rig: &Rig) {
    for round in 0..60u64 {
        std::thread::sleep(Duration::from_micros(round * 7919 % 9000));
        assert!(rig.disk.queue.freeze(Some(Duration::from_secs(10))));
        assert_eq!(rig.disk.queue.in_flight(), 0);
        std::thread::sleep(Duration::from_micros(round * 104_729 % 3000));
        rig.disk.queue.thaw();
    }
}

/// Writes eight requests ahead, short ones and long ones, until told to stop. Says how many were done, and refused.
pub(crate) fn write_under_freezes<S: Read + Write>(
    writer: u64,
    client: &mut Client<S>,
    reader: &mut Client<S>,
    done: &AtomicBool,
) -> (u64, u64) {
    let (base, mut counts, mut seed) = (writer * 4 * MIB, (0, 0), writer << 32);
    // Relaxed: nothing else is read by it.
    while !done.load(Ordering::Relaxed) {
        seed += 8;
        let length = |slot: u64| {
            if (seed / 8 + slot).is_multiple_of(3) {
                300_000
            } else {
                4096
            }
        };
        let cookies: Vec<_> = (0..8)
            .map(|slot| {
                let bytes = pattern(seed + slot, length(slot));
                let len = u32::try_from(bytes.len()).unwrap();
                let cookie = client.send(WRITE, FUA, base + slot * 400_000, len);
                client.stream.write_all(&bytes).unwrap();
                cookie
            })
            .collect();
        let replies: Vec<_> = cookies
            .into_iter()
            .map(|cookie| client.reply(cookie, 0))
            .collect();
        for (slot, reply) in (0..).zip(replies) {
            if reply.error == 108 {
                counts.1 += 1;
                continue;
            }
            assert_eq!(reply.error, 0);
            counts.0 += 1;
            let len = u32::try_from(length(slot)).unwrap();
            let mut read = reader.ask(READ, 0, base + slot * 400_000, len);
            while read.error == 108 {
                read = reader.ask(READ, 0, base + slot * 400_000, len);
            }
            assert!(read.payload == pattern(seed + slot, length(slot)));
        }
    }
    counts
}
