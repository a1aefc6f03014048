//! Giving memory back: the host's pages behind a part of the guest's memory, which the guest does
//! not use, go back to the host.

use std::{collections::BTreeMap, io};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion};

use super::{Error, GuestMemory, PAGE, Segment, regions};

/// Most stretches into which the rest of a template's mapping is cut. Each is a mapping, and so is what lies between two of
/// them; a process may have 65530 (vm.max_map_count, Documentation/admin-guide/sysctl/vm.rst).
const MAX_STRETCHES: usize = 16 << 10;

/// What guest memory is mapped from, as far as giving it back goes.
#[derive(Debug, Default)]
pub enum Backing {
    /// Anonymous memory.
    #[default]
    Anonymous,
    /// Anonymous memory, and in these places the template's file, private.
    Template(Stretches),
}

/// Stretches of guest-physical addresses: where each starts, and where it ends.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Stretches(BTreeMap<u64, u64>);

impl Stretches {
    /// Whether any address from `start` to `end` is in one.
    fn meet(&self, start: u64, end: u64) -> bool {
        self.0
            .range(..end)
            .next_back()
            .is_some_and(|(_, &last)| last > start)
    }

    /// Takes the addresses from `start` to `end` out.
    fn remove(&mut self, start: u64, end: u64) {
        while let Some((&first, &last)) = self.0.range(..end).next_back() {
            if last <= start {
                return;
            }
            self.0.remove(&first);
            if last > end {
                self.0.insert(end, last);
            }
            if first < start {
                self.0.insert(first, start);
            }
        }
    }
}

impl Backing {
    /// That of a child's memory, as [`super::private`] has made it of `segments`.
    ///
    /// # Errors
    /// [`Error::Size`].
    pub fn template(bytes: u64, segments: &[Segment]) -> Result<Self, Error> {
        let mut stretches = BTreeMap::new();
        for region in regions(bytes)? {
            for segment in segments {
                let start = segment.offset.max(region.offset);
                let end = (segment.offset + segment.bytes).min(region.offset + region.bytes);
                if start < end {
                    let address = |offset| region.start + (offset - region.offset);
                    stretches.insert(address(start), address(end));
                }
            }
        }
        Ok(Backing::Template(Stretches(stretches)))
    }

    /// Gives back the whole pages of `memory` from `start` on, `bytes` long, as far as there is
    /// memory there. The guest reads zeros from them afterwards or, where the template's mapping
    /// cannot be cut any further, what the template has.
    ///
    /// # Errors
    /// What the host says. The guest's memory is as before, or given back in part.
    pub fn give_back(
        &mut self,
        memory: &GuestMemory,
        start: GuestAddress,
        bytes: u64,
    ) -> io::Result<()> {
        let end = start.0.saturating_add(bytes) / PAGE * PAGE;
        let Some(start) = start.0.checked_next_multiple_of(PAGE) else {
            return Ok(());
        };
        for region in memory.iter() {
            let first = region.start_addr().0;
            let from = start.max(first);
            let to = end.min(first + region.len());
            if from < to {
                // Both fit: the region is mapped.
                let address = region.as_ptr().wrapping_add((from - first) as usize);
                self.give_back_mapped(address, from, to)?;
            }
        }
        Ok(())
    }

    /// `address` is where the guest's memory from `start` to `end` is mapped.
    fn give_back_mapped(&mut self, address: *mut u8, start: u64, end: u64) -> io::Result<()> {
        let length = (end - start) as usize;
        let advice = match self {
            Backing::Anonymous => Advice::LinuxDontNeed,
            Backing::Template(stretches)
                if stretches.meet(start, end) && stretches.0.len() < MAX_STRETCHES =>
            {
                // MADV_DONTNEED would bring the template's pages back: the next write copies one
                // where an empty page would do.
                let protection = ProtFlags::READ | ProtFlags::WRITE;
                let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
                // SAFETY: replaces pages of the guest's memory at once, at the same address and
                // with the same rights, so every pointer to them stays good; what they hold is
                // the guest's, which may change it at any time, so nothing relies on it.
                unsafe { mmap_anonymous(address.cast(), length, protection, flags) }?;
                stretches.remove(start, end);
                return Ok(());
            }
            Backing::Template(_) => Advice::LinuxDontNeed,
        };
        // SAFETY: the range is mapped guest memory and stays mapped; only what it holds changes,
        // which is the guest's, as above.
        Ok(unsafe { madvise(address.cast(), length, advice) }?)
    }
}

#[cfg(test)]
mod tests;
