//! Something that a start needs is used up: one clear sentence, nothing left behind, and the next start works.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf};

use crate::{
    case::{Case, scenario},
    config_file::ConfigFile,
    container::{BUSYBOX, Container, ctr},
    failure::{Failure, ensure},
    process::{End, Output},
    scene::Scene,
};

const OWN: &str = "runc needs other amounts at other places";

pub(super) fn cases() -> Vec<Case> {
    [
        scenario("exhausted/memory-while-forking", memory),
        scenario("exhausted/descriptors", descriptors),
        scenario("exhausted/disk-for-the-state-of-a-container", run_disk),
    ]
    .into_iter()
    .map(|case| case.alone().forkvm_only(OWN))
    .collect()
}

fn plain() -> Container {
    ctr(BUSYBOX).sh("echo ran").stdout("ran\n")
}

/// Runs a container that may work, or else fails with one of these words; whether it did work.
fn works(scene: &Scene<'_>, container: &Container, words: &[&str]) -> Result<bool, Failure> {
    let (_, mut running) = scene.start(container)?;
    running.close_stdin();
    let output: Output = running.wait(scene.deadline())?;
    if output.end == End::Exited(0) {
        return Ok(true);
    }
    // It ran, and came to the same end as a container on runc that wants more than it may have.
    if output.end == End::Exited(137) {
        return Ok(false);
    }
    let text = output.error_text().to_lowercase();
    if output.text().contains("ran") || !words.iter().any(|word| text.contains(word)) {
        return Err(output.failure(format!("expected one of {words:?} in the error")));
    }
    Ok(false)
}

/// A start with each amount: the first has to fail, and the last to work.
fn from_little_to_enough(
    scene: &Scene<'_>,
    amounts: &[u64],
    words: &[&str],
    mut container: impl FnMut(u64) -> Result<Container, Failure>,
) -> Result<(), Failure> {
    let mut worked = Vec::new();
    for &amount in amounts {
        worked.push(works(scene, &container(amount)?, words)?);
    }
    ensure(
        worked.first() == Some(&false) && worked.last() == Some(&true),
        || format!("with {amounts:?} it worked: {worked:?}"),
    )?;
    scene.run(&plain()).map(drop)
}

/// A cgroup above the containers' own whose memory is soon used up.
struct Tight(PathBuf);

impl Tight {
    fn new() -> Result<Self, Failure> {
        let path = PathBuf::from(format!("/sys/fs/cgroup/e2e-tight-{}", std::process::id()));
        fs::create_dir(&path).map_err(Failure::io(path.display()))?;
        Ok(Tight(path))
    }

    fn limit(&self, bytes: u64) -> Result<(), Failure> {
        for (file, value) in [("memory.max", bytes), ("memory.swap.max", 0)] {
            let path = self.0.join(file);
            fs::write(&path, value.to_string()).map_err(Failure::io(path.display()))?;
        }
        Ok(())
    }
}

impl Drop for Tight {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("forkvm-e2e: cannot remove {}: {error}", self.0.display());
        }
    }
}

fn memory(scene: &Scene<'_>) -> Result<(), Failure> {
    let tight = Tight::new()?;
    let name = tight
        .0
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let sizes: Vec<u64> = [1, 2, 4, 6, 8, 12, 16, 24, 256].map(|mib| mib << 20).into();
    from_little_to_enough(scene, &sizes, &["out of memory"], |bytes| {
        tight.limit(bytes)?;
        let cgroup = format!("/{name}/{}", scene.next_id());
        Ok(plain().option(&["--cgroup", &cgroup]))
    })
}

/// With how many descriptors a shim and its monitor, which has as many, are started. Some are too few for the one, some for
/// the other.
const DESCRIPTORS: [u64; 12] = [6, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 256];

fn descriptors(scene: &Scene<'_>) -> Result<(), Failure> {
    let words = ["too many open files", "error 24"];
    from_little_to_enough(scene, &DESCRIPTORS, &words, |count| {
        let script =
            format!("#!/bin/sh\nulimit -n {count}\nexec containerd-shim-forkvm-v2 \"$@\"\n");
        let shim = scene.write(&format!("containerd-shim-limited-v{count}"), &script)?;
        let mode = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&shim, mode).map_err(Failure::io(shim.display()))?;
        Ok(plain().option(&["--runtime", &shim.display().to_string()]))
    })
}

/// A file system without a free block where the shim writes what `forkvm ps` and its own successor read.
fn run_disk(scene: &Scene<'_>) -> Result<(), Failure> {
    let run = scene.path_text("run");
    fs::create_dir(&run).map_err(Failure::io(&run))?;
    scene.ok(["mount", "-t", "tmpfs", "-o", "size=4k", "none", &run])?;
    let fill = scene.write("run/full", &"x".repeat(4096));
    let config = ConfigFile::changed(&format!("[paths]\nrun = \"{run}\"\n"))?;
    let refused = fill.and_then(|_| scene.run(&plain().refused([&run, "no space left"])));
    drop(config);
    // By their names: an entry would keep the folder open, and busy.
    let left: Vec<_> = fs::read_dir(&run)
        .map_err(Failure::io(&run))?
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    scene.ok(["umount", &run])?;
    refused?;
    ensure(left.len() == 1, || {
        format!("left behind in {run}: {left:?}")
    })?;
    scene.run(&plain()).map(drop)
}
