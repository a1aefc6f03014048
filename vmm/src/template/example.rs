//! What a template is made of, for tests and fuzz targets.

use super::{Identity, Machine, manifest::Inputs};
use crate::snapshot::state;

/// A host.
pub(super) fn machine() -> Machine {
    Machine {
        cpu_model: "a processor".into(),
        cpuid: "c".into(),
        microcode: "0x1".into(),
        tsc_khz: 2_000_000,
        kernel_release: "6.12".into(),
    }
}

/// What goes into a template of a domain.
pub(super) fn inputs(domain: &str) -> Inputs {
    Inputs {
        kernel: "k".into(),
        initramfs: "i".into(),
        monitor: "m".into(),
        domain: domain.into(),
        cmdline: String::new(),
        vcpus: 2,
        memory_bytes: 1 << 30,
        state_version: state::VERSION,
    }
}

/// The identity of a template of a domain.
pub(super) fn identity(domain: &str) -> Identity {
    Identity::new(inputs(domain), machine())
}
