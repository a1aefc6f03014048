//! One process that the shim knows: a container's init, or an exec.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use nix::{errno::Errno, sys::signal, unistd::Pid};
use tokio::sync::watch;

use crate::{
    reaper::{Ended, Exit},
    stdio::{AgentEnds, Terminal},
};

/// Why a process could not be signalled or its terminal changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("process {0} has ended")]
    Ended(u32),
    #[error("{0} is not a signal")]
    NoSignal(u32),
    #[error("cannot send signal {signal} to process {pid}: {source}")]
    Signal {
        pid: u32,
        signal: u32,
        source: Errno,
    },
    #[error("process {0} has no terminal")]
    NoTerminal(u32),
    #[error("cannot set the window's size: {0}")]
    Resize(io::Error),
}

/// A process and its streams.
#[derive(Debug)]
pub(crate) struct Process {
    pid: u32,
    /// Its end as the reaper saw it.
    ended: Ended,
    /// The same, told only when its output has been delivered.
    finished: Ended,
    terminal: Arc<Mutex<Option<Terminal>>>,
}

impl Process {
    /// Starts to move the process's streams. `at_end` runs when it has ended, before the rest of its
    /// output is waited for.
    pub(crate) fn watch(
        pid: u32,
        ended: Ended,
        streams: AgentEnds,
        at_end: impl FnOnce() + Send + 'static,
    ) -> Self {
        let (pumps, terminal) = streams.start(&ended);
        let terminal = Arc::new(Mutex::new(terminal));
        let (finish, finished) = watch::channel(None);
        tokio::spawn({
            let mut ended = ended.clone();
            let terminal = Arc::clone(&terminal);
            async move {
                let exit = match ended.wait_for(Option::is_some).await {
                    Ok(exit) => *exit,
                    // The reaper has gone, and with it the agent.
                    Err(_) => return,
                };
                at_end();
                pumps.deliver().await;
                // The master is closed with it: what still runs on the terminal is hung up.
                terminal
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take();
                finish.send_replace(exit);
            }
        });
        Self {
            pid,
            ended,
            finished,
            terminal,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    /// To be waited for until the process has ended and its output has been delivered.
    pub(crate) fn finished(&self) -> Ended {
        self.finished.clone()
    }

    /// Sends a signal. The process is the agent's child: as long as it has not been reaped its number
    /// belongs to no other.
    pub(crate) fn signal(&self, number: u32) -> Result<(), Error> {
        if self.has_ended() {
            return Err(Error::Ended(self.pid));
        }
        send_signal(self.pid, number)
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) -> Result<(), Error> {
        let terminal = self.terminal.lock().unwrap_or_else(PoisonError::into_inner);
        match terminal.as_ref() {
            Some(terminal) => terminal.resize(rows, columns).map_err(Error::Resize),
            None if self.has_ended() => Err(Error::Ended(self.pid)),
            None => Err(Error::NoTerminal(self.pid)),
        }
    }
}

/// Sends a signal by its number: real-time signals, which have no name, too.
pub(crate) fn send_signal(pid: u32, number: u32) -> Result<(), Error> {
    // 64 is the last real-time signal of Linux.
    let signal = i32::try_from(number)
        .ok()
        .filter(|signal| (0..=64).contains(signal));
    let signal = signal.ok_or(Error::NoSignal(number))?;
    let target = i32::try_from(pid)
        .ok()
        .filter(|pid| *pid > 1)
        .ok_or(Error::Ended(pid))?;
    // SAFETY: kill touches no memory; `target` is one process, never a group or every process.
    let sent = unsafe { libc::kill(Pid::from_raw(target).as_raw(), signal) };
    match Errno::result(sent) {
        Ok(_) => Ok(()),
        Err(Errno::ESRCH) => Err(Error::Ended(pid)),
        Err(source) => Err(Error::Signal {
            pid,
            signal: number,
            source,
        }),
    }
}

/// Sends SIGKILL, whose number is the same everywhere.
pub(crate) const SIGKILL: u32 = signal::Signal::SIGKILL as u32;

/// The end of a process, or `None` if the agent goes away first.
pub(crate) async fn end_of(mut finished: Ended) -> Option<Exit> {
    let exit = finished.wait_for(Option::is_some).await.ok()?;
    *exit
}
