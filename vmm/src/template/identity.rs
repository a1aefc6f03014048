//! A template's id: a digest of everything that makes two templates differ.

use sha2::{Digest, Sha256};

use super::{
    Error, Machine, Manifest, Store, TemplateSpec,
    digest::{Cache, hex},
    manifest::Inputs,
};
use crate::snapshot::state;

/// Digits of an id.
const ID_DIGITS: usize = 16;

/// Digest of a template and what went into it.
#[derive(Clone, Debug)]
pub struct Identity {
    pub(super) id: String,
    pub(super) digest: String,
    pub(super) inputs: Inputs,
    pub(super) machine: Machine,
}

impl Identity {
    pub(super) fn new(inputs: Inputs, machine: Machine) -> Self {
        let digest = digest(&inputs, &machine);
        Self {
            id: digest[..ID_DIGITS].to_owned(),
            digest,
            inputs,
            machine,
        }
    }

    /// The template's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Why a template of another id is of no use any more: the kernel, the agent, the monitor or the machine is another
    /// now. `None` if only its size or its domain differs, or nothing.
    pub(super) fn outdates(&self, manifest: &Manifest) -> Option<String> {
        let (then, now) = (&manifest.inputs, &self.inputs);
        for (what, changed) in [
            ("guest kernel", then.kernel != now.kernel),
            ("initramfs", then.initramfs != now.initramfs),
            ("monitor", then.monitor != now.monitor),
        ] {
            if changed {
                return Some(format!("made with another {what}"));
            }
        }
        manifest.machine.difference(&self.machine)
    }
}

impl Store {
    /// What identifies the base template that `spec` makes on this machine, whether it exists or not. Reads the kernel,
    /// the initramfs and the monitor only if they changed since the last time.
    ///
    /// # Errors
    /// One of them is missing; KVM cannot be used.
    pub fn identity(&self, spec: &TemplateSpec) -> Result<Identity, Error> {
        let mut cache = Cache::load(self.root());
        let (kernel, kernel_read) = cache.file(&spec.kernel)?;
        let (initramfs, initramfs_read) = cache.file(&spec.initramfs)?;
        let (monitor, monitor_read) = cache.file(&spec.monitor)?;
        let (machine, asked) = cache.machine()?;
        if (kernel_read || initramfs_read || monitor_read || asked) && self.root().is_dir() {
            // The cache saves time; a store that cannot be written to works without it.
            if let Err(error) = cache.save(self.root()) {
                log::warn!("cannot keep digests in {}: {error}", self.root().display());
            }
        }
        let inputs = Inputs {
            kernel,
            initramfs,
            monitor,
            domain: spec.domain.to_string(),
            cmdline: spec.cmdline.clone(),
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            state_version: state::VERSION,
        };
        Ok(Identity::new(inputs, machine))
    }
}

/// Whether text is an id. Anything else could name a folder outside the store.
pub(super) fn check_id(id: &str) -> Result<(), Error> {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if id.len() == ID_DIGITS && id.bytes().all(digit) {
        Ok(())
    } else {
        Err(Error::BadId { id: id.to_owned() })
    }
}

/// SHA-256 over everything that makes two templates differ, each part with its length.
pub(super) fn digest(inputs: &Inputs, machine: &Machine) -> String {
    let mut hash = Sha256::new();
    let parts = [
        inputs.kernel.as_str(),
        &inputs.initramfs,
        &inputs.monitor,
        &inputs.domain,
        &inputs.cmdline,
        &inputs.vcpus.to_string(),
        &inputs.memory_bytes.to_string(),
        &inputs.state_version.to_string(),
        &machine.cpuid,
        &machine.microcode,
        &machine.kernel_release,
        &machine.tsc_step().to_string(),
    ];
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::super::example::{inputs, machine};
    use super::*;

    #[test]
    fn everything_that_differs_gives_another_id() {
        let first = Identity::new(inputs("host"), machine()).id;
        let input_changes: [fn(&mut Inputs); 8] = [
            |inputs| inputs.kernel.push('x'),
            |inputs| inputs.initramfs.push('x'),
            |inputs| inputs.monitor.push('x'),
            |inputs| inputs.domain.push('x'),
            |inputs| inputs.cmdline.push('x'),
            |inputs| inputs.vcpus += 1,
            |inputs| inputs.memory_bytes += 1,
            |inputs| inputs.state_version += 1,
        ];
        for change in input_changes {
            let mut other = inputs("host");
            change(&mut other);
            assert_ne!(Identity::new(other, machine()).id, first);
        }
        let machine_changes: [fn(&mut Machine); 4] = [
            |machine| machine.cpuid.push('x'),
            |machine| machine.microcode.push('1'),
            |machine| machine.kernel_release.push('1'),
            |machine| machine.tsc_khz *= 2,
        ];
        for change in machine_changes {
            let mut other = machine();
            change(&mut other);
            assert_ne!(Identity::new(inputs("host"), other).id, first);
        }
        // Parts do not run into each other.
        let mut shifted = inputs("host");
        shifted.kernel = "ki".into();
        shifted.initramfs = String::new();
        assert_ne!(Identity::new(shifted, machine()).id, first);
        // The name is for people, and a clock that was calibrated anew differs a little.
        let mut same = machine();
        same.cpu_model.push_str(" (again)");
        same.tsc_khz += 1;
        assert_eq!(Identity::new(inputs("host"), same).id, first);
    }

    #[test]
    fn another_machine_is_told_by_what_differs() {
        let here = machine();
        assert_eq!(here.difference(&here), None);
        type Change = fn(&mut Machine);
        let changes: [(&str, Change); 4] = [
            ("processor", |machine| machine.cpuid.push('x')),
            ("processor", |machine| machine.microcode.push('1')),
            ("Linux 6.12, this is 6.13", |machine| {
                machine.kernel_release = "6.13".into();
            }),
            ("2000000 kHz, this has 2100000 kHz", |machine| {
                machine.tsc_khz = 2_100_000;
            }),
        ];
        for (expected, change) in changes {
            let mut other = here.clone();
            change(&mut other);
            let text = here.difference(&other).unwrap();
            assert!(text.contains(expected), "{text}");
        }
    }
}
