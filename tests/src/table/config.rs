//! What `config.json` can say, field by field (docs/config.md), for a container's process and for the one of an exec.

use serde_json::{Value, json};

use crate::{
    case::{Case, scenario},
    container::{Client, Container},
    failure::{Failure, ensure},
    oci_config::OciConfig,
    process::{Running, Streams},
    scene::Scene,
};

use super::{events::Events, files::wait_for_log, tasks::task_pid};

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("config/process", process),
        scenario("config/capability-sets", capability_sets),
        scenario("config/scheduling-and-personality", scheduling),
        scenario("config/clocks-and-names", clocks_and_names),
        scenario("config/seccomp-actions", seccomp_actions),
        scenario("config/paths-masked-and-read-only", paths),
        scenario("config/sysctls", sysctls),
        scenario("config/sysctl-of-the-machine-is-refused", machine_sysctl),
        scenario("config/limits-inside-and-on-the-host", limits),
        scenario("config/unified-limits", unified),
        scenario("config/device-nodes-and-rules", devices),
        scenario("config/user-namespace", user_namespace),
        scenario("config/size-of-the-terminal-at-first", console_size),
    ]
}

/// Runs `script` as the container's own process and as an exec's: both have to write just `expected`. Gives the id of the
/// container, which runs.
fn both(
    scene: &Scene<'_>,
    config: OciConfig,
    script: &str,
    expected: &str,
) -> Result<String, Failure> {
    let id = started(scene, &waiting(scene, config, script)?, expected)?;
    exec(scene, &id, script, expected)?;
    Ok(id)
}

/// A container that runs `script` and waits then.
fn waiting(scene: &Scene<'_>, config: OciConfig, script: &str) -> Result<Container, Failure> {
    let script = format!("{script}\necho the end; exec sleep 1000");
    config.sh(&script).container(scene)
}

/// Starts one, which has to write just `expected` before it waits.
fn started(scene: &Scene<'_>, container: &Container, expected: &str) -> Result<String, Failure> {
    let id = scene.detach(container)?;
    wait_for_log(scene, &id, "the end")?;
    let log = scene.read(scene.log_of(&id))?;
    let release = log.lines().find_map(|line| line.strip_prefix("kernel "));
    scene.check_release(release.unwrap_or_default())?;
    let lines = log.lines().filter(|line| !line.starts_with("kernel "));
    let written: String = lines.map(|line| format!("{line}\n")).collect();
    ensure(written == format!("{expected}the end\n"), || {
        format!("the container's process wrote {written:?}, expected {expected:?}")
    })?;
    Ok(id)
}

/// Runs `script` in it, which has to write just `expected`.
fn exec(scene: &Scene<'_>, id: &str, script: &str, expected: &str) -> Result<(), Failure> {
    let output = scene
        .exec(Client::Ctr, id, ["sh", "-c", script])?
        .exits(0)?;
    if output.text() == expected {
        return Ok(());
    }
    Err(output.failure(format!("expected {expected:?} of the exec")))
}

fn process(scene: &Scene<'_>) -> Result<(), Failure> {
    // Every resource of getrlimit(2), each with a number of its own.
    let rlimits = [
        ("RLIMIT_AS", 4_u64 << 30, 8_u64 << 30),
        ("RLIMIT_CORE", 1024, 2048),
        ("RLIMIT_CPU", 1000, 2000),
        ("RLIMIT_DATA", 1 << 30, 2 << 30),
        ("RLIMIT_FSIZE", 1 << 20, 2 << 20),
        ("RLIMIT_LOCKS", 100, 200),
        ("RLIMIT_MEMLOCK", 4096, 8192),
        ("RLIMIT_MSGQUEUE", 1000, 2000),
        ("RLIMIT_NICE", 10, 20),
        ("RLIMIT_NOFILE", 100, 200),
        ("RLIMIT_NPROC", 300, 400),
        ("RLIMIT_RSS", 5000, 6000),
        ("RLIMIT_RTPRIO", 5, 6),
        ("RLIMIT_RTTIME", 1_000_000, 2_000_000),
        ("RLIMIT_SIGPENDING", 50, 60),
        ("RLIMIT_STACK", 1 << 20, 2 << 20),
    ];
    let rlimits: Vec<Value> = rlimits
        .iter()
        .map(|(kind, soft, hard)| json!({"type": kind, "soft": soft, "hard": hard}))
        .collect();
    let user = json!({"uid": 1000, "gid": 2000, "umask": 0o027, "additionalGids": [3000, 4000]});
    let config = OciConfig::new(scene)?
        .with("/process/user", user)
        .with("/process/cwd", json!("/tmp"))
        .with("/process/env", json!(["PATH=/bin", "GREETING=good day"]))
        .with("/process/oomScoreAdj", json!(321))
        .with("/process/noNewPrivileges", json!(false))
        .with("/process/rlimits", json!(rlimits));
    let script = r#"id -u; id -g; grep -E '^(Uid|Gid|Groups|NoNewPrivs|CapEff):' /proc/self/status
        pwd; echo "$GREETING|$HOME"; cat /proc/self/oom_score_adj
        tail -n +2 /proc/self/limits | cut -c 1-64 | tr -s ' '"#;
    let expected = "1000\n2000\n\
        Uid:\t1000\t1000\t1000\t1000\nGid:\t2000\t2000\t2000\t2000\nGroups:\t3000 4000 \n\
        CapEff:\t0000000000000000\nNoNewPrivs:\t0\n\
        /tmp\ngood day|/\n321\n\
        Max cpu time 1000 2000 \nMax file size 1048576 2097152 \nMax data size 1073741824 2147483648 \n\
        Max stack size 1048576 2097152 \nMax core file size 1024 2048 \nMax resident set 5000 6000 \n\
        Max processes 300 400 \nMax open files 100 200 \nMax locked memory 4096 8192 \n\
        Max address space 4294967296 8589934592 \nMax file locks 100 200 \nMax pending signals 50 60 \n\
        Max msgqueue size 1000 2000 \nMax nice priority 10 20 \nMax realtime priority 5 6 \n\
        Max realtime timeout 1000000 2000000 \n";
    // runc leaves the umask of an exec as it is.
    let container = waiting(scene, config.clone(), &format!("umask; {script}"))?;
    let id = started(scene, &container, &format!("0027\n{expected}"))?;
    exec(scene, &id, script, expected)
}

/// Five sets that differ, and a user who is not root: what is ambient stays in force over execve.
fn capability_sets(scene: &Scene<'_>) -> Result<(), Failure> {
    let sets = json!({
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW", "CAP_SYS_CHROOT", "CAP_MKNOD"],
        "permitted": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW", "CAP_SYS_CHROOT"],
        "effective": ["CAP_CHOWN", "CAP_KILL"],
        "inheritable": ["CAP_CHOWN", "CAP_NET_RAW"],
        "ambient": ["CAP_NET_RAW"],
    });
    let config = OciConfig::new(scene)?
        .with("/process/user/uid", json!(1000))
        .with("/process/noNewPrivileges", json!(true))
        .with("/process/capabilities", sets);
    let script = "grep -E '^(Cap|NoNewPrivs)' /proc/self/status; umask";
    let expected = "CapInh:\t0000000000002001\nCapPrm:\t0000000000002000\nCapEff:\t0000000000002000\n\
        CapBnd:\t0000000008042021\nCapAmb:\t0000000000002000\nNoNewPrivs:\t1\n0022\n";
    both(scene, config, script, expected).map(drop)
}

/// Fields that runc has known since 1.2.
fn scheduling(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = "ionice -p $$; uname -m";
    let expected = "best-effort: prio 6\ni686\n";
    // crun, as runc, takes the scheduler of an exec from its own request, where ctr cannot name one.
    let all = format!("cut -d ' ' -f 19,41 /proc/self/stat; {script}");
    let config = OciConfig::new(scene)?
        .with(
            "/process/scheduler",
            json!({"policy": "SCHED_BATCH", "nice": 7}),
        )
        .with(
            "/process/ioPriority",
            json!({"class": "IOPRIO_CLASS_BE", "priority": 6}),
        )
        .with("/linux/personality", json!({"domain": "LINUX32"}));
    let container = waiting(scene, config, &all)?.on_crun();
    let id = started(scene, &container, &format!("7 3\n{expected}"))?;
    exec(scene, &id, script, expected)
}

fn clocks_and_names(scene: &Scene<'_>) -> Result<(), Failure> {
    // A day since boot, by either clock.
    let script = "hostname; cat /proc/sys/kernel/domainname
        test $(cut -d . -f 1 /proc/uptime) -gt 86400 && echo a day; cat /proc/self/timens_offsets | tr -s ' '";
    let offsets = json!({"monotonic": {"secs": 3600}, "boottime": {"secs": 86400}});
    let config = OciConfig::new(scene)?
        .push("/linux/namespaces", json!({"type": "time"}))
        .with("/linux/timeOffsets", offsets)
        .with("/hostname", json!("box-9"))
        .with("/domainname", json!("example.test"));
    let container = waiting(scene, config, script)?.on_crun();
    let expected = "box-9\nexample.test\na day\nmonotonic 3600 0\nboottime 86400 0\n";
    let id = started(scene, &container, expected)?;
    exec(scene, &id, script, expected)
}

fn seccomp_actions(scene: &Scene<'_>) -> Result<(), Failure> {
    let rule = |name: &str, action: &str| json!({"names": [name], "action": action});
    let mask = json!({"index": 0, "value": 0o077, "op": "SCMP_CMP_EQ"});
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["umask"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": [mask]},
            rule("sethostname", "SCMP_ACT_KILL_PROCESS"),
            rule("chroot", "SCMP_ACT_TRAP"),
            rule("sync", "SCMP_ACT_KILL_THREAD"),
            rule("getppid", "SCMP_ACT_LOG"),
            rule("no_such_call_is_no_error", "SCMP_ACT_ERRNO"),
        ],
    });
    // A user without a privilege that loading a filter asks for.
    let config = OciConfig::new(scene)?
        .with("/process/user/uid", json!(1000))
        .with("/process/noNewPrivileges", json!(false))
        .with("/linux/seccomp", profile);
    let script = "grep Seccomp: /proc/self/status; mkdir /tmp/d 2>&1 | grep -o 'No space.*'
        umask 022; umask 077; umask; umask 027; umask
        for call in 'hostname x' 'chroot / true' sync; do sh -c \"$call\" 2>/dev/null; echo $?; done
        sh -c 'echo $PPID' >/dev/null && echo logged";
    let expected = "Seccomp:\t2\nNo space left on device\n0022\n0027\n159\n159\n159\nlogged\n";
    both(scene, config, script, expected).map(drop)
}

fn paths(scene: &Scene<'_>) -> Result<(), Failure> {
    let config = OciConfig::new(scene)?
        .with("/root/readonly", json!(true))
        .with(
            "/linux/maskedPaths",
            json!(["/etc/secret", "/srv", "/not/there", "/proc/version"]),
        )
        .with(
            "/linux/readonlyPaths",
            json!(["/dev/shm", "/not/there", "/run/frozen", "/proc/sys"]),
        );
    scene.write("root/etc/secret", "secret\n")?;
    scene.write("root/srv/secret", "secret\n")?;
    let script = "cat /etc/secret /proc/version; ls /srv
        for f in /etc/x /srv/x /dev/shm/x /run/x; do
          (echo x >$f) 2>&1 | grep -q 'Read-only' && echo $f is read-only; done
        (echo x >/proc/sys/kernel/domainname) 2>&1 | grep -o 'Read-only.*'; test -w /run && echo /run is not";
    let expected = "/etc/x is read-only\n/srv/x is read-only\n/dev/shm/x is read-only\n\
        Read-only file system\n/run is not\n";
    both(scene, config, script, expected).map(drop)
}

fn sysctls(scene: &Scene<'_>) -> Result<(), Failure> {
    let keys = json!({
        "net.ipv4.ip_unprivileged_port_start": "80",
        "net/ipv4/ip_forward": "1",
        "kernel.shm_rmid_forced": "1",
        "kernel.msgmax": "4096",
        "fs.mqueue.msg_max": "17",
        "kernel.sem": "10 20 30 40",
    });
    let config = OciConfig::new(scene)?.with("/linux/sysctl", keys);
    let script = "cd /proc/sys; cat net/ipv4/ip_unprivileged_port_start net/ipv4/ip_forward \
        kernel/shm_rmid_forced kernel/msgmax fs/mqueue/msg_max kernel/sem | tr '\\t' ' '";
    both(scene, config, script, "80\n1\n1\n4096\n17\n10 20 30 40\n").map(drop)
}

fn machine_sysctl(scene: &Scene<'_>) -> Result<(), Failure> {
    let config = OciConfig::new(scene)?.with("/linux/sysctl", json!({"vm.swappiness": "1"}));
    let container = config.sh("true").container(scene)?;
    scene
        .run(&container.refused(["vm.swappiness", "namespace"]))
        .map(drop)
}

/// A configuration of a container that sees its own cgroup.
fn with_cgroups(scene: &Scene<'_>) -> Result<OciConfig, Failure> {
    let mount = json!({
        "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
        "options": ["nosuid", "noexec", "nodev", "relatime", "ro"],
    });
    Ok(OciConfig::new(scene)?
        .push("/linux/namespaces", json!({"type": "cgroup"}))
        .push("/mounts", mount))
}

/// Reads files of the cgroup on the host that a process is in.
pub(super) fn host_limits<const N: usize>(
    scene: &Scene<'_>,
    pid: u32,
    files: [&str; N],
) -> Result<[String; N], Failure> {
    let cgroup = scene.read(format!("/proc/{pid}/cgroup"))?;
    let cgroup = cgroup.trim().trim_start_matches("0::");
    let mut values = files.map(String::from);
    for value in &mut values {
        *value = scene.read(format!("/sys/fs/cgroup{cgroup}/{value}"))?;
        value.truncate(value.trim_end().len());
    }
    Ok(values)
}

/// Memory and processes are limited in the guest, processors on the host, weights in both; the host's memory limit is
/// that of the container and what its monitor needs.
fn limits(scene: &Scene<'_>) -> Result<(), Failure> {
    // The most shares that there are: between the ends runtimes make weights of them by two formulas.
    let resources = json!({
        "devices": [{"allow": false, "access": "rwm"}],
        "memory": {"limit": 64 << 20, "reservation": 32 << 20, "swap": 64 << 20},
        "cpu": {"shares": 262_144, "quota": 50_000, "period": 100_000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 42},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
    });
    let script = "cd /sys/fs/cgroup; cat memory.max memory.low memory.swap.max pids.max cpu.weight hugetlb.2MB.max";
    let config = with_cgroups(scene)?
        .with("/process/oomScoreAdj", json!(-998))
        .with("/linux/resources", resources);
    let expected = "67108864\n33554432\n0\n42\n10000\n4194304\n";
    let id = both(scene, config, script, expected)?;
    let files = [
        "cpu.max",
        "cpu.weight",
        "cpuset.cpus",
        "cpuset.mems",
        "memory.max",
    ];
    let [quota, weight, cpus, mems, memory] = host_limits(scene, task_pid(scene, &id)?, files)?;
    ensure(
        [&*quota, &*weight, &*cpus, &*mems] == ["50000 100000", "10000", "0", "0"],
        || format!("on the host the limits are {quota}, {weight}, {cpus}, {mems}"),
    )?;
    let memory: u64 = memory.parse().unwrap_or(u64::MAX);
    ensure((64 << 20..=256 << 20).contains(&memory), || {
        format!("on the host memory.max is {memory}")
    })?;
    let pid = task_pid(scene, &id)?;
    let score = scene.read(format!("/proc/{pid}/oom_score_adj"))?;
    ensure(score == "-998\n", || {
        format!("its oom_score_adj is {score:?}")
    })
}

/// Limits by the names of their files: each acts where the one with a name of its own would.
fn unified(scene: &Scene<'_>) -> Result<(), Failure> {
    let unified = json!({
        "memory.max": "67108864", "memory.high": "60000000", "memory.low": "1048576", "memory.oom.group": "1",
        "pids.max": "33", "cpu.weight": "55", "cpu.max": "60000 100000", "cpuset.cpus": "0",
    });
    let script = "cd /sys/fs/cgroup; cat memory.max memory.high memory.low memory.oom.group pids.max cpu.weight";
    let config = with_cgroups(scene)?.with("/linux/resources/unified", unified);
    let expected = "67108864\n59998208\n1048576\n1\n33\n55\n";
    let id = both(scene, config, script, expected)?;
    let found = host_limits(
        scene,
        task_pid(scene, &id)?,
        ["cpu.max", "cpu.weight", "cpuset.cpus"],
    )?;
    ensure(found == ["60000 100000", "55", "0"], || {
        format!("on the host the limits are {found:?}")
    })
}

/// The devices that every container has, under other names too, with the mode and owner that are asked for; and rules,
/// of which the last that fits decides.
fn devices(scene: &Scene<'_>) -> Result<(), Failure> {
    let node = |path: &str, minor: i64, mode: u32| json!({"path": path, "type": "c", "major": 1, "minor": minor, "fileMode": mode, "uid": 5, "gid": 6});
    // Major 60 is for experiments (Documentation/admin-guide/devices.txt of Linux): nothing answers there, so that "no such
    // device" tells that the rules let it pass.
    let rule = |allow: bool, minor: i64, access: &str| json!({"allow": allow, "type": "c", "major": 60, "minor": minor, "access": access});
    let config = OciConfig::new(scene)?
        .push("/linux/devices", node("/dev/nothing", 3, 0o640))
        .push("/linux/devices", node("/dev/deep/zeros", 5, 0o604))
        .push(
            "/linux/devices",
            json!({"path": "/dev/queue", "type": "p", "fileMode": 0o620, "uid": 7}),
        )
        .push("/linux/resources/devices", rule(true, 4, "rwm"))
        .push("/linux/resources/devices", rule(true, 5, "rm"));
    let script = "cd /dev; stat -c '%n %F %t %T %a %u %g' nothing deep/zeros queue null
        echo x >nothing; head -c 2 deep/zeros | od -An -tx1; cd /run; rm -f four five other
        mknod four c 60 4; mknod five c 60 5; mknod other c 60 6
        for f in four five other; do
          (read line <$f) 2>&1 | grep -o -E 'not permitted|No such device'
          (echo x >$f) 2>&1 | grep -o -E 'not permitted|No such device'; done";
    let expected = "nothing character special file 1 3 640 5 6\n\
        deep/zeros character special file 1 5 604 5 6\nqueue fifo 0 0 620 7 0\n\
        null character special file 1 3 666 0 0\n 00 00\n\
        No such device\nNo such device\nNo such device\nnot permitted\nnot permitted\nnot permitted\n";
    both(scene, config, script, expected).map(drop)
}

/// Root inside is nobody of importance outside; an exec is in the same namespace, with the capabilities that it is given.
fn user_namespace(scene: &Scene<'_>) -> Result<(), Failure> {
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let config = with_cgroups(scene)?
        .push("/linux/namespaces", json!({"type": "user"}))
        .with("/linux/uidMappings", map.clone())
        .with("/linux/gidMappings", map)
        .with("/process/user/additionalGids", json!([3000]))
        .with("/linux/sysctl", json!({"net.ipv4.ip_forward": "1"}));
    let root = scene.path_text("root");
    scene.ok(["chown", "--recursive", "100000:100000", &root])?;
    let script = "cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; id -u; cat /proc/sys/net/ipv4/ip_forward
        grep -E '^(Groups|CapEff|Seccomp):' /proc/self/status; stat -c '%u %g' /bin/busybox /proc/1 /dev/null
        touch /tmp/made && chown 7:8 /tmp/made && stat -c '%u %g' /tmp/made
        mknod /tmp/x c 1 3 2>&1 | grep -o 'not permitted'; cat /dev/null; head -c 1 /dev/zero | od -An -tx1";
    let expected = " 0 100000 65536\n 0 100000 65536\n0\n1\nGroups:\t3000 \nCapEff:\t00000000a80425fb\nSeccomp:\t0\n\
        0 0\n0 0\n65534 65534\n7 8\nnot permitted\n 00\n";
    let id = both(scene, config, script, expected)?;
    let owner = scene.ok(["stat", "-c", "%u %g", &scene.path_text("root/tmp/made")])?;
    ensure(owner.text() == "100007 100008\n", || {
        format!("on the host the file belongs to {:?}", owner.text())
    })?;
    // A user, and a terminal that is the user's own.
    let words = [
        "ctr",
        "task",
        "exec",
        "--exec-id",
        "user",
        "--tty",
        "--user",
        "1000:1000",
    ];
    let mut words: Vec<String> = words.map(String::from).into();
    words.push(id);
    words.extend(
        [
            "sh",
            "-c",
            "id -u; grep CapEff: /proc/self/status; stat -c %u $(tty); echo x >$(tty)",
        ]
        .map(String::from),
    );
    let output = Running::spawn(&words, Streams::Terminal(24, 80))?
        .wait(scene.deadline())?
        .exits(0)?;
    // The client may complain behind that of a terminal that is gone.
    ensure(
        output
            .text()
            .starts_with("1000\nCapEff:\t0000000000000000\n1000\nx\n"),
        || format!("a user's exec wrote {:?}", output.text()),
    )
}

/// The size is there before the program, whatever the client does to it later: this one leaves at once.
fn console_size(scene: &Scene<'_>) -> Result<(), Failure> {
    let events = Events::subscribe(scene)?;
    let container = OciConfig::new(scene)?
        .with("/process/terminal", json!(true))
        .with("/process/consoleSize", json!({"height": 45, "width": 123}))
        .sh("{ stty size; uname -r; } >/tmp/seen")
        .container(scene)?
        .detached()
        .option(&["--tty"]);
    let (id, running) = scene.start_with(&container, Streams::Terminal(24, 80))?;
    running.wait(scene.deadline())?.exits(0)?;
    events.end_of(scene, &id)?;
    let seen = scene.read(scene.path("root/tmp/seen"))?;
    let (size, release) = seen.split_once('\n').unwrap_or_default();
    scene.check_release(release.trim())?;
    ensure(size == "45 123", || {
        format!("the terminal's size was {size:?}")
    })
}
