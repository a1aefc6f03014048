//! Finding, opening, listing and removing templates.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use super::{
    Error, Machine, Manifest, TemplateSpec,
    digest::{Cache, Stamp, hex},
    manifest::{self, Inputs},
};
use crate::{control::Source, snapshot::state};

/// Digits of an id.
const ID_DIGITS: usize = 16;

/// Upper bound of a manifest's length in bytes.
const MAX_MANIFEST: u64 = 64 * 1024;

/// A folder of templates.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// Digest of a template and what went into it.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub(super) id: String,
    pub(super) digest: String,
    pub(super) inputs: Inputs,
    pub(super) machine: Machine,
}

/// An open template. While it, or a monitor that was given its descriptors, lives, the template
/// cannot be removed: the memory file is locked (flock(2), shared).
#[derive(Debug)]
pub struct Template {
    manifest: Manifest,
    folder: PathBuf,
    memory: File,
    state: File,
}

impl Store {
    /// The store in the folder `root`, which is made at the first build.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Id of the base template that `spec` makes on this machine, whether it exists or not. Reads
    /// the kernel and the initramfs only if they changed since the last time.
    ///
    /// # Errors
    /// A missing kernel or initramfs; KVM that cannot be used.
    pub fn base_id(&self, spec: &TemplateSpec) -> Result<String, Error> {
        Ok(self.identity(spec)?.id)
    }

    pub(super) fn identity(&self, spec: &TemplateSpec) -> Result<Identity, Error> {
        let mut cache = Cache::load(&self.root);
        let (kernel, kernel_read) = cache.file(&spec.kernel)?;
        let (initramfs, initramfs_read) = cache.file(&spec.initramfs)?;
        let (machine, asked) = cache.machine()?;
        if (kernel_read || initramfs_read || asked) && self.root.is_dir() {
            // The cache saves time; a store that cannot be written to works without it.
            if let Err(error) = cache.save(&self.root) {
                log::warn!("cannot keep digests in {}: {error}", self.root.display());
            }
        }
        let inputs = Inputs {
            kernel,
            initramfs,
            cmdline: spec.cmdline.clone(),
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            state_version: state::VERSION,
        };
        let digest = digest(&inputs, &machine);
        Ok(Identity {
            id: digest[..ID_DIGITS].to_owned(),
            digest,
            inputs,
            machine,
        })
    }

    pub(super) fn folder(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// Opens a template for a fork: checks that it fits this machine, that the memory file is the
    /// one that was published (inode, size, times), and the state's checksum.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Damaged`], [`Error::OtherMachine`].
    pub fn open(&self, id: &str) -> Result<Template, Error> {
        let template = self.inspect(id)?;
        let (machine, _) = Cache::load(&self.root).machine()?;
        if let Some(what) = template.manifest.machine.difference(&machine) {
            return Err(Error::OtherMachine {
                id: id.to_owned(),
                what,
            });
        }
        Ok(template)
    }

    /// Opens a template to look at it, whatever machine it fits.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Damaged`].
    pub fn inspect(&self, id: &str) -> Result<Template, Error> {
        check_id(id)?;
        let folder = self.folder(id);
        let damaged = |what: String| Error::Damaged {
            id: id.to_owned(),
            what,
        };
        let open = |name: &str| {
            let path = folder.join(name);
            File::open(&path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound if !folder.exists() => Error::Missing {
                    id: id.to_owned(),
                    root: self.root.clone(),
                },
                io::ErrorKind::NotFound => damaged(format!("{name} is missing")),
                _ => Error::file("open", path)(error),
            })
        };
        let memory = open("memory")?;
        // Taken before anything is believed: from here on the template cannot be removed.
        match flock(&memory, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Error::Missing {
                    id: id.to_owned(),
                    root: self.root.clone(),
                });
            }
            Err(errno) => {
                return Err(Error::file("lock", folder.join("memory"))(errno.into()));
            }
        }
        let mut text = Vec::new();
        open("manifest.json")?
            .take(MAX_MANIFEST)
            .read_to_end(&mut text)
            .map_err(Error::file("read", folder.join("manifest.json")))?;
        let manifest: Manifest = serde_json::from_slice(&text)
            .map_err(|error| damaged(format!("manifest.json: {error}")))?;
        if manifest.version != manifest::VERSION || manifest.id != id {
            return Err(damaged(
                "manifest.json is of another template or version".into(),
            ));
        }
        if manifest.digest != digest(&manifest.inputs, &manifest.machine)
            || !manifest.digest.starts_with(id)
        {
            return Err(damaged("the digest in manifest.json differs".into()));
        }
        if manifest.inputs.state_version != state::VERSION {
            return Err(Error::OtherMachine {
                id: id.to_owned(),
                what: format!(
                    "state format {}, this monitor has {}",
                    manifest.inputs.state_version,
                    state::VERSION
                ),
            });
        }
        let metadata = memory
            .metadata()
            .map_err(Error::file("read", folder.join("memory")))?;
        if Stamp::from(&metadata) != manifest.memory.stamp {
            return Err(damaged(
                "memory was changed or copied since it was made".into(),
            ));
        }
        let state = open("state")?;
        let bytes = state::read(&state).map_err(|error| damaged(format!("state: {error}")))?;
        if bytes.len() as u64 != manifest.state.bytes
            || crc32fast::hash(&bytes) != manifest.state.checksum
        {
            return Err(damaged("checksum of state differs".into()));
        }
        Ok(Template {
            manifest,
            folder,
            memory,
            state,
        })
    }

    /// Ids of all templates, sorted. Folders that are being made or removed are not listed.
    ///
    /// # Errors
    /// A store that cannot be read; one that does not exist is empty.
    pub fn list(&self) -> Result<Vec<String>, Error> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::file("read", &self.root)(error)),
        };
        let mut ids = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::file("read", &self.root))?;
            if let Ok(name) = entry.file_name().into_string()
                && check_id(&name).is_ok()
            {
                ids.push(name);
            }
        }
        ids.sort();
        Ok(ids)
    }

    /// Removes a template, damaged or not.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::InUse`].
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        check_id(id)?;
        let folder = self.folder(id);
        if !folder.is_dir() {
            return Err(Error::Missing {
                id: id.to_owned(),
                root: self.root.clone(),
            });
        }
        // Held until the end, so nobody opens what is being taken away.
        let _lock = match File::open(folder.join("memory")) {
            Ok(memory) => {
                flock(&memory, FlockOperation::NonBlockingLockExclusive).map_err(|errno| {
                    match errno {
                        rustix::io::Errno::WOULDBLOCK => Error::InUse { id: id.to_owned() },
                        _ => Error::file("lock", folder.join("memory"))(errno.into()),
                    }
                })?;
                Some(memory)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(Error::file("open", folder.join("memory"))(error)),
        };
        let grave = self
            .root
            .join(format!(".removing-{id}-{}", std::process::id()));
        fs::rename(&folder, &grave).map_err(Error::file("remove", &folder))?;
        fs::remove_dir_all(&grave).map_err(Error::file("remove", &grave))
    }
}

impl Template {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.manifest.id
    }

    /// What it was made from and where it fits.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The source of a launch that forks it, and the descriptors that go with it.
    pub fn source(&self) -> (Source, [BorrowedFd<'_>; 2]) {
        (
            Source::Fork {
                template: self.manifest.id.clone(),
            },
            [self.memory.as_fd(), self.state.as_fd()],
        )
    }

    /// Reads all of the memory and compares its checksum: about a second for each GiB of data.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn verify(&self) -> Result<(), Error> {
        let damaged = |what: &str| Error::Damaged {
            id: self.manifest.id.clone(),
            what: what.to_owned(),
        };
        let bytes = state::read(&self.state).map_err(|error| damaged(&error.to_string()))?;
        let snapshot = state::parse(&bytes).map_err(|error| damaged(&error.to_string()))?;
        let checksum = crate::memory::checksum(&self.memory, &snapshot.memory.segments)
            .map_err(Error::file("read", self.folder.join("memory")))?;
        if checksum == self.manifest.memory.checksum {
            Ok(())
        } else {
            Err(damaged("checksum of memory differs"))
        }
    }
}

fn check_id(id: &str) -> Result<(), Error> {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if id.len() == ID_DIGITS && id.bytes().all(digit) {
        Ok(())
    } else {
        Err(Error::BadId { id: id.to_owned() })
    }
}

/// SHA-256 over everything that makes two templates differ, each part with its length.
fn digest(inputs: &Inputs, machine: &Machine) -> String {
    let mut hash = Sha256::new();
    let parts = [
        inputs.kernel.as_str(),
        &inputs.initramfs,
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
mod tests;
