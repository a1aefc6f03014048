//! Finding out which pages of a guest's memory are the monitor's own.
//!
//! A page of the template that was written to is anonymous memory in the monitor's page tables, one that was only read is
//! the file's (Documentation/admin-guide/mm/pagemap.rst).

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    sync::{Mutex, PoisonError},
};

use vm_memory::{GuestMemory as _, GuestMemoryRegion as _};

use super::Written;
use crate::memory::{GuestMemory, PAGE};

/// Bits of an entry of pagemap: the page is there, it was swapped out, it belongs to a file.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;

/// Bytes of an entry.
const ENTRY: usize = 8;

/// Entries that are read at once.
const CHUNK: u64 = 8192;

/// Records what the guest of this process writes to.
pub(crate) struct Recorder {
    pagemap: File,
    memory: GuestMemory,
    early: Mutex<Option<Vec<u64>>>,
}

impl Recorder {
    /// A recorder of `memory`. Opens a file of /proc.
    ///
    /// # Errors
    /// A /proc that is not there.
    pub(crate) fn new(memory: GuestMemory) -> io::Result<Self> {
        Ok(Self {
            pagemap: File::open("/proc/self/pagemap")?,
            memory,
            early: Mutex::new(None),
        })
    }

    /// What was written to so far is early.
    pub(crate) fn note_early(&self) {
        let pages = self.pages();
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        *early = pages
            .inspect_err(|error| log::warn!("what a start writes to is not known: {error}"))
            .ok();
    }

    /// What was written to since then is late. Nothing, if no file was asked for.
    pub(crate) fn finish(&self) -> io::Result<Written> {
        let late = self.pages()?;
        let early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(match early.as_deref() {
            Some(early) => {
                let new = |page: &u64| early.binary_search(page).is_err();
                let late: Vec<_> = late.into_iter().filter(new).collect();
                Written::new(early, &late)
            }
            None => Written::new(&[], &[]),
        })
    }

    /// The pages that are this process's own, in ascending order.
    pub(crate) fn pages(&self) -> io::Result<Vec<u64>> {
        let mut pages = Vec::new();
        let mut buffer = vec![0; CHUNK as usize * ENTRY];
        let mut offset = 0;
        for region in self.memory.iter() {
            let base = region.as_ptr() as u64 / PAGE;
            let count = region.len() / PAGE;
            for begin in (0..count).step_by(CHUNK as usize) {
                let entries = &mut buffer[..(count - begin).min(CHUNK) as usize * ENTRY];
                self.pagemap
                    .read_exact_at(entries, (base + begin) * ENTRY as u64)?;
                let (entries, _) = entries.as_chunks::<ENTRY>();
                pages.extend((offset + begin..).zip(entries).filter_map(|(page, entry)| {
                    let entry = u64::from_ne_bytes(*entry);
                    (entry & (PRESENT | SWAPPED) != 0 && entry & FILE == 0).then_some(page)
                }));
            }
            offset += count;
        }
        Ok(pages)
    }
}
