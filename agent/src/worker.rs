//! The worker: a process of its own that runs libcontainer once, and ends.
//!
//! libcontainer forks, changes the working folder, the dumpable flag and the cgroup of the process
//! it runs in; PID 1 can afford none of that. The worker is executed anew, so it has one thread, a
//! fresh address space without the agent's data, and random state of its own.

use std::{
    error::Error as _,
    fs, io,
    os::fd::{BorrowedFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::ExitCode,
};

use libcontainer::{
    container::builder::ContainerBuilder, error::LibcontainerError, syscall::syscall::SyscallType,
};
use nix::unistd::{Gid, setgroups};
use oci_spec::runtime::LinuxSeccomp;
use serde::Deserialize;

use crate::{
    boot,
    executor::GuestExecutor,
    identity::KERNEL_BOOT_ID,
    report::{self, Exec, Report, Request},
    user_namespace::Entry,
};

mod tracing_log;

/// The word by which the agent calls itself as a worker; the request comes on its socket.
pub(crate) const COMMAND: &str = "worker";

/// The descriptor on which the worker finds its socket.
pub(crate) const SOCKET: RawFd = 3;

/// Why a worker failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the worker's request cannot be read: {0}")]
    Request(io::Error),
    #[error("cannot read {path}: {source}")]
    Config { path: PathBuf, source: io::Error },
    #[error("{0}")]
    Container(String),
    #[error("cannot bring the container's loopback interface up: {0}")]
    Loopback(io::Error),
    #[error("cannot give the container its boot_id: {0}")]
    BootId(io::Error),
    #[error("cannot set the additional groups: {0}")]
    Groups(io::Error),
    #[error("cannot find the container's user namespace: {0}")]
    UserNamespace(io::Error),
    #[error("libcontainer told no PID")]
    NoPid,
}

/// Runs as a worker.
pub(crate) fn main() -> ExitCode {
    heed_all_signals();
    // SAFETY: the agent put its socket there before it executed us, and nothing else owns it. It is
    // never closed: what libcontainer forks reports on it until it executes the container's program.
    let socket = unsafe { BorrowedFd::borrow_raw(SOCKET) };
    close_on_exec(socket);
    tracing_log::install();
    let made = match report::receive_request(socket).map_err(Error::Request) {
        Ok(Some((request, streams))) => run(&request, streams),
        // The agent needs no worker any more.
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => Err(error),
    };
    match made {
        Ok(pid) => {
            report::send(socket, &Report::Made { pid });
            ExitCode::SUCCESS
        }
        Err(error) => {
            report::send(
                socket,
                &Report::Failed {
                    error: error.to_string(),
                },
            );
            ExitCode::FAILURE
        }
    }
}

/// Gives every signal its default disposition: a container's process would inherit what is ignored, as the Rust runtime
/// ignores SIGPIPE.
fn heed_all_signals() {
    /// `struct kernel_sigaction` (linux/arch/x86/include/uapi/asm/signal.h): the handler SIG_DFL, no flags, no mask.
    const DEFAULT: [usize; 4] = [0; 4];
    for signal in 1..=64 {
        // By system call: libc keeps signals 32 and 33 for itself. SIGKILL and SIGSTOP are refused, as they cannot be ignored.
        // SAFETY: the kernel reads one kernel_sigaction, 32 bytes, from a constant, and writes nothing (the old one goes to
        // a null pointer, which means nowhere); 8 is the size of its signal set. There is one thread and no handler.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT.as_ptr(),
                std::ptr::null::<usize>(),
                8_usize,
            )
        };
    }
}

fn close_on_exec(fd: BorrowedFd<'_>) {
    // Fails on a descriptor that is not open only; then there is nothing to close.
    let _ = rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC);
}

fn run(request: &Request, streams: Vec<OwnedFd>) -> Result<u32, Error> {
    let groups: Vec<Gid> = request.groups.iter().copied().map(Gid::from_raw).collect();
    // What libcontainer makes inherits them.
    setgroups(&groups).map_err(|error| Error::Groups(error.into()))?;
    match &request.exec {
        None => create(request, streams),
        Some(exec) => self::exec(request, exec, streams),
    }
}

fn builder(
    request: &Request,
    executor: GuestExecutor,
    streams: Vec<OwnedFd>,
) -> Result<ContainerBuilder, Error> {
    let builder = ContainerBuilder::new(request.container_id.clone(), SyscallType::default())
        .with_executor(executor)
        .with_console_socket(request.console.clone())
        .with_root_path(&request.state)
        .and_then(ContainerBuilder::validate_id)
        .map_err(|error| explain(&error))?;
    Ok(match <[OwnedFd; 3]>::try_from(streams) {
        Ok([stdin, stdout, stderr]) => builder
            .with_stdin(stdin)
            .with_stdout(stdout)
            .with_stderr(stderr),
        Err(_) => builder,
    })
}

fn create(request: &Request, streams: Vec<OwnedFd>) -> Result<u32, Error> {
    let executor = GuestExecutor {
        window: request.window,
        ..GuestExecutor::default()
    };
    let container = builder(request, executor, streams)?
        .as_init(&request.bundle)
        .with_systemd(false)
        .with_detach(true)
        // The container's init is PID 1's child from the start, not the worker's orphan.
        .as_sibling(true)
        .build()
        .map_err(|error| explain(&error))?;
    let pid = container.pid().ok_or(Error::NoPid)?.as_raw();
    let pid = u32::try_from(pid).map_err(|_| Error::NoPid)?;
    loopback_up(pid).map_err(Error::Loopback)?;
    share_boot_id(pid).map_err(Error::BootId)?;
    Ok(pid)
}

/// Brings up the loopback interface of the container's network namespace, as runc does in a new one.
fn loopback_up(pid: u32) -> io::Result<()> {
    let namespace = fs::File::open(format!("/proc/{pid}/ns/net"))?;
    if !same_file(&namespace, &fs::File::open("/proc/self/ns/net")?)? {
        // The worker has nothing to do in its own any more.
        nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        boot::loopback_up()?;
    }
    Ok(())
}

fn exec(request: &Request, exec: &Exec, streams: Vec<OwnedFd>) -> Result<u32, Error> {
    // libcontainer gives an exec no seccomp filter; the executor loads the container's own.
    let seccomp = if exec.filtered {
        filter(&request.bundle)?
    } else {
        None
    };
    let user_namespace = exec
        .user_namespace
        .as_ref()
        .map(|user| Entry::of(user.of, user.identity.clone()))
        .transpose()
        .map_err(Error::UserNamespace)?;
    let executor = GuestExecutor {
        window: request.window,
        terminal_owner: Some(exec.terminal_owner),
        user_namespace,
        seccomp,
        borrowed: exec.borrowed.clone(),
    };
    let pid = builder(request, executor, streams)?
        .as_tenant()
        .with_process(Some(&exec.process))
        .with_detach(true)
        .as_sibling(true)
        .build()
        .map_err(|error| explain(&error))?;
    u32::try_from(pid.as_raw()).map_err(|_| Error::NoPid)
}

/// The filter in a container's config.json.
fn filter(bundle: &Path) -> Result<Option<LinuxSeccomp>, Error> {
    let path = bundle.join("config.json");
    let failed = |source| Error::Config {
        path: path.clone(),
        source,
    };
    let text = fs::read(&path).map_err(failed)?;
    let config: FilterOnly = serde_json::from_slice(&text).map_err(|error| failed(error.into()))?;
    Ok(config.linux.seccomp)
}

/// The part of a config.json that an exec needs.
#[derive(Deserialize)]
struct FilterOnly {
    #[serde(default)]
    linux: LinuxFilter,
}

#[derive(Default, Deserialize)]
struct LinuxFilter {
    seccomp: Option<LinuxSeccomp>,
}

/// The message of an error with those of its sources that say more than it does.
fn explain(error: &LibcontainerError) -> Error {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    Error::Container(text.trim_end_matches('\0').to_owned())
}

/// Shows the child's boot_id in the container: its /proc is a mount of its own, in which the
/// kernel's file appears again. libcontainer allows no such mount in the spec.
fn share_boot_id(pid: u32) -> io::Result<()> {
    use rustix::{
        fs::{CWD, Mode, OFlags, ResolveFlags, openat2},
        mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
    };
    let ours = open_tree(
        CWD,
        KERNEL_BOOT_ID,
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?;
    let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt"))?;
    if same_file(&namespace, &fs::File::open("/proc/self/ns/mnt")?)? {
        return Ok(());
    }
    // Nothing follows but the answer: the worker may stay in the container's mount namespace.
    nix::sched::setns(&namespace, nix::sched::CloneFlags::CLONE_NEWNS)?;
    let target = openat2(
        CWD,
        KERNEL_BOOT_ID,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    );
    let target = match target {
        Ok(target) => target,
        // A container without /proc has no boot_id to replace.
        Err(rustix::io::Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    move_mount(
        &ours,
        "",
        &target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )?;
    Ok(())
}

fn same_file(one: &fs::File, other: &fs::File) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok(one.dev() == other.dev() && one.ino() == other.ino())
}
