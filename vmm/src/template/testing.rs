//! Templates for tests: files that fit each other, without a guest.

use std::{fs, path::Path};

use super::{
    Error, Identity, Machine, Manifest,
    digest::Stamp,
    manifest::{self, Inputs, MemoryFile, StateFile},
    record::now,
};
use crate::snapshot::state;

/// Opening compares its checksum and does not read it.
pub(super) const STATE: &[u8] = b"any bytes";

/// The identity of a template of a domain.
pub(super) fn identity(domain: &str) -> Identity {
    Identity::new(
        Inputs {
            kernel: "k".into(),
            initramfs: "i".into(),
            monitor: "m".into(),
            domain: domain.into(),
            cmdline: String::new(),
            vcpus: 2,
            memory_bytes: 1 << 30,
            state_version: state::VERSION,
        },
        Machine {
            cpu_model: "a processor".into(),
            cpuid: "c".into(),
            microcode: "0x1".into(),
            tsc_khz: 2_000_000,
            kernel_release: "6.12".into(),
        },
    )
}

/// Makes the folder and files of a template, whose memory takes `bytes` on disk.
pub(super) fn fill(identity: &Identity, folder: &Path, bytes: usize) -> Result<(), Error> {
    fs::create_dir(folder).map_err(Error::file("make", folder))?;
    fs::write(folder.join("memory"), vec![7; bytes]).unwrap();
    fs::write(folder.join("state"), STATE).unwrap();
    write_manifest(folder, &manifest(identity, folder));
    Ok(())
}

/// The manifest that fits the files of a folder.
pub(super) fn manifest(identity: &Identity, folder: &Path) -> Manifest {
    Manifest {
        version: manifest::VERSION,
        id: identity.id.clone(),
        digest: identity.digest.clone(),
        created: now(),
        inputs: identity.inputs.clone(),
        machine: identity.machine.clone(),
        memory: MemoryFile {
            stamp: Stamp::of(&folder.join("memory")).unwrap(),
            data_bytes: 6,
            checksum: 0,
        },
        state: StateFile {
            bytes: STATE.len() as u64,
            checksum: crc32fast::hash(STATE),
        },
    }
}

/// Replaces a template's manifest.
pub(super) fn write_manifest(folder: &Path, manifest: &Manifest) {
    fs::write(
        folder.join("manifest.json"),
        serde_json::to_vec(manifest).unwrap(),
    )
    .unwrap();
}
