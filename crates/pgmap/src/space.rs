//! The addresses that a [`Memory`](crate::Memory) manages, with the calls that programs know: map, unmap, discard,
//! protect, remap.
//!
//! Called by the program's threads, through the library or through the preloaded interposers. These calls take
//! the locks that the fault path takes: a signal handler that touches managed memory must not run during one.

use core::mem;
use core::ops::Range;
use core::ptr;
use core::time::Duration;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use pgmap_core::addr::{PAGE_SIZE, VirtAddr};
use pgmap_core::holders::Holder;
use pgmap_host::mmu::{Children, HostMmu, Inherit};
use pgmap_host::private_file::PrivateFile;
use pgmap_mm::discard::Pinned;
use pgmap_mm::gup::{Pin, PinError, PinnedPages, pin_user_pages, pin_user_pages_fast};
use pgmap_mm::mmu::Mmu;
use pgmap_mm::pinning::Pinnings;
use pgmap_mm::space::Worker;
use pgmap_mm::vma::Vmas;
use pgmap_sync::Mutex;
use pgmap_sync::atomic::{AtomicU64, Ordering};
use rustix::io::Errno;
use rustix::mm::MprotectFlags;

use crate::file::Mapped;

/// How long a pin waits for pages to leave, if there can ever be room for it.
const PIN_PATIENCE: Duration = Duration::from_millis(250);
/// Between two tries to pin.
const PIN_RETRY: Duration = Duration::from_millis(1);

/// Why addresses could not be given.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// More was asked for than RAM and devices could ever hold, or than there are addresses.
    #[error("{bytes} bytes are more than RAM and devices together can hold")]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// No byte was asked for.
    #[error("nothing was asked for: map a byte at least")]
    Empty,
    /// This is a fork's child: the memory is its parent's.
    #[error("this is a fork's child, and the memory is its parent's: make a Memory here")]
    Inherited,
    /// The range is not in managed memory, or not aligned to pages.
    #[error("the range is not a range of managed pages")]
    BadRange,
    /// A page of the range is pinned.
    #[error(transparent)]
    Pinned(#[from] Pinned),
    /// The machine refused.
    #[error("the machine refused: {0}")]
    Refused(#[from] Errno),
}

/// The addresses that one [`Memory`](crate::Memory) manages.
#[derive(Debug)]
pub struct AddressSpace {
    inner: Arc<pgmap_mm::space::AddressSpace>,
    pinnings: Pinnings,
    mmu: Arc<HostMmu>,
    /// Addresses at which the program has mapped something else: they are the kernel's, for ever.
    given_away: Mutex<Vmas>,
    /// For the next threads that pin: as many as ever did at once.
    spare_workers: Mutex<Vec<Worker>>,
    /// Forks that are announced and not done.
    announced: Mutex<u32>,
    /// The most bytes that one mapping may have.
    most_bytes: AtomicU64,
    /// Mappings of files that are gone but for their pins.
    lingering: Mutex<Vec<Mapped>>,
}

impl AddressSpace {
    pub(crate) fn new(
        inner: Arc<pgmap_mm::space::AddressSpace>,
        mmu: Arc<HostMmu>,
        most_bytes: u64,
    ) -> Self {
        let pages = u32::try_from(mmu.range().len() / PAGE_SIZE).unwrap_or(u32::MAX);
        Self {
            pinnings: Pinnings::new(&inner),
            inner,
            mmu,
            given_away: Mutex::new(Vmas::new(pages)),
            spare_workers: Mutex::default(),
            announced: Mutex::new(0),
            most_bytes: AtomicU64::new(most_bytes),
            lingering: Mutex::new(Vec::new()),
        }
    }

    /// Changes how many bytes one mapping may have: RAM and devices could never hold more.
    pub(crate) fn set_most(&self, bytes: u64) {
        // Relaxed, here and below: a number that stands alone.
        self.most_bytes.store(bytes, Ordering::Relaxed);
    }

    fn most_bytes(&self) -> usize {
        usize::try_from(self.most_bytes.load(Ordering::Relaxed)).unwrap_or(usize::MAX)
    }

    pub(crate) const fn inner(&self) -> &Arc<pgmap_mm::space::AddressSpace> {
        &self.inner
    }

    /// All managed addresses.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.mmu.range()
    }

    /// Fresh pages that read as zeros: at least `bytes` bytes, at an address that is a multiple of `align` bytes.
    ///
    /// # Errors
    ///
    /// [`MapError::OutOfMemory`] for more than could ever be held, as a full machine would answer.
    pub fn map(&self, bytes: usize, align: usize) -> Result<usize, MapError> {
        if bytes == 0 || bytes > self.most_bytes() {
            return Err(MapError::OutOfMemory { bytes });
        }
        self.reserve(bytes, align)
    }

    /// Addresses for an allocator that will use a part of them: as [`map`](Self::map), but not compared with what
    /// could be held.
    ///
    /// # Errors
    ///
    /// [`MapError::OutOfMemory`] if there are not so many addresses.
    pub fn reserve(&self, bytes: usize, align: usize) -> Result<usize, MapError> {
        let error = MapError::OutOfMemory { bytes };
        let pages = u32::try_from(bytes.div_ceil(PAGE_SIZE)).map_err(|_| error)?;
        let align = u32::try_from(align.div_ceil(PAGE_SIZE)).map_err(|_| error)?;
        self.inner.map(pages, align).map(VirtAddr::get).ok_or(error)
    }

    /// Pages that have a file's bytes, from `offset` on, until they are changed: at least `bytes` bytes. What is changed is nobody else's,
    /// and is kept in RAM and on devices; what is not is read again. The file is open for reading, and may be closed after this.
    ///
    /// An access to a page that the file does not have gets SIGBUS, until the page is discarded. Whether what changes in the file is seen is open,
    /// as it is for mmap(2).
    ///
    /// # Errors
    ///
    /// [`MapError::OutOfMemory`] as for [`map`](Self::map); [`MapError::Refused`] for what cannot be mapped.
    pub fn map_private_file(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        bytes: usize,
    ) -> Result<usize, MapError> {
        let error = MapError::OutOfMemory { bytes };
        if bytes == 0 || bytes > self.most_bytes() {
            return Err(error);
        }
        let pages = u32::try_from(bytes.div_ceil(PAGE_SIZE)).map_err(|_| error)?;
        let file = Arc::new(PrivateFile::map(&self.mmu, file, offset, bytes)?);
        let at = self.inner.map_private_file(pages, file);
        at.map(VirtAddr::get).ok_or(error)
    }

    /// Whether any page of a range has a file's bytes until it is changed.
    #[must_use]
    pub fn is_private_file(&self, at: usize, bytes: usize) -> bool {
        let range = self.pages(at, bytes);
        range.is_ok_and(|(at, pages)| self.inner.is_private_file(at, pages))
    }

    /// In a fork's child, of which [`range`](Self::range) is all that is known otherwise: whether any page of a range had a
    /// file's bytes until it was changed. The child has all of them, and nothing that would bring them back.
    #[must_use]
    pub fn was_private_file(&self, at: usize, bytes: usize) -> bool {
        let range = self.pages(at, bytes);
        range.is_ok_and(|(at, pages)| self.inner.was_private_file(at, pages))
    }

    /// Drops the pages of a range and gives its addresses back.
    ///
    /// # Errors
    ///
    /// [`MapError::BadRange`] or [`MapError::Pinned`].
    ///
    /// # Safety
    ///
    /// The caller owns the range: nobody relies on its bytes or its addresses.
    pub unsafe fn unmap(&self, at: usize, bytes: usize) -> Result<(), MapError> {
        let (at, pages) = self.pages(at, bytes)?;
        self.mmu.settle_forks();
        // SAFETY: by this function's contract.
        unsafe { self.mmu.unrestrict(at, pages)? };
        Ok(self.inner.unmap(at, pages)?)
    }

    /// Drops the pages of a range and never hands its addresses out again: the program maps something else there.
    ///
    /// # Errors
    ///
    /// [`MapError::BadRange`] or [`MapError::Pinned`].
    ///
    /// # Safety
    ///
    /// The caller owns the range: nobody relies on its bytes or its addresses.
    pub unsafe fn give_away(&self, at: usize, bytes: usize) -> Result<(), MapError> {
        let (at, pages) = self.pages(at, bytes)?;
        self.mmu.settle_forks();
        let range = self.inner.retire(at, pages);
        if let Some(range) = range {
            self.given_away.lock().insert(range);
        }
        Ok(self.inner.discard(at, pages)?)
    }

    /// Whether the program has mapped something else at any address of a range.
    #[must_use]
    pub fn is_given_away(&self, at: usize, bytes: usize) -> bool {
        let Ok((at, pages)) =
            self.pages(at.max(self.range().start) & !(PAGE_SIZE - 1), bytes.max(1))
        else {
            return false;
        };
        let first = self.inner.page_at(at).map_or(0, |page| page.0);
        self.given_away
            .lock()
            .overlaps(&(first..first.saturating_add(pages)))
    }

    /// How many bytes of a range, from its beginning on, are alike: all at addresses at which the program has mapped
    /// something else (`true`), or none.
    #[must_use]
    pub fn first_given_away(&self, at: usize, bytes: usize) -> (bool, usize) {
        let first = self.pages(at, bytes).ok();
        let Some(first) = first.and_then(|(start, _)| self.inner.page_at(start)) else {
            return (false, bytes);
        };
        let given_away = self.given_away.lock();
        let area = given_away.find(first.0);
        let is_given = area.is_some();
        let end = area
            .map(|area| area.end)
            .or_else(|| given_away.next_start(first.0));
        let pages = end.map_or(usize::MAX, |end| (end - first.0) as usize);
        (is_given, bytes.min(pages.saturating_mul(PAGE_SIZE)))
    }

    /// Whether a range is one that [`map`](Self::map) gave, as a whole.
    #[must_use]
    pub fn is_mapped(&self, at: usize, bytes: usize) -> bool {
        let Ok((start, pages)) = self.pages(at, bytes) else {
            return false;
        };
        let first = self.inner.page_at(start).map_or(0, |page| page.0);
        self.inner
            .area_at(start)
            .is_some_and(|area| area.end >= first.saturating_add(pages))
    }

    /// Makes a mapped range as fresh as a new mapping: zeros that may be read and written.
    ///
    /// # Errors
    ///
    /// [`MapError::BadRange`] or [`MapError::Pinned`].
    ///
    /// # Safety
    ///
    /// The caller owns the range: nobody relies on its bytes.
    pub unsafe fn renew(&self, at: usize, bytes: usize) -> Result<(), MapError> {
        let (start, pages) = self.pages(at, bytes)?;
        self.mmu.settle_forks();
        self.inner.forget_file(start, pages);
        // SAFETY: by this function's contract.
        unsafe { self.discard(at, bytes)? };
        // SAFETY: by this function's contract.
        unsafe { self.mmu.unrestrict(start, pages)? };
        Ok(())
    }

    /// Drops the pages of a range: they are as before their first touch from now on (`MADV_DONTNEED`).
    ///
    /// # Errors
    ///
    /// [`MapError::BadRange`] or [`MapError::Pinned`].
    ///
    /// # Safety
    ///
    /// The caller owns the range: nobody relies on its bytes or its addresses.
    pub unsafe fn discard(&self, at: usize, bytes: usize) -> Result<(), MapError> {
        let (at, pages) = self.pages(at, bytes)?;
        self.mmu.settle_forks();
        Ok(self.inner.discard(at, pages)?)
    }

    /// Allows or forbids access to a range (`mprotect`; `prot` is made of `PROT_READ`, `PROT_WRITE`, `PROT_EXEC`).
    ///
    /// # Errors
    ///
    /// [`MapError::BadRange`], or what the machine answers.
    ///
    /// # Safety
    ///
    /// The caller owns the range: nobody relies on its bytes or its addresses.
    pub unsafe fn protect(&self, at: usize, bytes: usize, prot: i32) -> Result<(), MapError> {
        let (start, pages) = self.pages(at, bytes)?;
        let flags = MprotectFlags::from_bits_retain(prot.cast_unsigned());
        // SAFETY: by this function's contract.
        unsafe { self.mmu.protect(start, pages, flags)? };
        Ok(())
    }

    /// As [`protect`](Self::protect), and gives the pages a protection key (`pkey_mprotect`). They stay in RAM for as long as
    /// they have it.
    ///
    /// # Errors
    ///
    /// As for `protect`.
    ///
    /// # Safety
    ///
    /// As for `protect`.
    pub unsafe fn protect_with_key(
        &self,
        at: usize,
        bytes: usize,
        prot: i32,
        key: i32,
    ) -> Result<(), MapError> {
        let (start, pages) = self.pages(at, bytes)?;
        let flags = MprotectFlags::from_bits_retain(prot.cast_unsigned());
        // SAFETY: by this function's contract.
        unsafe { self.mmu.protect_with_key(start, pages, flags, key)? };
        Ok(())
    }

    /// Makes a mapping longer or shorter (`mremap`), at another address if it must and may.
    ///
    /// # Errors
    ///
    /// [`MapError::OutOfMemory`] if there is no room, or if a file's mapping were to grow; [`MapError::BadRange`], [`MapError::Pinned`].
    ///
    /// # Safety
    ///
    /// The caller owns the mapping, and uses its old addresses no more if it moved.
    pub unsafe fn remap(
        &self,
        at: usize,
        old: usize,
        new: usize,
        place: Place,
    ) -> Result<usize, MapError> {
        let (start, old_pages) = self.pages(at, old)?;
        let new_bytes = new
            .checked_next_multiple_of(PAGE_SIZE)
            .ok_or(MapError::BadRange)?;
        let old_bytes = old_pages as usize * PAGE_SIZE;
        if new_bytes <= old_bytes {
            if new_bytes < old_bytes {
                // SAFETY: by this function's contract.
                unsafe { self.unmap(at + new_bytes, old_bytes - new_bytes)? };
            }
            return Ok(at);
        }
        let error = MapError::OutOfMemory { bytes: new };
        // Of a file no more is mapped than was asked for.
        if new_bytes > self.most_bytes() || self.is_private_file(at, old) {
            return Err(error);
        }
        let more = u32::try_from((new_bytes - old_bytes) / PAGE_SIZE).map_err(|_| error)?;
        if self.inner.extend(start, old_pages, more) {
            return Ok(at);
        }
        if place == Place::Fixed {
            return Err(error);
        }
        let to = self.map(new_bytes, PAGE_SIZE)?;
        // SAFETY: the caller owns the old mapping, the new one is fresh, and both are at least `old_bytes` long;
        // pages that are missing are brought in by the pager, of whose locks we hold none.
        unsafe { ptr::copy_nonoverlapping(at as *const u8, to as *mut u8, old_bytes) };
        // SAFETY: by this function's contract; the bytes have been copied.
        unsafe { self.unmap(at, old_bytes)? };
        Ok(to)
    }

    /// Whether forks have to be announced with [`before_fork`](Self::before_fork), because the machine does not tell this
    /// process of them. The child of one that is not announced gets SIGSEGV when it touches managed memory.
    #[must_use]
    pub fn needs_announced_forks(&self) -> bool {
        self.mmu.children() == Children::Announced
    }

    /// Announces a fork by the calling thread: brings all pages into RAM, whatever the budget, so that the child inherits
    /// them. If that cannot be had, the child gets SIGSEGV when it touches managed memory.
    pub fn before_fork(&self) {
        let mut worker = self.take_worker();
        let complete = self.inner.before_fork(&mut worker);
        self.keep_worker(worker);
        let mut announced = self.announced.lock();
        *announced += 1;
        if complete {
            self.let_children_inherit(Inherit::Pages);
        }
    }

    /// Says that an announced fork is done, or has failed. To be called in the parent only.
    pub fn after_fork(&self) {
        let mut announced = self.announced.lock();
        *announced -= 1;
        if *announced == 0 {
            self.let_children_inherit(Inherit::Nothing);
        }
        drop(announced);
        self.inner.after_fork();
    }

    /// Somebody serves faults from now on: the children of forks have the memory, if that one hears of them.
    pub(crate) fn begin_forks(&self) {
        match self.mmu.children() {
            Children::Served => self.let_children_inherit(Inherit::Pages),
            Children::Announced => {}
        }
    }

    /// Nobody serves faults after this, or hears of forks: children of later forks do not have the memory, and those of earlier ones
    /// have all of it. So no fork waits for a message to be read, however long pins keep the memory.
    pub(crate) fn end_forks(&self) {
        self.let_children_inherit(Inherit::Nothing);
        self.mmu.finish_forks();
    }

    /// Whether this is a fork's child, where nobody serves faults.
    pub(crate) fn is_inherited(&self) -> bool {
        self.mmu.is_foreign()
    }

    /// In a fork's child: gives back what it has inherited of a range. Takes no lock, since who had one may not be here.
    pub(crate) fn drop_inherited(&self, range: &Range<usize>) {
        let (at, pages) = (VirtAddr::new(range.start), range.len() / PAGE_SIZE);
        match self.mmu.children() {
            Children::Served => self.mmu.zap(at, pages),
            // It has nothing of it, and may have mapped something else there.
            Children::Announced => {}
        }
    }

    /// What the program has mapped over managed addresses is its own business.
    fn let_children_inherit(&self, inherit: Inherit) {
        let start = self.range().start;
        for gap in self.given_away.lock().gaps() {
            let gap = start + gap.start as usize * PAGE_SIZE..start + gap.end as usize * PAGE_SIZE;
            // Where the machine refuses, the child has nothing, which is better than zeros.
            let _ = self.mmu.let_children_inherit(gap, inherit);
        }
    }

    /// Pins a range: its pages are in RAM and stay where they are until the guard is dropped. All pages are pinned that hold any
    /// byte of it. Reads what is not in RAM, and waits a quarter of a second at most for other pages to leave.
    ///
    /// The range is one of anonymous memory, or of mapped files. What is written through the pin, by whomever, reaches the file:
    /// the pages are dirty until they are unpinned, and written back after that.
    ///
    /// # Errors
    ///
    /// See [`PinError`].
    #[track_caller]
    pub fn pin_user_pages(&self, range: Range<usize>, pin: &Pin) -> Result<PinnedPages, PinError> {
        let start = VirtAddr::new(range.start).page_start();
        let pages = range.end.saturating_sub(start.get()).div_ceil(PAGE_SIZE);
        if pages == 0 {
            return Err(PinError::Empty);
        }
        if self.is_inherited() {
            return Err(PinError::Inherited);
        }
        let pages = u32::try_from(pages).map_err(|_| PinError::BadAddress { at: start })?;
        if let Some(pinned) = pin_user_pages_fast(self.pinnings.mine(), start, pages, pin) {
            return Ok(pinned);
        }
        let began = Instant::now();
        let could_be_had = u64::from(pages) <= self.inner.ram().limit();
        let mut worker = self.take_worker();
        let pinned = loop {
            let pinned = pin_user_pages(&self.inner, &mut worker, start, pages, pin);
            let short = matches!(
                pinned,
                Err(PinError::NoMemory { .. } | PinError::Movable { .. })
            );
            if !short || !could_be_had || began.elapsed() >= PIN_PATIENCE {
                break pinned;
            }
            // Pages are on their way out, or others hold them for a moment.
            std::thread::sleep(PIN_RETRY);
        };
        self.keep_worker(worker);
        pinned
    }

    /// A worker that nobody uses.
    pub(crate) fn take_worker(&self) -> Worker {
        let spare = self.spare_workers.lock().pop();
        spare.unwrap_or_default()
    }

    /// Keeps a worker for the next thread: making one costs more than most pins.
    pub(crate) fn keep_worker(&self, worker: Worker) {
        self.spare_workers.lock().push(worker);
    }

    /// Keeps a mapping of a file until its pins have ended.
    pub(crate) fn linger(&self, mapped: Mapped) {
        self.lingering.lock().push(mapped);
    }

    /// Ends the mappings of files that nobody has pinned any more.
    pub(crate) fn end_lingering(&self) {
        // Not under the lock: a file may be closed.
        let mapped = mem::take(&mut *self.lingering.lock());
        let ended = mapped.into_iter().map(|mapped| mapped.end(&self.inner));
        let pinned: Vec<_> = ended.filter_map(Result::err).collect();
        self.lingering.lock().extend(pinned);
    }

    /// The pager is gone: mappings of files that are pinned even now are left to the kernel, and keep their addresses for the life
    /// of the process.
    pub(crate) fn leave_lingering(&self) {
        self.end_lingering();
        self.lingering.lock().iter().for_each(Mapped::leave);
    }

    /// Who has pages pinned, of files or of anonymous memory, oldest first (REF-7).
    #[must_use]
    pub fn holders(&self) -> Vec<Holder> {
        self.inner.map_of_frames().holders().all()
    }

    /// Who has pinned any of these addresses, oldest first (REF-7).
    #[must_use]
    pub fn holders_of(&self, range: &Range<usize>) -> Vec<Holder> {
        self.inner.holders(range)
    }

    /// The pages of a range of bytes inside the managed addresses.
    fn pages(&self, at: usize, bytes: usize) -> Result<(VirtAddr, u32), MapError> {
        let start = VirtAddr::new(at);
        let end = at
            .checked_add(bytes)
            .and_then(|end| end.checked_next_multiple_of(PAGE_SIZE));
        let end = end
            .filter(|end| *end <= self.range().end)
            .ok_or(MapError::BadRange)?;
        if bytes == 0 || at < self.range().start || !start.is_page_aligned() {
            return Err(MapError::BadRange);
        }
        let pages = u32::try_from((end - at) / PAGE_SIZE).map_err(|_| MapError::BadRange)?;
        Ok((start, pages))
    }
}

/// Whether a mapping may go to another address when it grows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// It has to stay.
    Fixed,
    /// It may move (`MREMAP_MAYMOVE`).
    Anywhere,
}
