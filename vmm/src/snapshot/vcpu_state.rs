//! State of one vCPU.
//!
//! Source of what there is and of the order: Documentation/virt/kvm/api.rst of Linux.

use kvm_bindings::{
    CpuId, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

/// The time stamp counter, and the deadline of the local APIC's timer in its ticks.
pub(crate) const MSR_IA32_TSC: u32 = 0x10;
pub(crate) const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

/// MSRs that are state and that `KVM_GET_MSR_INDEX_LIST` leaves out: `IA32_MTRR_DEF_TYPE`.
const UNLISTED: [u32; 1] = [0x2ff];

/// MSRs that KVM lists and that a restore may find refused, each with its reason. Any other
/// refusal is an error.
const MAY_BE_REFUSED: [u32; 0] = [];

/// KVM takes at most this many MSRs in one call (`MAX_IO_MSRS`).
const BATCH: usize = 256;

/// Frequencies this far apart (parts per million) are the same to KVM (`tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Type of a task state segment that is not busy (AMD64 APM volume 2, table 4-6).
const AVAILABLE_TSS: u8 = 9;

/// What can go wrong with saving or restoring a vCPU.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A KVM call.
    #[error("vCPU {vcpu}: {call}: {source}")]
    Kvm {
        /// The vCPU.
        vcpu: u8,
        /// The call.
        call: &'static str,
        /// The system's answer.
        source: kvm_ioctls::Error,
    },
    /// An MSR that KVM does not take back.
    #[error("vCPU {vcpu}: MSR {index:#x} is refused")]
    Msr {
        /// The vCPU.
        vcpu: u8,
        /// Index of the MSR.
        index: u32,
    },
    /// More entries than KVM takes.
    #[error("vCPU {vcpu}: too many {what}")]
    TooMany {
        /// The vCPU.
        vcpu: u8,
        /// Of what.
        what: &'static str,
    },
    /// The time stamp counter cannot have the frequency it had.
    #[error(
        "vCPU {vcpu}: the time stamp counter ran at {was} kHz and cannot do so here ({is} kHz)"
    )]
    Frequency {
        /// The vCPU.
        vcpu: u8,
        /// In the template.
        was: u32,
        /// Here.
        is: u32,
    },
}

/// Everything of one vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuState {
    id: u8,
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    // KVM_GET_SREGS2 adds the page-directory pointers of 32-bit PAE paging alone, which a 64-bit
    // guest does not have.
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    /// The XSAVE area as `KVM_GET_XSAVE2` gives it, in 32-bit words, at least 1024.
    xsave: Vec<u32>,
    lapic: kvm_lapic_state,
    /// All but the two below.
    msrs: Vec<kvm_msr_entry>,
    tsc: u64,
    tsc_deadline: u64,
    tsc_khz: u32,
    events: kvm_vcpu_events,
    debug_regs: kvm_debugregs,
}

#[cfg(test)]
impl VcpuState {
    /// A state of the size that a real one has, for tests of what holds it.
    pub(crate) fn example(id: u8) -> Self {
        let msr = kvm_msr_entry {
            index: MSR_IA32_TSC,
            data: 7,
            ..Default::default()
        };
        Self {
            id,
            cpuid: vec![Default::default(); 30],
            mp_state: Default::default(),
            regs: Default::default(),
            sregs: Default::default(),
            xcrs: Default::default(),
            xsave: vec![0; kvm_xsave::default().region.len()],
            lapic: Default::default(),
            msrs: vec![msr; 100],
            tsc: 1 << 40,
            tsc_deadline: 1 << 41,
            tsc_khz: 2_000_000,
            events: Default::default(),
            debug_regs: Default::default(),
        }
    }
}

/// The MSRs to save: all that KVM lists, and [`UNLISTED`].
pub(crate) fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, kvm_ioctls::Error> {
    let list = kvm.get_msr_index_list()?;
    let mut indices: Vec<_> = list
        .as_slice()
        .iter()
        .copied()
        .filter(|&index| index != MSR_IA32_TSC && index != MSR_IA32_TSC_DEADLINE)
        .collect();
    indices.extend(UNLISTED);
    Ok(indices)
}

impl VcpuState {
    /// Value of the time stamp counter when the vCPU was saved.
    pub(crate) fn tsc(&self) -> u64 {
        self.tsc
    }

    /// Sets the time stamp counter; all vCPUs get the same.
    pub(crate) fn set_tsc(&mut self, tsc: u64) {
        self.tsc = tsc;
    }

    /// Saves a vCPU that does not run and has no exit to complete.
    pub(crate) fn save(vm: &VmFd, vcpu: &VcpuFd, id: u8, msrs: &[u32]) -> Result<Self, Error> {
        let failed = |call| {
            move |source| Error::Kvm {
                vcpu: id,
                call,
                source,
            }
        };
        // First: KVM may take a pending INIT or SIPI into account here.
        let mp_state = vcpu.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        let tsc = read_msrs(vcpu, id, &[MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE])?;
        let value = |index| {
            tsc.iter()
                .find(|entry| entry.index == index)
                .map_or(0, |entry| entry.data)
        };
        let cpuid = vcpu
            .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_CPUID2"))?;
        Ok(Self {
            id,
            mp_state,
            regs: vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?,
            xcrs: vcpu.get_xcrs().map_err(failed("KVM_GET_XCRS"))?,
            xsave: read_xsave(vm, vcpu).map_err(failed("KVM_GET_XSAVE2"))?,
            debug_regs: vcpu.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?,
            tsc_khz: vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?,
            cpuid: cpuid.as_slice().to_vec(),
            tsc: value(MSR_IA32_TSC),
            tsc_deadline: value(MSR_IA32_TSC_DEADLINE),
            msrs: read_msrs(vcpu, id, msrs)?,
            events: vcpu
                .get_vcpu_events()
                .map_err(failed("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Restores a vCPU that was just created.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let id = self.id;
        let failed = |call| {
            move |source| Error::Kvm {
                vcpu: id,
                call,
                source,
            }
        };
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| Error::TooMany {
            vcpu: id,
            what: "CPUID entries",
        })?;
        vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(failed("KVM_SET_MP_STATE"))?;
        let mut sregs = self.sregs;
        // That one compares the type of the task register with 9 when user code uses an I/O port
        // (`check_io` in target/i386/tcg), where a processor has 11 (busy) there and KVM says so;
        // after a restore every such use would be a #GP.
        if crate::boot::cpuid::on_software_processor() {
            sregs.tr.type_ = AVAILABLE_TSS;
        }
        vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(failed("KVM_SET_XCRS"))?;
        self.restore_xsave(vcpu)?;
        vcpu.set_regs(&self.regs).map_err(failed("KVM_SET_REGS"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(failed("KVM_SET_LAPIC"))?;
        self.restore_frequency(vcpu)?;
        self.restore_msrs(vcpu)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(failed("KVM_SET_VCPU_EVENTS"))?;
        vcpu.set_debug_regs(&self.debug_regs)
            .map_err(failed("KVM_SET_DEBUGREGS"))
    }

    fn restore_xsave(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let failed = |source| Error::Kvm {
            vcpu: self.id,
            call: "KVM_SET_XSAVE",
            source,
        };
        let words = kvm_xsave::default().region.len();
        let too_many = || Error::TooMany {
            vcpu: self.id,
            what: "words of XSAVE state",
        };
        let (region, extra) = self.xsave.split_at_checked(words).ok_or_else(too_many)?;
        let mut xsave = Xsave::from_entries(extra).map_err(|_| too_many())?;
        // SAFETY: only the fixed part is written; the length of the flexible one stays.
        let fixed = unsafe { xsave.as_mut_fam_struct() };
        fixed.xsave.region.copy_from_slice(region);
        // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 says. They were saved under the same
        // host kernel and processor (the template's id holds both), so the area is as long.
        unsafe { vcpu.set_xsave2(&xsave) }.map_err(failed)
    }

    /// Gives the counter its old frequency, if this host's is not the same within KVM's
    /// tolerance.
    fn restore_frequency(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let is = vcpu.get_tsc_khz().map_err(|source| Error::Kvm {
            vcpu: self.id,
            call: "KVM_GET_TSC_KHZ",
            source,
        })?;
        let apart = u64::from(is.abs_diff(self.tsc_khz)) * 1_000_000;
        if apart <= u64::from(self.tsc_khz) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        vcpu.set_tsc_khz(self.tsc_khz)
            .map_err(|_| Error::Frequency {
                vcpu: self.id,
                was: self.tsc_khz,
                is,
            })
    }

    /// The counter comes first, its deadline last: the deadline is in ticks of the counter.
    fn restore_msrs(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let entry = |index, data| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        // A deadline of zero may be a timer that has fired and whose interrupt was not delivered
        // yet when the vCPU was saved. One interrupt too many does no harm, one too few does.
        let deadline = if self.tsc_deadline == 0 {
            self.tsc
        } else {
            self.tsc_deadline
        };
        let mut entries = Vec::with_capacity(self.msrs.len() + 2);
        entries.push(entry(MSR_IA32_TSC, self.tsc));
        entries.extend_from_slice(&self.msrs);
        entries.push(entry(MSR_IA32_TSC_DEADLINE, deadline));
        let mut left = entries.as_slice();
        while !left.is_empty() {
            let batch = &left[..left.len().min(BATCH)];
            let msrs = Msrs::from_entries(batch).map_err(|_| Error::TooMany {
                vcpu: self.id,
                what: "MSRs",
            })?;
            let done = vcpu.set_msrs(&msrs).map_err(|source| Error::Kvm {
                vcpu: self.id,
                call: "KVM_SET_MSRS",
                source,
            })?;
            left = &left[done.min(batch.len())..];
            if done < batch.len() {
                let index = left[0].index;
                if !MAY_BE_REFUSED.contains(&index) {
                    return Err(Error::Msr {
                        vcpu: self.id,
                        index,
                    });
                }
                left = &left[1..];
            }
        }
        Ok(())
    }
}

fn read_xsave(vm: &VmFd, vcpu: &VcpuFd) -> Result<Vec<u32>, kvm_ioctls::Error> {
    let fixed = size_of::<kvm_xsave>();
    // 0 where KVM has no KVM_GET_XSAVE2 (before Linux 5.17).
    let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    if bytes <= fixed {
        return Ok(vcpu.get_xsave()?.region.to_vec());
    }
    let mut xsave = Xsave::new((bytes - fixed).div_ceil(size_of::<u32>()))
        .map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says, and this process never asks for dynamic
    // XSAVE features, which alone could make it longer.
    unsafe { vcpu.get_xsave2(&mut xsave) }?;
    let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
    words.extend_from_slice(xsave.as_slice());
    Ok(words)
}

/// Reads MSRs; one that KVM lists and does not give is left out, with a word in the log.
fn read_msrs(vcpu: &VcpuFd, id: u8, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut entries = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let batch: Vec<_> = left
            .iter()
            .take(BATCH)
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&batch).map_err(|_| Error::TooMany {
            vcpu: id,
            what: "MSRs",
        })?;
        let done = vcpu.get_msrs(&mut msrs).map_err(|source| Error::Kvm {
            vcpu: id,
            call: "KVM_GET_MSRS",
            source,
        })?;
        entries.extend_from_slice(&msrs.as_slice()[..done.min(batch.len())]);
        left = &left[done.min(batch.len())..];
        if done < batch.len() {
            log::info!(
                "vCPU {id}: MSR {:#x} cannot be read, it is not saved",
                left[0]
            );
            left = &left[1..];
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_xcr;
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn any_state()(
            id in any::<u8>(),
            leaves in prop::collection::vec(any::<[u32; 6]>(), 0..64),
            msrs in prop::collection::vec(any::<(u32, u64)>(), 0..128),
            words in any::<[u64; 8]>(),
            xsave in prop::collection::vec(any::<u32>(), 1024..1400),
            page in prop::collection::vec(any::<u8>(), 1024),
            xcr in any::<[u32; 2]>(),
        ) -> VcpuState {
            let mut lapic = kvm_lapic_state::default();
            for (register, byte) in lapic.regs.iter_mut().zip(page) {
                *register = byte as _;
            }
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            xcrs.xcrs[0] = kvm_xcr { xcr: xcr[0], reserved: 0, value: xcr[1].into() };
            VcpuState {
                id,
                cpuid: leaves
                    .iter()
                    .map(|&[function, index, eax, ebx, ecx, edx]| kvm_cpuid_entry2 {
                        function, index, eax, ebx, ecx, edx, ..Default::default()
                    })
                    .collect(),
                mp_state: kvm_mp_state { mp_state: xcr[0] },
                regs: kvm_regs { rax: words[0], rip: words[1], rflags: words[2], ..Default::default() },
                sregs: kvm_sregs { cr3: words[3], efer: words[4], ..Default::default() },
                xcrs,
                xsave,
                lapic,
                msrs: msrs
                    .iter()
                    .map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() })
                    .collect(),
                tsc: words[5],
                tsc_deadline: words[6],
                tsc_khz: xcr[1],
                events: kvm_vcpu_events { flags: xcr[0], ..Default::default() },
                debug_regs: kvm_debugregs { dr7: words[7], ..Default::default() },
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_written_is_read(state in any_state()) {
            let bytes = postcard::to_stdvec(&state).unwrap();
            prop_assert_eq!(&postcard::from_bytes::<VcpuState>(&bytes).unwrap(), &state);
            // One byte short is never a whole state.
            prop_assert!(postcard::from_bytes::<VcpuState>(&bytes[..bytes.len() - 1]).is_err());
        }
    }
}
