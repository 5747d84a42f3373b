//! The built-in workload: several patterns over 512 MiB, every page stamped and verified.
//!
//! It is an ordinary program: it maps memory and touches it, and knows nothing of who manages it.

use core::fmt;
use core::ops::Range;
use std::panic::resume_unwind;
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use crate::output;
use crate::summary::Count;

/// What `run` starts this command with, to run the workload.
pub(crate) const VERB: &str = "__workload";

const BYTES: usize = 512 << 20;
const PAGE: usize = 4096;
const PAGES: usize = BYTES / PAGE;
/// Words of a page that are random; the rest are zeros, so that pages halve.
const RANDOM_WORDS: usize = 256;
const THREADS: usize = 2;
/// The generation of a page that was discarded: it reads as zeros.
const DISCARDED: u32 = 0;

/// Memory in pages, and what should be in each.
struct Field {
    words: Vec<u64>,
    generations: Vec<u32>,
    verified: u64,
}

/// A page that does not hold what it should.
struct Wrong {
    page: usize,
    word: usize,
    expected: u64,
    found: u64,
}

const WORDS: usize = PAGE / 8;

fn scramble(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn expected(page: usize, generation: u32, word: usize) -> u64 {
    if generation == DISCARDED || word >= RANDOM_WORDS {
        return 0;
    }
    scramble((page as u64) << 32 | u64::from(generation) << 10 | word as u64)
}

fn stamp(page: usize, words: &mut [u64], generation: u32) {
    for (word, value) in words.iter_mut().enumerate() {
        *value = expected(page, generation, word);
    }
}

fn verify(page: usize, words: &[u64], generation: u32) -> Result<(), Wrong> {
    for (word, found) in words.iter().copied().enumerate() {
        let expected = expected(page, generation, word);
        if found != expected {
            return Err(Wrong {
                page,
                word,
                expected,
                found,
            });
        }
    }
    Ok(())
}

impl Field {
    fn new() -> Self {
        // Zeroed memory of this size is a fresh mapping: nothing is touched yet.
        Self {
            words: vec![0; BYTES / 8],
            generations: vec![DISCARDED; PAGES],
            verified: 0,
        }
    }

    fn page(&mut self, page: usize) -> &mut [u64] {
        &mut self.words[page * WORDS..(page + 1) * WORDS]
    }

    fn write(&mut self, page: usize) {
        let generation = self.generations[page] + 1;
        self.generations[page] = generation;
        stamp(page, self.page(page), generation);
    }

    fn check(&mut self, page: usize) -> Result<(), Wrong> {
        let generation = self.generations[page];
        self.verified += 1;
        verify(page, self.page(page), generation)
    }

    fn check_all(&mut self, pages: impl Iterator<Item = usize>) -> Result<(), Wrong> {
        pages.into_iter().try_for_each(|page| self.check(page))
    }

    /// Drops the pages of a range, as allocators do.
    fn discard(&mut self, pages: Range<usize>) {
        let start = self.page(pages.start).as_mut_ptr();
        let first = (start as usize).next_multiple_of(PAGE);
        if first == start as usize {
            // SAFETY: the pages are ours, whole, and hold integers, of which zeros are valid values.
            unsafe { libc::madvise(start.cast(), pages.len() * PAGE, libc::MADV_DONTNEED) };
        } else {
            // The allocator gave memory that is not aligned to pages: nothing can be dropped by the page.
            pages.clone().for_each(|page| self.page(page).fill(0));
        }
        self.generations[pages].fill(DISCARDED);
    }

    /// Several threads verify and rewrite a share of the pages each.
    fn threads(&mut self) -> Result<(), Wrong> {
        let share = PAGES / THREADS;
        let words = self.words.chunks_mut(share * WORDS);
        let generations = self.generations.chunks_mut(share);
        let results: Vec<Result<(), Wrong>> = thread::scope(|scope| {
            let parts = words.zip(generations).enumerate();
            let threads: Vec<_> = parts
                .map(|(part, (words, generations))| {
                    scope.spawn(move || rewrite(part * share, words, generations))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
                .collect()
        });
        self.verified += PAGES as u64;
        results.into_iter().collect()
    }
}

fn rewrite(first: usize, words: &mut [u64], generations: &mut [u32]) -> Result<(), Wrong> {
    for (nth, (words, generation)) in words.chunks_mut(WORDS).zip(generations).enumerate() {
        verify(first + nth, words, *generation)?;
        *generation += 1;
        stamp(first + nth, words, *generation);
    }
    Ok(())
}

fn run(field: &mut Field) -> Result<(), Wrong> {
    let mut state = 1u64;
    let mut random = move || {
        state = scramble(state.wrapping_add(0x9e37_79b9_7f4a_7c15));
        usize::try_from(state).unwrap_or(0) % PAGES
    };
    phase("fill", || {
        (0..PAGES).for_each(|page| field.write(page));
        Ok(())
    })?;
    phase("read in order", || field.check_all(0..PAGES))?;
    phase("read backwards", || field.check_all((0..PAGES).rev()))?;
    phase("read with a stride", || {
        (0..7).try_for_each(|start| field.check_all((start..PAGES).step_by(7)))
    })?;
    phase("read at random", || {
        (0..PAGES).try_for_each(|_| field.check(random()))
    })?;
    phase("write at random", || {
        (0..PAGES).try_for_each(|_| {
            let page = random();
            field.check(page)?;
            field.write(page);
            Ok(())
        })
    })?;
    phase("drop and write again", || {
        field.discard(PAGES / 4..PAGES / 2);
        field.check_all(PAGES / 4..PAGES / 2)?;
        (PAGES / 4..PAGES / 3).for_each(|page| field.write(page));
        Ok(())
    })?;
    phase("two threads", || field.threads())?;
    phase("read all once more", || field.check_all(0..PAGES))
}

fn phase(name: &str, work: impl FnOnce() -> Result<(), Wrong>) -> Result<(), Wrong> {
    let start = Instant::now();
    work()?;
    let seconds = start.elapsed().as_secs_f64();
    say(format_args!("{name:<22} {seconds:>6.2} s\n"));
    Ok(())
}

/// Runs the workload and says how it went.
pub(crate) fn workload() -> ExitCode {
    let mut field = Field::new();
    let pages = Count(PAGES as u64);
    say(format_args!(
        "{pages} pages of 4 KiB, half random, half zeros\n"
    ));
    match run(&mut field) {
        Ok(()) => {
            let verified = Count(field.verified);
            say(format_args!(
                "OK: {verified} verifications of {pages} pages, every byte as it was written\n"
            ));
            ExitCode::SUCCESS
        }
        Err(Wrong {
            page,
            word,
            expected,
            found,
        }) => {
            say(format_args!(
                "WRONG: page {page}, word {word}: {found:#018x} instead of {expected:#018x}\n"
            ));
            ExitCode::FAILURE
        }
    }
}

/// The verdict is the exit status, even if nobody reads this.
fn say(text: fmt::Arguments<'_>) {
    let _ = output::print(text.to_string().as_bytes());
}
