//! An agent in namespaces of its own, reached over Unix sockets, with a busybox image.
//!
//! Needs root, a cgroup v2 mount, unshare(1) and a static busybox. What is missing is said, and the
//! test fails: nothing is skipped.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use forkvm_api::{
    agent::{CreateRequest, ExecRequest, Identity, SignalRequest, Streams, WaitRequest},
    agent_ttrpc::AgentClient,
    stream,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use ttrpc::{Code, context};

mod rootfs;

use rootfs::{busybox, make_rootfs};

static NEXT: AtomicU32 = AtomicU32::new(1);

/// A running agent. Dropping it ends it and everything in its PID namespace.
pub(crate) struct Guest {
    pub(crate) client: AgentClient,
    folder: tempfile::TempDir,
    cgroup: PathBuf,
    process: Child,
}

fn cgroup2() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mount = mounts
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .expect("this test needs a cgroup v2 mount, and there is none");
    PathBuf::from(mount.split(' ').nth(4).unwrap())
}

/// Runs a shell command in namespaces and in a cgroup of its own: the machine's /run, /etc and
/// cgroups stay as they are. `$AGENT` is the agent, `$FOLDER` the folder.
fn in_namespaces(command: &str, folder: &Path) -> (PathBuf, Child) {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let cgroup = cgroup2().join(format!("forkvm-agent-test-{}-{number}", std::process::id()));
    fs::create_dir(&cgroup).unwrap();
    let script = r#"
        echo $$ > "$CGROUP/cgroup.procs" &&
        exec unshare --cgroup --mount --pid --net --uts --ipc --fork --kill-child --mount-proc sh -c '
            mount -t cgroup2 none /sys/fs/cgroup &&
            mount -t tmpfs none /run && mount -t tmpfs none /etc && mkdir /run/forkvm &&
            eval "$COMMAND"'
    "#;
    let process = Command::new("sh")
        .args(["-c", script])
        .env("CGROUP", &cgroup)
        .env("COMMAND", command)
        .env("AGENT", env!("CARGO_BIN_EXE_forkvm-agent"))
        .env("FOLDER", folder)
        .env("FORKVM_LOG", "debug")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    (cgroup, process)
}

/// Runs the agent's warm-up; answers whether it succeeded, and that nothing was left of it.
pub(crate) fn warm_up() -> bool {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::copy(busybox(), folder.path().join("busybox")).unwrap();
    let command = r#"
        "$AGENT" warm-up "$FOLDER/busybox" && test ! -e /warm-up && test -z "$(ls /run/forkvm/bundles /run/forkvm/containers | grep -v :)" &&
        grep "populated 0" /sys/fs/cgroup/forkvm/_warm-up/cgroup.events
    "#;
    let (cgroup, mut process) = in_namespaces(command, folder.path());
    let success = process.wait().unwrap().success();
    remove_cgroups(&cgroup);
    success
}

impl Guest {
    /// Starts an agent without an identity.
    pub(crate) async fn start() -> Self {
        Self::start_behind("true").await
    }

    /// The same behind a shell command, which runs in the agent's namespaces.
    pub(crate) async fn start_behind(command: &str) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "this test needs root");
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        make_rootfs(&folder.path().join("rootfs"));
        let (cgroup, process) = in_namespaces(
            &format!("{command} && exec \"$AGENT\" serve --unix \"$FOLDER\""),
            folder.path(),
        );
        let guest_folder = folder.path().to_owned();
        wait_for(&guest_folder, "agent.sock").await;
        let address = format!("unix://{}", guest_folder.join("agent.sock").display());
        let client = ttrpc::r#async::Client::connect(&address).await.unwrap();
        Self {
            client: AgentClient::new(client),
            folder,
            cgroup,
            process,
        }
    }

    /// Starts an agent and gives it an identity.
    pub(crate) async fn identified() -> Self {
        let guest = Self::start().await;
        let request = forkvm_api::agent::IdentifyRequest {
            identity: Some(identity()).into(),
            ..Default::default()
        };
        guest
            .client
            .identify(context::with_duration(MINUTE), &request)
            .await
            .unwrap();
        guest
    }

    /// The worker that waits for its request: its PID in this namespace.
    pub(crate) fn waiting_worker(&self) -> Option<String> {
        let processes = fs::read_to_string(self.cgroup.join("cgroup.procs")).unwrap();
        let receives = format!("{} 0x3 ", nix::libc::SYS_recvfrom);
        let waits = |pid: &&str| {
            let is = |file: &str, start: &[u8]| {
                fs::read(format!("/proc/{pid}/{file}")).is_ok_and(|text| text.starts_with(start))
            };
            is("cmdline", b"forkvm-agent\0worker\0") && is("syscall", receives.as_bytes())
        };
        processes.lines().find(waits).map(str::to_owned)
    }

    /// The same with a container "one" that sleeps.
    pub(crate) async fn with_sleeper() -> Self {
        let guest = Self::identified().await;
        guest.create_sleeper().await;
        guest.run("one").await.unwrap();
        guest
    }

    /// Creates a container "one" that will sleep.
    pub(crate) async fn create_sleeper(&self) {
        let spec = spec(&self.rootfs(), &["sleep", "1000"]);
        self.create("one", &spec, Streams::default()).await.unwrap();
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.folder.path().join("rootfs")
    }

    /// Connects the stream `id`.
    pub(crate) async fn connect(&self, id: u64) -> UnixStream {
        let mut stream = UnixStream::connect(self.folder.path().join("streams.sock"))
            .await
            .unwrap();
        stream.write_all(&stream::header(id)).await.unwrap();
        stream
    }

    pub(crate) async fn create(
        &self,
        id: &str,
        spec: &Value,
        streams: Streams,
    ) -> ttrpc::Result<u32> {
        let request = CreateRequest {
            container_id: id.to_owned(),
            spec: spec.to_string().into_bytes(),
            streams: Some(streams).into(),
            ..Default::default()
        };
        Ok(self
            .client
            .create(context::with_duration(MINUTE), &request)
            .await?
            .pid)
    }

    pub(crate) async fn run(&self, id: &str) -> ttrpc::Result<()> {
        let request = forkvm_api::agent::StartRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.client
            .start(context::with_duration(MINUTE), &request)
            .await
            .map(|_| ())
    }

    pub(crate) async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        streams: Streams,
    ) -> ttrpc::Result<u32> {
        let request = ExecRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            process: process.to_string().into_bytes(),
            streams: Some(streams).into(),
            ..Default::default()
        };
        Ok(self
            .client
            .exec(context::with_duration(MINUTE), &request)
            .await?
            .pid)
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<u32> {
        let request = WaitRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        Ok(self
            .client
            .wait(context::with_duration(MINUTE), &request)
            .await?
            .exit_status)
    }

    pub(crate) async fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> ttrpc::Result<()> {
        let request = SignalRequest {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.client
            .signal(context::with_duration(MINUTE), &request)
            .await
            .map(|_| ())
    }

    pub(crate) async fn delete(&self, id: &str) -> ttrpc::Result<()> {
        let request = forkvm_api::agent::DeleteRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.client
            .delete(context::with_duration(MINUTE), &request)
            .await
            .map(|_| ())
    }

    pub(crate) async fn stats(&self, id: &str) -> ttrpc::Result<forkvm_api::agent::StatsResponse> {
        let request = forkvm_api::agent::StatsRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        self.client
            .stats(context::with_duration(MINUTE), &request)
            .await
    }

    pub(crate) async fn pids(&self, id: &str) -> ttrpc::Result<Vec<(u32, String)>> {
        let request = forkvm_api::agent::PidsRequest {
            container_id: id.to_owned(),
            ..Default::default()
        };
        let response = self
            .client
            .pids(context::with_duration(MINUTE), &request)
            .await?;
        Ok(response
            .processes
            .into_iter()
            .map(|process| (process.pid, process.exec_id))
            .collect())
    }

    /// Creates and starts a container with its output on one connection, waits for its end, deletes
    /// it; answers its output and exit status.
    pub(crate) async fn output(&self, id: &str, spec: &Value) -> (String, u32) {
        let stdout = u64::from(NEXT.fetch_add(1, Ordering::Relaxed)) + 1_000;
        let mut connection = self.connect(stdout).await;
        let mut errors = self.connect(stdout + 1_000_000).await;
        let streams = Streams {
            stdout,
            stderr: stdout + 1_000_000,
            ..Default::default()
        };
        self.create(id, spec, streams).await.unwrap();
        self.run(id).await.unwrap();
        let status = self.wait(id, "").await.unwrap();
        let mut text = String::new();
        connection.read_to_string(&mut text).await.unwrap();
        errors.read_to_string(&mut text).await.unwrap();
        self.delete(id).await.unwrap();
        (text, status)
    }

    /// What the agent has left of its containers.
    pub(crate) fn left_over(&self) -> Vec<PathBuf> {
        let agent = fs::read_to_string(self.cgroup.join("cgroup.procs")).unwrap();
        let agent = agent
            .lines()
            .find(|pid| {
                fs::read(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| String::from_utf8_lossy(&line).contains("serve"))
            })
            .expect("the agent runs")
            .to_owned();
        let run = PathBuf::from(format!("/proc/{agent}/root/run/forkvm"));
        [
            self.cgroup.join("forkvm"),
            run.join("bundles"),
            run.join("containers"),
        ]
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // What was in the PID namespace is dying; the kernel says when it is dead.
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        let events = fs::File::open(self.cgroup.join("cgroup.events")).unwrap();
        loop {
            let text = fs::read_to_string(self.cgroup.join("cgroup.events")).unwrap();
            if text.contains("populated 0") {
                break;
            }
            let mut poll = [rustix::event::PollFd::new(
                &events,
                rustix::event::PollFlags::PRI,
            )];
            let second = rustix::event::Timespec {
                tv_sec: 1,
                tv_nsec: 0,
            };
            let _ = rustix::event::poll(&mut poll, Some(&second));
        }
        remove_cgroups(&self.cgroup);
    }
}

fn remove_cgroups(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroups(&entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}

/// Longer than anything here takes on a slow machine.
pub(crate) const MINUTE: std::time::Duration = std::time::Duration::from_secs(30);

/// Waits until a socket can be connected to: the agent makes it and then listens, and tells nobody.
async fn wait_for(folder: &Path, name: &str) {
    let deadline = tokio::time::Instant::now() + MINUTE;
    while UnixStream::connect(folder.join(name)).await.is_err() {
        assert!(
            tokio::time::Instant::now() < deadline,
            "the agent does not listen on {name}"
        );
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

pub(crate) fn identity() -> Identity {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    Identity {
        entropy: vec![42; 32],
        realtime_ns: i64::try_from(now.as_nanos()).unwrap(),
        hostname: "guest".to_owned(),
        machine_id: "00112233445566778899aabbccddeeff".to_owned(),
        boot_id: "12345678-1234-1234-1234-123456789abc".to_owned(),
        ..Default::default()
    }
}

/// Docker's default capabilities.
pub(crate) fn capabilities() -> Value {
    let names = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    json!({ "bounding": names, "effective": names, "permitted": names })
}

/// A process as containerd writes it.
pub(crate) fn process(arguments: &[&str]) -> Value {
    json!({
        "user": { "uid": 0, "gid": 0, "additionalGids": [0, 10] },
        "args": arguments,
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": capabilities(),
        "oomScoreAdj": 0,
    })
}

/// A spec as `docker run` makes it, for a guest: in the guest's network namespace. Limits and device
/// rules are not in it: they need the controllers of cgroup v2 and more rights than the machine's
/// root may have, and are tested in a real guest.
pub(crate) fn spec(root: &Path, arguments: &[&str]) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": process(arguments),
        "root": { "path": root },
        "hostname": "container",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "noexec", "nodev"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"] }
        ],
        "linux": {
            "sysctl": { "net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647" },
            "namespaces": [
                { "type": "mount" }, { "type": "uts" }, { "type": "pid" }, { "type": "ipc" }, { "type": "cgroup" }
            ],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [{ "names": ["swapoff", "swapon"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }]
            },
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// The code and message of a refusal.
pub(crate) fn status(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code.enum_value().unwrap(), status.message),
        other => panic!("no status came back: {other}"),
    }
}
