//! Something dies that nobody expected to: the monitor, the shim, containerd.

use std::fs;

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    case::{Case, scenario},
    container::{BUSYBOX, Client, ctr},
    failure::{Failure, ensure},
    scene::Scene,
};

use super::files::log_at_end;
use super::{
    events::Events,
    tasks::{remove_task, task_pid},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("crash/the-tasks-process-is-killed", kill_task),
        scenario("crash/the-shim-is-killed", kill_shim),
        scenario(
            "crash/containerd-is-killed-and-started-again",
            restart_containerd,
        ),
    ]
    .into_iter()
    .map(Case::alone)
    .collect()
}

pub(super) fn kill(pid: u32) -> Result<(), Failure> {
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = process.ok_or_else(|| Failure::new(format!("{pid} is no process id")))?;
    kill_process(process, Signal::KILL)
        .map_err(|error| Failure::new(format!("cannot kill process {pid}: {error}")))
}

/// On forkvm the task's process is the monitor.
fn kill_task(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = ctr(BUSYBOX).sh("echo ready; sleep 1000").exits(137);
    let (id, running) = scene.start(&container)?;
    running.line("ready", scene.deadline())?;
    kill(task_pid(scene, &id)?)?;
    scene.finish(&container, running).map(drop)
}

fn parent_of(pid: u32) -> Result<u32, Failure> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).map_err(Failure::io(&path))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    parent
        .and_then(|parent| parent.trim().parse().ok())
        .ok_or_else(|| Failure::new(format!("{path} names no parent")))
}

/// containerd notices, runs the shim's `delete`, and everything is gone.
fn kill_shim(scene: &Scene<'_>) -> Result<(), Failure> {
    let events = Events::subscribe(scene)?;
    let id = scene.detach(&ctr(BUSYBOX).command(["sleep", "1000"]))?;
    scene.check_kernel(Client::Ctr, &id)?;
    kill(parent_of(task_pid(scene, &id)?)?)?;
    events.wait(scene, "/tasks/delete", &id)?;
    let list = scene.ok(["ctr", "task", "ls"])?.text();
    ensure(!list.contains(&id), || {
        format!("containerd still lists {list:?}")
    })?;
    scene.ok(["ctr", "container", "rm", &id]).map(drop)
}

/// A container lives on, and the new containerd finds it.
fn restart_containerd(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = scene.detach(&ctr(BUSYBOX).sh("trap 'echo last; exit 5' TERM; sleep 1000 & wait"))?;
    scene.check_kernel(Client::Ctr, &id)?;
    let before = task_pid(scene, &id)?;
    let unit = &scene.machine.containerd.unit;
    scene.ok([
        "systemctl",
        "kill",
        "--kill-whom=main",
        "--signal=KILL",
        unit,
    ])?;
    scene.ok(["systemctl", "restart", unit])?;
    let after = task_pid(scene, &id)?;
    ensure(before == after, || {
        format!("process {before} became {after}")
    })?;
    scene.check_kernel(Client::Ctr, &id)?;
    let events = Events::subscribe(scene)?;
    scene.ok(["ctr", "task", "kill", "--signal", "TERM", &id])?;
    events.end_of(scene, &id)?;
    let log = log_at_end(scene, &id, "last")?;
    ensure(log.ends_with("last\n"), || format!("the log is {log:?}"))?;
    remove_task(scene, &id, 5)?;
    scene.ok(["ctr", "container", "rm", &id]).map(drop)
}
