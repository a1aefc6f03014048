//! Guest memory: where it lies in the guest, and what it is mapped from.
//!
//! Up to 3 GiB lie from address 0; what is more lies from 4 GiB, behind the window of the devices.
//! In a template's memory file both follow each other without a gap.
//!
//! | machine | mapped from |
//! |---|---|
//! | cold boot | anonymous memory |
//! | builder of a template | the memory file, `MAP_SHARED` |
//! | child | the memory file `MAP_PRIVATE` where it has data, anonymous memory where it has holes: a first touch of a hole then does not fill the page cache |
//!
//! Each region is one contiguous host range, so it is one KVM memory slot however many mappings
//! it consists of.

use std::{
    fs::File,
    io,
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

use rustix::fs::{FallocateFlags, SeekFrom, seek};
use serde::{Deserialize, Serialize};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion, mmap::MmapRegionBuilder,
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

/// Memory of a machine that boots and is not frozen.
///
/// # Errors
/// [`Error::Size`], [`Error::Map`].
pub fn anonymous(bytes: u64) -> Result<GuestMemory, Error> {
    collect(bytes, |region| map(region, None))
}

/// Memory of a machine that is to be frozen: `file`, which is made as long as the memory, shared.
///
/// # Errors
/// [`Error::Size`], [`Error::Map`], [`Error::File`].
pub fn shared(file: &File, bytes: u64) -> Result<GuestMemory, Error> {
    regions(bytes)?;
    file.set_len(bytes).map_err(Error::File)?;
    collect(bytes, |region| map(region, Some(file)))
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
        let mapping = map(region, None)?;
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

fn map(region: Region, file: Option<&File>) -> Result<MmapRegion, Error> {
    let length = usize::try_from(region.bytes).map_err(|_| Error::Size(region.bytes))?;
    let builder = MmapRegionBuilder::new(length).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    let builder = match file {
        None => {
            builder.with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        }
        Some(file) => builder
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(
                file.try_clone().map_err(Error::File)?,
                region.offset,
            )),
    };
    builder
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

/// Punches the pages that are zero out of the memory file and returns the stretches that are
/// left, with holes shorter than 256 KiB counted as data. The guest must not run. What is a hole
/// already is not looked at: a page that is read would be one of the page cache.
///
/// # Errors
/// [`Error::File`].
pub fn punch_holes(file: &File, memory: &GuestMemory) -> Result<Vec<Segment>, Error> {
    let mut segments: Vec<Segment> = Vec::new();
    let mut offset = 0;
    let mut data = 0..0;
    for region in memory.iter() {
        let mut hole: Option<Segment> = None;
        for page in 0..region.len() / PAGE {
            let at = offset + page * PAGE;
            if at >= data.end {
                data = next_data(file, at)?;
            }
            if at + PAGE <= data.start || is_zero(region, page * PAGE) {
                hole = Some(hole.map_or(
                    Segment {
                        offset: at,
                        bytes: PAGE,
                    },
                    |hole| Segment {
                        bytes: hole.bytes + PAGE,
                        ..hole
                    },
                ));
                continue;
            }
            punch(file, hole.take())?;
            match segments.last_mut() {
                Some(last) if at - (last.offset + last.bytes) < SHORTEST_HOLE => {
                    last.bytes = at + PAGE - last.offset;
                }
                _ => segments.push(Segment {
                    offset: at,
                    bytes: PAGE,
                }),
            }
        }
        punch(file, hole)?;
        offset += region.len();
    }
    Ok(segments)
}

/// The first stretch of a file from `at` on that is no hole (lseek(2), SEEK_DATA); behind all that there is if none is
/// left. What was written through a mapping counts, on the disk or not. Its borders are those of the file system's blocks.
fn next_data(file: &File, at: u64) -> Result<Range<u64>, Error> {
    let failed = |errno: rustix::io::Errno| Error::File(errno.into());
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(u64::MAX..u64::MAX),
        Err(errno) => return Err(failed(errno)),
    };
    Ok(start..seek(file, SeekFrom::Hole(start)).map_err(failed)?)
}

fn is_zero(region: &GuestRegionMmap<()>, at: u64) -> bool {
    let Ok(at) = usize::try_from(at) else {
        return false;
    };
    let address = region.as_ptr().wrapping_add(at).cast::<u64>();
    (0..PAGE as usize / 8).all(|index| {
        let word = address.wrapping_add(index);
        // SAFETY: the page lies inside the region's mapping, which lives as long as `region`, and
        // is aligned; the read is volatile because other mappings of the file may change it.
        unsafe { word.read_volatile() == 0 }
    })
}

fn punch(file: &File, hole: Option<Segment>) -> Result<(), Error> {
    let Some(hole) = hole else { return Ok(()) };
    rustix::fs::fallocate(
        file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        hole.offset,
        hole.bytes,
    )
    .map_err(|errno| Error::File(errno.into()))
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
