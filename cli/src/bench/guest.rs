//! A guest of five instructions for the real monitor: it says that it is ready, which freezes it
//! into a template, and its children's first instruction says that they have resumed.
//!
//! It is an ELF file like any kernel, entered in 64-bit mode with its memory mapped one to one, and
//! uses nothing of the processor that a KVM which interprets its guests could lack.

use forkvm_api::{READY_LISTENING, READY_PORT, READY_RESUMED};

/// Guest-physical address of its first instruction: where Linux' own is, above the first MiB.
const ENTRY: u64 = 0x10_0000;

/// Memory of the guest in bytes: the least that the monitor takes.
pub(super) const MEMORY: u64 = forkvm_vmm::memory::MIN_BYTES;

/// Bytes of its initramfs, which it never looks at.
pub(super) const INITRAMFS: [u8; 4096] = [0; 4096];

const ELF_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;

/// `mov dx, READY_PORT; mov al, LISTENING; out dx, al; mov al, RESUMED; out dx, al; hlt`, and the
/// `hlt` again behind an interrupt.
fn program() -> [u8; 13] {
    let [low, high] = READY_PORT.to_le_bytes();
    [
        0x66,
        0xba,
        low,
        high,
        0xb0,
        READY_LISTENING,
        0xee,
        0xb0,
        READY_RESUMED,
        0xee,
        0xf4,
        0xeb,
        0xfd,
    ]
}

/// The guest as an ELF executable (System V ABI, chapter 4; AMD64 supplement).
pub(super) fn elf() -> Vec<u8> {
    let program = program();
    let offset = (ELF_HEADER + PROGRAM_HEADER) as u64;
    let length = program.len() as u64;
    let mut file = Vec::new();
    // Identification: 64 bits, little-endian, version 1.
    file.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // Executable, x86-64, version 1.
    file.extend(2_u16.to_le_bytes());
    file.extend(62_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    file.extend(ENTRY.to_le_bytes());
    file.extend((ELF_HEADER as u64).to_le_bytes());
    // No sections, no flags.
    file.extend(0_u64.to_le_bytes());
    file.extend(0_u32.to_le_bytes());
    for word in [ELF_HEADER as u16, PROGRAM_HEADER as u16, 1, 0, 0, 0] {
        file.extend(word.to_le_bytes());
    }
    // One segment to load, readable and executable.
    file.extend(1_u32.to_le_bytes());
    file.extend(5_u32.to_le_bytes());
    for word in [offset, ENTRY, ENTRY, length, length, 4096] {
        file.extend(word.to_le_bytes());
    }
    file.extend(program);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_as_long_as_its_headers_say() {
        let file = elf();
        assert_eq!(file.len(), ELF_HEADER + PROGRAM_HEADER + program().len());
        assert_eq!(&file[24..32], &ENTRY.to_le_bytes());
        assert_eq!(&file[ELF_HEADER + PROGRAM_HEADER..], &program());
    }

    #[test]
    fn the_loop_goes_back_to_the_halt() {
        let program = program();
        let jump = program.len() as i64;
        let target = jump + i64::from(program[program.len() - 1] as i8);
        assert_eq!(program[target as usize], 0xf4);
    }
}
