//! The calls of a task: signals, exec, listing, detached containers, many at once.

use crate::{
    case::{Case, scenario},
    container::{BUSYBOX, Client, ctr},
    failure::{Failure, ensure},
    process::{Output, Running, Streams},
    scene::Scene,
};

use super::{
    events::Events,
    files::{log_at_end, wait_for_line, wait_for_log},
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("task/kill-9-is-137", kill_hard),
        scenario("task/term-is-handled", kill_softly),
        scenario("task/exec", exec),
        scenario("task/exec-has-its-own-streams-and-user", exec_streams),
        scenario("task/exec-can-be-killed", exec_killed),
        scenario("task/exec-of-nothing-is-an-error", exec_not_there),
        scenario("task/exec-into-a-stopped-one-is-an-error", exec_stopped),
        scenario("task/pids", pids),
        scenario("task/detached-and-deleted", detached),
        scenario("task/a-running-one-is-not-deleted", delete_running),
        scenario("task/a-name-is-taken-once", same_name),
        scenario("task/four-at-once", four_at_once),
        scenario("task/pause-and-resume", pause),
        scenario("task/kill-9-reaches-a-paused-one", kill_paused),
        scenario("task/metrics", metrics),
        scenario("task/output-goes-to-a-program", log_program),
    ]
}

/// A container that says `ready` and waits to be killed.
fn waiting(script: &str) -> crate::container::Container {
    ctr(BUSYBOX).sh(&format!(
        "{script} echo ready; while :; do sleep 1000 & wait $!; done"
    ))
}

fn kill_hard(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = waiting("").exits(137);
    let (id, running) = scene.start(&container)?;
    running.line("ready", scene.deadline())?;
    scene.ok(["ctr", "task", "kill", "--signal", "SIGKILL", &id])?;
    scene.finish(&container, running).map(drop)
}

fn kill_softly(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = waiting("trap 'echo term; exit 143' TERM; trap 'echo usr1' USR1;").exits(143);
    let (id, running) = scene.start(&container)?;
    running.line("ready", scene.deadline())?;
    scene.ok(["ctr", "task", "kill", "--signal", "SIGUSR1", &id])?;
    running.line("usr1", scene.deadline())?;
    scene.ok(["ctr", "task", "kill", "--signal", "SIGTERM", &id])?;
    scene
        .finish(&container.stdout("ready\nusr1\nterm\n"), running)
        .map(drop)
}

/// A detached container that sleeps, on the right kernel.
pub(super) fn sleeper(scene: &Scene<'_>) -> Result<String, Failure> {
    let id = scene.detach(&ctr(BUSYBOX).command(["sleep", "1000"]))?;
    scene.check_kernel(Client::Ctr, &id)?;
    Ok(id)
}

fn exec(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = sleeper(scene)?;
    let shell = |script| scene.exec(Client::Ctr, &id, ["sh", "-c", script]);
    shell("exit 42")?.exits(42)?;
    shell("sh -c 'kill -9 $$'")?.exits(137)?;
    let output = shell("echo out; echo err >&2; cat /proc/1/comm; pwd")?.exits(0)?;
    expect(&output, "out\nsleep\n/\n", "err\n")?;
    // A name is free again when its process is gone.
    shell("exit 43")?.exits(43).map(drop)
}

fn exec_streams(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = sleeper(scene)?;
    let script = "id -u; id -g; pwd; cat";
    let mut words = vec!["ctr", "task", "exec", "--exec-id", "streams"];
    words.extend([
        "--user",
        "1000:2000",
        "--cwd",
        "/tmp",
        &id,
        "sh",
        "-c",
        script,
    ]);
    let words: Vec<String> = words.into_iter().map(String::from).collect();
    let output = crate::process::run(&words, b"typed in\n", scene.deadline())?.exits(0)?;
    expect(&output, "1000\n2000\n/tmp\ntyped in\n", "")
}

fn exec_killed(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = sleeper(scene)?;
    end_exec(scene, &id, "KILL", 137)?;
    // The container itself goes on.
    scene.exec(Client::Ctr, &id, ["true"])?.exits(0).map(drop)
}

/// Adds a process to a running container and ends it by a signal, by which it has to return `status`.
pub(super) fn end_exec(
    scene: &Scene<'_>,
    id: &str,
    signal: &str,
    status: i32,
) -> Result<(), Failure> {
    let script = "echo ready; exec sleep 1000";
    let words = [
        "ctr",
        "task",
        "exec",
        "--exec-id",
        "victim",
        id,
        "sh",
        "-c",
        script,
    ];
    let running = Running::spawn(&words.map(String::from), Streams::Pipes)?;
    running.line("ready", scene.deadline())?;
    scene.ok([
        "ctr",
        "task",
        "kill",
        "--signal",
        signal,
        "--exec-id",
        "victim",
        id,
    ])?;
    running.wait(scene.deadline())?.exits(status).map(drop)
}

fn exec_not_there(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = sleeper(scene)?;
    let output = scene
        .exec(Client::Ctr, &id, ["/no/such/program"])?
        .exits(1)?;
    expect_error(&output, &["/no/such/program", "no such file or directory"])?;
    scene.exec(Client::Ctr, &id, ["true"])?.exits(0).map(drop)
}

fn exec_stopped(scene: &Scene<'_>) -> Result<(), Failure> {
    let events = Events::subscribe(scene)?;
    // One that ends by itself at once may lose its output under runc's shim of containerd 2.
    let id = scene.detach(&ctr(BUSYBOX).sh("trap 'exit 3' TERM; echo ready; sleep 1000 & wait"))?;
    wait_for_log(scene, &id, "ready")?;
    scene.check_kernel(Client::Ctr, &id)?;
    scene.ok(["ctr", "task", "kill", "--signal", "TERM", &id])?;
    events.end_of(scene, &id)?;
    let output = scene.exec(Client::Ctr, &id, ["true"])?.exits(1)?;
    expect_error(&output, &["ctr:"])?;
    let status = scene.ok(["ctr", "task", "ls"])?.text();
    let line = status.lines().find(|line| line.contains(&id));
    ensure(line.is_some_and(|line| line.contains("STOPPED")), || {
        format!("ctr task ls says {status:?}")
    })?;
    let kill = scene.host(["ctr", "task", "kill", &id])?;
    expect_error(&kill.exits(1)?, &["not found"])?;
    remove_task(scene, &id, 3)?;
    scene.ok(["ctr", "container", "rm", &id]).map(drop)
}

fn pids(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = scene.detach(&ctr(BUSYBOX).sh("sleep 1000 & sleep 1000 & echo ready; wait"))?;
    wait_for_log(scene, &id, "ready")?;
    scene.check_kernel(Client::Ctr, &id)?;
    let task = task_pid(scene, &id)?;
    let list = scene.ok(["ctr", "task", "ps", &id])?.text();
    let pids: Vec<u32> = list
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next()?.parse().ok())
        .collect();
    ensure(pids.len() == 3 && pids.contains(&task), || {
        format!("expected 3 processes with {task} among them, found {list:?}")
    })?;
    // The task's process is the host's, and holds the container's network namespace.
    let inside = scene
        .exec(Client::Ctr, &id, ["ls", "/sys/class/net"])?
        .text();
    let link = format!("/proc/{task}/ns/net");
    let (own, theirs) = (namespace("/proc/self/ns/net")?, namespace(&link)?);
    ensure(inside == "lo\n" && own != theirs, || {
        format!("interfaces {inside:?}, network namespaces {own} and {theirs}")
    })
}

fn namespace(link: &str) -> Result<String, Failure> {
    let target = std::fs::read_link(link).map_err(Failure::io(link))?;
    Ok(target.display().to_string())
}

/// The process id of a task, as containerd shows it.
pub(super) fn task_pid(scene: &Scene<'_>, id: &str) -> Result<u32, Failure> {
    let list = scene.ok(["ctr", "task", "ls"])?;
    let text = list.text();
    let line = text.lines().find(|line| line.starts_with(id));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .ok_or_else(|| list.failure(format!("no task {id}")))
}

/// Removes a stopped task that has ended with this status, which is not 0: `ctr` tells it in a
/// warning.
pub(super) fn remove_task(scene: &Scene<'_>, id: &str, code: i32) -> Result<(), Failure> {
    let output = scene.ok(["ctr", "task", "rm", id])?;
    if output
        .error_text()
        .contains(&format!("non-zero exit code {code}\""))
    {
        return Ok(());
    }
    Err(output.failure(format!("expected the exit code {code} in a warning")))
}

fn detached(scene: &Scene<'_>) -> Result<(), Failure> {
    let events = Events::subscribe(scene)?;
    let id = scene
        .detach(&ctr(BUSYBOX).sh("trap 'echo last; exit 5' TERM; echo first; sleep 1000 & wait"))?;
    wait_for_log(scene, &id, "first")?;
    scene.check_kernel(Client::Ctr, &id)?;
    scene.ok(["ctr", "task", "kill", "--signal", "TERM", &id])?;
    events.end_of(scene, &id)?;
    let log = log_at_end(scene, &id, "last")?;
    // The kernel's line comes through the other stream, at any time.
    let lines = log.lines().filter(|line| !line.starts_with("kernel "));
    ensure(lines.eq(["first", "last"]), || {
        format!("the log is {log:?}")
    })?;
    remove_task(scene, &id, 5)?;
    scene.ok(["ctr", "container", "rm", &id]).map(drop)
}

fn delete_running(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = sleeper(scene)?;
    let output = scene.host(["ctr", "task", "rm", &id])?.exits(1)?;
    let refused = "task must be stopped before deletion";
    ensure(output.error_text().contains(refused), || {
        format!("ctr task rm says {:?}", output.error_text())
    })?;
    scene.exec(Client::Ctr, &id, ["true"])?.exits(0).map(drop)
}

fn same_name(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = sleeper(scene)?;
    let again = ctr(BUSYBOX).command(["true"]).arguments(scene.runtime, &id);
    let output = crate::process::run(&again, b"", scene.deadline())?.exits(1)?;
    expect_error(&output, &["already exists"])?;
    scene.exec(Client::Ctr, &id, ["true"])?.exits(0).map(drop)
}

fn four_at_once(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = |number: i32| ctr(BUSYBOX).sh(&format!("echo {number}; exit {number}"));
    let mut started = Vec::new();
    for number in 1..=4 {
        started.push((number, scene.start(&container(number))?.1));
    }
    for (number, mut running) in started {
        running.close_stdin();
        let row = container(number)
            .exits(number)
            .stdout(&format!("{number}\n"));
        scene.finish(&row, running)?;
    }
    Ok(())
}

/// The container finds that it stood still: its clock went on.
fn pause(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = "last=$(date +%s); echo ready
        while now=$(date +%s); [ $((now - last)) -lt 3 ]; do last=$now; done
        echo stood still; exit 7";
    let container = ctr(BUSYBOX).sh(script).exits(7);
    let (id, running) = scene.start(&container)?;
    running.line("ready", scene.deadline())?;
    scene.ok(["ctr", "task", "pause", &id])?;
    expect_status(scene, &id, "PAUSED")?;
    let output = scene.exec(Client::Ctr, &id, ["true"])?.exits(1)?;
    expect_error(&output, &["exec", "paused"])?;
    let output = scene.host(["ctr", "task", "pause", &id])?.exits(1)?;
    expect_error(&output, &["pause", "paused"])?;
    // What is looked at is that time passes.
    scene.ok(["sleep", "5"])?;
    scene.ok(["ctr", "task", "resume", &id])?;
    running.line("stood still", scene.deadline())?;
    scene
        .finish(&container.stdout("ready\nstood still\n"), running)
        .map(drop)
}

/// Whether `ctr task ls` shows a task with this status.
pub(super) fn expect_status(scene: &Scene<'_>, id: &str, status: &str) -> Result<(), Failure> {
    let output = scene.ok(["ctr", "task", "ls"])?;
    let has = |line: &&str| line.split_whitespace().next() == Some(id);
    let text = output.text();
    ensure(
        text.lines()
            .find(has)
            .is_some_and(|line| line.ends_with(status)),
        || format!("{id} is not {status} in:\n{text}"),
    )
}

fn kill_paused(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = waiting("").exits(137);
    let (id, running) = scene.start(&container)?;
    running.line("ready", scene.deadline())?;
    scene.ok(["ctr", "task", "pause", &id])?;
    scene.ok(["ctr", "task", "kill", "--signal", "SIGKILL", &id])?;
    scene.finish(&container, running).map(drop)
}

/// A program of the host takes what a container writes (`binary://`), and is told whose that is. Its streams end with
/// the task at the latest, and it is told to end then.
fn log_program(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = "#!/bin/sh
        trap '' TERM
        exec 5>&-
        { cat <&3; cat <&4; echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $*\"; } >\"$(dirname \"$0\")/out\"
        ";
    let events = Events::subscribe(scene)?;
    let program = scene.write("program", script)?.display().to_string();
    scene.ok(["chmod", "+x", &program])?;
    let uri = format!("binary://{program}?flag&key=a%20value");
    let container = ctr(BUSYBOX)
        .detached()
        .option(&["--log-uri", &uri])
        .sh("echo to stdout; echo to stderr >&2; exec sleep 1000");
    let (id, running) = scene.start(&container)?;
    running.wait(scene.deadline())?.exits(0)?;
    scene.check_kernel(Client::Ctr, &id)?;
    scene.ok(["ctr", "task", "kill", "--signal", "SIGKILL", &id])?;
    events.end_of(scene, &id)?;
    remove_task(scene, &id, 137)?;
    let out = scene.path_text("out");
    wait_for_line(scene, &out, "value")?;
    let text = scene.read(&out)?;
    let last = format!("default/{id} ");
    // The kernel's line is the case's own.
    let mut lines = text.lines().filter(|line| !line.starts_with("kernel "));
    let first = [lines.next(), lines.next()];
    // Flags come in an order of their own: a query is a map to containerd.
    let told = lines.next().and_then(|line| line.strip_prefix(&*last));
    let told = told.map(|words| words.contains("flag") && words.contains("key a value"));
    ensure(
        first == [Some("to stdout"), Some("to stderr")] && told == Some(true),
        || format!("the program has written {text:?}"),
    )?;
    scene.ok(["ctr", "container", "rm", &id]).map(drop)
}

/// Values of `ctr task metrics` by their names.
fn metric(scene: &Scene<'_>, id: &str, name: &str) -> Result<u64, Failure> {
    let output = scene.ok(["ctr", "task", "metrics", id])?;
    let text = output.text();
    let value = text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(name)).then(|| words.next()?.parse().ok())?
    });
    value.ok_or_else(|| Failure::new(format!("there is no {name} in:\n{text}")))
}

/// A container of three processes has used what its work takes, and no more than its limit.
fn metrics(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = "dd if=/dev/zero of=/dev/shm/held bs=1M count=20 2>/dev/null
        i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done
        sleep 1000 & sleep 1000 & echo ready; wait";
    let container = ctr(BUSYBOX)
        .option(&["--memory-limit", "67108864"])
        .sh(script)
        .exits(137);
    let (id, running) = scene.start(&container)?;
    running.line("ready", scene.deadline())?;
    let exact = [("memory.usage_limit", 67_108_864), ("pids.current", 3)];
    for (name, expected) in exact {
        let value = metric(scene, &id, name)?;
        ensure(value == expected, || {
            format!("{name} is {value}, not {expected}")
        })?;
    }
    let bounds = [
        ("memory.usage", 20 << 20, 64 << 20),
        ("cpu.usage_usec", 1000, 100_000_000),
    ];
    for (name, least, most) in bounds {
        let value = metric(scene, &id, name)?;
        ensure((least..=most).contains(&value), || {
            format!("{name} is {value}, not between {least} and {most}")
        })?;
    }
    // What a paused container has used is known too.
    scene.ok(["ctr", "task", "pause", &id])?;
    metric(scene, &id, "pids.current")?;
    scene.ok(["ctr", "task", "resume", &id])?;
    scene.ok(["ctr", "task", "kill", "--signal", "SIGKILL", &id])?;
    scene.finish(&container, running).map(drop)
}

fn expect(output: &Output, stdout: &str, stderr: &str) -> Result<(), Failure> {
    if output.text() == stdout && output.error_text() == stderr {
        return Ok(());
    }
    Err(output.failure(format!("expected {stdout:?} and {stderr:?}")))
}

/// One line of error with these words in it.
pub(super) fn expect_error(output: &Output, words: &[&str]) -> Result<(), Failure> {
    let text = output.error_text().to_lowercase();
    if text.trim_end().lines().count() != 1 {
        return Err(output.failure("expected one line of error"));
    }
    match words
        .iter()
        .find(|word| !text.contains(&word.to_lowercase()))
    {
        None => Ok(()),
        Some(word) => Err(output.failure(format!("expected {word:?} in the error"))),
    }
}
