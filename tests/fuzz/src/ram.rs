//! Guest memory with a forbidden zone around each region: an access of the host outside of it, by
//! up to the length of a descriptor, ends the process.

use std::ptr;

use forkvm_vmm::memory::GuestMemory;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, mmap::MmapRegionBuilder};

/// Two regions with a hole between them, as a guest with more than 3 GiB has: guest-physical
/// address and bytes.
pub const REGIONS: [(u64, usize); 2] = [(0, 0x6_0000), (0x10_0000, 0x2_0000)];

/// A descriptor's largest length, and more.
const GUARD: usize = 5 << 30;

/// The host's side of the memory, used again for every input of a thread.
struct Ranges([*mut libc::c_void; 2]);

thread_local! {
    static RANGES: Ranges = Ranges::reserve();
}

impl Ranges {
    fn reserve() -> Self {
        Self(REGIONS.map(|(_, length)| {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            // SAFETY: a new mapping at an address of the kernel's choice; nothing else is there.
            let start = unsafe {
                mmap_anonymous(
                    ptr::null_mut(),
                    2 * GUARD + length,
                    ProtFlags::empty(),
                    flags,
                )
            }
            .expect("address space");
            let region = start.wrapping_byte_add(GUARD);
            // SAFETY: the range lies in the mapping just made, which nobody uses yet.
            unsafe { mprotect(region, length, MprotectFlags::READ | MprotectFlags::WRITE) }
                .expect("memory");
            region
        }))
    }
}

/// Memory full of zeroes. The one before of this thread must not be used any more.
pub fn fresh() -> GuestMemory {
    RANGES.with(|ranges| {
        let regions = REGIONS
            .iter()
            .zip(&ranges.0)
            .map(|(&(start, length), &host)| {
                // SAFETY: private anonymous memory of this module, to which no reference exists: the
                // memory of the input before is no longer used.
                unsafe { madvise(host, length, Advice::LinuxDontNeed) }.expect("empty memory");
                let builder = MmapRegionBuilder::new(length)
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
                // SAFETY: the range is mapped readable and writable for as long as the thread lives,
                // and memory is not handed to other threads that outlive it.
                let region = unsafe { builder.with_raw_mmap_pointer(host.cast()) }
                    .build()
                    .expect("a region");
                GuestRegionMmap::new(region, GuestAddress(start)).expect("a region of the guest")
            });
        GuestMemory::from_regions(regions.collect()).expect("memory of the guest")
    })
}

/// A checksum over all of it.
pub fn checksum(memory: &GuestMemory) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    let mut page = [0; 0x1000];
    for (start, length) in REGIONS {
        for at in (0..length).step_by(page.len()) {
            let read = memory.read_slice(&mut page, GuestAddress(start + at as u64));
            read.expect("memory of the guest");
            hash.update(&page);
        }
    }
    hash.finalize()
}
