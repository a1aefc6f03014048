//! The MP table, by which a guest without ACPI finds processors, I/O APIC and interrupt lines.
//!
//! Source: Intel MultiProcessor Specification 1.4, chapter 4.

/// Version of the specification: 1.4.
const SPECIFICATION: u8 = 4;

/// Version of KVM's local APIC.
const APIC_VERSION: u8 = 0x14;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

/// Interrupt lines of the ISA bus. Devices use these alone.
const LINES: u8 = 16;

/// The floating pointer and the configuration table behind it, to be put at guest address `at`.
pub(super) fn table(at: u64, vcpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    // Processor entries (4.3.1): flags bit 0 usable, bit 1 boot processor; signature and features
    // of a processor with a local APIC and an FPU (Linux asks CPUID itself).
    for id in 0..vcpus {
        entries.extend([0, id, APIC_VERSION, 1 | u8::from(id == 0) << 1]);
        entries.extend(0x600_u32.to_le_bytes());
        entries.extend(0x201_u32.to_le_bytes());
        entries.extend([0; 8]);
    }
    // Bus entry (4.3.2): ISA, whose lines are edge-triggered and active high.
    entries.extend([1, 0]);
    entries.extend(b"ISA   ");
    // I/O APIC entry (4.3.3): usable; its id follows those of the processors.
    let io_apic = vcpus;
    entries.extend([2, io_apic, APIC_VERSION, 1]);
    entries.extend(IO_APIC.to_le_bytes());
    // I/O interrupt entries (4.3.4): line n of the bus is pin n, polarity and trigger of the bus.
    for line in 0..LINES {
        entries.extend([3, 0, 0, 0, 0, line, io_apic, line]);
    }
    // Local interrupt entries (4.3.5): ExtINT at LINT0 of processor 0, NMI at LINT1 of all.
    entries.extend([4, 3, 0, 0, 0, 0, 0, 0]);
    entries.extend([4, 1, 0, 0, 0, 0, 0xff, 1]);
    let count = u16::from(vcpus) + 1 + 1 + u16::from(LINES) + 2;

    // Configuration table header (4.2), 44 bytes.
    let mut table = b"PCMP".to_vec();
    table.extend((44 + entries.len() as u16).to_le_bytes());
    table.extend([SPECIFICATION, 0]);
    table.extend(b"FORKVM  ");
    table.extend(b"MICROVM     ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(entries);
    table[7] = checksum(&table);

    // Floating pointer structure (4.1), 16 bytes.
    let mut pointer = b"_MP_".to_vec();
    pointer.extend((at as u32 + 16).to_le_bytes());
    pointer.extend([1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer.extend(table);
    pointer
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0_u8, |sum, &byte| sum.wrapping_add(byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_zero_and_the_length_is_right() {
        for vcpus in 1..=8 {
            let bytes = table(0x9_fc00, vcpus);
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(table), 0);
            let length = u16::from_le_bytes([table[4], table[5]]);
            assert_eq!(usize::from(length), table.len());
            assert!(bytes.len() <= 1024, "{vcpus} vCPUs overflow the last KiB");
        }
    }
}
