//! The monitor: carries out one launch and then serves its control socket until that closes, the
//! guest ends, or something fails.
//!
//! Two things are waited for, both with poll(2): the control socket, and the vCPUs' reports.

mod fork;
mod times;

use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, mpsc},
    time::Instant,
};

use forkvm_api::{RECLAIM_PORT, WARM_UP, points};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    control::{self, Event, FailureKind, Request, Socket},
    devices::{Backends, console::Output},
    jail,
    launch::{self, Parts, Start},
    memory::{self, Backing},
    page_cache::PageCache,
    process,
    snapshot::state,
    vcpu::{Report, Reports},
    vm::{self, Boot, Machine, Running},
    written::Recorder,
};

use fork::fork;
use times::Times;

/// What ends a monitor before its time.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The control socket.
    #[error(transparent)]
    Socket(#[from] control::socket::Error),
    /// The first packet was something else.
    #[error("the first request must be a launch")]
    NoLaunch,
    /// A request that does not fit, in words.
    #[error("{0}")]
    Invalid(String),
    /// The launch request.
    #[error(transparent)]
    Launch(#[from] launch::Error),
    /// The process could not be isolated.
    #[error("cannot isolate the monitor: {0}")]
    Process(#[from] process::Error),
    /// The process could not be confined.
    #[error("cannot confine the monitor: {0}")]
    Jail(#[from] jail::Error),
    /// A template that cannot be forked.
    #[error("template {id} cannot be forked ({source}): run `forkvm template build --force`")]
    Template {
        /// Its id.
        id: String,
        /// Why.
        source: vm::Error,
    },
    /// The machine.
    #[error(transparent)]
    Vm(#[from] vm::Error),
    /// A vCPU, in words.
    #[error("{0}")]
    Vcpu(String),
    /// A wait, or a file.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    fn kind(&self) -> FailureKind {
        match self {
            Error::NoLaunch | Error::Launch(_) | Error::Invalid(_) | Error::Socket(_) => {
                FailureKind::Invalid
            }
            Error::Template {
                source: vm::Error::NoKvm(_),
                ..
            }
            | Error::Vm(vm::Error::NoKvm(_)) => FailureKind::NoKvm,
            Error::Template { .. } => FailureKind::Template,
            Error::Vm(vm::Error::Memory(memory::Error::Size(_)) | vm::Error::Vcpus(_)) => {
                FailureKind::Invalid
            }
            _ => FailureKind::Internal,
        }
    }
}

fn broken(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { what, source }
}

/// Runs the monitor with descriptor 0 as its control socket. Returns the exit status of the
/// process: 0 when the launcher closed the socket, the guest ended, or the freeze is done.
pub fn run() -> u8 {
    // SAFETY: descriptor 0 is the control socket and nothing else in this process uses it.
    let socket = Socket::new(unsafe { OwnedFd::from_raw_fd(0) });
    match serve(&socket) {
        Ok(()) => 0,
        Err(error) => {
            log::error!("{error}");
            let event = Event::Failed {
                kind: error.kind(),
                message: error.to_string(),
            };
            // A launcher that is gone has no ears.
            let _ = socket.send(&event, &[]);
            1
        }
    }
}

fn serve(socket: &Socket) -> Result<(), Error> {
    process::close_inherited()?;
    let Some((mut request, mut fds)) = socket.receive::<Request>()? else {
        return Ok(());
    };
    let mut times = Times::new(socket);
    if let Request::StopAt { point } = request {
        times.stop_at = Some(point);
        match socket.receive::<Request>()? {
            Some(next) => (request, fds) = next,
            None => return Ok(()),
        }
    }
    times.pass(points::VMM_LAUNCHED);
    let Request::Launch(launch) = request else {
        return Err(Error::NoLaunch);
    };
    let parts = Parts::new(launch, fds)?;
    process::isolate(parts.network)?;
    if matches!(parts.start, Start::Fork { .. }) {
        process::use_small_pages()?;
    }

    let console = parts.console.map(Output::shared);
    let serves_files = !parts.exports.is_empty();
    let backends = Backends {
        exports: parts.exports,
        console: console.clone(),
        taps: Vec::new(),
        entropy: !parts.freeze,
        memory: Backing::Anonymous,
    };
    // Held to the end: the lock on the template's memory file belongs to this description.
    let (machine, recorder, _template) =
        match parts.start {
            Start::Boot {
                mut kernel,
                mut initramfs,
                vcpus,
                memory_bytes,
                mut cmdline,
            } => {
                if parts.freeze {
                    cmdline = format!("{WARM_UP} {cmdline}");
                }
                let memory = memory::anonymous(memory_bytes).map_err(vm::Error::from)?;
                let boot = Boot {
                    kernel: &mut kernel,
                    initramfs: &mut initramfs,
                    cmdline: &cmdline,
                    vcpus,
                };
                let machine = Machine::boot(memory, boot, backends)?;
                times.pass(points::STATE_RESTORED);
                (machine, None, None)
            }
            Start::Fork {
                template,
                memory,
                state,
                writes,
            } => {
                let (machine, recorder) = fork(&memory, &state, writes, backends, &mut times)
                    .map_err(|source| Error::Template {
                        id: template,
                        source,
                    })?;
                (machine, recorder, Some(memory))
            }
        };
    let (sender, receiver) = mpsc::channel();
    let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(broken("an event"))?;
    let reports = Reports {
        sender,
        wake: wake.try_clone().map_err(broken("an event"))?,
        stop_at: times.stop_at.clone(),
    };
    let wake_of_cache = wake.try_clone().map_err(broken("an event"))?;
    // From here on nothing is opened by a path, and then the guest runs.
    jail::confine(serves_files)?;
    let running = machine.start(console, parts.freeze, (reports, receiver))?;
    let traffic = running.shared().devices.file_traffic();
    let mut control = Control {
        socket,
        running,
        page_cache: PageCache::new(traffic, wake_of_cache),
        wake,
        times,
        recorder,
        may_freeze: parts.freeze,
        freeze: None,
        parked: 0,
        pausing: false,
    };
    control.run()
}

/// The files that a freeze writes.
struct TemplateFiles {
    memory: File,
    state: File,
}

/// A running machine and its control socket.
struct Control<'a> {
    socket: &'a Socket,
    running: Running,
    page_cache: PageCache,
    wake: EventFd,
    times: Times<'a>,
    /// Until it is asked what the start has written to.
    recorder: Option<Arc<Recorder>>,
    /// Whether the machine was launched to become a template.
    may_freeze: bool,
    /// The template's files, once it is asked for.
    freeze: Option<TemplateFiles>,
    /// How many vCPUs are parked.
    parked: usize,
    /// Whether all are asked to be.
    pausing: bool,
}

impl Control<'_> {
    fn run(&mut self) -> Result<(), Error> {
        loop {
            let (request, report) = {
                let mut wait = [
                    PollFd::new(self.socket, PollFlags::IN),
                    PollFd::from_borrowed_fd(borrow(&self.wake), PollFlags::IN),
                ];
                let rest = self.page_cache.deadline().map(|at| {
                    let rest = at.saturating_duration_since(Instant::now());
                    Timespec::try_from(rest).unwrap_or_default()
                });
                match poll(&mut wait, rest.as_ref()) {
                    Ok(_) => {}
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(errno) => return Err(broken("poll")(errno.into())),
                }
                (!wait[0].revents().is_empty(), !wait[1].revents().is_empty())
            };
            if report {
                // Emptied first: a report that comes now wakes us again.
                let _ = self.wake.read();
                while let Some(report) = self.running.report() {
                    if self.report(report)? {
                        return Ok(());
                    }
                }
            }
            self.ask_for_page_cache();
            if request {
                match self.socket.receive::<Request>()? {
                    None => return Ok(()),
                    Some((request, fds)) => {
                        if self.request(request, fds)? {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }

    /// Asks the guest for what it has cached of files, if it is time to.
    fn ask_for_page_cache(&mut self) {
        if self.page_cache.look(Instant::now())
            && let Some(stream) = self.page_cache.ask()
            && let Err(error) = self
                .running
                .shared()
                .devices
                .connect(RECLAIM_PORT, [stream])
        {
            log::warn!("the guest cannot be asked for its page cache: {error}");
        }
    }

    /// Whether the machine has come to its end.
    fn request(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<bool, Error> {
        let expected = match request {
            // As many as come, but one at least.
            Request::Connect { .. } => fds.len().max(1),
            Request::Freeze => 2,
            Request::Launch(_)
            | Request::StopAt { .. }
            | Request::Pause
            | Request::Resume
            | Request::Written => 0,
        };
        if fds.len() != expected {
            return Err(Error::Invalid(format!(
                "a request came with {} descriptors instead of {expected}",
                fds.len()
            )));
        }
        match request {
            Request::Launch(_) | Request::StopAt { .. } => {
                Err(Error::Invalid("a machine is launched once".into()))
            }
            Request::Connect { port } => {
                let devices = &self.running.shared().devices;
                let result = devices.connect(port, fds.into_iter().map(UnixStream::from));
                if let Err(error) = result {
                    // The streams that are not connected are closed, which is the answer.
                    log::warn!("connection to port {port}: {error}");
                }
                Ok(false)
            }
            Request::Pause => self.pause(),
            Request::Resume => {
                if self.pausing && self.parked < self.running.vcpus() {
                    return Err(Error::Invalid(
                        "resume was asked before the pause was done".into(),
                    ));
                }
                if self.parked > 0 {
                    self.parked = 0;
                    self.pausing = false;
                    self.running.resume();
                }
                self.send(&Event::Resumed)?;
                Ok(false)
            }
            Request::Written => {
                let Some(recorder) = self.recorder.take() else {
                    return Err(Error::Invalid(
                        "what the start writes to is not recorded".into(),
                    ));
                };
                let written = recorder.finish().map_err(broken("pagemap"))?;
                self.send(&Event::Written(written))?;
                Ok(false)
            }
            Request::Freeze => {
                if !self.may_freeze || self.pausing {
                    return Err(Error::Invalid(
                        "only a running machine that was launched for it can be frozen".into(),
                    ));
                }
                let mut fds = fds.into_iter().map(File::from);
                self.freeze = fds
                    .next()
                    .zip(fds.next())
                    .map(|(memory, state)| TemplateFiles { memory, state });
                self.pause()
            }
        }
    }

    fn pause(&mut self) -> Result<bool, Error> {
        self.pausing = true;
        if self.parked < self.running.vcpus() {
            self.running.pause();
        }
        self.paused()
    }

    /// Goes on if all vCPUs are parked and were to be: one that boots to be frozen parks itself when its agent listens.
    /// Whether the machine has come to its end.
    fn paused(&mut self) -> Result<bool, Error> {
        if self.parked < self.running.vcpus() || !self.pausing {
            return Ok(false);
        }
        match self.freeze.take() {
            Some(files) => {
                self.write_template(&files)?;
                Ok(true)
            }
            None => {
                self.send(&Event::Paused)?;
                Ok(false)
            }
        }
    }

    /// Whether the machine has come to its end.
    fn report(&mut self, report: Report) -> Result<bool, Error> {
        match report {
            Report::FirstExit => {
                let shared = self.running.shared();
                let (entered, exit) = (shared.entered.get(), shared.first_exit.get());
                if let Some(&at) = entered {
                    self.times.at(points::VCPU_ENTERED, at);
                }
                if let Some(&at) = exit {
                    self.times.at(points::VCPU_FIRST_EXIT, at);
                }
                let points = self.times.passed.clone();
                self.send(&Event::Running { points })?;
            }
            Report::Listening => self.send(&Event::AgentListening)?,
            Report::Parked => {
                self.parked += 1;
                return self.paused();
            }
            Report::Stopped(reason) => {
                self.send(&Event::Stopped { reason })?;
                return Ok(true);
            }
            Report::Failed(message) => return Err(Error::Vcpu(message)),
            Report::Reached => self.times.stop(),
        }
        Ok(false)
    }

    fn write_template(&self, files: &TemplateFiles) -> Result<(), Error> {
        let progress = |step: &str| {
            let step = step.to_owned();
            // Progress is a courtesy: a launcher that is gone ends us at the next event.
            let _ = self.socket.send(&Event::Progress { step }, &[]);
        };
        let snapshot = self.running.freeze(&files.memory, progress)?;
        progress("writing to the disk");
        let bytes = state::serialize(&snapshot).map_err(vm::Error::from)?;
        (&files.state)
            .write_all(&bytes)
            .and_then(|()| files.state.sync_all())
            .map_err(broken("the template's state file"))?;
        files
            .memory
            .sync_all()
            .map_err(broken("the template's memory file"))?;
        self.send(&Event::Frozen(control::Frozen {
            data_bytes: snapshot
                .memory
                .segments
                .iter()
                .map(|segment| segment.bytes)
                .sum(),
            state_bytes: bytes.len() as u64,
        }))
    }

    fn send(&self, event: &Event) -> Result<(), Error> {
        Ok(self.socket.send(event, &[])?)
    }
}

fn borrow(event: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
