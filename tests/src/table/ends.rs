//! How a process ends: by each signal, and without ever having been started.

use std::fs;

use crate::{
    case::{Case, scenario},
    container::{BUSYBOX, Client, PYTHON, ctr},
    failure::{Failure, ensure},
    process::{End, Output, Running, Streams},
    scene::Scene,
};

use super::{
    events::Events,
    tasks::{end_exec, expect_status, remove_task, task_pid},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("end/each-signal-arrives", each_signal),
        scenario("end/by-a-signal-is-128-and-its-number", by_signal),
        scenario("end/of-a-program-that-cannot-be-executed", not_executed),
        scenario("end/killed-before-its-start", killed_when_created),
        scenario("end/removed-before-its-start", removed_when_created),
        scenario("end/exec-before-its-start", exec_when_created),
    ]
}

/// Writes the number of each signal that arrives.
const WRITE_SIGNALS: &str = r"
import os, signal
numbers = set(range(1, 65)) - {9, 19, 32, 33}
for number in numbers:
    signal.signal(number, lambda got, frame: os.write(1, b'<%d>\n' % got))
print('ready', flush=True)
while True: signal.pause()
";

fn each_signal(scene: &Scene<'_>) -> Result<(), Failure> {
    /// Signals of signal(7) by their numbers on x86-64.
    const STOP: u32 = 19;
    const CONTINUE: u32 = 18;
    let container = ctr(PYTHON).python(WRITE_SIGNALS).exits(137);
    let (id, running) = scene.start(&container)?;
    running.line("ready", scene.deadline())?;
    let kill =
        |signal: u32| scene.ok(["ctr", "task", "kill", "--signal", &signal.to_string(), &id]);
    // The 31 of old, and the first, a middle and the last real-time one that the C library leaves to programs.
    for signal in (1..=31).chain([34, 50, 64]) {
        if ![9, STOP, CONTINUE].contains(&signal) {
            kill(signal)?;
            running.line(&format!("<{signal}>"), scene.deadline())?;
        }
    }
    kill(STOP)?;
    let state = scene.exec(Client::Ctr, &id, ["grep", "State:", "/proc/1/status"])?;
    ensure(state.text().contains("T (stopped)"), || {
        format!("after SIGSTOP it says {:?}", state.text())
    })?;
    kill(CONTINUE)?;
    running.line(&format!("<{CONTINUE}>"), scene.deadline())?;
    let error = scene.host(["ctr", "task", "kill", "--signal", "65", &id])?;
    ensure(error.exits(1).is_ok(), || {
        "65 passed for a signal".to_owned()
    })?;
    kill(9)?;
    scene.finish(&container, running).map(drop)
}

/// With a core, without one, and a real-time one; an exec, as the kernel spares the first process of a PID namespace.
fn by_signal(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = scene.detach(&ctr(BUSYBOX).command(["sleep", "1000"]))?;
    scene.check_kernel(Client::Ctr, &id)?;
    for signal in [1, 6, 11, 14, 15, 31, 34, 64] {
        end_exec(scene, &id, &signal.to_string(), 128 + signal)?;
    }
    scene.exec(Client::Ctr, &id, ["true"])?.exits(0).map(drop)
}

/// The kernel refuses the file, which only executing it shows: it has been started then, and has ended.
fn not_executed(scene: &Scene<'_>) -> Result<(), Failure> {
    let folder = scene.path_text("data");
    scene.write("data/garbage", "\u{1}garbage")?;
    scene.ok(["chmod", "+x", &format!("{folder}/garbage")])?;
    let mount = format!("type=bind,src={folder},dst=/data,options=rbind:ro");
    let with_data = ctr(BUSYBOX).option(&["--mount", &mount]);
    // Older runcs end with 1, newer ones with 255.
    let could_not = |output: Output| -> Result<(), Failure> {
        let ended = matches!(output.end, End::Exited(1 | 255));
        if ended && output.error_text().contains("exec format error") {
            return Ok(());
        }
        Err(output.failure("expected an exec format error"))
    };
    let container = with_data.clone().bare().command(["/data/garbage"]);
    let (_, running) = scene.start(&container)?;
    could_not(running.wait(scene.deadline())?)?;
    let id = scene.detach(&with_data.command(["sleep", "1000"]))?;
    scene.check_kernel(Client::Ctr, &id)?;
    could_not(scene.exec(Client::Ctr, &id, ["/data/garbage"])?)
}

/// A task that its client leaves between create and start: what it is to write there cannot be written.
fn created(scene: &Scene<'_>) -> Result<String, Failure> {
    let container = ctr(BUSYBOX)
        .detached()
        .option(&["--null-io", "--pid-file", "/no/such/folder/pid"])
        .command(["sleep", "1000"]);
    let (id, running) = scene.start(&container)?;
    let output = running.wait(scene.deadline())?.exits(1)?;
    ensure(output.error_text().contains("/no/such/folder"), || {
        format!("the client says {:?}", output.error_text())
    })?;
    expect_status(scene, &id, "CREATED")?;
    Ok(id)
}

fn killed_when_created(scene: &Scene<'_>) -> Result<(), Failure> {
    let events = Events::subscribe(scene)?;
    let id = created(scene)?;
    let pid = task_pid(scene, &id)?;
    ensure(
        fs::exists(format!("/proc/{pid}/ns/net")).unwrap_or(false),
        || format!("there is no process {pid}"),
    )?;
    scene.ok(["ctr", "task", "kill", "--signal", "SIGKILL", &id])?;
    events.end_of(scene, &id)?;
    expect_status(scene, &id, "STOPPED")?;
    remove_task(scene, &id, 137)?;
    scene.ok(["ctr", "container", "rm", &id])?;
    prove(scene)
}

fn removed_when_created(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = created(scene)?;
    let output = scene.host(["ctr", "task", "rm", &id])?.exits(1)?;
    ensure(output.error_text().contains("must be stopped"), || {
        format!("ctr task rm says {:?}", output.error_text())
    })?;
    scene.ok(["ctr", "task", "rm", "--force", &id])?;
    scene.ok(["ctr", "container", "rm", &id])?;
    prove(scene)
}

/// The namespaces are there; what runs in them ends with the container's own process.
fn exec_when_created(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = created(scene)?;
    scene.check_kernel(Client::Ctr, &id)?;
    end_exec(scene, &id, "TERM", 143)?;
    let words = ["ctr", "task", "exec", "--exec-id", "last", &id, "sh", "-c"].map(String::from);
    let script = "echo ready; exec sleep 1000".to_owned();
    let running = Running::spawn(&[&words[..], &[script]].concat(), Streams::Pipes)?;
    running.line("ready", scene.deadline())?;
    expect_status(scene, &id, "CREATED")?;
    scene.ok(["ctr", "task", "kill", "--signal", "SIGKILL", &id])?;
    running.wait(scene.deadline())?.exits(137)?;
    remove_task(scene, &id, 137)?;
    scene.ok(["ctr", "container", "rm", &id]).map(drop)
}

/// What never ran cannot tell its kernel: another container of the same runtime does.
fn prove(scene: &Scene<'_>) -> Result<(), Failure> {
    scene.run(&ctr(BUSYBOX).command(["true"])).map(drop)
}
