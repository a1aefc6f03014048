//! Making a template: a monitor boots the guest, freezes it and writes it; then it gets its name.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::Path,
    process::Stdio,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::fs::{FlockOperation, flock};

use super::{
    Error, Manifest, Store, Template, TemplateSpec,
    digest::Stamp,
    manifest::{self, MemoryFile, StateFile},
    store::Identity,
};
use crate::{
    control::{
        Event, Frozen, Launch, Monitor, NetworkNamespace, Purpose, Request, Source, describe,
    },
    snapshot::state,
};

/// Longest time from the monitor's start to the frozen template. A boot takes a second or two on
/// hardware; software processors are some ten times slower.
const TIMEOUT: Duration = Duration::from_secs(300);

/// What a build is doing, for a display.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Somebody else builds the same template.
    Waiting,
    /// The guest boots.
    Booting,
    /// Its agent listens; the machine is being frozen.
    Freezing,
    /// A step of the freeze.
    Step(String),
    /// Checksums are computed and everything is brought to disk.
    Publishing,
}

impl fmt::Display for Progress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Progress::Waiting => "waiting for another build of the same template",
            Progress::Booting => "booting the guest",
            Progress::Freezing => "freezing the guest",
            Progress::Step(step) => step,
            Progress::Publishing => "bringing the template to disk",
        })
    }
}

impl Store {
    /// Makes the base template of `spec`, or opens it if it is there and whole. `monitor` is the
    /// monitor's program, `log` its standard error.
    ///
    /// # Errors
    /// [`Error::Build`] with the guest's last lines if the guest does not come up; files that
    /// cannot be written.
    pub fn build(
        &self,
        spec: &TemplateSpec,
        monitor: &Path,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Template, Error> {
        fs::create_dir_all(self.root()).map_err(Error::file("make", self.root()))?;
        let identity = self.identity(spec)?;
        let _lock = self.lock(&identity.id, progress)?;
        match self.open(&identity.id) {
            Ok(template) => return Ok(template),
            Err(Error::Missing { .. }) => {}
            Err(error @ Error::Damaged { .. }) => {
                log::warn!("{error}; building it anew");
                self.remove(&identity.id)?;
            }
            Err(error) => return Err(error),
        }
        self.clear_leftovers(&identity.id)?;
        let temporary =
            self.root()
                .join(format!(".building-{}-{}", identity.id, std::process::id()));
        let result = make(spec, &identity, monitor, &temporary, progress).and_then(|()| {
            let folder = self.folder(&identity.id);
            fs::rename(&temporary, &folder).map_err(Error::file("rename", &temporary))?;
            sync(self.root())
        });
        if let Err(error) = result {
            // What is left is removed by the next build of this id, if not now.
            let _ = fs::remove_dir_all(&temporary);
            return Err(error);
        }
        self.open(&identity.id)
    }

    /// Takes the lock of the one builder of an id, and waits for it if need be.
    fn lock(&self, id: &str, progress: &mut dyn FnMut(Progress)) -> Result<File, Error> {
        let path = self.root().join(format!(".lock-{id}"));
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::file("make", &path))?;
        let result = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                progress(Progress::Waiting);
                flock(&file, FlockOperation::LockExclusive)
            }
            other => other,
        };
        result.map_err(|errno| Error::file("lock", &path)(errno.into()))?;
        Ok(file)
    }

    /// Removes what a build of this id left that was killed. The lock is held.
    fn clear_leftovers(&self, id: &str) -> Result<(), Error> {
        let prefix = format!(".building-{id}-");
        let entries = fs::read_dir(self.root()).map_err(Error::file("read", self.root()))?;
        for entry in entries {
            let entry = entry.map_err(Error::file("read", self.root()))?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                fs::remove_dir_all(entry.path()).map_err(Error::file("remove", entry.path()))?;
            }
        }
        Ok(())
    }
}

fn create(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .create_new(true)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::file("make", path))
}

fn sync(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::file("sync", path))
}

/// Fills the folder `temporary` with a whole template.
fn make(
    spec: &TemplateSpec,
    identity: &Identity,
    monitor: &Path,
    temporary: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Error> {
    fs::create_dir(temporary).map_err(Error::file("make", temporary))?;
    let memory = create(&temporary.join("memory"))?;
    let state = create(&temporary.join("state"))?;
    let mut console = create(&temporary.join("console"))?;
    let frozen = boot_and_freeze(spec, monitor, &memory, &state, &mut console, progress)?;
    progress(Progress::Publishing);
    drop(console);
    fs::remove_file(temporary.join("console")).map_err(Error::file("remove", temporary))?;
    let bytes = state::read(&state).map_err(|error| Error::Build(format!("the state: {error}")))?;
    let snapshot =
        state::parse(&bytes).map_err(|error| Error::Build(format!("the state: {error}")))?;
    let checksum = crate::memory::checksum(&memory, &snapshot.memory.segments)
        .map_err(Error::file("read", temporary.join("memory")))?;
    let created = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let metadata = memory
        .metadata()
        .map_err(Error::file("read", temporary.join("memory")))?;
    let manifest = Manifest {
        version: manifest::VERSION,
        id: identity.id.clone(),
        digest: identity.digest.clone(),
        created,
        inputs: identity.inputs.clone(),
        machine: identity.machine.clone(),
        memory: MemoryFile {
            stamp: Stamp::from(&metadata),
            data_bytes: frozen.data_bytes,
            checksum,
        },
        state: StateFile {
            bytes: bytes.len() as u64,
            checksum: crc32fast::hash(&bytes),
        },
    };
    let path = temporary.join("manifest.json");
    let mut file = create(&path)?;
    serde_json::to_writer_pretty(&mut file, &manifest)
        .map_err(io::Error::from)
        .and_then(|()| file.write_all(b"\n"))
        .and_then(|()| file.sync_all())
        .map_err(Error::file("write", &path))?;
    sync(temporary)
}

/// Runs the monitor to the end of the freeze. When this returns the monitor has exited, so
/// nobody maps the memory file for writing any more.
fn boot_and_freeze(
    spec: &TemplateSpec,
    program: &Path,
    memory: &File,
    state: &File,
    console: &mut File,
    progress: &mut dyn FnMut(Progress),
) -> Result<Frozen, Error> {
    let kernel = File::open(&spec.kernel).map_err(Error::file("open", &spec.kernel))?;
    let initramfs = File::open(&spec.initramfs).map_err(Error::file("open", &spec.initramfs))?;
    let deadline = Instant::now() + TIMEOUT;
    let monitor = Monitor::spawn(program, Stdio::inherit())?;
    monitor.send(
        &Request::Launch(Launch {
            source: Source::Boot {
                vcpus: spec.vcpus,
                memory_bytes: spec.memory_bytes,
                cmdline: spec.cmdline.clone(),
            },
            purpose: Purpose::Freeze,
            network_namespace: NetworkNamespace::New,
            console: true,
            exports: Vec::new(),
        }),
        &[
            kernel.as_fd(),
            initramfs.as_fd(),
            memory.as_fd(),
            state.as_fd(),
            console.as_fd(),
        ],
    )?;
    progress(Progress::Booting);
    let failure = loop {
        match monitor.receive_before(deadline)? {
            Some(Event::AgentListening) => progress(Progress::Freezing),
            Some(Event::Progress { step }) => progress(Progress::Step(step)),
            Some(Event::Frozen(frozen)) => {
                let status = monitor.close()?;
                if !status.success() {
                    return Err(Error::Build(describe(status)));
                }
                return Ok(frozen);
            }
            Some(Event::Failed { message, .. }) => break message,
            Some(Event::Stopped { reason }) => break format!("the guest stopped: {reason}"),
            Some(Event::Running { .. } | Event::Paused | Event::Resumed) => {}
            None => break describe(monitor.close()?),
        }
    };
    let tail = tail(console).unwrap_or_default();
    Err(Error::Build(if tail.is_empty() {
        failure
    } else {
        format!("{failure}; the guest's last lines:\n{tail}")
    }))
}

/// The last kilobyte of the console.
fn tail(console: &mut File) -> io::Result<String> {
    let length = console.metadata()?.len();
    console.seek(SeekFrom::Start(length.saturating_sub(1024)))?;
    let mut bytes = Vec::new();
    console.take(1024).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}
