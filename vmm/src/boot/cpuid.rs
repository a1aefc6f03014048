//! What a vCPU answers to CPUID: all that KVM supports, less what a fork cannot carry or a
//! container does not need, and each vCPU's place among the others.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1, ECX.
const VMX: u32 = 1 << 5;
const PDCM: u32 = 1 << 15;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX.
const HTT: u32 = 1 << 28;
/// Leaf 6, EAX: the timer of the local APIC does not stop.
const ARAT: u32 = 1 << 2;
/// Leaf 0x80000001, ECX.
const CMP_LEGACY: u32 = 1 << 1;
const SVM: u32 = 1 << 2;
const PERFCTR_CORE: u32 = 1 << 23;
const PERFCTR_NB: u32 = 1 << 24;
/// Leaf 0x80000007, EDX.
const INVARIANT_TSC: u32 = 1 << 8;
/// Leaf 0x40000001, EAX: asynchronous page faults.
const ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// Leaf 0x40000001, EAX: the end of an interrupt is told by memory, without an exit.
const PV_EOI: u32 = 1 << 6;

/// Whether this host itself runs on QEMU's software processor, some of whose faults have to be
/// gone around.
pub fn on_software_processor() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    let signature = [leaf.ebx, leaf.ecx, leaf.edx].map(u32::to_le_bytes);
    signature.as_flattened() == b"TCGTCGTCGTCG"
}

/// What the entries depend on beside the supported ones.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    /// KVM has the local APIC's deadline timer.
    pub(crate) tsc_deadline: bool,
    /// [`on_software_processor`]
    pub(crate) software_processor: bool,
}

/// Entries for vCPU `id` of `count`, made from those of `KVM_GET_SUPPORTED_CPUID`.
pub(crate) fn entries(
    supported: &[kvm_cpuid_entry2],
    id: u8,
    count: u8,
    host: Host,
) -> Vec<kvm_cpuid_entry2> {
    let (id, count) = (u32::from(id), u32::from(count));
    // Bits of an APIC id that tell the cores of the one package apart.
    let core_bits = count.next_power_of_two().trailing_zeros();
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | count << 16 | id << 24;
                entry.ecx = entry.ecx & !(VMX | PDCM) | HYPERVISOR;
                if host.tsc_deadline {
                    entry.ecx |= TSC_DEADLINE;
                }
                entry.edx = entry.edx & !HTT | if count > 1 { HTT } else { 0 };
            }
            // Intel's caches: shared by one thread up to level 2, by the package from level 3.
            0x4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level < 3 { 0 } else { count - 1 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | (count - 1) << 26;
            }
            0x6 => entry.eax |= ARAT,
            // No performance counters: their state would have to be carried over.
            0xa | 0x8000_0022 => clear(entry),
            // A page fault of a child is short (its pages are in the page cache), and a fault
            // that is under way at the freeze would never be answered in a child.
            0x4000_0001 => {
                entry.eax &= !ASYNC_PF;
                // QEMU (helper_vmrun) keeps an interrupt that it has injected as its pending exception
                // until the next exit. If it is stopped before that it delivers it once more, also
                // with interrupts off, and the guest waits for a lock that it holds itself. The exit
                // at the interrupt's end leaves little time for that.
                if host.software_processor {
                    entry.eax &= !PV_EOI;
                }
            }
            0x8000_0001 => {
                entry.ecx &= !(SVM | PERFCTR_CORE | PERFCTR_NB | CMP_LEGACY);
                if count > 1 {
                    entry.ecx |= CMP_LEGACY;
                }
            }
            // kvm-clock stays the guest's clock source: it goes on at a fork, the raw counter of
            // another host would not.
            0x8000_0007 => entry.edx &= !INVARIANT_TSC,
            0x8000_0008 => entry.ecx = core_bits << 12 | (count - 1),
            0x8000_000a => clear(entry),
            // AMD's caches, as above.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level < 3 { 0 } else { count - 1 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
            }
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id;
                entry.ecx = 0;
                entry.edx = 0;
            }
            _ => {}
        }
    }
    // Topology (Intel SDM 2A, CPUID leaf 0BH): one thread a core, `count` cores. EAX is the shift
    // to the next level's id, ECX the level's number and kind (1 thread, 2 core).
    if supported
        .iter()
        .any(|entry| entry.function >= 0xb && entry.function < 0x4000_0000)
    {
        for (index, shift, number, kind) in [(0, 0, 1, 1 << 8), (1, core_bits, count, 2 << 8)] {
            entries.push(kvm_cpuid_entry2 {
                function: 0xb,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: number,
                ecx: kind | index,
                edx: id,
                ..Default::default()
            });
        }
    }
    entries
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host {
        tsc_deadline: true,
        software_processor: false,
    };

    #[test]
    fn a_software_processor_ends_interrupts_by_an_exit() {
        let host = Host {
            software_processor: true,
            ..HOST
        };
        let entries = entries(&[leaf(0x4000_0001)], 0, 1, host);
        assert_eq!(find(&entries, 0x4000_0001, 0).eax & PV_EOI, 0);
    }

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        let supported = [leaf(1), leaf(0xb), leaf(0x8000_001e)];
        for id in 0..4 {
            let entries = entries(&supported, id, 4, HOST);
            let id = u32::from(id);
            assert_eq!(find(&entries, 1, 0).ebx >> 24, id);
            assert_eq!(find(&entries, 1, 0).ebx >> 16 & 0xff, 4);
            assert_eq!(find(&entries, 0xb, 0).edx, id);
            assert_eq!(find(&entries, 0xb, 1).edx, id);
            assert_eq!(find(&entries, 0xb, 1).eax, 2);
            assert_eq!(find(&entries, 0xb, 1).ebx, 4);
            assert_eq!(find(&entries, 0x8000_001e, 0).eax, id);
        }
    }

    #[test]
    fn what_a_fork_cannot_carry_is_hidden() {
        let supported = [
            leaf(1),
            leaf(0xa),
            leaf(0x4000_0001),
            leaf(0x8000_0001),
            leaf(0x8000_0007),
            leaf(0x8000_000a),
        ];
        let entries = entries(&supported, 0, 1, HOST);
        assert_eq!(find(&entries, 1, 0).ecx & VMX, 0);
        assert_eq!(find(&entries, 1, 0).edx & HTT, 0);
        assert_eq!(find(&entries, 0xa, 0).eax, 0);
        assert_eq!(find(&entries, 0x4000_0001, 0).eax & ASYNC_PF, 0);
        assert_ne!(find(&entries, 0x4000_0001, 0).eax & PV_EOI, 0);
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx & SVM, 0);
        assert_eq!(find(&entries, 0x8000_0007, 0).edx & INVARIANT_TSC, 0);
        assert_eq!(find(&entries, 0x8000_000a, 0).edx, 0);
    }
}
