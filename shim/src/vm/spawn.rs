//! A child process that starts in a cgroup.
//!
//! Moving a process into a cgroup waits for an RCU grace period, some ten milliseconds, during which no process of
//! the host can fork or exit (the kernel's `cgroup_threadgroup_rwsem`). clone3(2) with `CLONE_INTO_CGROUP`, since Linux
//! 5.7, starts it there at once; std and glibc before 2.39 have no call for it.

use std::{
    ffi::CString,
    io::{self, PipeReader, Read as _},
    mem,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

/// A child that has executed its program.
pub(super) struct Child {
    pub(super) pid: u32,
    /// A descriptor of the process (pidfd_open(2)).
    pub(super) process: OwnedFd,
    /// What it writes to its standard error.
    pub(super) stderr: PipeReader,
}

/// Starts `program` without arguments: with `stdin` as its standard input, nothing as its standard output, and in
/// `cgroup`, an open folder of cgroup v2, or else in that of the caller. Its end raises SIGCHLD.
///
/// # Errors
/// What the operating system says, of the program too: it has been executed when this returns.
pub(super) fn spawn(
    program: &Path,
    stdin: &OwnedFd,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Child> {
    let program = CString::new(program.as_os_str().as_bytes())?;
    let null = std::fs::File::options().write(true).open("/dev/null")?;
    let (stderr, their_stderr) = io::pipe()?;
    let (mut failure, their_failure) = io::pipe()?;
    let standard = [
        stdin.as_raw_fd(),
        null.as_raw_fd(),
        their_stderr.as_raw_fd(),
    ];
    // Below three one could be overwritten by another before it is moved itself.
    if standard.iter().any(|fd| *fd < 3) {
        return Err(io::Error::other("the shim's standard streams are closed"));
    }

    let mut process: RawFd = -1;
    // SAFETY: needed to start from a zeroed structure, as clone3(2) asks; it holds integers alone, for which zero is valid.
    let mut arguments: libc::clone_args = unsafe { mem::zeroed() };
    arguments.flags = libc::CLONE_PIDFD.cast_unsigned().into();
    arguments.exit_signal = libc::SIGCHLD.cast_unsigned().into();
    arguments.pidfd = ptr::from_mut(&mut process) as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd().cast_unsigned().into();
    }
    // SAFETY: needed because no safe interface has CLONE_INTO_CGROUP. The structure is valid for its size, and the one
    // address in it, of `process`, is too. Without CLONE_VM the child has a copy of everything, and does only what is
    // allowed after a fork: `become_program` calls functions that are async-signal-safe and never returns.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            ptr::from_mut(&mut arguments),
            mem::size_of::<libc::clone_args>(),
        )
    };
    match pid {
        -1 => return Err(io::Error::last_os_error()),
        0 => become_program(&program, standard, their_failure.as_raw_fd()),
        _ => {}
    }
    // SAFETY: needed to own the descriptor that the kernel has stored; nobody else knows its number.
    let process = unsafe { OwnedFd::from_raw_fd(process) };
    drop((their_stderr, their_failure));
    let mut errno = Vec::new();
    failure.read_to_end(&mut errno)?;
    match errno.try_into().map(i32::from_ne_bytes) {
        Ok(errno) => Err(io::Error::from_raw_os_error(errno)),
        // Closed without a word: the program runs.
        Err(_) => Ok(Child {
            pid: u32::try_from(pid).map_err(io::Error::other)?,
            process,
            stderr,
        }),
    }
}

/// See clone3(2); libc's has the type of the flags of clone(2), into which it does not fit.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// The child's part: its standard streams, signals as a program expects them, the program. Writes the error number to
/// `failure`, which is closed by a program that is executed.
fn become_program(program: &CString, standard: [RawFd; 3], failure: RawFd) -> ! {
    let arguments = [program.as_ptr(), ptr::null()];
    for (target, fd) in (0..).zip(standard) {
        // SAFETY: needed to place a descriptor at a number; both are open, and nobody in this process owns the number.
        if unsafe { libc::dup2(fd, target) } < 0 {
            give_up(failure);
        }
    }
    let mut none = mem::MaybeUninit::uninit();
    // SAFETY: needed to unblock what a thread of the shim may have blocked; `none` is written here.
    unsafe { libc::sigemptyset(none.as_mut_ptr()) };
    // SAFETY: `none` was made by sigemptyset; the old set is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), ptr::null_mut()) };
    // SAFETY: needed because Rust ignores SIGPIPE and that is inherited; SIG_DFL runs no code.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    // SAFETY: both the path and the list of arguments end with a zero and are alive.
    unsafe { libc::execv(program.as_ptr(), arguments.as_ptr()) };
    give_up(failure);
}

fn give_up(failure: RawFd) -> ! {
    let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
    // SAFETY: needed because std's writers may allocate; the buffer is as long as said. If it fails there is nobody to tell.
    unsafe { libc::write(failure, ptr::from_ref(&errno).cast(), mem::size_of::<i32>()) };
    // SAFETY: needed to end without running what the parent has registered for its own exit.
    unsafe { libc::_exit(127) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_runs_with_its_streams() {
        let (input, mut writer) = io::pipe().unwrap();
        io::Write::write_all(&mut writer, b"echo lost; echo to the log of $$ >&2\n").unwrap();
        drop(writer);
        let mut child = spawn(Path::new("/bin/sh"), &input.into(), None).unwrap();
        let mut log = String::new();
        child.stderr.read_to_string(&mut log).unwrap();
        assert_eq!(log, format!("to the log of {}\n", child.pid));
    }

    #[test]
    fn a_program_that_is_not_there_is_the_callers_error() {
        let (input, _writer) = io::pipe().unwrap();
        let error = spawn(Path::new("/nowhere/forkvm-vmm"), &input.into(), None).err();
        assert_eq!(error.unwrap().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_is_not_a_cgroup_is_refused_before_anything_starts() {
        use std::os::fd::AsFd as _;
        let (input, _writer) = io::pipe().unwrap();
        let folder = std::fs::File::open("/").unwrap();
        let error = spawn(Path::new("/bin/true"), &input.into(), Some(folder.as_fd())).err();
        assert_eq!(error.unwrap().raw_os_error(), Some(libc::EBADF));
    }
}
