//! The files of a template: a monitor boots the guest, freezes it and writes it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt},
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use forkvm_api::points;

use super::{
    Error, Manifest, Progress, TemplateSpec,
    digest::Stamp,
    fault::Fault,
    identity::Identity,
    manifest::{self, MemoryFile, StateFile},
    record::now,
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

fn create(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .create_new(true)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::file("make", path))
}

/// Brings a file or a folder to disk.
pub(super) fn sync(path: &Path) -> Result<(), Error> {
    File::open(path)
        .and_then(|file| file.sync_all())
        .map_err(Error::file("sync", path))
}

/// Makes the folder `temporary` and fills it with a whole template.
pub(super) fn make(
    spec: &TemplateSpec,
    identity: &Identity,
    temporary: &Path,
    fault: Fault,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), Error> {
    fs::create_dir(temporary).map_err(Error::file("make", temporary))?;
    let memory = create(&temporary.join("memory"))?;
    let state = create(&temporary.join("state"))?;
    let mut console = create(&temporary.join("console"))?;
    let frozen = boot_and_freeze(spec, &memory, &state, &mut console, fault, progress)?;
    progress(Progress::Publishing);
    fault.passed(points::BUILD_FROZEN);
    drop(console);
    fs::remove_file(temporary.join("console")).map_err(Error::file("remove", temporary))?;
    let bytes = state::read(&state).map_err(|error| Error::Build(format!("the state: {error}")))?;
    let snapshot =
        state::parse(&bytes).map_err(|error| Error::Build(format!("the state: {error}")))?;
    let checksum = crate::memory::checksum(&memory, &snapshot.memory.segments)
        .map_err(Error::file("read", temporary.join("memory")))?;
    let metadata = memory
        .metadata()
        .map_err(Error::file("read", temporary.join("memory")))?;
    let manifest = Manifest {
        version: manifest::VERSION,
        id: identity.id.clone(),
        digest: identity.digest.clone(),
        created: now(),
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

/// Runs the monitor to the end of the freeze.
fn boot_and_freeze(
    spec: &TemplateSpec,
    memory: &File,
    state: &File,
    console: &mut File,
    fault: Fault,
    progress: &mut dyn FnMut(Progress),
) -> Result<Frozen, Error> {
    let kernel = File::open(&spec.kernel).map_err(Error::file("open", &spec.kernel))?;
    let initramfs = File::open(&spec.initramfs).map_err(Error::file("open", &spec.initramfs))?;
    let deadline = Instant::now() + TIMEOUT;
    let monitor = Monitor::spawn(&spec.monitor, Stdio::inherit())?;
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
        &[kernel.as_fd(), initramfs.as_fd(), console.as_fd()],
    )?;
    progress(Progress::Booting);
    fault.passed_with(points::BUILD_BOOTING, &monitor);
    let failure = loop {
        match monitor.receive_before(deadline)? {
            Some(Event::AgentListening) => {
                progress(Progress::Freezing);
                fault.passed_with(points::BUILD_FREEZING, &monitor);
                monitor.send(&Request::Freeze, &[memory.as_fd(), state.as_fd()])?;
            }
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
            Some(
                Event::Reached { .. }
                | Event::Running { .. }
                | Event::Paused
                | Event::Resumed
                | Event::Written(_),
            ) => {}
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
