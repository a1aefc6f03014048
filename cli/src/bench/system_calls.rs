//! The system calls of a fork, counted with ptrace(2): from the monitor's execution to the return of its first KVM_RUN,
//! those of all its threads. In a run of its own: being counted takes much longer than running.

use std::{
    collections::{BTreeMap, HashSet},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
};

use forkvm_vmm::{
    control::{Request, Socket},
    template::Template,
};
use nix::{
    errno::Errno,
    libc,
    sys::{
        ptrace::{self, Options},
        signal::Signal,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::{Error, child::launch};

/// `KVM_RUN` and the type of all ioctls of KVM (Linux, include/uapi/linux/kvm.h).
const KVM_RUN: u64 = 0xae80;
const KVM_TYPE: u64 = 0xae;

/// How often each system call was made.
#[derive(Debug, Default)]
pub(super) struct Calls {
    by_number: BTreeMap<u64, usize>,
    of_kvm: usize,
}

impl Calls {
    /// All of them.
    pub(super) fn all(&self) -> usize {
        self.by_number.values().sum()
    }

    /// How many are ioctls of KVM.
    pub(super) fn of_kvm(&self) -> usize {
        self.of_kvm
    }

    /// The most frequent ones by name.
    pub(super) fn most(&self, count: usize) -> Vec<(String, usize)> {
        let mut calls: Vec<_> = self
            .by_number
            .iter()
            .map(|(&number, &count)| (name(number), count))
            .collect();
        calls.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        calls.truncate(count);
        calls
    }

    fn add(&mut self, number: u64, request: u64) {
        *self.by_number.entry(number).or_default() += 1;
        if is_ioctl(number) && request >> 8 & 0xff == KVM_TYPE {
            self.of_kvm += 1;
        }
    }
}

fn is_ioctl(number: u64) -> bool {
    i64::try_from(number) == Ok(libc::SYS_ioctl)
}

fn name(number: u64) -> String {
    usize::try_from(number)
        .ok()
        .and_then(syscalls::Sysno::new)
        .map_or_else(|| format!("number {number}"), |call| call.name().to_owned())
}

/// Forks `template` once and counts.
///
/// # Errors
/// A monitor that cannot be traced, or that ends before its guest has run.
pub(super) fn count(program: &Path, template: &Template) -> Result<Calls, Error> {
    let (ours, theirs) = Socket::pair().map_err(|error| Error::Monitor(error.into()))?;
    let mut command = Command::new(program);
    command
        .stdin(Stdio::from(theirs.into_inner()))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    // SAFETY: needed to be traced from the first instruction on; PTRACE_TRACEME is one system call
    // and allocates nothing, so it may stand between fork and exec.
    unsafe { command.pre_exec(|| ptrace::traceme().map_err(Into::into)) };
    let mut child = command
        .spawn()
        .map_err(Error::io(format!("cannot trace {}", program.display())))?;
    let (source, descriptors) = template.source();
    // It lies in the socket until the monitor reads it.
    let sent = ours.send(&Request::Launch(launch(source)), &descriptors);
    let counted = sent
        .map_err(|error| Error::Monitor(error.into()))
        .and_then(|()| trace(Pid::from_raw(child.id().cast_signed())));
    // It has done its work; a process that is traced does not end by its socket.
    child.kill().map_err(Error::io("ending the monitor"))?;
    reap(Pid::from_raw(child.id().cast_signed()));
    counted
}

/// Waits for the end of a traced process: its threads are reaped by their tracer, before it.
fn reap(monitor: Pid) {
    let ended = |status| match status {
        WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..) => thread == monitor,
        _ => false,
    };
    // An error: there is nobody left to wait for.
    while waitpid(None, Some(WaitPidFlag::__WALL)).is_ok_and(|status| !ended(status)) {}
}

fn trace(monitor: Pid) -> Result<Calls, Error> {
    let failed = |what: &'static str| move |errno: Errno| Error::io(what)(errno.into());
    // Stopped behind its execve.
    waitpid(monitor, None).map_err(failed("waiting for the monitor"))?;
    let options =
        Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(monitor, options).map_err(failed("tracing the monitor"))?;
    let mut calls = Calls::default();
    // Threads that are inside KVM_RUN, and those that have been seen.
    let (mut running, mut known) = (HashSet::new(), HashSet::from([monitor]));
    let mut stopped = (monitor, None);
    loop {
        let (thread, signal): (Pid, Option<Signal>) = stopped;
        match ptrace::syscall(thread, signal) {
            // Ended while it was stopped.
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => return Err(failed("tracing the monitor")(errno)),
        }
        let status = waitpid(None, Some(WaitPidFlag::__WALL));
        stopped = match status.map_err(failed("waiting for the monitor"))? {
            WaitStatus::PtraceSyscall(thread) => {
                let info = ptrace::syscall_info(thread).map_err(failed("a system call"))?;
                if info.op == libc::PTRACE_SYSCALL_INFO_ENTRY {
                    // SAFETY: needed to read a union; `op` says that `entry` is the valid part.
                    let entry = unsafe { info.u.entry };
                    calls.add(entry.nr, entry.args[1]);
                    if is_ioctl(entry.nr) && entry.args[1] == KVM_RUN {
                        running.insert(thread);
                    }
                } else if running.remove(&thread) {
                    return Ok(calls);
                }
                (thread, None)
            }
            WaitStatus::PtraceEvent(thread, ..) => (thread, None),
            // A new thread begins stopped.
            WaitStatus::Stopped(thread, Signal::SIGSTOP) if known.insert(thread) => (thread, None),
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..)
                if thread == monitor =>
            {
                return Err(Error::Guest(
                    "the monitor ended before its guest ran".into(),
                ));
            }
            other => (other.pid().unwrap_or(monitor), None),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_named_and_sorted() {
        let mut calls = Calls::default();
        calls.add(0, 0);
        for request in [KVM_RUN, 0x5401, 0x4008_ae90] {
            calls.add(libc::SYS_ioctl.cast_unsigned(), request);
        }
        assert_eq!((calls.all(), calls.of_kvm()), (4, 2));
        assert_eq!(calls.most(1), [("ioctl".to_owned(), 3)]);
    }
}
