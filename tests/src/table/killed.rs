//! `kill -9` of the shim and of the monitor at every named time point of a start. The cases come from the list of
//! points: a new one is covered by itself.

use std::fs;

use forkvm_api::{fault::Kill, points};

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
            scenario(format!("killed/{kill}"), move |scene| survive(scene, kill))
                .alone()
                .forkvm_only("the named time points are forkvm's")
        })
        .collect()
}

/// The client hears of it, the command was not run unless it had been started, and the same name can be used again.
fn survive(scene: &Scene<'_>, kill: Kill) -> Result<(), Failure> {
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
