//! Runs one container before the ready signal, so that a template is frozen with everything warm
//! that the first container of a child needs: the worker's pages, the kernel's caches of what a
//! container is made of, and the code that the kernel patches at first use (cgroup controllers,
//! seccomp), which each child would have to patch in a copy of its own.
//!
//! It runs in a process of its own, which ends before the freeze and takes its memory, its random
//! state and its descriptors with it. Nothing in it is anybody's: the image is the agent itself.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use forkvm_api::{WARM_UP, agent::CreateRequest};
use serde_json::{Value, json};

use crate::{
    container::{self, Container},
    free_memory,
    launch::Launcher,
    process,
    reaper::{Exit, Reaper},
    streams::Streams,
};

/// The word by which the agent calls itself to warm up.
pub(crate) const COMMAND: &str = "warm-up";

/// How long the kernel may take for what it puts off when a container goes (freeing its cgroup, mounts and namespaces
/// behind RCU grace periods). There is no event for its end, and what is left of it would be done by each child.
const SETTLE: Duration = Duration::from_millis(200);

const ROOT: &str = "/warm-up";
/// No container of a client can have it: containerd's ids begin with a letter or a digit.
const ID: &str = "_warm-up";

/// Why the warm-up failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot make the image: {0}")]
    Image(io::Error),
    #[error("cannot start the runtime: {0}")]
    Runtime(io::Error),
    #[error("cannot reap: {0}")]
    Reap(io::Error),
    #[error("cannot make the agent the parent of orphans: {0}")]
    Subreaper(nix::Error),
    #[error(transparent)]
    Container(#[from] container::Error),
    #[error("the container ended with status {0:?}")]
    Status(Option<u32>),
}

/// Warms up if the kernel's command line has [`WARM_UP`], and leaves memory tidy behind.
pub(crate) fn run_if_asked() {
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    if command_line
        .split_ascii_whitespace()
        .any(|word| word == WARM_UP)
    {
        run();
        free_memory::tidy_up();
    }
}

/// In a process of its own. A failure costs time in the children and nothing else: it is logged.
fn run() {
    let outcome = Command::new("/proc/self/exe")
        .arg(COMMAND)
        .env_clear()
        .stdin(Stdio::null())
        .status();
    match outcome {
        Ok(status) if status.success() => {
            log::debug!("warmed up");
            std::thread::sleep(SETTLE);
        }
        Ok(status) => log::warn!("the warm-up failed: {status}"),
        Err(error) => log::warn!("the warm-up could not be started: {error}"),
    }
}

/// The process of [`run`]. The container executes `program`, which must need no library and know
/// `--help`: the agent itself, or what a test of an agent that is not linked statically names.
pub(crate) fn main(program: Option<&str>) -> std::process::ExitCode {
    let outcome = with_image(program);
    // What is left is a folder with a link to the agent.
    let _ = fs::remove_dir_all(ROOT);
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("forkvm-agent: warm-up: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn with_image(program: Option<&str>) -> Result<(), Error> {
    // What the worker makes must end up here: PID 1 does not reap yet.
    nix::sys::prctl::set_child_subreaper(true).map_err(Error::Subreaper)?;
    let root = Path::new(ROOT);
    for folder in ["bin", "dev", "proc", "sys"] {
        fs::create_dir_all(root.join(folder)).map_err(Error::Image)?;
    }
    let source = match program {
        Some(program) => PathBuf::from(program),
        None => fs::read_link("/proc/self/exe").map_err(Error::Image)?,
    };
    let name = source.file_name().unwrap_or(source.as_os_str());
    let copy = root.join("bin").join(name);
    let program = Path::new("/bin").join(name);
    // A link has the same pages: those of the worker.
    fs::hard_link(&source, &copy)
        .or_else(|_| fs::copy(&source, &copy).map(|_| ()))
        .map_err(Error::Image)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    runtime.block_on(async {
        let reaper = Reaper::default();
        tokio::select! {
            outcome = reaper.clone().run() => outcome.map_err(Error::Reap),
            outcome = one_container(&reaper, &program) => outcome,
        }
    })
}

async fn one_container(reaper: &Reaper, program: &Path) -> Result<(), Error> {
    let request = CreateRequest {
        container_id: ID.to_owned(),
        spec: spec(program).to_string().into_bytes(),
        ..Default::default()
    };
    let launcher = Launcher::new(reaper.clone());
    let container = Container::create(&request, &launcher, &Streams::default()).await?;
    container.start().await?;
    let end = process::end_of(container.process("")?.finished()).await;
    // Its cgroup stays, without processes: with the last one the kernel would take back what it patched into its code for
    // device rules and controllers, and each child would have to patch it in again, in a copy of its own.
    container::remove_files(ID)?;
    match end {
        Some(Exit { status: 0, .. }) => Ok(()),
        end => Err(Error::Status(end.map(|exit| exit.status))),
    }
}

/// What a container asks of the kernel when Docker or containerd made its spec.
fn spec(program: &Path) -> Value {
    let capabilities = json!(["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"]);
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let plain = ["nosuid", "noexec", "nodev"];
    let mut spec = json!({
        "ociVersion": "1.1.0",
        "root": { "path": ROOT },
        "hostname": ID,
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": [program, "--help"],
            "env": ["PATH=/bin", "HOME=/"],
            "cwd": "/",
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "oomScoreAdj": 0
        },
        "mounts": [
            mount("/proc", "proc", &plain),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["ro", "nosuid", "noexec", "nodev"]),
            mount("/dev/mqueue", "mqueue", &plain),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"])
        ],
        "linux": {
            "namespaces": [
                { "type": "mount" }, { "type": "uts" }, { "type": "pid" }, { "type": "ipc" }, { "type": "cgroup" },
                { "type": "network" }
            ],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [{ "names": seccomp_names(), "action": "SCMP_ACT_ALLOW" }]
            },
            "maskedPaths": ["/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"]
        }
    });
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if controllers
        .split_ascii_whitespace()
        .any(|controller| controller == "memory")
    {
        spec["linux"]["resources"] = json!({
            "devices": [
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm" }
            ],
            "memory": { "limit": 67_108_864 },
            "pids": { "limit": 100 },
            "cpu": { "shares": 1024 }
        });
    }
    spec
}

/// What making a container and `--help` need: a filter by names, as Docker's is.
fn seccomp_names() -> &'static [&'static str] {
    &[
        "accept4",
        "access",
        "arch_prctl",
        "bind",
        "brk",
        "capget",
        "capset",
        "chdir",
        "chmod",
        "clone",
        "clone3",
        "close",
        "close_range",
        "connect",
        "dup",
        "dup2",
        "dup3",
        "epoll_create1",
        "execve",
        "execveat",
        "exit",
        "exit_group",
        "faccessat",
        "faccessat2",
        "fchdir",
        "fchown",
        "fcntl",
        "fstat",
        "fstatfs",
        "futex",
        "getcwd",
        "getdents64",
        "getegid",
        "geteuid",
        "getgid",
        "getpid",
        "getppid",
        "getrandom",
        "getrlimit",
        "gettid",
        "getuid",
        "ioctl",
        "lseek",
        "madvise",
        "mmap",
        "mprotect",
        "mremap",
        "munmap",
        "newfstatat",
        "open",
        "openat",
        "openat2",
        "pipe2",
        "poll",
        "ppoll",
        "prctl",
        "pread64",
        "prlimit64",
        "read",
        "readlink",
        "readlinkat",
        "recvfrom",
        "recvmsg",
        "rseq",
        "rt_sigaction",
        "rt_sigprocmask",
        "rt_sigreturn",
        "sched_getaffinity",
        "seccomp",
        "sendmsg",
        "sendto",
        "set_robust_list",
        "set_tid_address",
        "setgroups",
        "setresgid",
        "setresuid",
        "sigaltstack",
        "socket",
        "stat",
        "statfs",
        "statx",
        "umask",
        "uname",
        "unlink",
        "wait4",
        "write",
        "writev",
    ]
}
