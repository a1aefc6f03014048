//! Containers that run while something is measured.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use super::measure::{deadline, retried, run_deadline, unique_name};
use crate::{
    container::{BUSYBOX, Container, ctr},
    failure::Failure,
    machine::Runtime,
    oci_config::default_spec,
    process::{self, Running, Streams},
};

/// A container that does nothing, has no streams, and is left behind by its client.
pub(super) fn sleeping() -> Container {
    ctr(BUSYBOX)
        .bare()
        .detached()
        .option(&["--null-io"])
        .command(["sleep", "100000"])
}

/// How long a container may take to start.
const PATIENCE: Duration = Duration::from_secs(60);

/// A detached container; dropped, it is killed.
pub(super) struct RunningContainer {
    id: String,
}

impl RunningContainer {
    /// Starts a container that its client leaves behind.
    pub(super) fn start(
        container: &Container,
        runtime: Runtime,
        mode: &str,
    ) -> Result<Self, Failure> {
        retried(runtime, || {
            let this = RunningContainer { id: unique_name() };
            let arguments = container.arguments(runtime, &this.id);
            // How long a start takes is known where instructions are counted alone.
            let end = match mode {
                "counted" => run_deadline(runtime),
                _ => Instant::now() + PATIENCE,
            };
            process::run(&arguments, b"", end)?.exits(0)?;
            Ok(this)
        })
    }

    /// Starts a container whose client stays, and waits until it has written a line with `word`. Whether its machine hangs is
    /// seen at the end alone, so it has as long as any measurement.
    pub(super) fn until(
        container: &Container,
        runtime: Runtime,
        word: &str,
    ) -> Result<(Self, Running), Failure> {
        let this = RunningContainer { id: unique_name() };
        let arguments = container.arguments(runtime, &this.id);
        let running = Running::spawn(&arguments, Streams::Pipes)?;
        running.line(word, deadline())?;
        Ok((this, running))
    }

    /// Its name.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The process of its task: the monitor.
    pub(super) fn task_pid(&self) -> Result<u32, Failure> {
        let list = ["ctr", "task", "ls"].map(String::from);
        let output = process::run(&list, b"", deadline())?.exits(0)?;
        let text = output.text();
        let line = text.lines().find(|line| line.starts_with(&self.id));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
            .ok_or_else(|| output.failure(format!("no task {}", self.id)))
    }

    /// Removes it.
    pub(super) fn remove(self) -> Result<(), Failure> {
        let result = self.try_remove();
        std::mem::forget(self);
        result
    }

    fn try_remove(&self) -> Result<(), Failure> {
        for words in [
            ["ctr", "task", "rm", "--force", &self.id].as_slice(),
            ["ctr", "container", "rm", &self.id].as_slice(),
        ] {
            let words: Vec<String> = words.iter().map(|&word| word.into()).collect();
            // A forced removal returns the status of the killed process.
            process::run(&words, b"", deadline())?;
        }
        Ok(())
    }
}

impl Drop for RunningContainer {
    fn drop(&mut self) {
        let _ = self.try_remove();
    }
}

/// containerd's own spec of a container that sleeps, with a hook that writes down the monitor's
/// private memory. createRuntime hooks run when Create is done but for them (OCI runtime
/// specification, "Lifecycle").
pub(super) fn spec_with_hook(answer: &Path, root: &str) -> Result<String, Failure> {
    let mut spec = default_spec(deadline())?;
    spec["process"]["args"] = serde_json::json!(["/bin/sleep", "100000"]);
    spec["root"]["path"] = serde_json::json!(root);
    // `ctr oci spec` names the folder above the containers' cgroups.
    spec["linux"]["cgroupsPath"] = serde_json::json!(format!("/default/{}", unique_name()));
    let program = std::env::current_exe().map_err(Failure::io("this program's path"))?;
    let arguments = serde_json::json!(["forkvm-figures", "hook", answer]);
    spec["hooks"] = serde_json::json!({
        "createRuntime": [{"path": program, "args": arguments}],
    });
    Ok(spec.to_string())
}

/// An image's files in a folder of the host, until this is dropped.
pub(super) struct MountedImage {
    pub(super) path: String,
}

impl MountedImage {
    pub(super) fn new(image: &str, folder: &Path) -> Result<Self, Failure> {
        fs::create_dir(folder).map_err(Failure::io(folder.display()))?;
        let path = folder.display().to_string();
        let words = ["ctr", "image", "mount", "--rw", image, &path].map(String::from);
        process::run(&words, b"", deadline())?.exits(0)?;
        Ok(MountedImage { path })
    }
}

impl Drop for MountedImage {
    fn drop(&mut self) {
        let words = ["ctr", "image", "unmount", "--rm", &self.path].map(String::from);
        let ended = process::run(&words, b"", deadline()).and_then(|output| output.exits(0));
        if let Err(error) = ended {
            eprintln!(
                "forkvm-figures: the image at {} stays mounted: {error}",
                self.path
            );
        }
    }
}
