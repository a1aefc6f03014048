//! One measured start: the container's whole life through `ctr run --rm`, by the caller's clock.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::timings::{self, Start};
use crate::{
    config_file::ConfigFile,
    container::Container,
    failure::Failure,
    machine::Runtime,
    process::{self, Output},
    runner::may_hang,
    scene::remove,
};

/// How long one start may take before the measurement is given up.
const LIMIT: Duration = Duration::from_secs(600);

/// How long one container may take where it may hang: three times what any takes in counted mode.
const RUN_LIMIT: Duration = Duration::from_millis(1500);

/// What starts the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// runc.
    Runc,
    /// forkvm with a machine that boots.
    Boot,
    /// forkvm with a machine that is forked from the template.
    Fork,
}

impl Way {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Way::Runc => "runc",
            Way::Boot => "forkvm, cold boot",
            Way::Fork => "forkvm, fork",
        }
    }

    /// Its runtime.
    pub fn runtime(self) -> Runtime {
        match self {
            Way::Runc => Runtime::Runc,
            Way::Boot | Way::Fork => Runtime::Forkvm,
        }
    }
}

/// The folder and the file that a set of measurements works with.
#[derive(Debug)]
pub struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    /// A fresh one.
    ///
    /// # Errors
    /// When no folder can be made.
    pub fn new() -> Result<Self, Failure> {
        let folder = tempfile::TempDir::with_prefix("forkvm-figures-");
        let folder = folder.map_err(Failure::io("scratch folder"))?;
        Ok(Bench { folder })
    }

    /// A file in its folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a container that has to return what it expects; its output, and the time points of its
    /// start if forkvm started it.
    ///
    /// # Errors
    /// A container that fails, or a start without time points.
    pub fn run(&self, way: Way, container: &Container) -> Result<(Output, Option<Start>), Failure> {
        retried(way.runtime(), || self.run_once(way, container))
    }

    fn run_once(
        &self,
        way: Way,
        container: &Container,
    ) -> Result<(Output, Option<Start>), Failure> {
        let log = self.path("timings.jsonl");
        let _ = std::fs::remove_file(&log);
        let _config = self.configure(way, &log)?;
        let id = unique_name();
        let arguments = container.arguments(way.runtime(), &id);
        let output = process::run(&arguments, b"", run_deadline(way.runtime()))
            .and_then(|output| container.judge(output))
            .inspect_err(|_| {
                if may_hang(way.runtime()) {
                    // A hung guest never answers; nothing else runs in the test host.
                    let kill = ["pkill", "-KILL", "-x", "forkvm-vmm"].map(String::from);
                    let _ = process::run(&kill, b"", deadline());
                }
                remove(container.client(), &id, deadline());
            })?;
        if way == Way::Runc {
            return Ok((output, None));
        }
        let mut starts = timings::read(&log)?;
        let start = starts
            .pop()
            .ok_or_else(|| output.failure("the start left no time points"))?;
        let expected = if way == Way::Boot { "boot" } else { "fork" };
        if start.mode != expected {
            return Err(output.failure(format!("the machine was started by '{}'", start.mode)));
        }
        Ok((output, Some(start)))
    }

    /// The configuration that makes forkvm start a machine in this way and keep its time points.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn configure(&self, way: Way, log: &Path) -> Result<Option<ConfigFile>, Failure> {
        let mode = match way {
            Way::Runc => return Ok(None),
            Way::Boot => "boot",
            Way::Fork => "fork",
        };
        let vm = forkvm_config::Config::load()
            .map_err(|error| Failure::new(error.to_string()))?
            .vm;
        let text = format!(
            "[vm]\nvcpus = {}\nmemory_mib = {}\n[start]\nmode = \"{mode}\"\n[log]\ntimings = \"{}\"\n",
            vm.vcpus,
            vm.memory_mib,
            log.display()
        );
        ConfigFile::with(&text).map(Some)
    }
}

/// Tries once more what a guest did that QEMU's software processor hung, and says so. What was measured of the first try
/// is not kept.
///
/// # Errors
/// The second failure, or the first of runc or on a real processor.
pub fn retried<T>(
    runtime: Runtime,
    mut start: impl FnMut() -> Result<T, Failure>,
) -> Result<T, Failure> {
    match start() {
        Err(failure) if may_hang(runtime) => {
            eprintln!("\nonce more, this failed: {failure}");
            start()
        }
        result => result,
    }
}

/// The end of one container: soon where it may hang.
pub fn run_deadline(runtime: Runtime) -> Instant {
    let limit = if may_hang(runtime) { RUN_LIMIT } else { LIMIT };
    Instant::now() + limit
}

/// The end of a measurement that hangs.
pub fn deadline() -> Instant {
    Instant::now() + LIMIT
}

/// A container's name that was never used before.
pub fn unique_name() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("figures-{}-{number}", std::process::id())
}
