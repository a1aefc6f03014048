//! What `docker` asks of a runtime.

use crate::{
    case::{Case, row, scenario},
    container::{BUSYBOX, Client, docker},
    failure::{Failure, ensure},
    process,
    scene::Scene,
};

use super::config::host_limits;

pub(super) fn cases() -> Vec<Case> {
    vec![
        row(
            "docker/run",
            docker(BUSYBOX)
                .option(&["--env", "A=b c", "--workdir", "/usr", "--user", "1000:1000"])
                .sh("echo $A; pwd; id -u; echo err >&2; exit 42")
                .exits(42)
                .stdout("b c\n/usr\n1000\n")
                .stderr("err\n"),
        ),
        row(
            "docker/stdin",
            docker(BUSYBOX)
                .stdin("typed in\n")
                .command(["cat"])
                .stdout("typed in\n"),
        ),
        row(
            "docker/no-stdin-is-end-of-file",
            docker(BUSYBOX).sh("cat; echo end").stdout("end\n"),
        ),
        row(
            "docker/hosts-hostname-and-resolv-conf",
            docker(BUSYBOX)
                .option(&["--hostname", "box-8", "--add-host", "other:192.0.2.7"])
                .sh("cat /etc/hostname; hostname; cat /etc/hosts; test -s /etc/resolv.conf && echo resolv; \
                     echo '# mine' >>/etc/hosts && tail -n 1 /etc/hosts")
                .stdout_has([
                    "box-8\nbox-8\n",
                    "127.0.0.1\tlocalhost",
                    "192.0.2.7\tother",
                    "resolv\n# mine\n",
                ]),
        ),
        row(
            "docker/default-isolation",
            docker(BUSYBOX)
                .sh("grep -E '^(CapEff|Seccomp):' /proc/self/status; unshare -U true || echo refused; \
                     cat /proc/self/cgroup; ls /sys/class/net")
                .stdout("CapEff:\t00000000a80425fb\nSeccomp:\t2\nrefused\n0::/\nlo\n"),
        ),
        row(
            "docker/read-only-with-tmpfs-and-no-capabilities",
            docker(BUSYBOX)
                .option(&["--read-only", "--tmpfs", "/scratch:size=1m", "--cap-drop", "ALL"])
                .option(&["--shm-size", "8m", "--pids-limit", "50", "--memory", "64m"])
                .sh("touch /x 2>/dev/null || echo read-only; touch /scratch/x && echo tmpfs; \
                     grep CapEff: /proc/self/status; df -k /dev/shm | tail -n 1 | tr -s ' ' | cut -d' ' -f2; \
                     cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/memory.max")
                .stdout("read-only\ntmpfs\nCapEff:\t0000000000000000\n8192\n50\n67108864\n"),
        ),
        row(
            "docker/init",
            docker(BUSYBOX)
                .option(&["--init"])
                .sh("cat /proc/1/comm; exit 4")
                .exits(4)
                .stdout("docker-init\n"),
        ),
        scenario("docker/volumes", volumes),
        scenario("docker/lifecycle", lifecycle),
        scenario("docker/kill-and-rm-by-force", kill_and_remove),
        scenario("docker/restart-keeps-the-root", restart),
        scenario("docker/pause-and-unpause", pause),
        scenario("docker/update", update),
        scenario("docker/cgroup-in-a-slice-of-systemd", slice),
        scenario("docker/stats", stats),
        scenario("docker/out-of-memory-is-told", out_of_memory),
        scenario("docker/attach", attach),
        scenario("docker/forwards-its-own-signals", forwarded_signal),
    ]
}

fn volumes(scene: &Scene<'_>) -> Result<(), Failure> {
    scene.write("data/in", "from the host\n")?;
    let writable = format!("{}:/data", scene.path_text("data"));
    let read_only = format!("{}:/frozen:ro", scene.path_text("data"));
    let container = docker(BUSYBOX)
        .option(&[
            "--volume",
            &writable,
            "--volume",
            &read_only,
            "--volume",
            "/anonymous",
        ])
        .sh("cat /data/in; echo out >/data/out; cat /frozen/out; \
             touch /frozen/x 2>/dev/null || echo frozen; touch /anonymous/x && ls /anonymous")
        .stdout("from the host\nout\nfrozen\nx\n");
    scene.run(&container)?;
    let out = scene.read(scene.path("data/out"))?;
    ensure(out == "out\n", || format!("the host reads {out:?}"))
}

fn inspect(scene: &Scene<'_>, id: &str, what: &str) -> Result<String, Failure> {
    let output = scene.ok(["docker", "inspect", "--format", what, id])?;
    Ok(output.text().trim_end().to_owned())
}

fn lifecycle(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = "trap 'echo stopping; exit 7' TERM; echo ready; echo err >&2; \
                  while :; do sleep 1000 & wait $!; done";
    let id = scene.detach(&docker(BUSYBOX).sh(script))?;
    scene.check_kernel(Client::Docker, &id)?;
    let state = inspect(scene, &id, "{{.State.Status}} {{.State.Running}}")?;
    ensure(state == "running true", || {
        format!("docker inspect says {state}")
    })?;

    let exec = [
        "docker",
        "exec",
        "--interactive",
        "--env",
        "A=b c",
        "--user",
        "1000",
        "--workdir",
        "/usr",
    ];
    let mut exec: Vec<String> = exec.map(String::from).into();
    exec.extend([&*id, "sh", "-c", "echo $A; id -u; pwd; cat; exit 9"].map(String::from));
    let output = process::run(&exec, b"typed in\n", scene.deadline())?.exits(9)?;
    ensure(output.text() == "b c\n1000\n/usr\ntyped in\n", || {
        format!("docker exec wrote {:?}", output.text())
    })?;
    let top = scene.ok(["docker", "top", &id])?.text();
    ensure(top.lines().count() >= 2, || {
        format!("docker top says {top:?}")
    })?;

    let wait = ["docker", "wait", &id].map(String::from);
    let waiter = process::Running::spawn(&wait, process::Streams::Pipes)?;
    scene.ok(["docker", "stop", "--time", "60", &id])?;
    let waited = waiter.wait(scene.deadline())?.exits(0)?.text();
    ensure(waited == "7\n", || format!("docker wait says {waited:?}"))?;
    let state = inspect(
        scene,
        &id,
        "{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}",
    )?;
    ensure(state == "exited 7 false", || {
        format!("docker inspect says {state}")
    })?;

    let logs = scene.ok(["docker", "logs", &id])?;
    let errors = logs.error_text();
    ensure(
        logs.text() == "ready\nstopping\n" && errors.ends_with("err\n"),
        || format!("docker logs says {:?} and {errors:?}", logs.text()),
    )?;
    let output = scene.host(["docker", "exec", &id, "true"])?.exits(1)?;
    super::tasks::expect_error(&output, &["is not running"])?;
    scene.ok(["docker", "rm", &id]).map(drop)
}

fn kill_and_remove(scene: &Scene<'_>) -> Result<(), Failure> {
    let sleeper = docker(BUSYBOX).command(["sleep", "1000"]);
    let killed = scene.detach(&sleeper)?;
    scene.check_kernel(Client::Docker, &killed)?;
    scene.ok(["docker", "kill", &killed])?;
    scene.ok(["docker", "wait", &killed])?;
    let code = inspect(scene, &killed, "{{.State.ExitCode}}")?;
    ensure(code == "137", || format!("the exit code is {code}"))?;
    let removed = scene.detach(&sleeper)?;
    scene.ok(["docker", "rm", "--force", &killed, &removed])?;
    for id in [&killed, &removed] {
        scene.host(["docker", "inspect", id])?.exits(1)?;
    }
    Ok(())
}

fn restart(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = "test -e /seen && echo again || echo first; touch /seen; exec sleep 1000";
    let id = scene.detach(
        &docker(BUSYBOX)
            .option(&["--stop-signal", "KILL"])
            .sh(script),
    )?;
    scene.check_kernel(Client::Docker, &id)?;
    scene.ok(["docker", "restart", &id])?;
    scene.check_kernel(Client::Docker, &id)?;
    let logs = scene.ok(["docker", "logs", &id])?.text();
    ensure(logs == "first\nagain\n", || {
        format!("docker logs says {logs:?}")
    })?;
    scene.ok(["docker", "rm", "--force", &id]).map(drop)
}

fn pause(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = scene.detach(&docker(BUSYBOX).command(["sleep", "1000"]))?;
    scene.check_kernel(Client::Docker, &id)?;
    scene.ok(["docker", "pause", &id])?;
    let state = inspect(scene, &id, "{{.State.Status}} {{.State.Paused}}")?;
    ensure(state == "paused true", || {
        format!("docker inspect says {state}")
    })?;
    let output = scene.host(["docker", "exec", &id, "true"])?.exits(1)?;
    super::tasks::expect_error(&output, &["is paused"])?;
    scene.ok(["docker", "unpause", &id])?;
    scene.exec(Client::Docker, &id, ["true"])?.exits(0)?;
    // Docker resumes by itself what it removes by force.
    scene.ok(["docker", "pause", &id])?;
    scene.ok(["docker", "rm", "--force", &id]).map(drop)
}

/// Limits change in a container that runs, in which they can be read.
fn update(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = docker(BUSYBOX)
        .option(&[
            "--memory",
            "64m",
            "--memory-swap",
            "64m",
            "--pids-limit",
            "100",
        ])
        .option(&["--cpu-shares", "512"]);
    let id = scene.detach(&container.command(["sleep", "1000"]))?;
    scene.check_kernel(Client::Docker, &id)?;
    let limits = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.weight";
    let read = || -> Result<Vec<String>, Failure> {
        let output = scene.exec(Client::Docker, &id, ["sh", "-c", limits])?;
        Ok(output.exits(0)?.text().lines().map(str::to_owned).collect())
    };
    let before = read()?;
    ensure(before[..2] == ["67108864", "100"], || {
        format!("at first the limits are {before:?}")
    })?;
    scene.ok([
        "docker",
        "update",
        "--memory",
        "128m",
        "--memory-swap",
        "128m",
        &id,
    ])?;
    scene.ok([
        "docker",
        "update",
        "--pids-limit",
        "50",
        "--cpu-shares",
        "2048",
        &id,
    ])?;
    let after = read()?;
    let changed = after[..2] == ["134217728", "50"] && after[2] != before[2];
    ensure(changed, || {
        format!("then they are {after:?}, at first {before:?}")
    })?;
    // Less than what is used is no error: memory is given back.
    scene.ok([
        "docker",
        "update",
        "--memory",
        "32m",
        "--memory-swap",
        "32m",
        &id,
    ])?;
    let lowered = read()?;
    ensure(lowered[0] == "33554432", || {
        format!("lowered, the limits are {lowered:?}")
    })?;
    // What a container must not use is so after an update too.
    let device = "mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg";
    let refused = scene.exec(Client::Docker, &id, ["sh", "-c", device])?;
    ensure(
        refused.exits(1)?.error_text().contains("not permitted"),
        || "the rules for devices are gone".to_owned(),
    )?;
    scene.ok(["docker", "rm", "--force", &id]).map(drop)
}

/// systemd makes the container's cgroup, a scope in the slice that is named; the limits of the host are in it, and with
/// the container it is gone.
fn slice(scene: &Scene<'_>) -> Result<(), Failure> {
    let slice = format!("e2e{}.slice", scene.runtime.name());
    let container = docker(BUSYBOX)
        .option(&["--cgroup-parent", &slice, "--pids-limit", "50"])
        .option(&["--memory", "64m", "--memory-swap", "64m"])
        .option(&["--cpus", "0.5", "--cpuset-cpus", "0"]);
    let id = scene.detach(&container.command(["sleep", "1000"]))?;
    scene.check_kernel(Client::Docker, &id)?;
    let pid: u32 = inspect(scene, &id, "{{.State.Pid}}")?.parse().unwrap_or(0);
    let scope = inspect(scene, &id, "docker-{{.Id}}.scope")?;
    let cgroup = scene.read(format!("/proc/{pid}/cgroup"))?;
    ensure(cgroup == format!("0::/{slice}/{scope}\n"), || {
        format!("its cgroup is {cgroup:?}")
    })?;
    let files = ["cpu.max", "cpuset.cpus", "memory.swap.max", "memory.max"];
    let [quota, cpus, swap, memory] = host_limits(scene, pid, files)?;
    let memory: u64 = memory.parse().unwrap_or(u64::MAX);
    ensure(
        [&*quota, &*cpus, &*swap] == ["50000 100000", "0", "0"]
            && (64 << 20..=256 << 20).contains(&memory),
        || format!("its limits are {quota}, {cpus}, {swap}, {memory}"),
    )?;
    scene.ok(["docker", "rm", "--force", &id])?;
    let state = scene.host(["systemctl", "is-active", &scope])?.text();
    ensure(state == "inactive\n", || format!("{scope} is {state:?}"))?;
    // A slice stays when the last one in it has gone.
    scene.ok(["systemctl", "stop", &slice]).map(drop)
}

fn stats(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = docker(BUSYBOX).option(&["--memory", "64m"]);
    let id = scene.detach(&container.command(["sleep", "1000"]))?;
    scene.check_kernel(Client::Docker, &id)?;
    let format = "{{.PIDs}} {{.MemUsage}}";
    let output = scene.ok(["docker", "stats", "--no-stream", "--format", format, &id])?;
    let text = output.text();
    let holds = text.starts_with("1 ") && text.trim_end().ends_with("/ 64MiB");
    ensure(holds, || format!("docker stats says {text:?}"))?;
    scene.ok(["docker", "rm", "--force", &id]).map(drop)
}

fn out_of_memory(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = docker(BUSYBOX).option(&["--memory", "32m", "--memory-swap", "32m"]);
    let script = "mkfifo /go; read line </go; exec tail /dev/zero";
    let id = scene.detach(&container.sh(script))?;
    scene.check_kernel(Client::Docker, &id)?;
    let go = "until [ -p /go ]; do :; done; echo >/go";
    scene
        .exec(Client::Docker, &id, ["sh", "-c", go])?
        .exits(0)?;
    let code = scene.ok(["docker", "wait", &id])?.text();
    let state = inspect(scene, &id, "{{.State.OOMKilled}}")?;
    ensure(code == "137\n" && state == "true", || {
        format!("it ended with {code:?}, and OOMKilled is {state}")
    })?;
    scene.ok(["docker", "rm", &id]).map(drop)
}

fn attach(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = docker(BUSYBOX).option(&["--interactive"]);
    let id =
        scene.detach(&container.sh("read line; echo \"<$line>\"; read line; echo end; exit 5"))?;
    scene.check_kernel(Client::Docker, &id)?;
    let words = ["docker", "attach", &id].map(String::from);
    let mut attached = process::Running::spawn(&words, process::Streams::Pipes)?;
    attached.write(b"typed\n")?;
    attached.line("<typed>", scene.deadline())?;
    // Closing it here would only detach: Docker keeps the container's input open.
    attached.write(b"more\n")?;
    attached.wait(scene.deadline())?.exits(5)?;
    scene.ok(["docker", "rm", &id]).map(drop)
}

fn forwarded_signal(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = docker(BUSYBOX)
        .sh("trap 'exit 9' INT; echo ready; while :; do sleep 1000 & wait $!; done")
        .exits(9);
    let (_, running) = scene.start(&container)?;
    running.line("ready", scene.deadline())?;
    running.signal(rustix::process::Signal::INT);
    scene.finish(&container, running).map(drop)
}
