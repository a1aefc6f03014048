//! Templates for tests: files that fit each other, without a guest.

use std::{fs, path::Path};

pub(super) use super::example::identity;
use super::{
    Error, Identity, Manifest,
    digest::Stamp,
    manifest::{self, MemoryFile, StateFile},
    record::now,
};

/// Opening compares its checksum and does not read it.
pub(super) const STATE: &[u8] = b"any bytes";

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
