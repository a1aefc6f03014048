//! `kill -9` of the shim and of the monitor at every named time point of a start, and of the builder and its monitor at
//! every one of a build. The cases come from the lists of points: a new one is covered by itself.

use std::fs;

use forkvm_api::{
    fault::{Kill, Process},
    points,
};

use crate::{
    case::{Case, scenario},
    config_file::ConfigFile,
    container::{BUSYBOX, Client, ctr},
    failure::{Failure, ensure},
    process::{self, End},
    scene::{self, Scene},
};

pub(super) fn cases() -> Vec<Case> {
    Kill::all()
        .map(|kill| {
            let steps = if kill.is_in_build() { build } else { start };
            scenario(format!("killed/{kill}"), move |scene| steps(scene, kill))
                .alone()
                .forkvm_only("the named time points are forkvm's")
        })
        .collect()
}

/// The client hears of it, the command was not run unless it had been started, and the same name can be used again.
fn start(scene: &Scene<'_>, kill: Kill) -> Result<(), Failure> {
    let out = scene.path("out");
    fs::create_dir(&out).map_err(Failure::io(out.display()))?;
    let mount = format!("type=bind,src={},dst=/out,options=rbind:rw", out.display());
    // Were nothing killed it would end well.
    let container = ctr(BUSYBOX)
        .option(&["--mount", &mount])
        .bare()
        .sh("echo >/out/ran; sleep 20");
    let config = ConfigFile::changed(&format!("[test]\nkill = \"{kill}\"\n"))?;
    let (id, mut running) = scene.start(&container)?;
    running.close_stdin();
    let output = running.wait(scene.deadline())?;
    drop(config);
    if output.end == End::Exited(0) {
        return Err(output.failure("expected that it fails, as one of its processes was killed"));
    }
    ensure(
        kill.point == points::PROCESS_STARTED || !out.join("ran").exists(),
        || "the container's command was executed before Start".into(),
    )?;

    scene::remove(Client::Ctr, &id, scene.deadline());
    let again = ctr(BUSYBOX).bare().command(["uname", "-r"]);
    let again = again.arguments(scene.runtime, &id);
    let output = process::run(&again, b"", scene.deadline())?.exits(0)?;
    scene.check_release(output.text().trim())
}

/// Nobody sees half of a template; the next build makes it, and what the dead one has left is gone.
fn build(scene: &Scene<'_>, kill: Kill) -> Result<(), Failure> {
    let store = scene.path("store");
    let own = format!(
        "[vm]\nmemory_mib = 128\n[paths]\ntemplates = \"{}\"\nrecord = \"{}\"\n",
        store.display(),
        scene.path_text("record.json")
    );
    let config = ConfigFile::changed(&format!("{own}[test]\nkill = \"{kill}\"\n"))?;
    let failed = scene.host(["forkvm", "template", "build"])?;
    drop(config);
    let expected = match kill.process {
        Process::Builder => End::Signalled(9),
        Process::Shim | Process::Monitor => End::Exited(1),
    };
    if failed.end != expected {
        return Err(failed.failure(format!("expected {expected}, found {}", failed.end)));
    }
    let _config = ConfigFile::changed(&own)?;
    // A start that finds nothing builds; but one that finds a failure of just now is booted instead.
    scene.ok(["forkvm", "template", "build"])?;
    scene.ok(["forkvm", "template", "verify"])?;
    scene.run(&ctr(BUSYBOX).command(["true"]))?;
    let names = fs::read_dir(&store).map_err(Failure::io(store.display()))?;
    let mut names: Vec<String> = names
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name != ".digests.json")
        .collect();
    names.sort();
    ensure(names.len() == 1 && !names[0].starts_with('.'), || {
        format!("{names:?} is in the store")
    })
}
