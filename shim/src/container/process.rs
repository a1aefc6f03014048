//! One process of a container: the init process or an exec.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::phase::Phase;
use crate::{
    machine::Exit,
    streams::{Open, Stdio},
};

/// A process as containerd sees it.
pub(crate) struct Process {
    /// Empty for the init process.
    pub(crate) exec_id: String,
    pub(crate) stdio: Stdio,
    /// The OCI `process` object of an exec, JSON.
    pub(crate) spec: Vec<u8>,
    state: Mutex<State>,
    /// Becomes the end when it is announced.
    exit: watch::Sender<Option<Exit>>,
}

/// What changes in a process's life. Never held across a call to the guest.
pub(crate) struct State {
    pub(crate) phase: Phase,
    /// The PID that containerd sees; 0 before an exec has started.
    pub(crate) pid: u32,
    /// Terminal size asked for before the process was started: rows, columns.
    pub(crate) size: (u32, u32),
    /// `CloseIO` came before the streams were open.
    pub(crate) stdin_closed: bool,
    pub(crate) streams: Option<Open>,
}

impl Process {
    pub(crate) fn new(exec_id: &str, pid: u32, stdio: Stdio, spec: Vec<u8>) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            stdio,
            spec,
            state: Mutex::new(State {
                phase: Phase::Created,
                pid,
                size: (0, 0),
                stdin_closed: false,
                streams: None,
            }),
            exit: watch::Sender::new(None),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // A panic while it was held leaves plain values, nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells those that wait. Called once, behind the event that announces the end.
    pub(crate) fn announce(&self, exit: Exit) {
        self.exit.send_replace(Some(exit));
    }

    /// Waits for the announced end. `None` only when the process is dropped.
    pub(crate) async fn exited(&self) -> Option<Exit> {
        let mut exit = self.exit.subscribe();
        let exit = exit.wait_for(Option::is_some).await.ok()?;
        *exit
    }
}
