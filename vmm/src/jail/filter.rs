//! The filters of system calls, made at build time of `config/seccomp/monitor.toml`.
//!
//! A filter is inherited by the threads that are started under it and cannot be taken off. So the
//! main thread takes [`Filter::Files`], starts the file server's thread, takes
//! [`Filter::Machine`] on top, and starts all others.

use std::io;

/// Which calls are left; every other one kills the process.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Filter {
    /// Those of the machine and of the file server.
    Files,
    /// Those of the machine alone.
    Machine,
    /// Those of a monitor that makes a template.
    Freeze,
}

/// `struct sock_filter` instructions, eight bytes each, as seccomp(2) takes them.
const MACHINE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/machine.bpf"));
const FILES: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/files.bpf"));
const FREEZE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/freeze.bpf"));

impl Filter {
    fn program(self) -> &'static [u8] {
        match self {
            Filter::Files => FILES,
            Filter::Machine => MACHINE,
            Filter::Freeze => FREEZE,
        }
    }

    /// Puts the calling thread, and those that it starts from now on, under the filter. The process
    /// has `no_new_privs`.
    ///
    /// # Errors
    /// The system call's.
    pub(crate) fn install(self) -> io::Result<()> {
        let program = self.program();
        let program = libc::sock_fprog {
            len: u16::try_from(program.len() / size_of::<libc::sock_filter>())
                .map_err(io::Error::other)?,
            // The kernel copies the instructions, wherever they lie, and changes none.
            filter: program.as_ptr().cast_mut().cast(),
        };
        // SAFETY: needed because libc has no wrapper. The structure outlives the call and names as
        // many instructions as there are; the kernel reads both and checks the program.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                0,
                &raw const program,
            )
        };
        if result == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `action` in a process of its own under a filter; gives its end (waitpid(2)).
    fn under(filter: Filter, action: fn()) -> std::process::ExitStatus {
        use std::os::unix::process::ExitStatusExt;
        // SAFETY: the child calls system calls alone and ends by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let confined =
                rustix::thread::set_no_new_privs(true).is_ok() && filter.install().is_ok();
            if confined {
                action();
            }
            // SAFETY: ends the child without running what the parent has registered.
            unsafe { libc::_exit(if confined { 0 } else { 77 }) };
        }
        let mut status = 0;
        // SAFETY: the child is ours and nobody else waits for it.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        std::process::ExitStatus::from_raw(status)
    }

    fn is_killed(filter: Filter, action: fn()) -> bool {
        use std::os::unix::process::ExitStatusExt;
        let end = under(filter, action);
        assert!(end.success() || end.signal() == Some(libc::SIGSYS), "{end}");
        !end.success()
    }

    fn make_socket() {
        // SAFETY: integers alone.
        unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) };
    }

    fn make_folder() {
        // SAFETY: the name ends with a zero.
        unsafe { libc::mkdirat(-1, c"x".as_ptr(), 0) };
    }

    fn map(protection: libc::c_int) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, which nothing uses.
        unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
    }

    fn make_machine() {
        const KVM_CREATE_VM: libc::c_ulong = 0xae01;
        // SAFETY: integers alone.
        unsafe { libc::ioctl(-1, KVM_CREATE_VM, 0) };
    }

    fn run_machine() {
        const KVM_RUN: libc::c_ulong = 0xae80;
        // SAFETY: integers alone.
        unsafe { libc::ioctl(-1, KVM_RUN, 0) };
    }

    #[test]
    fn what_is_not_on_the_list_kills() {
        for filter in [Filter::Machine, Filter::Files, Filter::Freeze] {
            assert!(!is_killed(filter, || {}));
            assert!(!is_killed(filter, run_machine));
            assert!(!is_killed(filter, || map(
                libc::PROT_READ | libc::PROT_WRITE
            )));
            assert!(is_killed(filter, || map(libc::PROT_READ | libc::PROT_EXEC)));
            assert!(is_killed(filter, make_machine));
            assert!(is_killed(filter, make_socket));
        }
    }

    #[test]
    fn files_are_for_the_file_server() {
        assert!(is_killed(Filter::Machine, make_folder));
        assert!(!is_killed(Filter::Files, make_folder));
    }
}
