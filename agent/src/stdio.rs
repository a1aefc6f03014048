//! The standard streams of one process: pipes or a terminal on its side, stream connections on the
//! other, and the tasks that move bytes between them.
//!
//! - Only the host's half-close ends the standard input.
//! - When the process has ended, what it wrote is delivered before its exit is told; what is written
//!   later, by a process that inherited the stream, still is delivered after it.

use std::{io, os::fd::OwnedFd, sync::Arc};

use rustix::{
    fs::{Gid, Uid},
    pipe::{PipeFlags, pipe_with},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{sync::oneshot, task::JoinHandle};

use crate::{
    channel::{CHUNK, Channel},
    reaper::Ended,
    streams::{self, Streams},
};

/// Why a process has no standard streams.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Stream(#[from] streams::Error),
    #[error("cannot make a pipe: {0}")]
    Pipe(io::Error),
    #[error("cannot open /dev/null: {0}")]
    Null(io::Error),
    #[error("cannot take the terminal over: {0}")]
    Terminal(io::Error),
}

/// The connections that a request names, before a process exists.
#[derive(Debug)]
pub(crate) struct Connections {
    stdin: Option<Channel>,
    stdout: Option<Channel>,
    stderr: Option<Channel>,
}

impl Connections {
    /// Waits for each that is named.
    pub(crate) async fn of(
        request: &forkvm_api::agent::Streams,
        streams: &Streams,
    ) -> Result<Self, Error> {
        let stdin = streams.take(request.stdin).await?;
        let (stdout, stderr) = if request.terminal {
            (None, None)
        } else {
            (
                streams.take(request.stdout).await?,
                streams.take(request.stderr).await?,
            )
        };
        Ok(Self {
            stdin,
            stdout,
            stderr,
        })
    }

    /// A pipe for each stream that is wanted, /dev/null for the others. The pipes belong to the
    /// process's user, so that it may open /dev/stdout anew.
    pub(crate) fn pipes(self, owner: Owner) -> Result<(ProcessEnds, AgentEnds), Error> {
        let (stdin, stdin_pump) = match self.stdin {
            Some(connection) => {
                let (reader, writer) = pipe(owner)?;
                (reader, Some((connection, channel(writer)?)))
            }
            None => (null()?, None),
        };
        let (stdout, stdout_pump) = output_pipe(self.stdout, owner)?;
        let (stderr, stderr_pump) = output_pipe(self.stderr, owner)?;
        let process = ProcessEnds {
            fds: [stdin, stdout, stderr],
        };
        let agent = AgentEnds::Pipes {
            stdin: stdin_pump,
            outputs: [stdout_pump, stderr_pump],
        };
        Ok((process, agent))
    }

    /// The terminal, whose master the process's runtime has sent.
    pub(crate) fn terminal(self, master: OwnedFd) -> Result<AgentEnds, Error> {
        let master = Arc::new(Channel::new(master).map_err(Error::Terminal)?);
        Ok(AgentEnds::Terminal {
            master,
            connection: self.stdin.map(Arc::new),
        })
    }
}

/// The user that owns a process's pipes, by the guest's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

fn pipe(owner: Owner) -> Result<(OwnedFd, OwnedFd), Error> {
    let make = || -> rustix::io::Result<_> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        rustix::fs::fchown(
            &reader,
            Some(Uid::from_raw(owner.uid)),
            Some(Gid::from_raw(owner.gid)),
        )?;
        Ok((reader, writer))
    };
    make().map_err(|error| Error::Pipe(error.into()))
}

/// The process's end, and what moves bytes from the other end to the connection.
fn output_pipe(
    connection: Option<Channel>,
    owner: Owner,
) -> Result<(OwnedFd, Option<(Channel, Channel)>), Error> {
    let Some(connection) = connection else {
        return Ok((null()?, None));
    };
    let (reader, writer) = pipe(owner)?;
    Ok((writer, Some((channel(reader)?, connection))))
}

fn channel(fd: OwnedFd) -> Result<Channel, Error> {
    Channel::new(fd).map_err(Error::Pipe)
}

fn null() -> Result<OwnedFd, Error> {
    let null = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null");
    null.map(OwnedFd::from).map_err(Error::Null)
}

/// What the process gets as its descriptors 0, 1 and 2.
#[derive(Debug)]
pub(crate) struct ProcessEnds {
    pub(crate) fds: [OwnedFd; 3],
}

/// The agent's side of a process's standard streams.
#[derive(Debug)]
pub(crate) enum AgentEnds {
    Pipes {
        /// From the connection to the pipe.
        stdin: Option<(Channel, Channel)>,
        /// From the pipe to the connection: stdout, stderr.
        outputs: [Option<(Channel, Channel)>; 2],
    },
    Terminal {
        master: Arc<Channel>,
        connection: Option<Arc<Channel>>,
    },
}

/// The running tasks of a process's streams.
#[derive(Debug)]
pub(crate) struct Pumps {
    input: Option<JoinHandle<()>>,
    delivered: Vec<oneshot::Receiver<()>>,
}

/// The terminal of a process.
#[derive(Debug)]
pub(crate) struct Terminal {
    master: Arc<Channel>,
}

impl Terminal {
    /// Sets the size of its window.
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> io::Result<()> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        Ok(tcsetwinsize(self.master.as_fd(), size)?)
    }
}

impl AgentEnds {
    /// Starts to move bytes. `ended` says when the process ends.
    pub(crate) fn start(self, ended: &Ended) -> (Pumps, Option<Terminal>) {
        let mut pumps = Pumps {
            input: None,
            delivered: Vec::new(),
        };
        match self {
            AgentEnds::Pipes { stdin, outputs } => {
                pumps.input = stdin.map(|(connection, pipe)| tokio::spawn(input(connection, pipe)));
                for (pipe, connection) in outputs.into_iter().flatten() {
                    let output = Output {
                        source: pipe.into(),
                        connection: Some(connection.into()),
                        lingers: true,
                    };
                    pumps.delivered.push(output.start(ended));
                }
                (pumps, None)
            }
            AgentEnds::Terminal { master, connection } => {
                if let Some(connection) = &connection {
                    let keyboard = keyboard(Arc::clone(connection), Arc::clone(&master));
                    pumps.input = Some(tokio::spawn(keyboard));
                }
                let screen = Output {
                    source: Arc::clone(&master),
                    connection,
                    lingers: false,
                };
                pumps.delivered.push(screen.start(ended));
                (pumps, Some(Terminal { master }))
            }
        }
    }
}

impl Pumps {
    /// Waits until everything that the process wrote before its end has been handed to the
    /// connections, and stops its input.
    pub(crate) async fn deliver(self) {
        if let Some(input) = self.input {
            input.abort();
        }
        for delivered in self.delivered {
            // A pump that is gone has nothing to deliver any more.
            let _ = delivered.await;
        }
    }
}

/// Moves what the host sends into the process's standard input, until the host half-closes.
async fn input(connection: Channel, pipe: Channel) {
    let mut pipe = Some(pipe);
    let mut buffer = Vec::with_capacity(CHUNK);
    loop {
        if let Ok(0) | Err(_) = connection.read(&mut buffer).await {
            return;
        }
        // A process that has closed its standard input does not make the host's writer wait: what
        // comes is read and dropped.
        if let Some(open) = &pipe
            && open.write_all(&buffer).await.is_err()
        {
            pipe = None;
        }
    }
}

/// Moves what the host sends into the terminal. The host's half-close does not close a terminal:
/// as with runc, the end of input is a character that somebody types.
async fn keyboard(connection: Arc<Channel>, master: Arc<Channel>) {
    let mut buffer = Vec::with_capacity(1024);
    loop {
        match connection.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {
                if master.write_all(&buffer).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Moves what a process writes to a connection.
struct Output {
    source: Arc<Channel>,
    connection: Option<Arc<Channel>>,
    /// Goes on after the process's end until the last writer is gone. A terminal is hung up instead.
    lingers: bool,
}

impl Output {
    /// Starts it. The answer is told when the process has ended and what it wrote has been handed
    /// over, or when there is nothing to come.
    fn start(self, ended: &Ended) -> oneshot::Receiver<()> {
        let (delivered, receiver) = oneshot::channel();
        tokio::spawn(self.run(ended.clone(), delivered));
        receiver
    }

    async fn run(mut self, mut ended: Ended, delivered: oneshot::Sender<()>) {
        let mut delivered = Some(delivered);
        let mut buffer = Vec::with_capacity(CHUNK);
        loop {
            // The order matters: an end that is seen here came before the source is found empty.
            let over = ended.borrow_and_update().is_some();
            match self.source.try_read(&mut buffer) {
                Ok(Some(0)) | Err(_) => break,
                Ok(Some(_)) => {
                    self.hand_over(&buffer).await;
                    // A process that never stops writing must not keep the others waiting.
                    tokio::task::consume_budget().await;
                    continue;
                }
                Ok(None) if over && !self.lingers => break,
                Ok(None) if over => {
                    if let Some(delivered) = delivered.take() {
                        // Nobody has to wait for it.
                        let _ = delivered.send(());
                    }
                }
                Ok(None) => {}
            }
            tokio::select! {
                readable = self.source.readable() => if readable.is_err() { break },
                changed = ended.changed(), if !over => if changed.is_err() { break },
            }
        }
        if let Some(connection) = self.connection {
            connection.end_output();
        }
    }

    /// If the host is gone the bytes are dropped: the process must not be stopped by a full pipe.
    async fn hand_over(&mut self, bytes: &[u8]) {
        if let Some(connection) = &self.connection
            && connection.write_all(bytes).await.is_err()
        {
            self.connection = None;
        }
    }
}
