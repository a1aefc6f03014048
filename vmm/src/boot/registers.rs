//! Registers and tables of a processor at Linux' 64-bit entry.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::{Error, GDT, PAGE_TABLES, STACK, ZERO_PAGE};
use crate::memory::GuestMemory;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Present and writable.
const TABLE: u64 = 0b11;
/// Present, writable, a page of 2 MiB.
const LARGE_PAGE: u64 = 0b1000_0011;

/// Selectors of the boot protocol: `__BOOT_CS` and `__BOOT_DS`.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// Enabled, write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets in the local APIC's registers (Intel SDM 3A, table 11-1) and delivery modes.
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVER_NMI: u32 = 0b100;
const DELIVER_EXTINT: u32 = 0b111;

/// Flat 4 GiB segments: code for 64 bits, and data.
fn segments() -> (kvm_segment, kvm_segment) {
    let data = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: BOOT_DS,
        type_: 0b0011,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    };
    let code = kvm_segment {
        selector: BOOT_CS,
        type_: 0b1011,
        db: 0,
        l: 1,
        ..data
    };
    (code, data)
}

/// A segment as an entry of the descriptor table (Intel SDM 3A, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | flags << 40
        | (limit >> 16 & 0xf) << 48
        | (segment.base >> 24 & 0xff) << 56
}

/// Writes the descriptor table and the page tables.
pub(super) fn write_tables(memory: &GuestMemory) -> Result<(), Error> {
    let (code, data) = segments();
    let table = [0, 0, descriptor(&code), descriptor(&data)];
    for (index, entry) in (0_u64..).zip(table) {
        memory.write_obj(entry, GuestAddress(GDT + index * 8))?;
    }
    let (level4, level3, level2) = (PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    memory.write_obj(level3 | TABLE, GuestAddress(level4))?;
    memory.write_obj(level2 | TABLE, GuestAddress(level3))?;
    for index in 0..512_u64 {
        memory.write_obj(index << 21 | LARGE_PAGE, GuestAddress(level2 + index * 8))?;
    }
    Ok(())
}

/// Enables in XCR0 what the vCPU's CPUID offers, which the guest would do itself. KVM must know of
/// it: QEMU's software AMD-V does not intercept XSETBV, so there KVM would go on with XCR0 = 1 and
/// put that back at the next entry; the guest's first return from a signal then fails.
fn enable_extended_state(vcpu: &VcpuFd) -> Result<(), Error> {
    let failed = |call| move |source| Error::Kvm { call, source };
    let cpuid = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(failed("KVM_GET_CPUID2"))?;
    // Leaf 0xd, sub-leaf 0: EDX:EAX are the bits of XCR0 that may be set (Intel SDM 1, 13.2).
    let leaf = cpuid
        .as_slice()
        .iter()
        .find(|entry| (entry.function, entry.index) == (0xd, 0));
    let Some(leaf) = leaf.filter(|leaf| leaf.eax != 0) else {
        return Ok(());
    };
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
    vcpu.set_xcrs(&xcrs).map_err(failed("KVM_SET_XCRS"))
}

/// Sets a vCPU up for a boot. Others than the first wait for the guest to start them.
pub(crate) fn prepare(vcpu: &VcpuFd, id: u8, entry: u64) -> Result<(), Error> {
    let failed = |call| move |source| Error::Kvm { call, source };
    let entries = [
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    for entry in entries {
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| Error::Kvm {
            call: "KVM_SET_MSRS",
            source: kvm_ioctls::Error::new(libc::E2BIG),
        })?;
        let set = vcpu.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
        if set != 1 {
            log::debug!("MSR {:#x} cannot be set", entry.index);
        }
    }

    let mut lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    for (register, mode) in [(APIC_LVT0, DELIVER_EXTINT), (APIC_LVT1, DELIVER_NMI)] {
        // Bits 8 to 10 of a local vector entry are the delivery mode.
        let byte = &mut lapic.regs[register + 1];
        *byte = (*byte as u8 & !0b111 | mode as u8) as _;
    }
    vcpu.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))?;

    enable_extended_state(vcpu)?;

    if id != 0 {
        return Ok(());
    }
    let (code, data) = segments();
    let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    vcpu.set_regs(&kvm_regs {
        // Bit 1 is always set (Intel SDM 1, 3.4.3).
        rflags: 2,
        rip: entry,
        rsp: STACK,
        rbp: STACK,
        rsi: ZERO_PAGE,
        ..Default::default()
    })
    .map_err(failed("KVM_SET_REGS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_linux() {
        // GDT_ENTRY(0xa09b, 0, 0xfffff) and GDT_ENTRY(0xc093, 0, 0xfffff).
        let (code, data) = segments();
        assert_eq!(descriptor(&code), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&data), 0x00cf_9300_0000_ffff);
    }
}
