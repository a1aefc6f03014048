//! The standard streams of a process, between the FIFOs of containerd's client and the guest.
//!
//! Each stream is one connection to the guest (`forkvm_api::stream`); with a terminal one
//! connection carries both directions. FIFOs are held open for reading and writing, so that a
//! client that goes away neither ends the process's stdin nor breaks its stdout: it may come back.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use forkvm_api::agent::Streams;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::unix::pipe,
    sync::watch,
    task::JoinHandle,
    time::timeout,
};

use crate::machine::{self, Machine};

mod log_program;

pub(crate) use log_program::LogPrograms;

/// Bytes that one direction of a stream holds on their way, a pipe's own capacity (pipe(7)).
const BUFFER: usize = 64 * 1024;

/// After a process has ended its output is on its way already. Something else may hold the stream
/// open (a process in the background): after this long without a byte from the guest the end is
/// announced all the same.
const QUIET: Duration = Duration::from_millis(500);

/// The same when bytes wait for a client that does not read them.
const BLOCKED: Duration = Duration::from_secs(10);

/// Why a stream cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("streams with the scheme {0}:// are not supported: use a FIFO, file:// or binary://")]
    Scheme(String),
    #[error("cannot open the stream {path}: {source}")]
    Open { path: PathBuf, source: io::Error },
}

/// Where a process's streams go, as containerd names them; empty for nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stdio {
    pub(crate) terminal: bool,
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// One end of a stream on the host.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Nowhere,
    Fifo(&'a Path),
    /// `file://`, appended to.
    File(&'a Path),
    /// `binary://`: what stands behind that.
    Program(&'a str),
}

impl<'a> Place<'a> {
    fn parse(name: &'a str) -> Result<Self, Error> {
        match name.split_once("://") {
            None if name.is_empty() => Ok(Place::Nowhere),
            None => Ok(Place::Fifo(Path::new(name))),
            Some(("fifo", path)) => Ok(Place::Fifo(Path::new(path))),
            Some(("file", path)) => Ok(Place::File(Path::new(path))),
            Some(("binary", rest)) => Ok(Place::Program(rest)),
            Some((scheme, _)) => Err(Error::Scheme(scheme.to_owned())),
        }
    }
}

impl Stdio {
    /// Whether the names can be opened at all, without opening them.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match Place::parse(&self.stdin)? {
            Place::Nowhere | Place::Fifo(_) => {}
            Place::File(_) | Place::Program(_) => return Err(not_input(&self.stdin)),
        }
        let (stdout, stderr) = self.outputs()?;
        match stderr {
            // One program takes both.
            stderr @ Place::Program(_) if stdout != stderr => Err(Error::Open {
                path: PathBuf::from(&self.stderr),
                source: io::Error::other("stderr goes to the log program of stdout, or to none"),
            }),
            _ => Ok(()),
        }
    }

    /// Places of stdout and stderr. A terminal has one output: a name for stderr means nothing then, as under runc, and
    /// clients may give one that nobody has made.
    fn outputs(&self) -> Result<(Place<'_>, Place<'_>), Error> {
        let stdout = Place::parse(&self.stdout)?;
        if self.terminal {
            return Ok((stdout, Place::Nowhere));
        }
        Ok((stdout, Place::parse(&self.stderr)?))
    }
}

fn not_input(name: &str) -> Error {
    let source = io::Error::other("stdin must be a FIFO");
    Error::Open {
        path: PathBuf::from(name),
        source,
    }
}

/// Where output goes.
enum Sink {
    Nowhere,
    Fifo(pipe::Sender),
    File(File),
}

/// The client's ends of both outputs.
async fn open_sinks(
    stdio: &Stdio,
    programs: &LogPrograms,
) -> Result<(Sink, Sink, Option<log_program::Process>), Error> {
    let (stdout, stderr) = stdio.outputs()?;
    if let Place::Program(rest) = stdout {
        let program = programs.start(rest).await?;
        let stderr = match stderr {
            Place::Program(_) => Sink::Fifo(program.stderr),
            other => Sink::open(&other)?,
        };
        return Ok((Sink::Fifo(program.stdout), stderr, Some(program.process)));
    }
    Ok((Sink::open(&stdout)?, Sink::open(&stderr)?, None))
}

impl Sink {
    fn open(place: &Place<'_>) -> Result<Self, Error> {
        let (path, opened) = match *place {
            Place::Nowhere => return Ok(Sink::Nowhere),
            Place::Fifo(path) => (path, open_fifo(path)),
            Place::File(path) => (path, open_log(path)),
            // `Stdio::check` refuses it in any place that leads here.
            Place::Program(rest) => return Err(Error::Scheme(format!("binary://{rest}"))),
        };
        opened.map_err(|source| Error::Open {
            path: path.to_owned(),
            source,
        })
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Sink::Nowhere => Ok(()),
            Sink::Fifo(fifo) => fifo.write_all(bytes).await,
            Sink::File(file) => file.write_all(bytes),
        }
    }
}

fn open_fifo(path: &Path) -> io::Result<Sink> {
    let mut options = pipe::OpenOptions::new();
    options.read_write(true).open_sender(path).map(Sink::Fifo)
}

fn open_log(path: &Path) -> io::Result<Sink> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).open(path).map(Sink::File)
}

/// The client's end of stdin: `hold` keeps it open until `CloseIO`.
struct Source {
    fifo: pipe::Receiver,
    hold: pipe::Sender,
}

impl Source {
    fn open(place: &Place<'_>) -> Result<Option<Self>, Error> {
        let path = match *place {
            Place::Nowhere => return Ok(None),
            Place::Fifo(path) => path,
            // `Stdio::check` has refused them.
            Place::File(_) | Place::Program(_) => return Err(not_input("")),
        };
        let failed = |source| Error::Open {
            path: path.to_owned(),
            source,
        };
        let fifo = pipe::OpenOptions::new()
            .open_receiver(path)
            .map_err(failed)?;
        let hold = pipe::OpenOptions::new().open_sender(path).map_err(failed)?;
        Ok(Some(Self { fifo, hold }))
    }
}

/// The open streams of a process. Dropping them ends all copying.
pub(crate) struct Open {
    hold: Mutex<Option<pipe::Sender>>,
    outputs: Outputs,
    copies: Vec<JoinHandle<()>>,
    /// The log program, which is told to end when this is dropped.
    _program: Option<log_program::Process>,
}

impl Open {
    /// Ends stdin once what its client has written is delivered.
    pub(crate) fn close_stdin(&self) {
        // The last writer is gone with it, unless the client still holds its own end.
        drop(
            self.hold
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
    }

    /// The output streams, to wait for their end.
    pub(crate) fn outputs(&self) -> Outputs {
        self.outputs.clone()
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.copies.iter().for_each(JoinHandle::abort);
    }
}

/// How far the outputs of a process are.
#[derive(Clone)]
pub(crate) struct Outputs {
    /// Those that have not ended.
    open: Arc<watch::Sender<usize>>,
    /// Bytes taken from the guest and bytes delivered, so that standing still is seen.
    moved: Arc<AtomicU64>,
    /// One waits for its client.
    blocked: Arc<AtomicBool>,
}

impl Outputs {
    fn new() -> Self {
        Self {
            open: Arc::new(watch::Sender::new(0)),
            moved: Arc::default(),
            blocked: Arc::default(),
        }
    }

    /// Waits for the last byte: for the end of every stream, or for none to have moved for a
    /// while.
    pub(crate) async fn drained(&self) {
        let mut open = self.open.subscribe();
        loop {
            let before = self.moved.load(Ordering::Relaxed);
            let limit = if self.blocked.load(Ordering::Relaxed) {
                BLOCKED
            } else {
                QUIET
            };
            let ended = timeout(limit, open.wait_for(|open| *open == 0)).await;
            let moved = self.moved.load(Ordering::Relaxed) != before;
            let now_blocked = self.blocked.load(Ordering::Relaxed) && limit != BLOCKED;
            if ended.is_ok() || !(moved || now_blocked) {
                return;
            }
        }
    }
}

/// Opens the streams of a process: the client's ends, then the connections to the guest, and
/// starts to copy. Answers the names of the connections for the agent.
pub(crate) async fn open(
    stdio: &Stdio,
    programs: &LogPrograms,
    machine: &dyn Machine,
    mut next_id: impl FnMut() -> u64,
) -> Result<(Streams, Open), crate::error::Error> {
    stdio.check()?;
    let source = Source::open(&Place::parse(&stdio.stdin)?)?;
    let (stdout, stderr, program) = open_sinks(stdio, programs).await?;
    let mut names = Streams {
        terminal: stdio.terminal,
        ..Default::default()
    };
    let outputs = Outputs::new();
    let (mut copies, mut hold) = (Vec::new(), None);
    if stdio.terminal {
        // A terminal's output must be taken even if nobody wants it.
        names.stdin = next_id();
        let [stream, ..] = machine.streams([names.stdin, 0, 0]).await?;
        let not_there = || machine::Error::Io(io::ErrorKind::NotConnected.into());
        let (read, write) = stream.ok_or_else(not_there)?.into_split();
        copies.push(spawn_output(read, stdout, &outputs));
        if let Some(source) = source {
            hold = Some(source.hold);
            copies.push(tokio::spawn(copy_input(source.fifo, write)));
        } else {
            // Dropping the write half would half-close the connection: stdin is not closed, it
            // is silent.
            copies.push(tokio::spawn(async move {
                let _write = write;
                std::future::pending::<()>().await;
            }));
        }
    } else {
        let mut name = |wanted: bool| if wanted { next_id() } else { 0 };
        names.stdin = name(source.is_some());
        names.stdout = name(!matches!(stdout, Sink::Nowhere));
        names.stderr = name(!matches!(stderr, Sink::Nowhere));
        let ids = [names.stdin, names.stdout, names.stderr];
        let [input, output, error] = machine.streams(ids).await?;
        if let (Some(source), Some(input)) = (source, input) {
            hold = Some(source.hold);
            copies.push(tokio::spawn(copy_input(source.fifo, input)));
        }
        for (sink, stream) in [(stdout, output), (stderr, error)] {
            copies.extend(stream.map(|stream| spawn_output(stream, sink, &outputs)));
        }
    }
    Ok((
        names,
        Open {
            hold: Mutex::new(hold),
            outputs,
            copies,
            _program: program,
        },
    ))
}

/// Copies until the client's end is closed, then half-closes the guest's.
async fn copy_input(mut fifo: pipe::Receiver, mut stream: impl AsyncWrite + Unpin) {
    let mut buffer = vec![0; BUFFER];
    loop {
        match fifo.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            // The process has closed its stdin or is gone.
            Ok(length) if stream.write_all(&buffer[..length]).await.is_err() => return,
            Ok(_) => {}
        }
    }
    // Nobody is left to be told if the guest is gone.
    let _ = stream.shutdown().await;
}

fn spawn_output(
    stream: impl AsyncRead + Unpin + Send + 'static,
    sink: Sink,
    outputs: &Outputs,
) -> JoinHandle<()> {
    outputs.open.send_modify(|open| *open += 1);
    let outputs = outputs.clone();
    tokio::spawn(async move {
        copy_output(stream, sink, &outputs).await;
        outputs.open.send_modify(|open| *open -= 1);
    })
}

/// Copies until the guest ends the stream. The client's end is closed with it.
async fn copy_output(mut stream: impl AsyncRead + Unpin, mut sink: Sink, outputs: &Outputs) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => length,
        };
        outputs.moved.fetch_add(1, Ordering::Relaxed);
        outputs.blocked.store(true, Ordering::Relaxed);
        let written = sink.write(&buffer[..length]).await;
        outputs.blocked.store(false, Ordering::Relaxed);
        outputs.moved.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = written {
            // A log that cannot be written must not stop the process: its output is discarded.
            log::error!("output is lost: {error}");
            sink = Sink::Nowhere;
        }
    }
}

#[cfg(test)]
mod tests;
