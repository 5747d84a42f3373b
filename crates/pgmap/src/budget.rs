//! How the processes of a run share its RAM: who needs frames takes them from what nobody has, and who does not need
//! them gives them back.
//!
//! Each process decides for itself, from what all of them have written down: nobody waits for anybody. When nothing is
//! left and somebody lacks frames, those who have more than a fair part give some up at every look, and those who lack
//! none (they wait, or have finished) give up more, down to the least that a process can work with. A process that is stopped
//! (SIGSTOP) looks no more, and keeps what it has.

use core::ptr;

use pgmap_core::addr::PAGE_SIZE;
use pgmap_core::ram::Ram;
use pgmap_drivers::quota::Quota;
use pgmap_sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::memory::MIN_RAM_BYTES;
use crate::shared::{PROCESSES, Process, Region};

/// The least that a process can work with, in frames; it has that even if the budget has not.
const LEAST: u64 = MIN_RAM_BYTES / PAGE_SIZE as u64;
/// The part of its frames that a process gives up at one look is one in so many.
const STEP: u64 = 16;

/// One process's part of the budget.
#[derive(Debug)]
pub(crate) struct Grant {
    /// Bytes of the whole budget, which may change; those that processes have; and this process's.
    budget: &'static AtomicU64,
    used: &'static AtomicU64,
    processes: &'static [Process; PROCESSES],
    mine: &'static Process,
    /// Frames were short since the last look.
    pressed: AtomicBool,
    /// Frames of this process's part that files have which its program maps.
    files: AtomicU64,
}

impl Grant {
    /// The part of the process `mine`; its first frames are set as the limit of `ram`.
    pub(crate) fn new(region: Region, mine: &'static Process, ram: &Ram) -> Self {
        let grant = Self {
            budget: region.ram_bytes(),
            used: region.granted(),
            processes: region.processes(),
            mine,
            pressed: AtomicBool::new(false),
            files: AtomicU64::new(0),
        };
        grant.take(grant.chunk());
        grant
            .quota()
            .charge(bytes(LEAST.saturating_sub(grant.held())));
        ram.set_limit(grant.held());
        grant
    }

    /// Frames are short: takes more, if nobody has them and others do not need them as much. To be called often.
    pub(crate) fn grow(&self, ram: &Ram) {
        // Relaxed, here and below: numbers that stand alone.
        self.pressed.store(true, Ordering::Relaxed);
        self.mine.hungry.store(true, Ordering::Relaxed);
        let missing = self.fair().saturating_sub(self.held());
        if missing > 0 && self.free() > 0 {
            self.take(missing.min(self.chunk()));
            self.limit(ram, self.held());
        }
    }

    /// The files that the program maps have so many frames now: the rest of this process's part is for `ram`.
    pub(crate) fn note_files(&self, frames: u64, ram: &Ram) {
        let limit = self.limit_now(ram);
        self.files.store(frames, Ordering::Relaxed);
        self.limit(ram, limit);
        // Files do not wait for frames: more are to be had before they are needed.
        let wanted = ram.in_use() + frames + self.chunk() / 2;
        if frames > 0 && wanted > self.held() {
            self.grow(ram);
        }
    }

    /// Frames that files have which the program maps.
    pub(crate) fn files(&self) -> u64 {
        self.files.load(Ordering::Relaxed)
    }

    /// Frames that this process may use now, those of files included.
    fn limit_now(&self, ram: &Ram) -> u64 {
        let files = self.files.load(Ordering::Relaxed);
        ram.limit().saturating_add(files).min(self.held())
    }

    /// Frames that this process may use from now on: what files do not have of them is for `ram`, but never less than a process
    /// can work with.
    fn limit(&self, ram: &Ram, frames: u64) {
        let files = self.files.load(Ordering::Relaxed);
        ram.set_limit(frames.saturating_sub(files).max(LEAST));
    }

    /// Gives back what is not needed, and some of what others need more. To be called now and then, by one thread.
    pub(crate) fn look(&self, ram: &Ram) {
        let pressed = self.pressed.swap(false, Ordering::Relaxed);
        self.mine.hungry.store(pressed, Ordering::Relaxed);
        // `grow` may have raised the limit by what this gave back just then.
        let mut limit = self.limit_now(ram).min(self.share());
        let used = ram.in_use() + self.files.load(Ordering::Relaxed);
        if !pressed {
            limit = limit.min(used + (used / 4).max(LEAST));
        }
        if self.hungry_others() > 0 {
            let floor = if pressed { self.fair() } else { LEAST };
            let less = limit - limit / STEP;
            limit = limit.min(less.max(floor));
        }
        let limit = limit.max(LEAST);
        self.limit(ram, limit);
        // What is still in use above the limit is given back at a later look.
        let keep = limit.max(used);
        self.quota().give(bytes(self.held().saturating_sub(keep)));
    }

    /// The budget as it is now.
    fn quota(&self) -> Quota {
        Quota {
            limit: self.budget.load(Ordering::Relaxed),
            used: self.used,
            mine: &self.mine.granted,
        }
    }

    /// What of its frames a process may keep: all, unless the budget was lowered below what processes have.
    fn share(&self) -> u64 {
        let (held, quota) = (self.held(), self.quota());
        let used = frames(quota.used.load(Ordering::Relaxed)).max(1);
        let limit = frames(quota.limit);
        if used <= limit {
            return held;
        }
        let share = u128::from(held) * u128::from(limit) / u128::from(used);
        u64::try_from(share).unwrap_or(held)
    }

    /// What each process that lacks frames could have.
    fn fair(&self) -> u64 {
        frames(self.quota().limit) / (self.hungry_others() + 1)
    }

    fn hungry_others(&self) -> u64 {
        let others = self.processes.iter();
        let others = others.filter(|process| !ptr::eq(*process, self.mine));
        let hungry = others.filter(|process| process.hungry.load(Ordering::Relaxed));
        hungry.count() as u64
    }

    /// Frames that are taken at a time.
    fn chunk(&self) -> u64 {
        (frames(self.quota().limit) / 16).max(LEAST)
    }

    /// Frames that this process has.
    pub(crate) fn held(&self) -> u64 {
        frames(self.mine.granted.load(Ordering::Relaxed))
    }

    /// Frames that nobody has.
    fn free(&self) -> u64 {
        let used = self.used.load(Ordering::Relaxed);
        frames(self.quota().limit.saturating_sub(used))
    }

    /// Takes up to `most` of the frames that nobody has; none if somebody else takes them just now.
    fn take(&self, most: u64) {
        let _ = self.quota().take(bytes(most.min(self.free())));
    }
}

const fn bytes(frames: u64) -> u64 {
    frames * PAGE_SIZE as u64
}

const fn frames(bytes: u64) -> u64 {
    bytes / PAGE_SIZE as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgmap_core::addr::Pfn;
    use pgmap_core::memremap::MemoryMap;
    use pgmap_host::platform::HostPlatform;
    use std::sync::Arc;

    const BUDGET: u64 = 16384;

    /// A process of the model: its frames, and how many it would like to have.
    struct Model {
        ram: Ram,
        grant: Grant,
        used: Vec<Pfn>,
        wanted: usize,
    }

    impl Model {
        fn start(region: Region, pid: u32) -> Self {
            let map = MemoryMap::new(&HostPlatform, BUDGET).unwrap();
            let ram = Arc::clone(&map).add_ram(BUDGET).unwrap();
            let (_, process) = region.claim(pid).unwrap();
            let grant = Grant::new(region, process, &ram);
            let used = Vec::new();
            Self {
                ram,
                grant,
                used,
                wanted: 0,
            }
        }

        /// What happens between two looks: it frees what is above the limit, and takes what it wants and can have.
        fn run(&mut self) {
            let above = usize::try_from(self.ram.deficit()).unwrap();
            let at = self.used.len() - above.min(self.used.len());
            self.ram.free(&self.used.split_off(at));
            while self.used.len() < self.wanted && self.take() {}
            self.grant.look(&self.ram);
        }

        /// Takes some of what it wants. Whether there may be more.
        fn take(&mut self) -> bool {
            let mut out = [Pfn::from_u32(0); 64];
            let most = (self.wanted - self.used.len()).min(out.len());
            let taken = self.ram.alloc(&mut out[..most]);
            self.used.extend(&out[..taken]);
            if taken < most {
                self.grant.grow(&self.ram);
            }
            taken == most || self.ram.free_count() > 0
        }
    }

    fn used(models: &[Model]) -> Vec<u64> {
        models.iter().map(|model| model.ram.in_use()).collect()
    }

    /// Runs for ten seconds, about. The budget is never passed.
    fn run(region: Region, models: &mut [Model]) {
        for _ in 0..100 {
            models.iter_mut().for_each(Model::run);
            assert!(used(models).iter().sum::<u64>() <= BUDGET);
            let held = models.iter().map(|model| model.grant.held()).sum();
            assert_eq!(frames(region.granted().load(Ordering::Relaxed)), held);
        }
    }

    fn region() -> Region {
        Region::create(bytes(BUDGET), 0).unwrap().0
    }

    /// One that is alone has all of it, and gives back what it does not use.
    #[test]
    fn one_process_has_everything() {
        let region = region();
        let mut models = [Model::start(region, 1)];
        models[0].wanted = usize::MAX;
        run(region, &mut models);
        assert_eq!(used(&models), [BUDGET]);
        models[0].wanted = 1000;
        let surplus = models[0].used.split_off(1000);
        models[0].ram.free(&surplus);
        run(region, &mut models);
        assert_eq!((used(&models), models[0].grant.held()), (vec![1000], 1256));
    }

    /// Those who need more than there is have equal parts; one that needs less has what it needs.
    #[test]
    fn the_needy_share_what_the_modest_leave() {
        let region = region();
        let mut models = [1, 2, 3].map(|pid| Model::start(region, pid));
        models[0].wanted = usize::MAX;
        run(region, &mut models);
        models[1].wanted = usize::MAX;
        models[2].wanted = 1000;
        run(region, &mut models);
        let used = used(&models);
        assert!(used[..2].iter().all(|used| *used > BUDGET / 3), "{used:?}");
        assert_eq!(used[2], 1000);
    }

    /// One that waits does not keep from others what it does not use now.
    #[test]
    fn who_waits_makes_room() {
        let region = region();
        let mut models = [1, 2].map(|pid| Model::start(region, pid));
        models[0].wanted = usize::MAX;
        run(region, &mut models);
        models[0].wanted = 0;
        models[1].wanted = usize::MAX;
        run(region, &mut models);
        assert_eq!(used(&models), [LEAST, BUDGET - LEAST]);
    }

    /// What a process had that was killed is there for the others.
    #[test]
    fn the_dead_leave_their_part() {
        let region = region();
        let mut models = [1, 2].map(|pid| Model::start(region, pid));
        models[0].wanted = usize::MAX;
        run(region, &mut models);
        region.reap(|pid| pid == 1, |_| {});
        models[1].wanted = usize::MAX;
        run(region, &mut models[1..]);
        assert_eq!(used(&models[1..]), [BUDGET]);
    }

    /// HOT-5: when the budget is lowered, everybody gives back in proportion; when it is raised again, they have it again.
    #[test]
    fn a_lower_budget_is_kept_by_all_and_a_higher_one_is_used() {
        let region = region();
        let mut models = [1, 2].map(|pid| Model::start(region, pid));
        for model in &mut models {
            model.wanted = usize::MAX;
        }
        run(region, &mut models);
        let store = |budget| region.ram_bytes().store(bytes(budget), Ordering::Relaxed);
        store(BUDGET / 4);
        run(region, &mut models);
        let kept = used(&models);
        assert!(kept.iter().sum::<u64>() <= BUDGET / 4, "{kept:?}");
        assert!(kept.iter().all(|used| *used > BUDGET / 16), "{kept:?}");
        store(BUDGET);
        run(region, &mut models);
        let kept = used(&models);
        assert!(kept.iter().all(|used| *used > BUDGET / 3), "{kept:?}");
    }
}
