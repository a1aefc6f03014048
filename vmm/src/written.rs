//! The pages that a start writes to: recorded by the first child of a template, copied beforehand in every later one.
//!
//! A page of a template that a guest reads first and writes then costs a child three exits: one to enter it for reading,
//! one that ends with the host's copy and with what KVM had entered taken away, one to enter the copy. Which pages these
//! are hardly changes from start to start. So the first child looks which of its pages are copies, twice: before it answers
//! the guest's first request for a file, that is when the identity is applied and the container is about to be made
//! (*early*), and when it is asked, the container being made (*late*). Later children have theirs copied at the same two
//! moments, before the guest comes to them.
//!
//! A list that is wrong costs time and memory, both bounded, and nothing else: it names pages and holds no content.

mod record;

use std::{fs::File, io, os::unix::fs::FileExt as _};

use rustix::mm::{Advice, madvise};
use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemory as _, GuestMemoryRegion as _, GuestRegionMmap, MemoryRegionAddress};

pub(crate) use record::Recorder;

use crate::memory::{GuestMemory, PAGE};

/// Version of the file.
const VERSION: u32 = 1;

/// Most runs of a list: some ten bytes each, so that two lists fit into a packet of the control socket.
const MAX_RUNS: usize = 2000;

/// Most pages of both lists, three times what a start writes: 16 MiB.
const MAX_PAGES: u64 = 4096;

/// Upper bound of the file's length in bytes.
const MAX_BYTES: u64 = 64 << 10;

/// What can be wrong with a list. The child then copies nothing beforehand.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    /// No JSON of this form.
    #[error("it is no list of pages: {0}")]
    Syntax(#[from] serde_json::Error),
    /// Another version, too many pages, runs out of order, or outside the memory.
    #[error("its pages are not in order, too many, or not in the guest's memory")]
    Pages,
}

/// Pages that follow each other: the first one's offset in the memory file in pages of 4 KiB, and how many.
pub type Run = (u64, u64);

/// The lists, each in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Written {
    version: u32,
    /// Written to until the guest asks for its first file.
    early: Vec<Run>,
    /// Written to from then until the container is made.
    late: Vec<Run>,
}

impl Written {
    /// The lists of pages in ascending order; what is more than a list may hold is left out.
    pub(crate) fn new(early: &[u64], late: &[u64]) -> Self {
        let mut left = MAX_PAGES;
        let mut runs = |pages: &[u64]| {
            let mut runs: Vec<Run> = Vec::new();
            for &page in pages {
                let full = runs.len() == MAX_RUNS;
                match runs.last_mut() {
                    _ if left == 0 => break,
                    Some((first, count)) if *first + *count == page => *count += 1,
                    _ if full => break,
                    _ => runs.push((page, 1)),
                }
                left -= 1;
            }
            runs
        };
        Self {
            version: VERSION,
            early: runs(early),
            late: runs(late),
        }
    }

    /// Reads a file of lists for `memory`.
    ///
    /// # Errors
    /// All of [`Error`].
    pub(crate) fn read(file: &File, memory: &GuestMemory) -> Result<Self, Error> {
        let length = file.metadata()?.len().min(MAX_BYTES);
        let mut text = vec![0; usize::try_from(length).map_err(|_| Error::Pages)?];
        file.read_exact_at(&mut text, 0)?;
        Self::parse(&text, memory)
    }

    fn parse(text: &[u8], memory: &GuestMemory) -> Result<Self, Error> {
        let written: Self = serde_json::from_slice(text)?;
        let bytes: u64 = memory.iter().map(|region| region.len()).sum();
        let mut total: u64 = 0;
        for list in [&written.early, &written.late] {
            let mut end = 0;
            for &(first, count) in list {
                let next = first.checked_add(count).ok_or(Error::Pages)?;
                total = total.saturating_add(count);
                if count == 0 || first < end || next > bytes / PAGE {
                    return Err(Error::Pages);
                }
                end = next;
            }
        }
        if written.version != VERSION || total > MAX_PAGES {
            return Err(Error::Pages);
        }
        Ok(written)
    }

    /// Whether nothing is recorded: the guest asked for no file, or its pages could not be looked at.
    pub(crate) fn is_empty(&self) -> bool {
        self.early.is_empty() && self.late.is_empty()
    }

    /// Copies the pages that are written to early.
    pub(crate) fn copy_early(&self, memory: &GuestMemory) {
        copy(&self.early, memory);
    }

    /// Copies those that are written to late.
    pub(crate) fn copy_late(&self, memory: &GuestMemory) {
        copy(&self.late, memory);
    }
}

fn copy(runs: &[Run], memory: &GuestMemory) {
    for &run in runs {
        for (region, start, pages) in parts(run, memory) {
            let Ok(slice) =
                region.get_slice(MemoryRegionAddress(start * PAGE), (pages * PAGE) as usize)
            else {
                continue;
            };
            let address = slice.ptr_guard_mut().as_ptr();
            // SAFETY: needed to have pages copied. The range is part of the guest's memory, as `get_slice` has checked; a
            // page that is copied early changes no byte.
            let copied =
                unsafe { madvise(address.cast(), slice.len(), Advice::LinuxPopulateWrite) };
            if let Err(error) = copied {
                // Then it is copied when it is written to.
                log::debug!("pages are not copied beforehand: {error}");
                return;
            }
        }
    }
}

/// A run as pieces of regions: the region, the first page in it, how many.
fn parts(
    (first, count): Run,
    memory: &GuestMemory,
) -> impl Iterator<Item = (&GuestRegionMmap<()>, u64, u64)> {
    let mut begin = 0;
    memory.iter().filter_map(move |region| {
        let (start, end) = (begin, begin + region.len() / PAGE);
        begin = end;
        let (from, to) = (first.max(start), (first + count).min(end));
        (from < to).then(|| (region, from - start, to - from))
    })
}

#[cfg(test)]
mod tests;
