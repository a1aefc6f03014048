//! A cold boot: the kernel, the initramfs and the tables that Linux' 64-bit entry expects.
//!
//! Source: the Linux x86 boot protocol (Documentation/arch/x86/boot.rst, "64-bit boot protocol").
//!
//! | guest address | what |
//! |---|---|
//! | 0x500 | descriptor table |
//! | 0x7000 | zero page (`boot_params`) |
//! | below 0x8ff0 | stack of the entry code |
//! | 0x9000..0xc000 | page tables, 1 GiB mapped one to one |
//! | 0x2_0000 | command line |
//! | 0x9_fc00 | MP table, in the last KiB of base memory where Linux looks for it |
//! | 0x100_0000 | kernel, where its ELF headers say |
//! | end of the low region | initramfs |

pub(crate) mod cpuid;
mod mptable;
pub(crate) mod registers;

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
};

use linux_loader::loader::{
    Elf, KernelLoader,
    bootparam::{CAN_USE_HEAP, KASLR_FLAG, LOADED_HIGH, boot_e820_entry, boot_params},
};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryRegion};

use crate::memory::{GuestMemory, LOW_END, PAGE};

pub(crate) const GDT: u64 = 0x500;
pub(crate) const ZERO_PAGE: u64 = 0x7000;
pub(crate) const STACK: u64 = 0x8ff0;
pub(crate) const PAGE_TABLES: u64 = 0x9000;
const CMDLINE: u64 = 0x2_0000;
const MP_TABLE: u64 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;

/// Longest command line with its final zero (`COMMAND_LINE_SIZE` of x86 Linux).
const CMDLINE_BYTES: usize = 2048;

/// e820 types (boot.rst, "e820_table").
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What every guest is told.
///
/// `console=hvc0`: the virtio console. `quiet`: each line on it is an exit. `reboot=t panic=-1`: a
/// reboot or a panic ends in a triple fault at once, which the monitor sees. `nomodule` is not
/// needed (the kernel has no modules), neither is `no_timer_check` (a KVM guest implies it).
/// `noreplace-smp` would keep lock prefixes on one processor, at a cost to every start.
/// `cryptomgr.notests`: no self-tests at boot. `page_reporting_order=2`: free memory is told of in
/// pieces of 16 KiB; what a program leaves behind is rarely free in pieces of 2 MiB, the default.
const CMDLINE_BASE: &str = "console=hvc0 quiet reboot=t panic=-1 cryptomgr.notests \
                            page_reporting.page_reporting_order=2";

/// What can go wrong in preparing a boot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a kernel that can be entered.
    #[error("the guest kernel is not a 64-bit ELF vmlinux that fits the memory: {0}")]
    Kernel(linux_loader::loader::Error),
    /// The initramfs cannot be read.
    #[error("cannot read the initramfs: {0}")]
    Initramfs(io::Error),
    /// Kernel and initramfs do not both fit.
    #[error("the guest's memory is too small for its kernel and initramfs")]
    TooSmall,
    /// The command line is too long, or has a character that it cannot have.
    #[error("the guest's command line is longer than {} bytes or not plain text", CMDLINE_BYTES - 1)]
    Cmdline,
    /// Guest memory cannot be written.
    #[error("cannot write the boot tables: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// A KVM call on a vCPU.
    #[error("{call}: {source}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// The system's answer.
        source: kvm_ioctls::Error,
    },
}

/// Puts kernel, initramfs, command line and tables into memory. Returns the entry point.
pub(crate) fn load(
    memory: &GuestMemory,
    kernel: &mut File,
    initramfs: &mut File,
    devices: &[String],
    extra: &str,
    vcpus: u8,
) -> Result<u64, Error> {
    let loaded =
        Elf::load(memory, None, kernel, Some(GuestAddress(HIGH_MEMORY))).map_err(Error::Kernel)?;

    let bytes = initramfs.seek(SeekFrom::End(0)).map_err(Error::Initramfs)?;
    initramfs.rewind().map_err(Error::Initramfs)?;
    let low_end = memory
        .iter()
        .map(|region| region.start_addr().0 + region.len())
        .filter(|&end| end <= LOW_END)
        .max()
        .ok_or(Error::TooSmall)?;
    let start = low_end.checked_sub(bytes).ok_or(Error::TooSmall)? & !(PAGE - 1);
    if start < loaded.kernel_end {
        return Err(Error::TooSmall);
    }
    let length = usize::try_from(bytes).map_err(|_| Error::TooSmall)?;
    memory.read_exact_volatile_from(GuestAddress(start), initramfs, length)?;

    let cmdline = command_line(devices, extra)?;
    memory.write_slice(&cmdline, GuestAddress(CMDLINE))?;

    let mut zero_page = boot_params::default();
    // The header of a kernel that was loaded without its real-mode part.
    zero_page.hdr.boot_flag = 0xaa55;
    zero_page.hdr.header = 0x5372_6448;
    zero_page.hdr.type_of_loader = 0xff;
    // KASLR_FLAG: randomise the kernel's memory regions (the image itself is not moved by this
    // entry).
    zero_page.hdr.loadflags = (LOADED_HIGH | CAN_USE_HEAP | KASLR_FLAG) as u8;
    zero_page.hdr.kernel_alignment = 0x100_0000;
    zero_page.hdr.cmd_line_ptr = CMDLINE as u32;
    zero_page.hdr.cmdline_size = cmdline.len() as u32;
    zero_page.hdr.ramdisk_image = start as u32;
    zero_page.hdr.ramdisk_size = u32::try_from(bytes).map_err(|_| Error::TooSmall)?;
    let mut entries = 0;
    let mut add = |addr, end: u64, type_| {
        zero_page.e820_table[entries] = boot_e820_entry {
            addr,
            size: end - addr,
            type_,
        };
        entries += 1;
    };
    add(0, MP_TABLE, E820_RAM);
    add(MP_TABLE, HIGH_MEMORY, E820_RESERVED);
    for region in memory.iter() {
        let address = region.start_addr().0;
        add(address.max(HIGH_MEMORY), address + region.len(), E820_RAM);
    }
    zero_page.e820_entries = entries as u8;
    memory.write_obj(zero_page, GuestAddress(ZERO_PAGE))?;

    memory.write_slice(&mptable::table(MP_TABLE, vcpus), GuestAddress(MP_TABLE))?;
    registers::write_tables(memory)?;
    Ok(loaded.kernel_load.0)
}

/// The command line with its final zero.
fn command_line(devices: &[String], extra: &str) -> Result<Vec<u8>, Error> {
    let mut line = CMDLINE_BASE.to_owned();
    for part in devices.iter().map(String::as_str).chain([extra.trim()]) {
        if !part.is_empty() {
            line.push(' ');
            line.push_str(part);
        }
    }
    let plain = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
    if line.len() >= CMDLINE_BYTES || !line.bytes().all(plain) {
        return Err(Error::Cmdline);
    }
    let mut bytes = line.into_bytes();
    bytes.push(0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory;

    #[test]
    fn the_command_line_names_devices_and_ends_with_zero() {
        let line = command_line(&["virtio_mmio.device=4K@0xd0000000:5".into()], " a=b ").unwrap();
        let text = String::from_utf8(line).unwrap();
        assert!(text.starts_with("console=hvc0 "), "{text}");
        assert!(
            text.ends_with(" virtio_mmio.device=4K@0xd0000000:5 a=b\0"),
            "{text}"
        );
    }

    #[test]
    fn a_command_line_that_linux_would_cut_is_refused() {
        assert!(matches!(
            command_line(&[], &"x".repeat(2048)),
            Err(Error::Cmdline)
        ));
        assert!(matches!(command_line(&[], "a\nb"), Err(Error::Cmdline)));
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let memory = memory::anonymous(64 << 20).unwrap();
        let mut kernel = tempfile::tempfile().unwrap();
        kernel.write_all(&[0x7f; 4096]).unwrap();
        let mut initramfs = tempfile::tempfile().unwrap();
        let result = load(&memory, &mut kernel, &mut initramfs, &[], "", 1);
        assert!(matches!(result, Err(Error::Kernel(_))), "{result:?}");
    }
}
