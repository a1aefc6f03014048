//! The monitor's process and its control socket, for tokio.

use std::{
    os::fd::{AsFd as _, AsRawFd, OwnedFd, RawFd},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use forkvm_vmm::control::{Event, FailureKind, Request, TimePoint, socket::Socket};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
    sync::watch,
};

use super::Error;
use crate::{reaper::Reaper, run_state::start_time};

/// Bytes of the monitor's standard error that are kept for the message of its end.
const KEPT: usize = 4096;

/// How far a machine is.
#[derive(Clone, Debug, Default)]
struct Progress {
    running: Option<Vec<TimePoint>>,
    listening: bool,
    failed: Option<(String, FailureKind)>,
    stopped: Option<String>,
}

/// The control socket, as tokio waits for it.
struct Control(Socket);

impl AsRawFd for Control {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// A monitor's process. It lives until it is killed or the shim ends: then its control socket
/// closes.
pub(super) struct Monitor {
    pid: u32,
    start_time: u64,
    process: OwnedFd,
    socket: Arc<AsyncFd<Control>>,
    progress: watch::Receiver<Progress>,
    ended: watch::Receiver<Option<String>>,
}

impl Monitor {
    /// Starts the monitor's program; it waits for its launch request.
    pub(super) fn spawn(program: &Path, reaper: &Reaper) -> Result<Self, Error> {
        let failed = |error| Error::Spawn(program.to_owned(), error);
        let (ours, theirs) = Socket::pair()?;
        ours.set_nonblocking(true)?;
        let mut child = reaper
            .spawn(
                Command::new(program)
                    .stdin(Stdio::from(theirs.into_inner()))
                    .stdout(Stdio::null())
                    .stderr(Stdio::piped()),
            )
            .map_err(failed)?;
        let pid = child.pid;
        // Collected at the earliest by the runtime, after this returns: the number is still its.
        let process = Pid::from_raw(pid.cast_signed())
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
            .map_err(|error| failed(error.into()))?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        // SAFETY: needed because tokio cannot know that a descriptor given by number stays open;
        // `Control` owns its socket, never closes or replaces it, and always answers its number.
        let socket = unsafe { AsyncFd::register_with_interest(Control(ours), interest) };
        let socket = Arc::new(socket.map_err(|error| failed(error.into()))?);
        let (progress_sender, progress) = watch::channel(Progress::default());
        tokio::spawn(receive(Arc::clone(&socket), progress_sender));
        let (ended_sender, ended) = watch::channel(None);
        let events = progress.clone();
        let stderr = child.stderr.take();
        let log = tokio::spawn(async move {
            match stderr
                .map(|stderr| tokio::net::unix::pipe::Receiver::from_owned_fd(stderr.into()))
            {
                Some(Ok(pipe)) => relay_log(pipe).await,
                _ => String::new(),
            }
        });
        let reaped = child.ended;
        tokio::spawn(async move {
            let status = reaped.await;
            let last_words = log.await.unwrap_or_default();
            let told = {
                let progress = events.borrow();
                let failed = progress.failed.as_ref().map(|(message, _)| message.clone());
                failed.or_else(|| progress.stopped.clone())
            };
            let reason = told.unwrap_or_else(|| match status {
                Ok(status) => format!("its monitor ended ({status}) {last_words}")
                    .trim()
                    .to_owned(),
                Err(_) => "its monitor is gone".to_owned(),
            });
            log::info!("monitor {pid} has ended: {reason}");
            ended_sender.send_replace(Some(reason));
        });
        let start_time = start_time(pid).unwrap_or(0);
        Ok(Self {
            pid,
            start_time,
            process,
            socket,
            progress,
            ended,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// See [`crate::run_state::State::monitor_start`].
    pub(super) fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Sends one request with its descriptors.
    pub(super) async fn send(
        &self,
        request: &Request,
        descriptors: &[OwnedFd],
    ) -> Result<(), Error> {
        let borrowed: Vec<_> = descriptors.iter().map(|fd| fd.as_fd()).collect();
        loop {
            let mut ready = self
                .socket
                .writable()
                .await
                .map_err(forkvm_vmm::control::socket::Error::Io)?;
            match ready.get_inner().0.send(request, &borrowed) {
                Err(error) if error.would_block() => ready.clear_ready(),
                other => return Ok(other?),
            }
        }
    }

    /// Waits until the guest runs and, if it `boots`, until its agent listens; answers the
    /// monitor's time points.
    pub(super) async fn running(&self, boots: bool) -> Result<Vec<TimePoint>, Error> {
        let mut progress = self.progress.clone();
        let arrived = progress
            .wait_for(|p| p.failed.is_some() || (p.running.is_some() && (p.listening || !boots)))
            .await
            .map(|progress| progress.clone());
        match arrived {
            Ok(Progress {
                failed: Some((message, kind)),
                ..
            }) => Err(Error::Failed(message, kind)),
            Ok(Progress {
                running: Some(points),
                ..
            }) => Ok(points),
            // The control socket was closed: the process is ending.
            _ => Err(Error::Ended(self.wait_ended().await)),
        }
    }

    /// A connection to a port on which the guest listens. A refusal ends it.
    pub(super) async fn connect(&self, port: u32) -> Result<UnixStream, Error> {
        let socket = |error| Error::Control(forkvm_vmm::control::socket::Error::Io(error));
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(socket)?;
        ours.set_nonblocking(true).map_err(socket)?;
        let ours = UnixStream::from_std(ours).map_err(socket)?;
        self.send(&Request::Connect { port }, &[theirs.into()])
            .await?;
        Ok(ours)
    }

    /// Kills the process.
    pub(super) fn kill(&self) {
        // It may have ended already, which is all that is wanted.
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
    }

    /// Becomes the reason once the process is gone.
    pub(super) fn ended(&self) -> watch::Receiver<Option<String>> {
        self.ended.clone()
    }

    pub(super) async fn wait_ended(&self) -> String {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "its monitor is gone".to_owned(),
        }
    }
}

/// Takes the monitor's events until the socket is closed by either side.
async fn receive(socket: Arc<AsyncFd<Control>>, progress: watch::Sender<Progress>) {
    loop {
        let Ok(mut ready) = socket.readable().await else {
            return;
        };
        let event = match ready.get_inner().0.receive::<Event>() {
            Err(error) if error.would_block() => {
                ready.clear_ready();
                continue;
            }
            Ok(Some((event, _))) => event,
            Ok(None) => return,
            Err(error) => {
                log::error!("the monitor's events: {error}");
                return;
            }
        };
        log::debug!("monitor: {event:?}");
        progress.send_modify(|progress| match event {
            Event::Running { points } => progress.running = Some(points),
            Event::AgentListening => progress.listening = true,
            Event::Failed { kind, message } => progress.failed = Some((message, kind)),
            Event::Stopped { reason } => progress.stopped = Some(reason),
            Event::Frozen(_) | Event::Progress { .. } | Event::Paused | Event::Resumed => {}
        });
    }
}

/// Passes the monitor's log lines on to the shim's; answers the last of them.
async fn relay_log(pipe: tokio::net::unix::pipe::Receiver) -> String {
    use tokio::io::{AsyncBufReadExt as _, BufReader};
    let mut lines = BufReader::new(pipe).lines();
    let mut last = String::new();
    while let Ok(Some(line)) = lines.next_line().await {
        log::info!("vmm: {line}");
        last = line;
        last.truncate(KEPT);
    }
    last
}
