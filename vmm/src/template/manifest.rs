//! `manifest.json`: what a template was made from, where it fits, and what its files are.

use serde::{Deserialize, Serialize};

#[cfg(doc)]
use super::Domain;
use super::{Machine, digest::Stamp};

/// Version of the manifest's format.
pub const VERSION: u32 = 2;

/// What every version of the format has.
#[derive(Debug, Deserialize)]
pub(super) struct Versioned {
    pub(super) version: u32,
}

/// The manifest of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format.
    pub version: u32,
    /// The template's id: the first 16 digits of `digest`.
    pub id: String,
    /// SHA-256 over everything that makes two templates differ.
    pub digest: String,
    /// When it was made, seconds since 1970.
    pub created: u64,
    /// What it was made from.
    pub inputs: Inputs,
    /// The machine it fits.
    pub machine: Machine,
    /// The memory file.
    pub memory: MemoryFile,
    /// The state file.
    pub state: StateFile,
}

/// What a template was made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inputs {
    /// SHA-256 of the guest kernel.
    pub kernel: String,
    /// SHA-256 of the initramfs, which holds the agent.
    pub initramfs: String,
    /// SHA-256 of the monitor's program.
    pub monitor: String,
    /// Whose containers may be forked from it, as [`Domain`] is written.
    pub domain: String,
    /// Added to the kernel's command line.
    pub cmdline: String,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Version of the monitor's state format.
    pub state_version: u32,
}

/// The memory file. A start checks the stamp; `forkvm template verify` the checksum.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryFile {
    /// Inode, size and times when it was published.
    pub stamp: Stamp,
    /// Bytes that hold data; the rest are holes.
    pub data_bytes: u64,
    /// CRC-32 (as in zip) of the whole file, holes as zeroes left out.
    pub checksum: u32,
}

/// The state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateFile {
    /// Length in bytes.
    pub bytes: u64,
    /// CRC-32 of the whole file.
    pub checksum: u32,
}
