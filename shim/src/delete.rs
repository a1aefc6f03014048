//! The `delete` action, the crash path: a new process that cleans up after a shim that is dead or
//! does not answer. containerd gives it five seconds.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use containerd_shim::{Flags, api::DeleteResponse};
use forkvm_config::Config;
use protobuf::{Message as _, well_known_types::timestamp::Timestamp};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use crate::{
    bundle::{self, Bundle},
    cgroup, rootfs,
    run_state::{RunFolder, State, start_time},
};

/// Each of the two processes may take this long to die of SIGKILL.
const DEATH: Duration = Duration::from_millis(1500);

/// 128 + SIGKILL.
const KILLED: u32 = 137;

/// What could not be cleaned up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    #[error(transparent)]
    Configuration(#[from] forkvm_config::Error),
    #[error("cannot kill the {what} {pid}: {source}")]
    Kill {
        what: &'static str,
        pid: u32,
        source: io::Error,
    },
    #[error("the {what} {pid} does not die")]
    Alive { what: &'static str, pid: u32 },
    #[error(transparent)]
    Rootfs(#[from] rootfs::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    RunState(#[from] crate::run_state::Error),
    #[error("cannot remove the socket {0}: {1}")]
    Socket(std::path::PathBuf, io::Error),
    #[error("cannot encode the answer: {0}")]
    Answer(protobuf::Error),
}

/// Runs the action; the result is the encoded `DeleteResponse`.
pub(crate) fn run(flags: &Flags) -> Result<Vec<u8>, Error> {
    let config = Config::load()?;
    let folder = RunFolder::new(&config.paths.run, &flags.namespace, &flags.id);
    let state = folder.read_state();
    match Bundle::open(&flags.bundle) {
        Ok(bundle) => {
            end_shim(&bundle)?;
            end_monitor(state.as_ref())?;
            rootfs::unmount(&bundle.path().join("rootfs"))?;
            if let Some(socket) = bundle.socket() {
                remove(&socket)?;
            }
            // A template that it was building when it died. Whatever cannot be removed now is by the next build.
            let _ = forkvm_vmm::template::store(&config).sweep(None);
        }
        // Nothing but the monitor can be left without a bundle.
        Err(bundle::Error::Folder { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            end_monitor(state.as_ref())?;
        }
        Err(error) => return Err(error.into()),
    }
    if let Some(state) = &state {
        cgroup::remove(&state.cgroup, &state.id)?;
    }
    folder.remove()?;
    let response = DeleteResponse {
        pid: state.map_or(0, |state| state.monitor_pid),
        exit_status: KILLED,
        exited_at: Some(Timestamp::from(SystemTime::now())).into(),
        ..Default::default()
    };
    response.write_to_bytes().map_err(Error::Answer)
}

/// Ends the shim if it lives. Its lock says whether it does, and that a PID has not been given to
/// another process since.
fn end_shim(bundle: &Bundle) -> Result<(), Error> {
    if bundle.lock()?.is_some() {
        return Ok(());
    }
    let Ok(pid) = bundle.lock_holder().trim().parse::<u32>() else {
        return Ok(());
    };
    let Some(process) = open_process("shim", pid)? else {
        return Ok(());
    };
    // Still locked behind the open: this is the process that holds it.
    if bundle.lock()?.is_some() {
        return Ok(());
    }
    kill("shim", pid, &process)
}

/// The monitor ends by itself when its shim does; this makes sure.
fn end_monitor(state: Option<&State>) -> Result<(), Error> {
    let Some(state) = state.filter(|state| state.monitor_pid != 0) else {
        return Ok(());
    };
    let pid = state.monitor_pid;
    match open_process("monitor", pid)? {
        Some(process) if start_time(pid) == Some(state.monitor_start) => {
            kill("monitor", pid, &process)
        }
        _ => Ok(()),
    }
}

/// A descriptor of a process; `None` when it is gone.
fn open_process(what: &'static str, pid: u32) -> Result<Option<OwnedFd>, Error> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let Some(raw) = raw else {
        return Ok(None);
    };
    match pidfd_open(raw, PidfdFlags::empty()) {
        Ok(process) => Ok(Some(process)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(Error::Kill {
            what,
            pid,
            source: error.into(),
        }),
    }
}

fn kill(what: &'static str, pid: u32, process: &OwnedFd) -> Result<(), Error> {
    let failed = |error: rustix::io::Errno| Error::Kill {
        what,
        pid,
        source: error.into(),
    };
    match pidfd_send_signal(process, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(failed(error)),
    }
    let deadline = Instant::now() + DEATH;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        };
        // A pidfd becomes readable when its process ends (pidfd_open(2)).
        match poll(
            &mut [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)],
            Some(&left),
        ) {
            Ok(0) => return Err(Error::Alive { what, pid }),
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

fn remove(socket: &Path) -> Result<(), Error> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::Socket(socket.to_owned(), error))
        }
        _ => Ok(()),
    }
}
