//! One machine of the real monitor, started as the shim starts it, without a container.

use std::{
    fs::File,
    os::fd::AsFd as _,
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use forkvm_api::points;
use forkvm_vmm::{
    control::{
        Event, Launch, Monitor, NetworkNamespace, Purpose, Request, Source, TimePoint, Writes,
    },
    on_software_processor,
    template::{Template, TemplateSpec},
};
use rustix::time::{ClockId, clock_gettime};

use super::{Error, agent::Agents, timings::Start};

/// A running machine; it ends when this is dropped.
pub(super) struct Child {
    monitor: Monitor,
    /// The time points that it has passed.
    pub(super) start: Start,
}

/// How long a fork may take. QEMU's software processor hangs a guest now and then (docs/testing.md), so there it is some
/// ten times what any takes.
fn fork_limit() -> Duration {
    Duration::from_millis(if on_software_processor() {
        1500
    } else {
        30_000
    })
}

/// How long a boot may take.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// Tries once more what a guest did that QEMU's software processor hung, and says so; nothing of the first try is kept.
///
/// # Errors
/// The second failure, or the first on a real processor.
pub(super) fn retried<T>(mut start: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    match start() {
        Err(error @ (Error::Guest(_) | Error::Monitor(_) | Error::Program(_)))
            if on_software_processor() =>
        {
            eprintln!("once more, this failed: {error}");
            start()
        }
        result => result,
    }
}

impl Child {
    /// Forks a template; returns when the guest has executed its first instruction. If a container's start has left a
    /// record of what it writes to, that is expected as the shim does it; none is made here, where no container starts.
    ///
    /// # Errors
    /// A monitor that fails, a guest that does not run in time.
    pub(super) fn fork(program: &Path, template: &Template) -> Result<Self, Error> {
        let (source, descriptors) = match template.source_of_start() {
            (
                Source::Fork {
                    writes: Writes::Record,
                    ..
                },
                _,
            ) => {
                let (source, descriptors) = template.source();
                (source, descriptors.to_vec())
            }
            start => start,
        };
        Self::launch(program, source, &descriptors, fork_limit(), "fork")
    }

    /// Boots a guest; returns when its agent listens.
    ///
    /// # Errors
    /// A monitor that fails, a guest that does not come up in time.
    pub(super) fn boot(program: &Path, spec: &TemplateSpec) -> Result<Self, Error> {
        let open = |path: &Path| File::open(path).map_err(Error::io(path.display()));
        let (kernel, initramfs) = (open(&spec.kernel)?, open(&spec.initramfs)?);
        let source = Source::Boot {
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            cmdline: spec.cmdline.clone(),
        };
        let descriptors = [kernel.as_fd(), initramfs.as_fd()];
        let child = Self::launch(program, source, &descriptors, BOOT_LIMIT, "boot")?;
        match child.monitor.receive_before(Instant::now() + BOOT_LIMIT)? {
            Some(Event::AgentListening) => Ok(child),
            other => Err(ended(other)),
        }
    }

    fn launch(
        program: &Path,
        source: Source,
        descriptors: &[std::os::fd::BorrowedFd<'_>],
        limit: Duration,
        mode: &str,
    ) -> Result<Self, Error> {
        let mut start = Start::new(mode);
        start.pass(points::REQUESTED, now());
        let monitor = Monitor::spawn(program, Stdio::null())?;
        start.pass(points::VMM_SPAWNED, now());
        monitor.send(&Request::Launch(launch(source)), descriptors)?;
        match monitor.receive_before(Instant::now() + limit)? {
            Some(Event::Running { points }) => {
                for TimePoint { name, at_ns } in points {
                    start.pass(&name, at_ns);
                }
                Ok(Self { monitor, start })
            }
            other => Err(ended(other)),
        }
    }

    /// Gives it an identity and takes the time of the agent's answer.
    ///
    /// # Errors
    /// See [`Agents::identify`].
    pub(super) fn identify(&mut self, agents: &Agents) -> Result<(), Error> {
        agents.identify(&self.monitor, fork_limit())?;
        self.start.pass(points::IDENTITY_APPLIED, now());
        Ok(())
    }

    /// The monitor's process.
    pub(super) fn pid(&self) -> u32 {
        self.monitor.pid()
    }
}

/// What a monitor is asked for; with a network namespace of its own, as the shim does.
pub(super) fn launch(source: Source) -> Launch {
    Launch {
        source,
        purpose: Purpose::Run,
        network_namespace: NetworkNamespace::New,
        console: false,
        exports: Vec::new(),
    }
}

fn ended(event: Option<Event>) -> Error {
    Error::Guest(match event {
        Some(Event::Failed { message, .. }) => message,
        Some(Event::Stopped { reason }) => format!("the guest stopped: {reason}"),
        Some(other) => format!("the monitor said {other:?} out of turn"),
        None => "the monitor ended without a word".to_owned(),
    })
}

/// The host's CLOCK_MONOTONIC in nanoseconds.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    points::nanoseconds(Duration::new(
        time.tv_sec.unsigned_abs(),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    ))
}
