//! Child processes: a shim is a subreaper, so orphans of its hooks become its own, and one place
//! must collect them all.

use std::{
    collections::HashMap,
    io,
    os::unix::process::ExitStatusExt as _,
    process::{Command, ExitStatus},
    sync::{Arc, Mutex, PoisonError},
};

use rustix::{
    io::Errno,
    process::{WaitOptions, wait},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
};

/// Starts children and tells their ends.
#[derive(Clone, Default)]
pub(crate) struct Reaper {
    waiting: Arc<Mutex<HashMap<u32, oneshot::Sender<ExitStatus>>>>,
}

/// A child that was started.
pub(crate) struct Child {
    pub(crate) pid: u32,
    /// Its end.
    pub(crate) ended: oneshot::Receiver<ExitStatus>,
    /// The write end of its standard input, if that was piped.
    pub(crate) stdin: Option<std::process::ChildStdin>,
    /// The read end of its standard output, if that was piped.
    pub(crate) stdout: Option<std::process::ChildStdout>,
    /// The read end of its standard error, if that was piped.
    pub(crate) stderr: Option<std::process::ChildStderr>,
}

impl Child {
    /// Sends it a signal, if it has not ended.
    pub(crate) fn signal(&mut self, signal: rustix::process::Signal) {
        // What was collected has sent its status; until then the number is its own, and the one thread that collects is this
        // one.
        if !matches!(
            self.ended.try_recv(),
            Err(oneshot::error::TryRecvError::Empty)
        ) {
            return;
        }
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid.cast_signed()) {
            // It may have ended this moment.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }
}

impl Reaper {
    /// A reaper that collects as long as the runtime lives.
    ///
    /// # Errors
    /// When SIGCHLD cannot be watched.
    pub(crate) fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let signals = signal(SignalKind::child())?;
        tokio::spawn(reaper.clone().run(signals));
        Ok(reaper)
    }

    /// Starts a child. Its end is not missed, however soon it comes.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let (mut child, ended) = self.track(|| command.spawn().map(|child| (child.id(), child)))?;
        Ok(Child {
            pid: child.id(),
            ended,
            stdin: child.stdin.take(),
            stdout: child.stdout.take(),
            stderr: child.stderr.take(),
        })
    }

    /// Has `start` start a child, whose PID it answers first, and answers the rest with the child's end: the table is
    /// locked from before the start until the child stands in it.
    pub(crate) fn track<T>(
        &self,
        start: impl FnOnce() -> io::Result<(u32, T)>,
    ) -> io::Result<(T, oneshot::Receiver<ExitStatus>)> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let (pid, started) = start()?;
        let (sender, ended) = oneshot::channel();
        waiting.insert(pid, sender);
        Ok((started, ended))
    }

    async fn run(self, mut signals: Signal) {
        while signals.recv().await.is_some() {
            self.collect();
        }
    }

    fn collect(&self) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // Not by nix: it has no real-time signals, and takes the end by one for an error.
            let (pid, status) = match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => (pid, ExitStatus::from_raw(status.as_raw())),
                Ok(None) | Err(Errno::CHILD) => return,
                Err(Errno::INTR) => continue,
                Err(error) => {
                    log::error!("cannot collect children: {error}");
                    return;
                }
            };
            // An orphan of a hook has nobody who waits.
            if let Some(sender) = waiting.remove(&pid.as_raw_nonzero().get().unsigned_abs()) {
                let _ = sender.send(status);
            }
        }
    }
}
