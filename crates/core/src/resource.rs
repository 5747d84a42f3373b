//! The resource tree: which ranges of the physical address space are what, and whose.
//!
//! Matched by flags and descriptor, never by name (HOT-1): names are for people. `Resources` adds which device mapping has
//! which of the ranges, for `memremap`.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use crate::addr::{PAGE_SHIFT, Pfn, PfnRange};
use crate::memremap::{MapError, aligned};

/// What a resource is, as a set of flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flags(u8);

impl Flags {
    /// Memory of any kind.
    pub const MEMORY: Self = Self(1);
    /// Memory that is System RAM.
    pub const SYSTEM_RAM: Self = Self(1 | 2);
    /// Somebody uses it: nobody else can request it, or a part of it.
    pub const BUSY: Self = Self(4);
    /// Nobody but its owner may map it.
    pub const EXCLUSIVE: Self = Self(8);

    /// The flags of both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all flags of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What memory a resource is, more closely than its flags tell.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Descriptor {
    /// Nothing more is known; in a question, anything.
    None,
    /// Persistent memory.
    PersistentMemory,
    /// Memory of a device that the CPU cannot address.
    DevicePrivate,
    /// Memory that is not used as RAM unless somebody asks for it.
    SoftReserved,
}

/// A range of the physical address space, what it is, and what lies in it.
///
/// # Invariants
///
/// The children lie inside the range, do not overlap, and are sorted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resource {
    range: PfnRange,
    flags: Flags,
    descriptor: Descriptor,
    name: String,
    children: Vec<Resource>,
}

/// What stands in the way of a resource.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{name} is in the way, from {:?} on", range.start())]
pub struct InTheWay {
    /// Its frames.
    pub range: PfnRange,
    /// What it is.
    pub flags: Flags,
    /// What people know it by.
    pub name: String,
}

/// No resource has this range to give back: it is not there, not busy and longer, or something lies in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no resource has the {} frames from {:?} on to give back", .0.count(), .0.start())]
pub struct NotThere(pub PfnRange);

/// How a range lies to resources of a kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Intersection {
    /// No frame is of the kind.
    Disjoint,
    /// Some are, and no other resource is in the range.
    Intersects,
    /// Some are, and others are in other resources.
    Mixed,
}

impl Resource {
    /// A resource with nothing in it.
    #[must_use]
    pub fn new(range: PfnRange, flags: Flags, descriptor: Descriptor, name: &str) -> Self {
        Self {
            range,
            flags,
            descriptor,
            name: name.into(),
            children: Vec::new(),
        }
    }

    /// Its frames.
    #[must_use]
    pub const fn range(&self) -> PfnRange {
        self.range
    }

    /// What it is.
    #[must_use]
    pub const fn flags(&self) -> Flags {
        self.flags
    }

    /// What it is, more closely.
    #[must_use]
    pub const fn descriptor(&self) -> Descriptor {
        self.descriptor
    }

    /// What people know it by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What lies in it.
    #[must_use]
    pub fn children(&self) -> &[Self] {
        &self.children
    }

    fn in_the_way(&self) -> InTheWay {
        InTheWay {
            range: self.range,
            flags: self.flags,
            name: self.name.clone(),
        }
    }

    fn is(&self, flags: Flags, descriptor: Descriptor) -> bool {
        self.flags.contains(flags)
            && (descriptor == Descriptor::None || descriptor == self.descriptor)
    }
}

/// All resources.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ResourceTree {
    roots: Vec<Resource>,
}

impl ResourceTree {
    /// The resources that lie in no other.
    #[must_use]
    pub fn roots(&self) -> &[Resource] {
        &self.roots
    }

    /// Adds a resource, inside the smallest that contains it; what it contains itself becomes its children.
    ///
    /// # Errors
    ///
    /// [`InTheWay`] names the first resource that it overlaps, and that neither contains it nor is contained.
    #[doc(alias = "insert_resource")]
    pub fn insert(&mut self, mut new: Resource) -> Result<(), InTheWay> {
        let mut level = &mut self.roots;
        while let Some(nth) = position(level, |other| contains(other.range, new.range)) {
            level = &mut level[nth].children;
        }
        let overlapped = |other: &&Resource| other.range.intersects(new.range);
        let mut overlapped = level.iter().filter(overlapped);
        if let Some(other) = overlapped.find(|other| !contains(new.range, other.range)) {
            return Err(other.in_the_way());
        }
        let first = level.partition_point(|other| other.range.end() <= new.range.start().get());
        let inside = level[first..].partition_point(|other| other.range.intersects(new.range));
        new.children = level.drain(first..first + inside).collect();
        // INVARIANT: those before end before it, those after begin after it.
        level.insert(first, new);
        Ok(())
    }

    /// Makes a range busy, for one owner: inside the smallest resource that contains it and is not busy.
    ///
    /// # Errors
    ///
    /// [`InTheWay`] names the first resource that has some of the range.
    #[doc(alias = "request_mem_region")]
    pub fn request(&mut self, mut new: Resource) -> Result<(), InTheWay> {
        new.flags = new.flags.and(Flags::BUSY);
        let mut level = &mut self.roots;
        let is_free = |other: &Resource| !other.flags.contains(Flags::BUSY);
        while let Some(nth) = position(level, |other| {
            is_free(other) && contains(other.range, new.range)
        }) {
            level = &mut level[nth].children;
        }
        if let Some(nth) = position(level, |other| other.range.intersects(new.range)) {
            return Err(level[nth].in_the_way());
        }
        let place = level.partition_point(|other| other.range.start() < new.range.start());
        // INVARIANT: it overlaps none of its siblings, and is put in order.
        level.insert(place, new);
        Ok(())
    }

    /// Takes away a resource in which nothing lies. Of a busy one a part may be given back; the rest stays.
    ///
    /// # Errors
    ///
    /// [`NotThere`] if there is no such resource, or something lies in it.
    #[doc(alias = "release_mem_region")]
    pub fn release(&mut self, range: PfnRange) -> Result<(), NotThere> {
        let mut level = &mut self.roots;
        loop {
            let nth = position(level, |other| contains(other.range, range));
            let nth = nth.ok_or(NotThere(range))?;
            let may_go = level[nth].flags.contains(Flags::BUSY) || level[nth].range == range;
            if may_go && level[nth].children.is_empty() {
                let whole = level.remove(nth);
                let rest = outside(whole.range, range).map(|range| Resource {
                    range,
                    ..whole.clone()
                });
                // INVARIANT: parts of what stood here.
                level.splice(nth..nth, rest);
                return Ok(());
            }
            level = &mut level[nth].children;
        }
    }

    /// How a range lies to the resources that have all of `flags` and, unless that is [`Descriptor::None`], the descriptor.
    /// What lies in such a resource counts as it does.
    #[must_use]
    pub fn region_intersects(
        &self,
        range: PfnRange,
        flags: Flags,
        descriptor: Descriptor,
    ) -> Intersection {
        let (mut matched, mut other) = (0, 0);
        count(
            &self.roots,
            range,
            &|resource| resource.is(flags, descriptor),
            &mut (&mut matched, &mut other),
        );
        match (matched, other) {
            (0, _) => Intersection::Disjoint,
            (_, 0) => Intersection::Intersects,
            (_, _) => Intersection::Mixed,
        }
    }

    /// The first busy resource that has some of a range.
    pub(crate) fn first_busy(&self, range: PfnRange) -> Option<&Resource> {
        fn find(level: &[Resource], range: PfnRange) -> Option<&Resource> {
            let mut level = level.iter().filter(|other| other.range.intersects(range));
            level.find_map(|other| {
                let busy = other.flags.contains(Flags::BUSY);
                busy.then_some(other)
                    .or_else(|| find(&other.children, range))
            })
        }
        find(&self.roots, range)
    }
}

/// Counts the frames of a range that are in a resource of the kind, and those that are only in others.
fn count(
    level: &[Resource],
    range: PfnRange,
    is: &impl Fn(&Resource) -> bool,
    (matched, other): &mut (&mut u64, &mut u64),
) -> u64 {
    let mut covered = 0;
    for resource in level {
        let Some(part) = common(resource.range, range) else {
            continue;
        };
        covered += part.count();
        if is(resource) {
            **matched += part.count();
        } else {
            let inside = count(&resource.children, part, is, &mut (matched, other));
            **other += part.count() - inside;
        }
    }
    covered
}

fn position(level: &[Resource], wanted: impl Fn(&Resource) -> bool) -> Option<usize> {
    level.iter().position(wanted)
}

const fn contains(outer: PfnRange, inner: PfnRange) -> bool {
    outer.start().get() <= inner.start().get() && inner.end() <= outer.end()
}

fn between(start: u64, end: u64) -> Option<PfnRange> {
    PfnRange::new(Pfn::new(start)?, end.checked_sub(start)?)
}

fn common(a: PfnRange, b: PfnRange) -> Option<PfnRange> {
    let start = a.start().max(b.start()).get();
    between(start, a.end().min(b.end()))
}

/// What is left of `whole` without `part`.
fn outside(whole: PfnRange, part: PfnRange) -> impl Iterator<Item = PfnRange> {
    let before = between(whole.start().get(), part.start().get());
    before.into_iter().chain(between(part.end(), whole.end()))
}

/// As `/proc/iomem` shows it: first and last byte, and the name; children indented.
impl fmt::Display for ResourceTree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn write(f: &mut fmt::Formatter<'_>, level: &[Resource], depth: usize) -> fmt::Result {
            for resource in level {
                let first = resource.range.start().get() << PAGE_SHIFT;
                let last = (resource.range.end() << PAGE_SHIFT) - 1;
                let (indent, name) = (depth * 2, &resource.name);
                writeln!(f, "{:indent$}{first:08x}-{last:08x} : {name}", "")?;
                write(f, &resource.children, depth + 1)?;
            }
            Ok(())
        }
        write(f, &self.roots, 0)
    }
}

/// The resource tree, and which device mapping has which ranges of it.
#[derive(Debug, Default)]
pub(crate) struct Resources {
    pub(crate) tree: ResourceTree,
    devices: Vec<(u8, PfnRange)>,
    /// The end of the RAM that was there first: private memory is numbered behind it.
    after_ram: Option<u64>,
}

impl Resources {
    /// Enters the RAM that is there from the start.
    pub(crate) fn add_ram(&mut self, range: PfnRange) -> Result<(), MapError> {
        if self.after_ram.is_some() {
            return Err(MapError::RamTwice);
        }
        self.enter_ram(range)?;
        self.after_ram = Some(aligned(range).1);
        Ok(())
    }

    /// How many frames of a range are System RAM.
    pub(crate) fn ram_frames(&self, range: PfnRange) -> u64 {
        let (mut ram, mut other) = (0, 0);
        let is_ram = |resource: &Resource| resource.is(Flags::SYSTEM_RAM, Descriptor::None);
        count(
            &self.tree.roots,
            range,
            &is_ram,
            &mut (&mut ram, &mut other),
        );
        ram
    }

    /// Enters a range as System RAM.
    pub(crate) fn enter_ram(&mut self, range: PfnRange) -> Result<(), MapError> {
        if let Some(other) = self.tree.first_busy(whole(range)) {
            return Err(MapError::Conflict(other.range));
        }
        let flags = Flags::SYSTEM_RAM;
        let ram = Resource::new(range, flags, Descriptor::None, "System RAM");
        let entered = self.tree.request(ram);
        entered.map_err(|other| MapError::Conflict(other.range))
    }

    /// Reserves ranges for a device: all, or none and an error that names the range in the way (MAP-2, MAP-3).
    pub(crate) fn insert(&mut self, device: u8, ranges: &[PfnRange]) -> Result<(), MapError> {
        for (nth, range) in ranges.iter().enumerate() {
            let used = whole(*range);
            let ram = (Flags::SYSTEM_RAM, Descriptor::None);
            if self.tree.region_intersects(used, ram.0, ram.1) != Intersection::Disjoint {
                return Err(MapError::IntersectsRam(*range));
            }
            if let Some(other) = self.tree.first_busy(used) {
                return Err(MapError::Conflict(other.range));
            }
            let mut earlier = ranges[..nth].iter();
            if let Some(other) =
                earlier.find(|other| other.intersects(used) || whole(**other).intersects(used))
            {
                return Err(MapError::Conflict(*other));
            }
        }
        for (nth, range) in ranges.iter().enumerate() {
            let new = Resource::new(*range, Flags::MEMORY, Descriptor::None, "device");
            if let Err(other) = self.tree.request(new) {
                // A resource that is not busy, but ends inside the range.
                self.forget(&ranges[..nth]);
                return Err(MapError::Conflict(other.range));
            }
        }
        self.devices
            .extend(ranges.iter().map(|range| (device, *range)));
        Ok(())
    }

    /// Says what a device's ranges are, and what people know it by.
    pub(crate) fn describe(&mut self, device: u8, descriptor: Descriptor, name: &str) {
        fn find(level: &mut [Resource], range: PfnRange) -> Option<&mut Resource> {
            let nth = position(level, |other| contains(other.range, range))?;
            let found = &mut level[nth];
            if found.range == range && found.flags.contains(Flags::BUSY) {
                return Some(found);
            }
            find(&mut found.children, range)
        }
        for (_, range) in self.devices.iter().filter(|(owner, _)| *owner == device) {
            if let Some(resource) = find(&mut self.tree.roots, *range) {
                resource.descriptor = descriptor;
                resource.name = name.into();
            }
        }
    }

    pub(crate) fn remove(&mut self, device: u8) {
        let (gone, kept) = self.devices.iter().partition(|(owner, _)| *owner == device);
        self.devices = kept;
        let gone: Vec<(u8, PfnRange)> = gone;
        let ranges: Vec<PfnRange> = gone.iter().map(|(_, range)| *range).collect();
        self.forget(&ranges);
    }

    fn forget(&mut self, ranges: &[PfnRange]) {
        for range in ranges {
            let released = self.tree.release(*range);
            debug_assert_eq!(released, Ok(()), "a device's range was not reserved");
        }
    }

    pub(crate) fn is_used(&self, device: u8) -> bool {
        self.devices.iter().any(|(owner, _)| *owner == device)
    }

    /// The lowest whole sub-sections after RAM that have room for so many frames.
    pub(crate) fn find_room(&self, frames: u64) -> Option<PfnRange> {
        self.room(
            frames,
            self.after_ram.unwrap_or(0),
            crate::sparse::SUBSECTION_FRAMES,
        )
    }

    /// The lowest free frames at or after `from`, aligned to `align` frames.
    pub(crate) fn room(&self, frames: u64, from: u64, align: u64) -> Option<PfnRange> {
        let ends = self.tree.roots.iter().map(|root| aligned(root.range).1);
        ends.chain([from])
            .filter(|start| *start >= from)
            .filter_map(|start| {
                let start = start.checked_next_multiple_of(align)?;
                PfnRange::new(Pfn::new(start)?, frames)
            })
            .filter(|room| {
                let room = whole(*room);
                let mut roots = self.tree.roots.iter();
                !roots.any(|root| whole(root.range).intersects(room))
            })
            .min_by_key(|room| room.start())
    }
}

/// The sub-sections that a range touches (MAP-2: tests are made on the ranges that will really be used).
fn whole(range: PfnRange) -> PfnRange {
    let (start, end) = aligned(range);
    between(start, end).unwrap_or(range)
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
