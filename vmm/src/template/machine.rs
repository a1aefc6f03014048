//! What of a machine a template depends on.

use std::fs;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Error, digest::hex};

/// The parts of a host that a frozen guest has seen or depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name, for people.
    pub cpu_model: String,
    /// SHA-256 over what `KVM_GET_SUPPORTED_CPUID` answers: model and features.
    pub cpuid: String,
    /// Revision of the microcode, `0x0` if the host does not tell.
    pub microcode: String,
    /// Frequency of the time stamp counter in kHz, as KVM gives it to a vCPU.
    pub tsc_khz: u32,
    /// Release of the host's kernel (uname(2)).
    pub kernel_release: String,
}

impl Machine {
    /// Asks KVM and the kernel. Makes a virtual machine for the frequency: some milliseconds.
    ///
    /// # Errors
    /// KVM that cannot be used.
    pub fn detect() -> Result<Self, Error> {
        let failed = |what: &'static str| {
            move |error: kvm_ioctls::Error| Error::Kvm(format!("{what}: {error}"))
        };
        let kvm = Kvm::new().map_err(failed("open"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let mut hash = Sha256::new();
        for entry in cpuid.as_slice() {
            // Topology leaves (0xb, 0x1f, 0x8000001e) and the APIC id in leaf 1 depend on the
            // processor that happens to answer.
            if matches!(entry.function, 0xb | 0x1f | 0x8000_001e) {
                continue;
            }
            let ebx = match entry.function {
                1 => entry.ebx & 0x00ff_ffff,
                _ => entry.ebx,
            };
            for word in [
                entry.function,
                entry.index,
                entry.eax,
                ebx,
                entry.ecx,
                entry.edx,
            ] {
                hash.update(word.to_le_bytes());
            }
        }
        let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        let vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
        let tsc_khz = vcpu.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let line = |key: &str| {
            cpuinfo
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(name, _)| name.trim() == key)
                .map(|(_, value)| value.trim().to_owned())
        };
        Ok(Self {
            cpu_model: line("model name").unwrap_or_else(|| "unknown".to_owned()),
            cpuid: hex(&hash.finalize()),
            microcode: line("microcode").unwrap_or_else(|| "0x0".to_owned()),
            tsc_khz,
            kernel_release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
        })
    }

    /// The frequency as it enters a template's id: the host's calibration differs a little at
    /// every boot, so a step of 1 per cent of it. What remains is scaled or refused at the
    /// restore.
    pub(crate) fn tsc_step(&self) -> u32 {
        let khz = f64::from(self.tsc_khz.max(1));
        // ln(1.01) apart: neighbouring steps differ by 1 per cent.
        (khz.ln() / 1.01_f64.ln()).round() as u32
    }

    /// What differs between this machine and `other`, in words, or nothing.
    pub(crate) fn difference(&self, other: &Machine) -> Option<String> {
        if self.cpuid != other.cpuid || self.microcode != other.microcode {
            return Some(format!(
                "made on the processor {:?}, this is {:?} or its features or microcode differ",
                self.cpu_model, other.cpu_model
            ));
        }
        if self.kernel_release != other.kernel_release {
            return Some(format!(
                "made under Linux {}, this is {}",
                self.kernel_release, other.kernel_release
            ));
        }
        if self.tsc_step() != other.tsc_step() {
            return Some(format!(
                "made with a time stamp counter of {} kHz, this has {} kHz",
                self.tsc_khz, other.tsc_khz
            ));
        }
        None
    }
}
