//! Follows a process and its threads through their system calls (ptrace(2)).

use std::{
    collections::{BTreeSet, HashMap},
    io,
    mem::{self, MaybeUninit},
    os::fd::RawFd,
    ptr,
};

/// A system call as it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Call {
    pub(super) number: i32,
    pub(super) arguments: [u64; 6],
}

/// Forks a process that traces the caller to its end and then hands the calls that it made under a
/// filter to `done`. It writes a byte to `tell` once it does. The caller must have one thread.
pub(super) fn attach(tell: RawFd, done: impl FnOnce(&BTreeSet<Call>)) -> io::Result<()> {
    let caller = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: needed because the tracer has to be another process. The caller has one thread, so
    // the child may do what it likes.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let traced = begin(caller, tell).and_then(|()| follow(caller));
            if let Ok(calls) = &traced {
                done(calls);
            }
            // SAFETY: ends the process without running what its parent has registered.
            unsafe { libc::_exit(traced.is_err().into()) }
        }
        _ => Ok(()),
    }
}

fn begin(process: libc::pid_t, tell: RawFd) -> io::Result<()> {
    let options = libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACESYSGOOD;
    request(libc::PTRACE_SEIZE, process, options as usize)?;
    request(libc::PTRACE_INTERRUPT, process, 0)?;
    wait(process)?;
    request(libc::PTRACE_SYSCALL, process, 0)?;
    // Not ours: the control socket's end is seen when the monitor has closed it.
    for stream in 0..2 {
        // SAFETY: integers alone; nothing in this process uses the descriptor.
        unsafe { libc::close(stream) };
    }
    // SAFETY: the buffer is as long as said.
    if unsafe { libc::write(tell, [0_u8].as_ptr().cast(), 1) } != 1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: integers alone; it is not used again.
    unsafe { libc::close(tell) };
    Ok(())
}

/// What is known of a thread.
#[derive(Clone, Copy, Default)]
struct Thread {
    /// It has taken a filter, or was started by one that had.
    filtered: bool,
    /// The call that it is in takes one.
    filtering: bool,
}

/// Takes every stop of the process's threads until all of them have ended.
fn follow(process: libc::pid_t) -> io::Result<BTreeSet<Call>> {
    let mut threads = HashMap::from([(process, Thread::default())]);
    let mut calls = BTreeSet::new();
    loop {
        let (thread, status) = match wait(-1) {
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => return Ok(calls),
            other => other?,
        };
        if !libc::WIFSTOPPED(status) {
            threads.remove(&thread);
            continue;
        }
        // One that is new was started by the main thread, which starts them all.
        let started_by = threads.get(&process).copied().unwrap_or_default();
        let known = threads.entry(thread).or_insert(Thread {
            filtering: false,
            ..started_by
        });
        let signal = match (libc::WSTOPSIG(status), status >> 16) {
            (SYSCALL_STOP, _) => {
                at_call(thread, known, &mut calls)?;
                0
            }
            // Events: a thread was started, or begins.
            (_, event) if event != 0 => 0,
            (signal, _) => signal,
        };
        match request(libc::PTRACE_SYSCALL, thread, signal as usize) {
            // Killed meanwhile: its end is reported.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            other => other?,
        }
    }
}

/// What waitpid(2) reports for a stop at a system call (`PTRACE_O_TRACESYSGOOD`).
const SYSCALL_STOP: libc::c_int = libc::SIGTRAP | 0x80;

fn at_call(id: libc::pid_t, thread: &mut Thread, calls: &mut BTreeSet<Call>) -> io::Result<()> {
    let Some(info) = call_info(id)? else {
        return Ok(());
    };
    match info.op {
        libc::PTRACE_SYSCALL_INFO_ENTRY => {
            // SAFETY: `entry` is what the kernel fills in at an entry.
            let entry = unsafe { info.u.entry };
            let number = entry.nr as i32;
            if thread.filtered {
                calls.insert(Call {
                    number,
                    arguments: entry.args,
                });
            }
            thread.filtering = i64::from(number) == libc::SYS_seccomp;
        }
        libc::PTRACE_SYSCALL_INFO_EXIT => thread.filtered |= mem::take(&mut thread.filtering),
        _ => {}
    }
    Ok(())
}

/// The call that a thread stands at; none of one that was killed meanwhile.
fn call_info(thread: libc::pid_t) -> io::Result<Option<libc::ptrace_syscall_info>> {
    let mut info = MaybeUninit::<libc::ptrace_syscall_info>::zeroed();
    // SAFETY: the kernel writes at most as many bytes as said, and the structure has them.
    let length = unsafe {
        libc::ptrace(
            libc::PTRACE_GET_SYSCALL_INFO,
            thread,
            size_of::<libc::ptrace_syscall_info>(),
            info.as_mut_ptr(),
        )
    };
    if length < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ESRCH) => Ok(None),
            _ => Err(error),
        };
    }
    // SAFETY: zeroes are valid for all of its fields, and the kernel has written over some.
    Ok(Some(unsafe { info.assume_init() }))
}

fn request(request: libc::c_uint, thread: libc::pid_t, data: usize) -> io::Result<()> {
    // SAFETY: none of the requests made here reads or writes memory of ours.
    let result = unsafe { libc::ptrace(request, thread, ptr::null_mut::<u8>(), data) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Waits for a stop or an end of `process`, of any if that is -1.
fn wait(process: libc::pid_t) -> io::Result<(libc::pid_t, libc::c_int)> {
    let mut status = 0;
    // SAFETY: the status is written to memory of ours.
    let thread = unsafe { libc::waitpid(process, &raw mut status, libc::__WALL) };
    if thread < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((thread, status))
}
