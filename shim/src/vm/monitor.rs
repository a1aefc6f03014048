//! The monitor's process and its control socket, for tokio.

use std::{
    io::Write as _,
    os::fd::{AsFd as _, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::ExitStatus,
    sync::Arc,
};

use forkvm_api::stream;
use forkvm_vmm::{
    control::{Event, FailureKind, Request, TimePoint, describe, socket::Socket},
    written::Written,
};
use log::Level;
use rustix::{
    fs::{Mode, OFlags, openat},
    process::{Signal, pidfd_send_signal},
};
use tokio::{
    io::{AsyncReadExt as _, Interest, unix::AsyncFd},
    net::{UnixStream, unix::pipe},
    sync::watch,
};

use super::{Error, spawn::spawn};
use crate::{
    fault::Fault,
    machine::{self, OUT_OF_MEMORY},
    reaper::Reaper,
    run_state::start_time,
};

/// Longer lines of the monitor's log are cut.
const LONGEST_LINE: usize = 4096;

/// Why a machine has ended, where the kernel alone knows.
const KILLED: &str = "it was killed";

/// How far a machine is.
#[derive(Clone, Debug, Default)]
struct Progress {
    /// The point at which it was asked to stop.
    reached: Option<String>,
    running: Option<Vec<TimePoint>>,
    listening: bool,
    failed: Option<(String, FailureKind)>,
    stopped: Option<String>,
    written: Option<Written>,
    paused: bool,
}

/// Our end of a new connection and the monitor's, which reads `header` first.
fn pair(header: &[u8]) -> Result<(UnixStream, OwnedFd), Error> {
    let make = || {
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        // An empty socket takes a few bytes at once.
        ours.write_all(header)?;
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, theirs.into()))
    };
    make().map_err(|error| Error::Control(forkvm_vmm::control::socket::Error::Io(error)))
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
    /// Starts the monitor's program, in `cgroup` or else in the shim's; it waits for its launch request.
    pub(super) fn spawn(
        program: &Path,
        cgroup: Option<BorrowedFd<'_>>,
        reaper: &Reaper,
    ) -> Result<Self, Error> {
        let failed = |error| Error::Spawn(program.to_owned(), error);
        let (ours, theirs) = Socket::pair()?;
        ours.set_nonblocking(true)?;
        let theirs = theirs.into_inner();
        let (child, reaped) = reaper
            .track(|| spawn(program, &theirs, cgroup).map(|child| (child.pid, child)))
            .map_err(failed)?;
        drop(theirs);
        let pid = child.pid;
        let interest = Interest::READABLE | Interest::WRITABLE;
        // SAFETY: needed because tokio cannot know that a descriptor given by number stays open;
        // `Control` owns its socket, never closes or replaces it, and always answers its number.
        let socket = unsafe { AsyncFd::register_with_interest(Control(ours), interest) };
        let socket = Arc::new(socket.map_err(|error| failed(error.into()))?);
        let (progress_sender, progress) = watch::channel(Progress::default());
        let events = tokio::spawn(receive(Arc::clone(&socket), progress_sender));
        let last_event = progress.clone();
        let folder = cgroup.and_then(|folder| folder.try_clone_to_owned().ok());
        let (ended_sender, ended) = watch::channel(None);
        let log = tokio::spawn(relay_log(child.stderr.into(), "vmm"));
        tokio::spawn(async move {
            let status = reaped.await;
            // What it said last may still wait in its socket and its log.
            let _ = events.await;
            let last_line = log.await.unwrap_or_default();
            let mut reason = reason(&last_event.borrow(), status.ok(), &last_line);
            if reason == KILLED && folder.is_some_and(|folder| is_out_of_memory(&folder)) {
                reason = OUT_OF_MEMORY.to_owned();
            }
            log::debug!("monitor {pid}: {reason}");
            ended_sender.send_replace(Some(reason));
        });
        let start_time = start_time(pid).unwrap_or(0);
        Ok(Self {
            pid,
            start_time,
            process: child.process,
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
    pub(super) async fn running(
        &self,
        boots: bool,
        fault: &Fault,
    ) -> Result<Vec<TimePoint>, Error> {
        let mut progress = self.progress.clone();
        let arrived = progress
            .wait_for(|p| {
                if let Some(point) = &p.reached {
                    fault.passed(point);
                }
                p.failed.is_some() || (p.running.is_some() && (p.listening || !boots))
            })
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
        let (ours, theirs) = pair(&[])?;
        self.send(&Request::Connect { port }, &[theirs]).await?;
        Ok(ours)
    }

    /// The same for each header, which the guest reads first. All are asked for at once, and the header is there before, so
    /// that the guest is interrupted once.
    pub(super) async fn connect_each(
        &self,
        port: u32,
        headers: &[[u8; stream::HEADER_LEN]],
    ) -> Result<Vec<UnixStream>, Error> {
        if headers.is_empty() {
            return Ok(Vec::new());
        }
        let pairs = headers.iter().map(|header| pair(header));
        let pairs: Vec<_> = pairs.collect::<Result<_, _>>()?;
        let (ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        self.send(&Request::Connect { port }, &theirs).await?;
        Ok(ours)
    }

    /// What the start has written to, of a monitor that records it; nothing if it ends before it says so.
    pub(super) async fn written(&self) -> Option<Written> {
        self.send(&Request::Written, &[]).await.ok()?;
        let mut progress = self.progress.clone();
        let told = progress
            .wait_for(|progress| progress.written.is_some())
            .await;
        told.ok()?.written.clone()
    }

    /// Stops the machine's processors.
    pub(super) async fn pause(&self) -> Result<(), machine::Error> {
        self.move_on(&Request::Pause, true).await
    }

    /// Lets them go on.
    pub(super) async fn resume(&self) -> Result<(), machine::Error> {
        self.move_on(&Request::Resume, false).await
    }

    async fn move_on(&self, request: &Request, paused: bool) -> Result<(), machine::Error> {
        let mut progress = self.progress.clone();
        let moved = match self.send(request, &[]).await {
            Ok(()) => progress.wait_for(|it| it.paused == paused).await.is_ok(),
            Err(_) => false,
        };
        if moved {
            return Ok(());
        }
        // The control socket was closed: the process is ending.
        Err(machine::Error::Ended(self.wait_ended().await))
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
            Event::Reached { point } => progress.reached = Some(point),
            Event::Running { points } => progress.running = Some(points),
            Event::AgentListening => progress.listening = true,
            Event::Failed { kind, message } => progress.failed = Some((message, kind)),
            Event::Stopped { reason } => progress.stopped = Some(reason),
            Event::Written(written) => progress.written = Some(written),
            Event::Paused => progress.paused = true,
            Event::Resumed => progress.paused = false,
            Event::Frozen(_) | Event::Progress { .. } => {}
        });
    }
}

/// Why a monitor has ended: what it said itself, else how its process ended.
fn reason(progress: &Progress, status: Option<ExitStatus>, last_line: &str) -> String {
    if let Some((message, _)) = &progress.failed {
        return message.clone();
    }
    if let Some(stopped) = &progress.stopped {
        return stopped.clone();
    }
    match status {
        Some(status) if status.signal() == Some(libc::SIGKILL) => KILLED.to_owned(),
        Some(status) => format!("{} {last_line}", describe(status))
            .trim()
            .to_owned(),
        None => "its monitor is gone".to_owned(),
    }
}

/// Whether the kernel has killed a process of this cgroup for want of memory (`memory.events`, Documentation/
/// admin-guide/cgroup-v2.rst of Linux).
fn is_out_of_memory(cgroup: &OwnedFd) -> bool {
    let open = || -> std::io::Result<String> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = openat(cgroup, "memory.events", flags, Mode::empty())?;
        std::io::read_to_string(std::fs::File::from(file))
    };
    open().is_ok_and(|events| {
        let kills = events
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill "));
        kills.is_some_and(|kills| kills != "0")
    })
}

/// Passes the log of another process, `who`, on to the shim's, a line at a time; answers the last one.
pub(super) async fn relay_log(stderr: OwnedFd, who: &'static str) -> String {
    let Ok(mut pipe) = pipe::Receiver::from_owned_fd(stderr) else {
        return String::new();
    };
    let (mut buffer, mut filled, mut last) = (vec![0; LONGEST_LINE], 0, String::new());
    while let Ok(length @ 1..) = pipe.read(&mut buffer[filled..]).await {
        filled += length;
        let mut begin = 0;
        while let Some(length) = buffer[begin..filled].iter().position(|byte| *byte == b'\n') {
            last = relay_line(who, &buffer[begin..begin + length]);
            begin += length + 1;
        }
        buffer.copy_within(begin..filled, 0);
        filled -= begin;
        if filled == buffer.len() {
            last = relay_line(who, &buffer);
            filled = 0;
        }
    }
    last
}

/// Logs one line at the level that it names.
fn relay_line(who: &str, line: &[u8]) -> String {
    let line = String::from_utf8_lossy(line).into_owned();
    let level = [Level::Error, Level::Warn, Level::Debug, Level::Trace]
        .into_iter()
        .find(|level| line.contains(level.as_str()))
        .unwrap_or(Level::Info);
    log::log!(level, "{who}: {line}");
    line
}

#[cfg(test)]
mod tests {
    use std::process::ExitStatus;

    use super::*;

    #[test]
    fn the_reason_is_the_monitors_own_word_before_its_status() {
        let mut progress = Progress::default();
        let exited = Some(ExitStatus::from_raw(1 << 8));
        assert_eq!(
            reason(&progress, Some(ExitStatus::from_raw(9)), "x"),
            "it was killed"
        );
        assert!(reason(&progress, exited, "out of memory").contains("out of memory"));
        let filtered = ExitStatus::from_raw(libc::SIGSYS);
        assert!(reason(&progress, Some(filtered), "").contains("system call"));
        progress.stopped = Some("the guest has shut down".into());
        assert_eq!(reason(&progress, exited, ""), "the guest has shut down");
        progress.failed = Some(("no KVM".into(), FailureKind::NoKvm));
        assert_eq!(reason(&progress, exited, ""), "no KVM");
    }

    #[test]
    fn a_kill_for_want_of_memory_is_told_from_others() {
        let folder = tempfile::tempdir().unwrap();
        let cgroup = OwnedFd::from(std::fs::File::open(folder.path()).unwrap());
        assert!(!is_out_of_memory(&cgroup));
        for (events, expected) in [
            ("oom 3\noom_kill 0\n", false),
            ("oom 3\noom_kill 1\n", true),
        ] {
            std::fs::write(folder.path().join("memory.events"), events).unwrap();
            assert_eq!(is_out_of_memory(&cgroup), expected);
        }
    }

    #[tokio::test]
    async fn a_log_is_read_to_its_end_however_long_its_lines_are() {
        let (reader, writer) = std::io::pipe().unwrap();
        let writing = tokio::task::spawn_blocking(move || {
            let mut writer = writer;
            std::io::Write::write_all(&mut writer, &vec![b'a'; 3 * LONGEST_LINE]).unwrap();
            std::io::Write::write_all(&mut writer, b"\nWARN last\n").unwrap();
        });
        assert_eq!(relay_log(reader.into(), "vmm").await, "WARN last");
        writing.await.unwrap();
    }
}
