//! containerd's own client, `ctr`, and the containers that it starts on two runtimes from one image.

use std::{
    fs,
    io::ErrorKind,
    os::fd::AsFd as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use forkvm_vmm::on_software_processor;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};

use super::Error;

/// How long anything may take that cannot hang.
const LIMIT: Duration = Duration::from_secs(600);

/// A runtime of containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Runtime {
    Runc,
    Forkvm,
}

impl Runtime {
    /// In the order in which they take turns.
    pub(super) const BOTH: [Runtime; 2] = [Runtime::Runc, Runtime::Forkvm];

    pub(super) fn name(self) -> &'static str {
        match self {
            Runtime::Runc => "runc",
            Runtime::Forkvm => "forkvm",
        }
    }

    fn of_containerd(self) -> &'static str {
        match self {
            Runtime::Runc => "io.containerd.runc.v2",
            Runtime::Forkvm => "io.containerd.forkvm.v2",
        }
    }

    /// Whether a guest may hang: on QEMU's software processor alone (docs/testing.md).
    pub(super) fn may_hang(self) -> bool {
        self == Runtime::Forkvm && on_software_processor()
    }
}

/// A container's name that was never used before.
pub(super) fn unique_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("bench-{}-{number}", std::process::id())
}

/// The words of `ctr run` with these options in front of the image.
pub(super) fn run_words<'a>(
    runtime: Runtime,
    options: &[&'a str],
    image: &'a str,
    id: &'a str,
    command: &[&'a str],
) -> Vec<&'a str> {
    let mut words = vec!["run", "--runtime", runtime.of_containerd()];
    words.extend_from_slice(options);
    words.extend([image, id]);
    words.extend_from_slice(command);
    words
}

/// A `ctr` that runs.
pub(super) struct Client {
    child: Child,
    began: Instant,
    shown: String,
}

impl Client {
    /// Starts `ctr` with these words.
    ///
    /// # Errors
    /// It is not installed.
    pub(super) fn start(words: &[&str]) -> Result<Self, Error> {
        let began = Instant::now();
        let child = Command::new("ctr")
            .args(words)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| match error.kind() {
                ErrorKind::NotFound => Error::Program(
                    "ctr is not installed, with which containers are measured: install containerd, or measure \
                     without it: forkvm bench monitor fork sweep"
                        .into(),
                ),
                _ => Error::io("ctr")(error),
            })?;
        Ok(Self {
            child,
            began,
            shown: format!("ctr {}", words.join(" ")),
        })
    }

    /// When it was started.
    pub(super) fn began(&self) -> Instant {
        self.began
    }

    /// Waits for its success; what it wrote, and how long it took.
    ///
    /// # Errors
    /// It failed; or it did not end in time and was killed.
    pub(super) fn wait(mut self, limit: Duration) -> Result<(String, Duration), Error> {
        let ended = wait_for(&self.child, limit)?;
        let took = self.began.elapsed();
        if !ended {
            self.child.kill().map_err(Error::io("ctr"))?;
        }
        let output = self.child.wait_with_output().map_err(Error::io("ctr"))?;
        if !ended {
            let limit = limit.as_secs_f32();
            return Err(Error::Guest(format!(
                "'{}' has not ended within {limit} s",
                self.shown
            )));
        }
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(Error::Program(format!(
                "'{}' failed: {}",
                self.shown,
                said.trim()
            )));
        }
        Ok((String::from_utf8_lossy(&output.stdout).into_owned(), took))
    }
}

fn wait_for(child: &Child, limit: Duration) -> Result<bool, Error> {
    let failed = |errno: rustix::io::Errno| Error::io("waiting for ctr")(errno.into());
    let pid = Pid::from_child(child);
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(failed)?;
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut wait = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
        match poll(&mut wait, Some(&timeout)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
}

/// Runs `ctr` to its end.
///
/// # Errors
/// See [`Client`].
pub(super) fn ctr(words: &[&str]) -> Result<String, Error> {
    Ok(Client::start(words)?.wait(LIMIT)?.0)
}

/// The image to measure with: the one that was asked for, else the first with busybox in its name.
///
/// # Errors
/// containerd has none.
pub(super) fn image(asked: Option<&str>) -> Result<String, Error> {
    let list = ctr(&["image", "ls", "-q"])?;
    let found = list.lines().find(|name| match asked {
        Some(asked) => *name == asked,
        None => name.contains("busybox"),
    });
    found.map(str::to_owned).ok_or_else(|| {
        let image = asked.unwrap_or("docker.io/library/busybox:latest");
        Error::Program(format!(
            "containerd has no image to measure with: run `ctr image pull {image}`, or name another with --image"
        ))
    })
}

/// Removes a container by force, with its machine if that hangs.
pub(super) fn remove(runtime: Runtime, id: &str, run: &Path) {
    if runtime.may_hang()
        && let Some(monitor) = monitor_of(run, id)
    {
        // It may have ended.
        let _ = kill_process(monitor, Signal::KILL);
    }
    // A forced removal answers with the status of the process that it killed.
    let _ = ctr(&["task", "rm", "--force", id]);
    let _ = ctr(&["container", "rm", id]);
}

/// The monitor of a container.
fn monitor_of(run: &Path, id: &str) -> Option<Pid> {
    let state: serde_json::Value =
        serde_json::from_str(&kept_by_shim(run, id, "state.json")?).ok()?;
    Pid::from_raw(i32::try_from(state["monitor_pid"].as_u64()?).ok()?)
}

/// A file of what a container's shim keeps in the folder `run`, whatever the container's namespace is.
pub(super) fn kept_by_shim(run: &Path, id: &str, file: &str) -> Option<String> {
    let namespaces = fs::read_dir(run).ok()?;
    namespaces
        .flatten()
        .find_map(|namespace| fs::read_to_string(namespace.path().join(id).join(file)).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ() {
        assert_ne!(unique_name(), unique_name());
    }

    #[test]
    fn a_container_s_words_are_in_ctr_s_order() {
        let words = run_words(Runtime::Runc, &["--rm"], "image", "id", &["true"]);
        assert_eq!(
            words,
            [
                "run",
                "--runtime",
                "io.containerd.runc.v2",
                "--rm",
                "image",
                "id",
                "true"
            ]
        );
    }

    #[test]
    fn a_monitor_is_found_by_its_container() {
        let run = tempfile::tempdir().unwrap();
        let folder = run.path().join("default/c1");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("state.json"), r#"{"monitor_pid": 4711}"#).unwrap();
        assert_eq!(monitor_of(run.path(), "c1"), Pid::from_raw(4711));
        assert_eq!(monitor_of(run.path(), "c2"), None);
    }
}
