//! The launcher's side: starts a monitor's process and talks to it.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Instant,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    Event, Request,
    socket::{self, Socket},
};

/// What can go wrong with a monitor's process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program cannot be started.
    #[error("cannot start the monitor {program}: {source}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The control socket failed.
    #[error(transparent)]
    Socket(#[from] socket::Error),
    /// It said nothing in time.
    #[error("the monitor did not answer in time, see its log")]
    TimedOut,
    /// Its end cannot be waited for.
    #[error("cannot wait for the monitor: {0}")]
    Wait(io::Error),
}

/// How a monitor's process ended, for a sentence that begins with it.
pub fn describe(status: ExitStatus) -> String {
    match status.signal() {
        Some(libc::SIGSYS) => "its monitor was killed for a system call that is not on its list \
                               (SIGSYS): either its guest has broken into it or the list lacks the \
                               call, which the host's kernel log names (`dmesg`, type=1326)"
            .to_owned(),
        Some(libc::SIGKILL) => "it was killed".to_owned(),
        _ => format!("its monitor ended ({status})"),
    }
}

/// A running monitor. Dropping it closes the control socket, so the monitor exits; the process is
/// then reaped.
#[derive(Debug)]
pub struct Monitor {
    // Closed first: the process exits by it, and then `child` can be waited for.
    socket: Option<Socket>,
    child: Option<Child>,
}

impl Monitor {
    /// Starts `program` with the control socket as its standard input and `log` as its standard
    /// error. Nothing else is inherited (descriptors of ours are close-on-exec).
    ///
    /// # Errors
    /// A program that cannot be started.
    pub fn spawn(program: &Path, log: Stdio) -> Result<Self, Error> {
        let (ours, theirs) = Socket::pair()?;
        let child = Command::new(program)
            .stdin(Stdio::from(theirs.into_inner()))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(|source| Error::Spawn {
                program: program.to_owned(),
                source,
            })?;
        Ok(Self {
            socket: Some(ours),
            child: Some(child),
        })
    }

    /// Process id of the monitor.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Sends one request with the descriptors it names; blocks while the socket is full.
    ///
    /// # Errors
    /// See [`Socket::send`].
    pub fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        match &self.socket {
            Some(socket) => Ok(socket.send(request, fds)?),
            None => Err(closed()),
        }
    }

    /// Waits for the next event; `None` when the monitor has ended.
    ///
    /// # Errors
    /// See [`Socket::receive`].
    pub fn receive(&self) -> Result<Option<Event>, Error> {
        match &self.socket {
            Some(socket) => Ok(socket.receive()?.map(|(event, _)| event)),
            None => Err(closed()),
        }
    }

    /// Waits for the next event until `deadline`.
    ///
    /// # Errors
    /// [`Error::TimedOut`]; else see [`Monitor::receive`].
    pub fn receive_before(&self, deadline: Instant) -> Result<Option<Event>, Error> {
        let Some(socket) = &self.socket else {
            return Err(closed());
        };
        let mut wait = [PollFd::new(socket, PollFlags::IN)];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut wait, Some(&timeout)) {
                Ok(0) => return Err(Error::TimedOut),
                Ok(_) => return self.receive(),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(socket::Error::Io(errno.into()).into()),
            }
        }
    }

    /// Gives up the parts to an owner that waits in its own way (tokio's `AsyncFd`). That owner
    /// reaps the process.
    ///
    /// # Errors
    /// None of a monitor that [`Monitor::spawn`] has made.
    pub fn into_parts(mut self) -> Result<(Child, Socket), Error> {
        match (self.child.take(), self.socket.take()) {
            (Some(child), Some(socket)) => Ok((child, socket)),
            _ => Err(closed()),
        }
    }

    /// Closes the control socket and waits for the process to end.
    ///
    /// # Errors
    /// The system call's.
    pub fn close(mut self) -> Result<ExitStatus, Error> {
        self.socket = None;
        match self.child.take() {
            Some(mut child) => child.wait().map_err(Error::Wait),
            None => Err(closed()),
        }
    }
}

fn closed() -> Error {
    Error::Socket(socket::Error::Io(io::ErrorKind::NotConnected.into()))
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.socket = None;
        if let Some(child) = &mut self.child {
            // The monitor exits when its socket closes; a failure to wait leaves a zombie at worst.
            let _ = child.wait();
        }
    }
}

/// The descriptor to wait on for events.
impl Monitor {
    /// Borrowed control socket, if it is still open.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }
}
