//! Guest memory: where it lies in the guest, and what it is mapped from.
//!
//! Up to 3 GiB lie from address 0; what is more lies from 4 GiB, behind the window of the devices.
//! In a template's memory file both follow each other without a gap.
//!
//! | machine | mapped from |
//! |---|---|
//! | cold boot | anonymous memory |
//! | child | the memory file `MAP_PRIVATE` where it has data, anonymous memory where it has holes: a first touch of a hole then does not fill the page cache |
//!
//! A freeze writes what is not zero into a new memory file. Nobody ever maps one for writing: a private mapping shows later
//! writes of others.
//!
//! Each region is one contiguous host range, so it is one KVM memory slot however many mappings
//! it consists of.

mod backing;

pub use backing::Backing;

use std::{
    fs::File,
    io::{self, Seek as _, SeekFrom},
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use serde::{Deserialize, Serialize};
use vm_memory::{
    Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress, MmapRegion, mmap::MmapRegionBuilder,
};

/// Memory of one guest.
pub type GuestMemory = GuestMemoryMmap<()>;

/// End of the low region. Above it, up to [`HIGH_START`], lie the devices and the interrupt
/// controllers.
pub const LOW_END: u64 = 0xc000_0000;

/// Start of the region of what does not fit below [`LOW_END`].
pub const HIGH_START: u64 = 0x1_0000_0000;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// A guest has a multiple of this many bytes.
pub const GRANULE: u64 = 2 << 20;

/// Smallest memory of a guest in bytes.
pub const MIN_BYTES: u64 = 16 << 20;

/// Largest memory of a guest in bytes.
pub const MAX_BYTES: u64 = 1 << 40;

/// Holes shorter than this stay part of the data around them, so that a child has few mappings.
const SHORTEST_HOLE: u64 = 256 << 10;

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A size that no guest can have.
    #[error(
        "a guest cannot have {0} bytes of memory: it must be a multiple of 2 MiB, from 16 MiB to 1 TiB"
    )]
    Size(u64),
    /// A list of segments that does not fit the memory.
    #[error("the template's memory segments are not in order or outside its memory")]
    Segments,
    /// A memory file of another length than the machine's memory.
    #[error("the template's memory file has {actual} bytes, it should have {expected}")]
    FileSize {
        /// Length of the file.
        actual: u64,
        /// Bytes of memory in the state.
        expected: u64,
    },
    /// A mapping that the host refused.
    #[error("cannot map the guest's memory: {0}")]
    Map(io::Error),
    /// The memory file cannot be read or changed.
    #[error("template memory file: {0}")]
    File(io::Error),
}

/// One contiguous piece of a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Where it lies in the memory file.
    pub offset: u64,
}

/// A stretch of the memory file that holds data, in bytes, on page borders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Offset in the memory file.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
}

/// The regions of a guest with `bytes` of memory.
///
/// # Errors
/// [`Error::Size`].
pub fn regions(bytes: u64) -> Result<Vec<Region>, Error> {
    if !(MIN_BYTES..=MAX_BYTES).contains(&bytes) || !bytes.is_multiple_of(GRANULE) {
        return Err(Error::Size(bytes));
    }
    let low = bytes.min(LOW_END);
    let mut regions = vec![Region {
        start: 0,
        bytes: low,
        offset: 0,
    }];
    if bytes > low {
        regions.push(Region {
            start: HIGH_START,
            bytes: bytes - low,
            offset: low,
        });
    }
    Ok(regions)
}

/// Memory of a machine that boots.
///
/// # Errors
/// [`Error::Size`], [`Error::Map`].
pub fn anonymous(bytes: u64) -> Result<GuestMemory, Error> {
    collect(bytes, map)
}

/// Memory of a child: the segments of `file` copy-on-write, the rest empty.
///
/// # Errors
/// [`Error::Size`], [`Error::FileSize`], [`Error::Segments`], [`Error::Map`].
pub fn private(file: &File, bytes: u64, segments: &[Segment]) -> Result<GuestMemory, Error> {
    check(bytes, segments)?;
    let actual = file.metadata().map_err(Error::File)?.len();
    if actual != bytes {
        return Err(Error::FileSize {
            actual,
            expected: bytes,
        });
    }
    collect(bytes, |region| {
        let mapping = map(region)?;
        for segment in segments {
            let start = segment.offset.max(region.offset);
            let end = (segment.offset + segment.bytes).min(region.offset + region.bytes);
            if start < end {
                overlay(&mapping, start - region.offset, file, start, end - start)?;
            }
        }
        Ok(mapping)
    })
}

fn collect(
    bytes: u64,
    mut map: impl FnMut(Region) -> Result<MmapRegion, Error>,
) -> Result<GuestMemory, Error> {
    let mut mapped = Vec::new();
    for region in regions(bytes)? {
        let mapping = map(region)?;
        mapped.push(
            GuestRegionMmap::new(mapping, GuestAddress(region.start)).ok_or(Error::Size(bytes))?,
        );
    }
    GuestMemory::from_regions(mapped).map_err(|_| Error::Size(bytes))
}

fn map(region: Region) -> Result<MmapRegion, Error> {
    let length = usize::try_from(region.bytes).map_err(|_| Error::Size(region.bytes))?;
    MmapRegionBuilder::new(length)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()
        .map_err(|error| Error::Map(io::Error::other(error)))
}

/// Replaces `bytes` at `at` of an anonymous mapping by a private mapping of `file`.
fn overlay(
    mapping: &MmapRegion,
    at: u64,
    file: &File,
    offset: u64,
    bytes: u64,
) -> Result<(), Error> {
    let range = (
        usize::try_from(at),
        usize::try_from(bytes),
        i64::try_from(offset),
    );
    let (Ok(at), Ok(length), Ok(offset)) = range else {
        return Err(Error::Segments);
    };
    if at
        .checked_add(length)
        .is_none_or(|end| end > mapping.size())
    {
        return Err(Error::Segments);
    }
    let address = mapping.as_ptr().wrapping_add(at);
    // SAFETY: replaces pages of `mapping`, which owns the range `address..address + length` (the
    // bounds are checked above) and has handed out no reference into it yet. The new pages are
    // readable and writable like the old ones, and `MmapRegion` unmaps the whole range by its
    // length, whatever it consists of.
    let mapped = unsafe {
        libc::mmap(
            address.cast(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED,
            file.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(Error::Map(io::Error::last_os_error()));
    }
    Ok(())
}

/// Whether `segments` are on page borders, in order, apart from each other and inside the memory.
fn check(bytes: u64, segments: &[Segment]) -> Result<(), Error> {
    let mut end = 0;
    for segment in segments {
        let next = segment.offset.checked_add(segment.bytes);
        if segment.bytes == 0
            || !segment.offset.is_multiple_of(PAGE)
            || !segment.bytes.is_multiple_of(PAGE)
            || segment.offset < end
            || next.is_none_or(|next| next > bytes)
        {
            return Err(Error::Segments);
        }
        end = segment.offset + segment.bytes;
    }
    Ok(())
}

/// Writes the pages that are not zero to `file`, which is empty and becomes as long as the memory; returns where they are,
/// with holes shorter than 256 KiB counted as data. The guest must not run.
///
/// # Errors
/// [`Error::File`].
pub fn write(file: &File, memory: &GuestMemory) -> Result<Vec<Segment>, Error> {
    let mut segments: Vec<Segment> = Vec::new();
    let mut offset = 0;
    for region in memory.iter() {
        for run in data(region) {
            let bytes = usize::try_from(run.bytes).map_err(|_| Error::Segments)?;
            (&mut &*file)
                .seek(SeekFrom::Start(offset + run.offset))
                .map_err(Error::File)?;
            region
                .write_all_volatile_to(MemoryRegionAddress(run.offset), &mut &*file, bytes)
                .map_err(|error| Error::File(io::Error::other(error)))?;
            let start = offset + run.offset;
            match segments.last_mut() {
                Some(last) if start - (last.offset + last.bytes) < SHORTEST_HOLE => {
                    last.bytes = start + run.bytes - last.offset;
                }
                _ => segments.push(Segment {
                    offset: start,
                    bytes: run.bytes,
                }),
            }
        }
        offset += region.len();
    }
    file.set_len(offset).map_err(Error::File)?;
    Ok(segments)
}

/// The runs of pages of a region that are not zero; offsets are from its start.
fn data(region: &GuestRegionMmap<()>) -> Vec<Segment> {
    let mut runs: Vec<Segment> = Vec::new();
    for page in (0..region.len() / PAGE).map(|page| page * PAGE) {
        if is_zero(region, page) {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.offset + last.bytes == page => last.bytes += PAGE,
            _ => runs.push(Segment {
                offset: page,
                bytes: PAGE,
            }),
        }
    }
    runs
}

fn is_zero(region: &GuestRegionMmap<()>, at: u64) -> bool {
    let Ok(at) = usize::try_from(at) else {
        return false;
    };
    let address = region.as_ptr().wrapping_add(at).cast::<u64>();
    (0..PAGE as usize / 8).all(|index| {
        let word = address.wrapping_add(index);
        // SAFETY: the page lies inside the region's mapping, which lives as long as `region`, and
        // is aligned; the read is volatile because guest memory belongs to no Rust object.
        unsafe { word.read_volatile() == 0 }
    })
}

/// CRC-32 of the data segments of a memory file, one behind the other.
///
/// # Errors
/// Those of reading.
pub fn checksum(file: &File, segments: &[Segment]) -> io::Result<u32> {
    let mut hash = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    for segment in segments {
        let mut at = segment.offset;
        let end = segment.offset.saturating_add(segment.bytes);
        while at < end {
            let length = (end - at).min(buffer.len() as u64) as usize;
            file.read_exact_at(&mut buffer[..length], at)?;
            hash.update(&buffer[..length]);
            at += length as u64;
        }
    }
    Ok(hash.finalize())
}

#[cfg(test)]
mod tests;
