//! The texts of the store, for the fuzz targets.

use std::path::Path;

use super::digest::{Cache, Stamp};
use super::manifest::{self, MemoryFile, StateFile};
use super::{Error, Identity, Manifest, example};

/// Reads the remembered digests of a store, and writes what was understood.
///
/// # Errors
/// Those of writing.
pub fn digests(root: &Path) -> std::io::Result<()> {
    Cache::load(root).save(root)
}

/// The id that a manifest's content gives it, if it is one.
pub fn manifest_id(text: &[u8]) -> Option<String> {
    let manifest: Manifest = serde_json::from_slice(text).ok()?;
    Some(Identity::new(manifest.inputs, manifest.machine).id)
}

/// The manifest with the digest, id, stamp and checksum of its content and of the files in its folder.
pub fn fix_manifest(text: &[u8], folder: &Path) -> Option<Vec<u8>> {
    let mut manifest: Manifest = serde_json::from_slice(text).ok()?;
    let identity = Identity::new(manifest.inputs.clone(), manifest.machine.clone());
    manifest.digest = identity.digest;
    manifest.id = identity.id;
    manifest.memory.stamp = Stamp::of(&folder.join("memory")).ok()?;
    let state = std::fs::read(folder.join("state")).ok()?;
    manifest.state.bytes = state.len() as u64;
    manifest.state.checksum = crc32fast::hash(&state);
    serde_json::to_vec(&manifest).ok()
}

/// A manifest and a file of digests, as the store writes them; `file` is any file.
///
/// # Errors
/// A file that cannot be read.
pub fn example_texts(file: &Path) -> Result<[Vec<u8>; 2], Error> {
    let identity = example::identity("host");
    let manifest = Manifest {
        version: manifest::VERSION,
        id: identity.id,
        digest: identity.digest,
        created: 0,
        inputs: identity.inputs,
        machine: identity.machine.clone(),
        memory: MemoryFile {
            stamp: Stamp::of(file)?,
            data_bytes: 6,
            checksum: 0,
        },
        state: StateFile {
            bytes: 0,
            checksum: 0,
        },
    };
    let cache = Cache::example(file, identity.machine)?;
    let text = |error: serde_json::Error| Error::file("write", file)(error.into());
    Ok([
        serde_json::to_vec(&manifest).map_err(text)?,
        serde_json::to_vec(&cache).map_err(text)?,
    ])
}
