//! Where the holes are.

use core::ops::Range;

use pgmap_drivers::block::{BlockDevice, BlockError, Contents};

use super::proto::{STATE_DATA, STATE_HOLE_ZERO};

/// Bytes that the device is asked about at first: looking at many extents takes its time.
const WINDOW: u64 = 16 << 20;
/// If it has not more extents than this there, it is asked about more bytes the next time: the kernel looks at all that
/// follows whenever it looks for the end of data.
const FEW: usize = 64;
/// Extents of one answer; the client asks again for what follows.
const MOST_EXTENTS: usize = 4096;

/// The states of a range from its beginning on, as lengths in bytes and flags, neighbours being different: one at
/// least, `most` at most.
pub(super) fn block_status(
    device: &dyn BlockDevice,
    range: Range<u64>,
    most: Most,
) -> Result<Vec<(u32, u32)>, BlockError> {
    let most = match most {
        Most::One => 1,
        Most::Many => MOST_EXTENTS,
    };
    let mut states: Vec<(u32, u32)> = Vec::new();
    let (mut at, mut window) = (range.start, WINDOW);
    while at < range.end {
        let end = range.end.min(at + window);
        let extents = device.extents(at..end)?;
        at = end;
        if extents.len() <= FEW {
            window *= 8;
        }
        for (extent, contents) in extents {
            let state = match contents {
                Contents::Data => STATE_DATA,
                Contents::Hole => STATE_HOLE_ZERO,
            };
            // Not longer than the request.
            let len = u32::try_from(extent.end - extent.start).unwrap_or(u32::MAX);
            let full = states.len() == most;
            match states.last_mut() {
                Some((so_far, last)) if *last == state => *so_far = so_far.saturating_add(len),
                Some(_) if full => return Ok(states),
                Some(_) | None => states.push((len, state)),
            }
        }
    }
    Ok(states)
}

/// How many extents the client wants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Most {
    One,
    Many,
}
