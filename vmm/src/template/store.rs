//! Finding, opening, listing and removing templates.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use forkvm_api::fault::Kill;
use rustix::{
    fs::{
        AtFlags, CWD, FlockOperation, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT,
        flock, futimens, linkat, openat,
    },
    io::Errno,
};

use super::{
    Error, Identity, Limits, Machine, Manifest, RecordFile, TemplateSpec,
    digest::Stamp,
    fault::Fault,
    identity::{check_id, digest},
    lock::uninterrupted,
    manifest::{self, Versioned},
    record::now,
};
use crate::{
    control::{Source, Writes},
    snapshot::state,
    written::Written,
};

/// Upper bound of a manifest's length in bytes.
const MAX_MANIFEST: u64 = 64 * 1024;

/// Name of the record of what a start writes to, in a template's folder.
const WRITTEN: &str = "written";

/// Seconds of a day.
const DAY: u64 = 24 * 60 * 60;

/// A folder of templates.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    limits: Limits,
    record: Option<RecordFile>,
    fault: Fault,
}

/// An open template. While it, or a monitor that was given its descriptors, lives, the template
/// cannot be removed: the memory file is locked (flock(2), shared).
#[derive(Debug)]
pub struct Template {
    manifest: Manifest,
    path: PathBuf,
    folder: OwnedFd,
    memory: File,
    state: File,
    written: Option<File>,
}

impl Store {
    /// The store in the folder `root`, which is made at the first build; without limits, and nothing is counted.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            limits: Limits::default(),
            record: None,
            fault: Fault::default(),
        }
    }

    /// The same store, in whose builds `kill` comes to pass: for forkvm's own tests.
    #[must_use]
    pub fn with_fault(self, kill: Option<Kill>) -> Self {
        Self {
            fault: Fault(kill),
            ..self
        }
    }

    pub(super) fn fault(&self) -> Fault {
        self.fault
    }

    /// The same store with limits.
    #[must_use]
    pub fn with_limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// The same store, which counts what happens in `record`.
    #[must_use]
    pub fn with_record(self, record: RecordFile) -> Self {
        Self {
            record: Some(record),
            ..self
        }
    }

    /// The store's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Its limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Where it counts.
    pub fn record(&self) -> Option<&RecordFile> {
        self.record.as_ref()
    }

    pub(super) fn folder(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    pub(super) fn missing(&self, id: &str) -> Error {
        Error::Missing {
            id: id.to_owned(),
            root: self.root.clone(),
        }
    }

    /// Opens the template of `spec` for a fork: checks that it fits this machine and is not too old, that the memory file
    /// is the one that was published (inode, size, times), and the state's checksum. Notes that it was used.
    ///
    /// # Errors
    /// Those for which [`Error::needs_build`] is true; a guest image that is missing; KVM that cannot be used.
    pub fn fork(&self, spec: &TemplateSpec) -> Result<Template, Error> {
        let template = self.open(&self.identity(spec)?)?;
        // Which template goes first is not worth a container: the store may be read-only.
        if let Err(errno) = template.mark_used() {
            log::debug!("template {}: its use is not noted: {errno}", template.id());
        }
        Ok(template)
    }

    /// The same without a fork in mind: nothing is noted.
    ///
    /// # Errors
    /// Those for which [`Error::needs_build`] is true.
    pub fn open(&self, identity: &Identity) -> Result<Template, Error> {
        let template = self.inspect(&identity.id)?;
        template.fits(&identity.machine)?;
        template.is_fresh(self.limits.age, now())?;
        Ok(template)
    }

    /// Opens a template to look at it, whatever machine it fits and however old it is.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Damaged`], [`Error::Outdated`] if it has another format.
    pub fn inspect(&self, id: &str) -> Result<Template, Error> {
        check_id(id)?;
        let path = self.folder(id);
        let damaged = |what: String| Error::Damaged {
            id: id.to_owned(),
            what,
        };
        let outdated = |what: String| Error::Outdated {
            id: id.to_owned(),
            what,
        };
        // All files are those of one folder, even if another is published meanwhile.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder =
            rustix::fs::open(&path, flags, Mode::empty()).map_err(|errno| match errno {
                Errno::NOENT => self.missing(id),
                _ => Error::file("open", &path)(errno.into()),
            })?;
        let open = |name: &str| {
            let opened = openat(
                &folder,
                name,
                OFlags::RDONLY | OFlags::CLOEXEC,
                Mode::empty(),
            );
            opened.map(File::from).map_err(|errno| match errno {
                // Taken away while we looked.
                Errno::NOENT if !is_at(&folder, &path) => self.missing(id),
                Errno::NOENT => damaged(format!("{name} is missing")),
                _ => Error::file("open", path.join(name))(errno.into()),
            })
        };
        let memory = open("memory")?;
        // Taken before anything is believed: from here on the template cannot be removed. Others hold it alone for the
        // moment that it takes to rename a folder.
        uninterrupted(|| flock(&memory, FlockOperation::LockShared))
            .map_err(|errno| Error::file("lock", path.join("memory"))(errno.into()))?;
        let mut text = Vec::new();
        open("manifest.json")?
            .take(MAX_MANIFEST)
            .read_to_end(&mut text)
            .map_err(Error::file("read", path.join("manifest.json")))?;
        let unreadable = |error| damaged(format!("manifest.json: {error}"));
        let format: Versioned = serde_json::from_slice(&text).map_err(unreadable)?;
        if format.version != manifest::VERSION {
            return Err(outdated(format!(
                "its manifest has version {}, this forkvm writes {}",
                format.version,
                manifest::VERSION
            )));
        }
        let manifest: Manifest = serde_json::from_slice(&text).map_err(unreadable)?;
        if manifest.id != id {
            return Err(damaged("manifest.json is of another template".into()));
        }
        if manifest.digest != digest(&manifest.inputs, &manifest.machine)
            || !manifest.digest.starts_with(id)
        {
            return Err(damaged("the digest in manifest.json differs".into()));
        }
        if manifest.inputs.state_version != state::VERSION {
            return Err(outdated(format!(
                "its state has format {}, this monitor has {}",
                manifest.inputs.state_version,
                state::VERSION
            )));
        }
        let metadata = memory
            .metadata()
            .map_err(Error::file("read", path.join("memory")))?;
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
        // A hint, not a part of the template: without it a start takes longer.
        let written = open(WRITTEN).ok();
        Ok(Template {
            manifest,
            path,
            folder,
            memory,
            state,
            written,
        })
    }

    /// Ids of all templates, sorted. Folders that are being made or removed are not listed.
    ///
    /// # Errors
    /// A store that cannot be read; one that does not exist is empty.
    pub fn list(&self) -> Result<Vec<String>, Error> {
        let mut ids = self.names()?;
        ids.retain(|name| check_id(name).is_ok());
        ids.sort();
        Ok(ids)
    }

    /// Names of everything in the store's folder.
    pub(super) fn names(&self) -> Result<Vec<String>, Error> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::file("read", &self.root)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::file("read", &self.root))?;
            names.extend(entry.file_name().into_string());
        }
        Ok(names)
    }

    /// Removes a template, damaged or not.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::InUse`].
    pub fn remove(&self, id: &str) -> Result<(), Error> {
        check_id(id)?;
        if !self.folder(id).is_dir() {
            return Err(self.missing(id));
        }
        let grave = {
            let _changes = self.lock_changes()?;
            let _unused = self
                .unused(id)?
                .ok_or_else(|| Error::InUse { id: id.to_owned() })?;
            self.bury(id)?
        };
        super::leftovers::erase(&grave)
    }

    /// The lock of whoever takes templates out of the store or puts them in: nobody else then holds one's memory alone.
    pub(super) fn lock_changes(&self) -> Result<File, Error> {
        let root = File::open(&self.root).map_err(Error::file("open", &self.root))?;
        uninterrupted(|| flock(&root, FlockOperation::LockExclusive))
            .map_err(|errno| Error::file("lock", &self.root)(errno.into()))?;
        Ok(root)
    }

    /// Locks a template's memory for the caller alone, if no child lives; whoever opens it then waits. The store is
    /// locked. A template without memory, which is damaged, is in nobody's use: then `Some(None)`.
    pub(super) fn unused(&self, id: &str) -> Result<Option<Option<File>>, Error> {
        let path = self.folder(id).join("memory");
        let memory = match File::open(&path) {
            Ok(memory) => memory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some(None)),
            Err(error) => return Err(Error::file("open", path)(error)),
        };
        match flock(&memory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Some(memory))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(Error::file("lock", path)(errno.into())),
        }
    }
}

/// Whether an open folder is still the one at `path`.
fn is_at(folder: &OwnedFd, path: &Path) -> bool {
    match (rustix::fs::fstat(folder), rustix::fs::stat(path)) {
        (Ok(held), Ok(named)) => (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino),
        _ => false,
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
        &self.path
    }

    /// Whether it can be forked on `machine`.
    fn fits(&self, machine: &Machine) -> Result<(), Error> {
        let id = self.manifest.id.clone();
        match self.manifest.machine.difference(machine) {
            Some(what) => Err(Error::Outdated { id, what }),
            None => Ok(()),
        }
    }

    /// Whether it is at most `age` old `now`, in seconds since 1970.
    pub(super) fn is_fresh(&self, age: Option<Duration>, now: u64) -> Result<(), Error> {
        // One that was made in a far future is as old as nobody knows: the clock was set back.
        let old = now.abs_diff(self.manifest.created);
        if age.is_some_and(|most| old > most.as_secs()) {
            return Err(Error::Expired {
                id: self.manifest.id.clone(),
                days: old / DAY,
            });
        }
        Ok(())
    }

    /// Sets the time of its last use to now.
    fn mark_used(&self) -> Result<(), Errno> {
        let at = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
        futimens(
            &self.folder,
            &Timestamps {
                last_access: at(UTIME_OMIT),
                last_modification: at(UTIME_NOW),
            },
        )
    }

    /// The source of a launch that forks it, and the descriptors that go with it.
    pub fn source(&self) -> (Source, [BorrowedFd<'_>; 2]) {
        (
            self.fork(Writes::Ignore),
            [self.memory.as_fd(), self.state.as_fd()],
        )
    }

    /// The same for a container's start, whose writes are expected if another's were recorded, and recorded if not.
    pub fn source_of_start(&self) -> (Source, Vec<BorrowedFd<'_>>) {
        let mut descriptors = vec![self.memory.as_fd(), self.state.as_fd()];
        let writes = match &self.written {
            Some(file) => {
                descriptors.push(file.as_fd());
                Writes::Expect
            }
            None => Writes::Record,
        };
        (self.fork(writes), descriptors)
    }

    fn fork(&self, writes: Writes) -> Source {
        Source::Fork {
            template: self.manifest.id.clone(),
            writes,
        }
    }

    /// Whether the start of a child is to be recorded.
    pub fn records(&self) -> bool {
        self.written.is_none()
    }

    /// Keeps what a start has written to, unless another child's is there already. A record of nothing is not kept: the
    /// next start shall make one.
    ///
    /// # Errors
    /// A folder that cannot be written to.
    pub fn keep_written(&self, written: &Written) -> Result<(), Error> {
        if written.is_empty() {
            return Ok(());
        }
        let failed = || Error::file("write", self.path.join(WRITTEN));
        // Without a name until it is whole.
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let mut file = openat(&self.folder, ".", flags, Mode::RUSR | Mode::WUSR)
            .map(File::from)
            .map_err(|errno| failed()(errno.into()))?;
        serde_json::to_writer(&mut file, written).map_err(|error| failed()(error.into()))?;
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        match linkat(CWD, unnamed, &self.folder, WRITTEN, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(failed()(errno.into())),
        }
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
            .map_err(Error::file("read", self.path.join("memory")))?;
        if checksum == self.manifest.memory.checksum {
            Ok(())
        } else {
            Err(damaged("checksum of memory differs"))
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
