//! Runs workers, and hears what they made.

use std::{
    io,
    os::fd::OwnedFd,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use command_fds::{CommandFdExt, FdMapping};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    channel,
    reaper::{Ended, Reaper},
    report::{self, Report, Request},
    stdio::ProcessEnds,
    worker,
};

/// How long after the end of an exec the worker for the next one is executed: by then its end has been told, which would
/// otherwise wait for this.
const QUIET: Duration = Duration::from_millis(60);

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot start a worker: {0}")]
    Spawn(io::Error),
    #[error("cannot hear the worker: {0}")]
    Hear(io::Error),
    /// What the worker says.
    #[error("{0}")]
    Failed(String),
    #[error("the worker ended with status {0} and said nothing")]
    Silent(u32),
}

/// A process that a worker has made.
#[derive(Debug)]
pub(crate) struct Launched {
    pub(crate) pid: u32,
    pub(crate) ended: Ended,
    pub(crate) reports: Reports,
}

/// What a made process has to say until it executes its program.
#[derive(Debug)]
pub(crate) struct Reports {
    socket: AsyncFd<OwnedFd>,
    first_error: Option<String>,
    failure: Option<String>,
}

/// A worker that has been executed, and waits for its request.
#[derive(Debug)]
struct Worker {
    ended: Ended,
    socket: OwnedFd,
}

/// The worker for the next request.
#[derive(Debug, Default)]
enum Next {
    /// It will be executed when it is needed.
    #[default]
    Nobody,
    /// It is about to be executed.
    Coming,
    Waiting(Worker),
}

/// Runs workers. Clones share the one that waits.
#[derive(Debug, Clone)]
pub(crate) struct Launcher {
    reaper: Reaper,
    next: Arc<Mutex<Next>>,
}

impl Launcher {
    pub(crate) fn new(reaper: Reaper) -> Self {
        Self {
            reaper,
            next: Arc::default(),
        }
    }

    // Each change is one assignment: a panic elsewhere cannot leave half of one.
    fn next(&self) -> MutexGuard<'_, Next> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a worker executed for the next request, in a while ([`QUIET`]). To be called when an exec has ended: where there
    /// was one there will be more, and a container without any has no memory to spend on it.
    pub(crate) fn prepare(&self) {
        {
            let mut next = self.next();
            if !matches!(*next, Next::Nobody) {
                return;
            }
            *next = Next::Coming;
        }
        let launcher = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(QUIET).await;
            let spawned = launcher.spawn();
            *launcher.next() = match spawned {
                Ok(worker) => Next::Waiting(worker),
                Err(error) => {
                    log::warn!("no worker waits for the next exec: {error}");
                    Next::Nobody
                }
            };
        });
    }

    /// Takes the worker that waits, if one does.
    fn take_waiting(&self) -> Option<Worker> {
        let mut next = self.next();
        match std::mem::take(&mut *next) {
            Next::Waiting(worker) => Some(worker),
            other => {
                *next = other;
                None
            }
        }
    }

    fn spawn(&self) -> io::Result<Worker> {
        let (ours, theirs) = report::pair()?;
        let socket = FdMapping {
            parent_fd: theirs,
            child_fd: worker::SOCKET,
        };
        let child = Command::new("/proc/self/exe")
            .arg0("forkvm-agent")
            .arg(worker::COMMAND)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .fd_mappings(vec![socket])
            .map_err(io::Error::other)?
            .spawn()?;
        // It is reaped by the reaper, as all others.
        Ok(Worker {
            ended: self.reaper.claim(child.id()),
            socket: ours,
        })
    }

    /// A worker that has its request.
    fn hand_out(&self, request: &Request, streams: &[OwnedFd]) -> io::Result<Worker> {
        if let Some(worker) = self.take_waiting() {
            // One that waited may be gone: what is short of memory ends whom it likes.
            if report::send_request(&worker.socket, request, streams).is_ok() {
                return Ok(worker);
            }
        }
        let worker = self.spawn()?;
        report::send_request(&worker.socket, request, streams)?;
        Ok(worker)
    }

    /// Runs a worker to its end, or until it has made the process. With a terminal there are no streams.
    pub(crate) async fn launch(
        &self,
        request: &Request,
        streams: Option<ProcessEnds>,
    ) -> Result<Launched, Error> {
        let _at_work = self.reaper.worker_at_work();
        let streams = streams.map_or_else(Vec::new, |ends| ends.fds.into());
        let Worker {
            ended: mut worker_ended,
            socket,
        } = self.hand_out(request, &streams).map_err(Error::Spawn)?;
        drop(streams);
        let socket = channel::register(socket, Interest::READABLE).map_err(Error::Hear)?;
        let mut reports = Reports {
            socket,
            first_error: None,
            failure: None,
        };
        let mut silent = false;
        loop {
            // What the worker said before its end is in the socket when its end is seen.
            let over = *worker_ended.borrow_and_update();
            loop {
                match report::try_receive(reports.socket.get_ref()) {
                    Ok(Some(report)) => {
                        if let Some(pid) = reports.hear(report) {
                            return Ok(Launched {
                                pid,
                                ended: self.reaper.claim(pid),
                                reports,
                            });
                        }
                    }
                    Ok(None) => break,
                    // Every sender has gone. A closed socket stays readable: it is not asked again.
                    Err(_) => {
                        silent = true;
                        break;
                    }
                }
            }
            if let Some(exit) = over {
                return Err(match reports.failure() {
                    Some(failure) => Error::Failed(failure),
                    None => Error::Silent(exit.status),
                });
            }
            tokio::select! {
                ready = reports.socket.readable(), if !silent => ready.map_err(Error::Hear)?.clear_ready(),
                _ = worker_ended.changed() => {}
            }
        }
    }
}

impl Reports {
    /// Takes one report in; answers the PID if it says one.
    fn hear(&mut self, report: Report) -> Option<u32> {
        match report {
            Report::Made { pid } => return Some(pid),
            // The first is the one in our own words; libcontainer's, which quotes it, follows.
            Report::Failed { error } => {
                self.failure.get_or_insert(error);
            }
            Report::Log { level, text } => {
                let level = if level <= 1 {
                    log::Level::Error
                } else {
                    log::Level::Warn
                };
                if level == log::Level::Error {
                    self.first_error.get_or_insert_with(|| text.clone());
                }
                // An error comes back to the caller in the answer.
                log::debug!("libcontainer: {level}: {text}");
            }
        }
        None
    }

    /// The failure in one line, with the cause that only libcontainer's log tells.
    fn failure(&mut self) -> Option<String> {
        let failure = self.failure.take()?;
        Some(match self.first_error.take() {
            Some(cause) if !failure.contains(&cause) && !failure.starts_with("exec") => {
                format!("{failure} ({cause})")
            }
            _ => failure,
        })
    }

    /// Waits until the process has executed its program; what went wrong if it could not.
    pub(crate) async fn executed(mut self) -> Result<(), Error> {
        loop {
            match report::try_receive(self.socket.get_ref()) {
                Ok(Some(report)) => {
                    self.hear(report);
                }
                Ok(None) => self
                    .socket
                    .readable()
                    .await
                    .map_err(Error::Hear)?
                    .clear_ready(),
                // The last descriptor was closed, by the program's execution or by the end.
                Err(_) => {
                    return match self.failure() {
                        Some(failure) => Err(Error::Failed(failure)),
                        None => Ok(()),
                    };
                }
            }
        }
    }
}
