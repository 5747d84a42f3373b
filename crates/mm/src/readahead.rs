//! Which neighbours a fault brings along.
//!
//! A fault that continues a stream (forwards, backwards, or with a stride) doubles the stream's window;
//! any other fault starts a new stream of one page. Several streams are remembered, so that two threads
//! reading two arrays do not spoil each other's windows.

use core::ops::Range;

use crate::page_table::PageIndex;

/// Streams remembered.
const STREAMS: usize = 8;
/// The largest window, in pages.
pub const MAX_WINDOW: u32 = 32;
/// The window after the second fault of a stream.
const FIRST_WINDOW: u32 = 4;
/// A window of this many pages means that the stream is sequential beyond doubt.
const LONG_WINDOW: u32 = 16;
/// Strides up to this many pages are recognised.
const MAX_STRIDE: i64 = 512;

/// What to bring along with a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    page: u32,
    step: i64,
    window: u32,
}

impl Plan {
    /// The contiguous pages worth having, the faulting one among them.
    #[must_use]
    pub fn run(&self) -> Range<u32> {
        match self.step {
            1 => self.page..self.page.saturating_add(self.window),
            -1 => self.page.saturating_sub(self.window - 1)..self.page + 1,
            _ => self.page..self.page + 1,
        }
    }

    /// The single pages ahead of a strided stream; nothing for other streams.
    pub fn strided(self) -> impl Iterator<Item = PageIndex> {
        let pages = if self.step.abs() > 1 { self.window } else { 1 };
        (1..i64::from(pages)).filter_map(move |nth| {
            u32::try_from(i64::from(self.page) + nth * self.step)
                .ok()
                .map(PageIndex)
        })
    }

    /// Whether the stream has been sequential for so long that its pages are not worth keeping behind it.
    #[must_use]
    pub const fn is_sequential(&self) -> bool {
        self.window >= LONG_WINDOW
    }

    /// The page, if the stream goes forwards, and has been sequential for so long.
    #[must_use]
    pub fn forwards(&self) -> Option<PageIndex> {
        (self.step == 1 && self.is_sequential()).then_some(PageIndex(self.page))
    }

    /// How many pages the plan covers.
    #[must_use]
    pub const fn window(&self) -> u32 {
        self.window
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The last page that faulted.
    page: u32,
    /// The end of those that were mapped with it.
    end: u32,
    /// Pages from one access to the next; 0 while unknown.
    step: i64,
    window: u32,
    used: u64,
}

impl Stream {
    /// The window if `page` continues this stream.
    fn continued_by(&self, page: u32) -> Option<(i64, u32)> {
        if self.window == 0 {
            return None;
        }
        // Behind what was mapped is where a stream forwards goes on, if nothing is left out.
        let goes_on = page == self.end && matches!(self.step, 0 | 1);
        let delta = if goes_on {
            1
        } else {
            i64::from(page) - i64::from(self.page)
        };
        if self.step == 0 {
            // The second fault fixes the step.
            return (delta != 0 && delta.abs() <= MAX_STRIDE).then_some((delta, 1));
        }
        // The stream's next fault lies behind its window, or a little further on where pages were resident.
        let steps = delta
            .checked_div(self.step)
            .filter(|steps| steps * self.step == delta)?;
        let window = i64::from(self.window);
        (1..=window * 2 + 1)
            .contains(&steps)
            .then_some((self.step, self.window))
    }
}

/// The streams of one fault handler.
#[derive(Debug, Default)]
pub struct Readahead {
    streams: [Stream; STREAMS],
    clock: u64,
}

impl Readahead {
    /// Notes a fault and says what to bring along.
    pub fn plan(&mut self, page: PageIndex) -> Plan {
        self.clock += 1;
        let page = page.0;
        let known = self.streams.iter_mut().find_map(|stream| {
            // A stream with a step is certain; a fresh one only guesses that this fault is its second.
            stream
                .continued_by(page)
                .filter(|_| stream.step != 0)
                .map(|next| (stream, next))
        });
        if let Some((stream, (step, window))) = known {
            let window = (window * 2).clamp(FIRST_WINDOW, MAX_WINDOW);
            *stream = Stream {
                page,
                end: page.saturating_add(1),
                step,
                window,
                used: self.clock,
            };
            return Plan { page, step, window };
        }
        let second = self.streams.iter_mut().find_map(|stream| {
            stream
                .continued_by(page)
                .filter(|_| stream.step == 0)
                .map(|next| (stream, next.0))
        });
        if let Some((stream, step)) = second {
            // Neighbours are a stream at once; a stride has to be confirmed by a third fault.
            let window = if step.abs() == 1 { FIRST_WINDOW } else { 1 };
            *stream = Stream {
                page,
                end: page.saturating_add(1),
                step,
                window,
                used: self.clock,
            };
            return Plan { page, step, window };
        }
        let fresh = Stream {
            page,
            end: page.saturating_add(1),
            step: 0,
            window: 1,
            used: self.clock,
        };
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
            *oldest = fresh;
        }
        Plan {
            page,
            step: 0,
            window: 1,
        }
    }

    /// Notes that all pages before `end` were mapped with the page of a plan.
    pub fn reached(&mut self, plan: &Plan, end: u32) {
        let mut streams = self.streams.iter_mut();
        if let Some(stream) = streams.find(|stream| stream.page == plan.page) {
            stream.end = end;
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    fn fault(readahead: &mut Readahead, page: u32) -> Plan {
        readahead.plan(PageIndex(page))
    }

    /// A sequential reader faults once per window, and the window doubles up to its limit.
    #[test]
    fn a_sequential_window_doubles_up_to_its_limit() {
        let mut readahead = Readahead::default();
        let mut page = 1000;
        let mut windows = Vec::new();
        for _ in 0..8 {
            let run = fault(&mut readahead, page).run();
            assert_eq!(run.start, page);
            windows.push(run.len());
            page = run.end;
        }
        assert_eq!(windows, [1, 4, 8, 16, 32, 32, 32, 32]);
    }

    /// Two streams that alternate keep a window each.
    #[test]
    fn two_streams_do_not_disturb_each_other() {
        let mut readahead = Readahead::default();
        let (mut first, mut second) = (1000, 900_000);
        for _ in 0..6 {
            first = fault(&mut readahead, first).run().end;
            second = fault(&mut readahead, second).run().end;
        }
        assert_eq!(fault(&mut readahead, first).window(), MAX_WINDOW);
        assert_eq!(fault(&mut readahead, second).window(), MAX_WINDOW);
    }

    /// A reader that goes backwards gets the pages before its fault.
    #[test]
    fn a_backward_stream_is_followed() {
        let mut readahead = Readahead::default();
        fault(&mut readahead, 1000);
        let run = fault(&mut readahead, 999).run();
        assert_eq!(run, 996..1000);
        assert_eq!(fault(&mut readahead, 995).run(), 988..996);
    }

    /// A stream whose faults map more than it asked for is a stream forwards all the same, and keeps its window.
    #[test]
    fn what_is_mapped_along_does_not_end_a_stream() {
        let mut readahead = Readahead::default();
        let mut page = 1000;
        let mut windows = Vec::new();
        for _ in 0..6 {
            let plan = fault(&mut readahead, page);
            windows.push(plan.window());
            page += 64;
            readahead.reached(&plan, page);
        }
        assert_eq!(windows, [1, 4, 8, 16, 32, 32]);
        assert!(fault(&mut readahead, page).forwards().is_some());
    }

    /// A stride is followed after its third fault, without the pages between.
    #[test]
    fn a_stride_is_followed_without_what_lies_between() {
        let mut readahead = Readahead::default();
        fault(&mut readahead, 1000);
        assert_eq!(fault(&mut readahead, 1010).strided().count(), 0);
        let plan = fault(&mut readahead, 1020);
        assert_eq!(plan.run(), 1020..1021);
        let pages: Vec<u32> = plan.strided().map(|page| page.0).collect();
        assert_eq!(pages, [1030, 1040, 1050]);
    }

    /// Random faults bring nothing along.
    #[test]
    fn random_faults_bring_nothing_along() {
        let mut readahead = Readahead::default();
        let mut page = 1u32;
        for _ in 0..1000 {
            page = page.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let plan = fault(&mut readahead, page >> 4);
            assert_eq!((plan.run().len(), plan.strided().count()), (1, 0));
        }
    }
}
