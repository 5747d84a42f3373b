//! Private mappings of files: a page that nobody has changed has the file's bytes, and one that was changed is as any other.
//!
//! A page is read at its first touch, and mapped write-protected: until it is written it need not be stored anywhere, as it can be
//! read again ([`Copy::File`]). Called by the fault path and by forks. What must never happen here: zeros, or another
//! page's bytes, where the file has bytes; a page dropped that was changed.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::ops::{ControlFlow, Range};
use core::slice;

use pgmap_core::addr::{Page, VirtAddr};

use crate::fault::{Access, Outcome, around, protection};
use crate::mmu::{Progress, Stop};
use crate::page_table::{Cursor, PageIndex};
use crate::policy::Class;
use crate::pte::{Copy, Pte};
use crate::readahead::Plan;
use crate::space::{AddressSpace, Worker};
use crate::stats::Stats;

/// A file cannot be read at this moment, which says nothing about its bytes: try again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the file cannot be read now; try again")]
pub struct NotNow;

/// What is mapped of a file, in pages from the beginning of the mapping.
pub trait FilePages: Send + Sync + fmt::Debug {
    /// Reads the pages from `first` on. Says how many it read: fewer where the file has ended, or its bytes are lost.
    ///
    /// # Errors
    ///
    /// [`NotNow`] if it has read none and cannot say whether there are any.
    fn read(&self, first: u32, pages: &mut [Page]) -> Result<usize, NotNow>;
}

/// Neighbouring pages of an address space that one file is behind.
#[derive(Clone, Debug)]
pub(crate) struct PrivateFile {
    /// The pages of the address space.
    pub(crate) pages: Range<u32>,
    /// The page of what is mapped that the first of them is.
    first: u32,
    file: Arc<dyn FilePages>,
}

impl PrivateFile {
    fn read(&self, page: u32, pages: &mut [Page]) -> Result<usize, NotNow> {
        self.file.read(page - self.pages.start + self.first, pages)
    }

    /// The part of it that is in a range, if there is one.
    fn part(&self, range: &Range<u32>) -> Option<Self> {
        let start = self.pages.start.max(range.start);
        let end = self.pages.end.min(range.end);
        (start < end).then(|| Self {
            pages: start..end,
            first: start - self.pages.start + self.first,
            file: Arc::clone(&self.file),
        })
    }
}

/// The private mappings of files, by where they begin; no two overlap.
#[derive(Debug, Default)]
pub(crate) struct PrivateFiles {
    files: BTreeMap<u32, PrivateFile>,
}

impl PrivateFiles {
    /// A file is mapped at pages at which there is none.
    pub(crate) fn insert(&mut self, pages: Range<u32>, file: Arc<dyn FilePages>) {
        let start = pages.start;
        let file = PrivateFile {
            pages,
            first: 0,
            file,
        };
        self.files.insert(start, file);
    }

    /// No file is behind these pages any more. Answers what was there, to be dropped without a lock.
    pub(crate) fn remove(&mut self, range: &Range<u32>) -> Vec<PrivateFile> {
        let before = self.files.range(..range.start).next_back();
        let from = before.map_or(range.start, |(start, _)| *start);
        let there = self.files.range(from..range.end.max(from));
        let there: Vec<_> = there.map(|(_, file)| file.clone()).collect();
        for file in &there {
            self.files.remove(&file.pages.start);
            let rests = [0..range.start, range.end..u32::MAX];
            for rest in rests.iter().filter_map(|rest| file.part(rest)) {
                self.files.insert(rest.pages.start, rest);
            }
        }
        there
    }

    /// The file behind a page.
    pub(crate) fn find(&self, page: u32) -> Option<PrivateFile> {
        self.next(page).filter(|file| file.pages.contains(&page))
    }

    fn overlaps(&self, range: Range<u32>) -> bool {
        let before = self.files.range(..range.end).next_back();
        before.is_some_and(|(_, file)| file.pages.end > range.start)
    }

    /// The first mapping that has the page, or one behind it.
    fn next(&self, page: u32) -> Option<PrivateFile> {
        let before = self.files.range(..=page).next_back();
        let around = before.filter(|(_, file)| file.pages.end > page);
        let next = around.or_else(|| self.files.range(page..).next());
        next.map(|(_, file)| file.clone())
    }
}

impl AddressSpace {
    /// Takes fresh addresses for `pages` pages that have a file's bytes until they are changed. Where the file has none, an access gets
    /// SIGBUS; what changes in the file is seen in pages that are read again, or for the first time.
    pub fn map_private_file(&self, pages: u32, file: Arc<dyn FilePages>) -> Option<VirtAddr> {
        self.map_with(pages, 1, Some(file))
    }

    /// From now on the pages of a range that are touched first, or have been discarded, are zeros.
    pub fn forget_file(&self, at: VirtAddr, pages: u32) {
        let Some(first) = self.page_at(at) else {
            return;
        };
        let range = first.0..first.0.saturating_add(pages);
        let files = self.areas.lock().files.remove(&range);
        // Without the lock: it may be the last that holds the file.
        drop(files);
    }

    /// Whether a file is behind any of the pages of a range.
    #[must_use]
    pub fn is_private_file(&self, at: VirtAddr, pages: u32) -> bool {
        self.page_at(at).is_some_and(|first| {
            let areas = self.areas.lock();
            areas.files.overlaps(first.0..first.0.saturating_add(pages))
        })
    }

    /// For a fork's child, where no fault is served any more: whether a file was behind any of the pages of a range. Yes as well where
    /// that cannot be told, as somebody was changing it then.
    #[must_use]
    pub fn was_private_file(&self, at: VirtAddr, pages: u32) -> bool {
        self.page_at(at).is_some_and(|first| {
            let range = first.0..first.0.saturating_add(pages);
            let areas = self.areas.try_lock();
            areas.is_none_or(|areas| areas.files.overlaps(range))
        })
    }

    /// The file behind a page. To be asked under the page's cursor by who installs its bytes (FLT-2).
    pub(crate) fn file_behind(&self, page: PageIndex) -> Option<PrivateFile> {
        self.areas.lock().files.find(page.0)
    }

    /// The first touch of a page that a file is behind, and of those that will probably be read next. The worker has a frame.
    pub(crate) fn file_fill(
        &self,
        mut cursor: Cursor<'_>,
        worker: &mut Worker,
        page: PageIndex,
        file: &PrivateFile,
        touch: Touch<'_>,
    ) -> Outcome {
        let (run, copy) = match touch {
            // Its neighbours would have to be stored as well.
            Touch::ToWrite => (page.0..page.0 + 1, Copy::None),
            Touch::ToRead(plan) => {
                let wanted = plan.run();
                let wanted = wanted.start.max(file.pages.start)..wanted.end.min(file.pages.end);
                let run = cursor.run(page.0, &wanted, |pte| pte == Pte::None);
                let most = worker.frames.prepare(&self.ram, run.len());
                (around(page.0, &run, most), Copy::File)
            }
        };
        let run = match read_around(file, worker, page.0, run) {
            Ok(Some(run)) => run,
            Ok(None) => return self.beyond_the_end(cursor, page),
            Err(NotNow) => return Outcome::NoMemory,
        };
        let at = self.table.address(PageIndex(run.start));
        let pages = &worker.pages[..run.len()];
        let mut progress = self.mmu.install(at, pages, protection(copy));
        let mut entered = copy;
        if progress.done == 0 && progress.stop == Some(Stop::Exists) {
            // The machine has a page that we did not know of; from now on it is accounted for, and it may have been written.
            (progress.done, entered) = (1, Copy::None);
        }
        for page in (run.start..run.end).take(progress.done) {
            let frame = worker.frames.take();
            self.enter(&mut cursor, PageIndex(page), frame, entered);
        }
        self.queues.push(page.block(), Class::Main);
        Stats::add(&self.stats.faults_zero_fill, 1);
        let ahead = progress.done.saturating_sub(1);
        Stats::add(&self.stats.readahead_pages, ahead as u64);
        self.settle(progress.stop, self.table.address(page))
    }

    /// Maps the file's bytes once more where the machine has no page, as something that may be written. `None` if the file has none.
    pub(crate) fn install_from(
        &self,
        worker: &mut Worker,
        page: PageIndex,
        file: &PrivateFile,
    ) -> Result<Option<Progress>, NotNow> {
        let target = slice::from_mut(&mut worker.pages[0]);
        if file.read(page.0, target)? == 0 {
            return Ok(None);
        }
        let at = self.table.address(page);
        Ok(Some(self.mmu.install_if_missing(at, &target[0])))
    }

    /// There is nothing of the file: SIGBUS, as for every mapping of it. If the machine has a page it is a fault that is out of date.
    pub(crate) fn beyond_the_end(&self, mut cursor: Cursor<'_>, page: PageIndex) -> Outcome {
        let at = self.table.address(page);
        let progress = self.mmu.poison_if_missing(at);
        // A frame that is pinned stays the page's until that is discarded.
        if progress.done == 1 && self.claim_mapped(cursor.get(page)) {
            let frame = self.forget(&mut cursor, page);
            cursor.set(page, Pte::Poisoned);
            self.ram.free(frame.as_slice());
        }
        self.settle(progress.stop, at)
    }

    /// Shows every page that a file is behind and that nobody has touched to `visit`, with its bytes or without, until that says no.
    /// They are the same under the page's cursor.
    pub(crate) fn for_each_untouched(
        &self,
        worker: &mut Worker,
        mut visit: impl FnMut(VirtAddr, Option<&Page>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let mut next = 0;
        while let Some(page) = self.next_behind(next) {
            next = page + 1;
            let index = PageIndex(page);
            let cursor = self.table.lock(index.block());
            let Some(file) = self.file_behind(index) else {
                continue;
            };
            if cursor.get(index) == Pte::None {
                let read = file.read(page, slice::from_mut(&mut worker.pages[0]));
                // The child cannot wait for what cannot be read now.
                let bytes = (read == Ok(1)).then_some(&worker.pages[0]);
                visit(self.table.address(index), bytes)?;
            }
        }
        ControlFlow::Continue(())
    }

    /// Before an announced fork: brings every page into RAM that a file is behind. False if one could not be had.
    pub(crate) fn bring_in_files(&self, worker: &mut Worker) -> bool {
        let mut next = 0;
        while let Some(page) = self.next_behind(next) {
            next = page + 1;
            let page = PageIndex(page);
            let is_untouched = || self.table.lock(page.block()).get(page) == Pte::None;
            // What somebody has unmapped since is not missed.
            if is_untouched()
                && self.fault(worker, self.table.address(page), Access::Read) == Outcome::NoMemory
            {
                return false;
            }
        }
        true
    }

    /// The first page from `page` on that a file is behind.
    fn next_behind(&self, page: u32) -> Option<u32> {
        let next = self.areas.lock().files.next(page);
        next.map(|file| file.pages.start.max(page))
    }
}

/// What a page is touched for.
#[derive(Clone, Copy)]
pub(crate) enum Touch<'a> {
    /// To be read; neighbours that the plan wants are read, too.
    ToRead(&'a Plan),
    /// To be changed.
    ToWrite,
}

/// Reads a run of pages, the first into the first of the worker's buffers. Answers those that were read, with `page` among them; `None`
/// if that one cannot be.
fn read_around(
    file: &PrivateFile,
    worker: &mut Worker,
    page: u32,
    run: Range<u32>,
) -> Result<Option<Range<u32>>, NotNow> {
    let read = file.read(run.start, &mut worker.pages[..run.len()])?;
    if (page - run.start) as usize >= read {
        // One that cannot be read may be before it.
        let alone = file.read(page, slice::from_mut(&mut worker.pages[0]))?;
        return Ok((alone == 1).then_some(page..page + 1));
    }
    let end = run.start + u32::try_from(read).unwrap_or(0);
    Ok(Some(run.start..end.min(run.end)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file whose every page is its number, from a first one on.
    #[derive(Debug)]
    struct Numbered(u8);

    impl FilePages for Numbered {
        fn read(&self, first: u32, pages: &mut [Page]) -> Result<usize, NotNow> {
            for (page, nth) in pages.iter_mut().zip(first..) {
                page.0[0] = self.0.wrapping_add(nth.to_le_bytes()[0]);
            }
            Ok(pages.len())
        }
    }

    proptest! {
        /// Whatever is mapped and unmapped, each page has its own page of its own file behind it, or none.
        #[test]
        fn files_agree_with_a_list_of_pages(
            steps in prop::collection::vec((any::<bool>(), 0u32..60, 1u32..20), 1..40),
        ) {
            let mut files = PrivateFiles::default();
            let mut model = [None; 80];
            for (number, (is_mapped, start, len)) in (1u8..).step_by(5).zip(steps) {
                let range = start..start + len;
                files.remove(&range);
                model[start as usize..range.end as usize].fill(None);
                if is_mapped {
                    files.insert(range.clone(), Arc::new(Numbered(number)));
                    for (nth, page) in (0u8..).zip(range.clone()) {
                        model[page as usize] = Some(number.wrapping_add(nth));
                    }
                }
                for page in 0..80u32 {
                    let found = files.find(page).map(|file| {
                        let mut pages = [Page::ZERO];
                        assert_eq!(file.read(page, &mut pages), Ok(1));
                        pages[0].0[0]
                    });
                    prop_assert_eq!(found, model[page as usize]);
                    let behind = model[page as usize..].iter().position(Option::is_some);
                    let next = files.next(page).map(|file| file.pages.start.max(page));
                    prop_assert_eq!(next.map(|next| (next - page) as usize), behind);
                }
                let any = model[start as usize..range.end as usize].iter().any(Option::is_some);
                prop_assert_eq!(files.overlaps(range), any);
            }
        }
    }
}
