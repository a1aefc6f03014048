//! Runs a worker and hears what it made.

use std::{
    io,
    os::fd::OwnedFd,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
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

/// Where a worker finds the standard streams of the process that it makes: behind its socket.
const FIRST_STREAM: i32 = worker::SOCKET + 1;

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

/// Runs a worker to its end, or until it has made the process.
pub(crate) async fn launch(
    reaper: &Reaper,
    mut request: Request,
    streams: Option<ProcessEnds>,
) -> Result<Launched, Error> {
    let _at_work = reaper.worker_at_work();
    let (ours, theirs) = report::pair().map_err(Error::Spawn)?;
    let mut fds = vec![theirs];
    if let Some(ends) = streams {
        request.stdio = (FIRST_STREAM..FIRST_STREAM + 3).collect();
        fds.extend(ends.fds);
    }
    let worker = spawn(&request, fds).map_err(Error::Spawn)?;
    let mut worker_ended = reaper.claim(worker);
    let socket = channel::register(ours, Interest::READABLE).map_err(Error::Hear)?;
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
                            ended: reaper.claim(pid),
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

fn spawn(request: &Request, fds: Vec<OwnedFd>) -> io::Result<u32> {
    let mappings = fds
        .into_iter()
        .zip(worker::SOCKET..)
        .map(|(parent_fd, child_fd)| FdMapping {
            parent_fd,
            child_fd,
        })
        .collect();
    let child = Command::new("/proc/self/exe")
        .arg0("forkvm-agent")
        .arg(worker::COMMAND)
        .arg(serde_json::to_string(request)?)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .fd_mappings(mappings)
        .map_err(io::Error::other)?
        .spawn()?;
    // It is reaped by the reaper, as all others.
    Ok(child.id())
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
