//! The monitor's jail: what its process gives up for good once its machine is made and before the
//! guest runs. Whoever breaks out of the device models is in here.
//!
//! [`confine`] takes away the file tree, capabilities and limits of the whole process while it has
//! one thread; [`filter`] then takes away system calls, thread by thread. A step that fails ends
//! the monitor: no guest runs without its jail. `docs/monitor.md` says what is left.

pub(crate) mod filter;

use std::io;

use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount, unmount},
    process::{
        DumpableBehavior, Resource, Rlimit, chdir, pivot_root, set_dumpable_behavior, setrlimit,
    },
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities,
        clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
        set_capabilities_secure_bits,
    },
};

use crate::devices::fs;

/// A step of the jail that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct Error {
    what: &'static str,
    source: io::Error,
}

fn failed(what: &'static str) -> impl FnOnce(Errno) -> Error {
    move |errno| Error {
        what,
        source: errno.into(),
    }
}

/// Confines the process. It has one thread, a mount namespace of its own without propagation, and
/// every descriptor that it will ever open by a path. `serves_files`: its guest has exports.
///
/// # Errors
/// [`Error`]; the process is then not to go on.
pub(crate) fn confine(serves_files: bool) -> Result<(), Error> {
    leave_the_file_tree()?;
    set_limits()?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("no core dumps"))?;
    give_up_capabilities(if serves_files {
        fs::SERVING
    } else {
        CapabilitySet::empty()
    })
}

/// Makes an empty read-only folder the root, and the only mount of the namespace. Descriptors go
/// on working: exports are mounts that are in no namespace, or in the launcher's.
fn leave_the_file_tree() -> Result<(), Error> {
    // Any folder that is there whatever the host is: it is hidden in this namespace alone.
    const PLACE: &str = "/dev";
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("none", PLACE, "tmpfs", flags, Some(c"size=4k,mode=0555"))
        .map_err(failed("an empty root"))?;
    chdir(PLACE).map_err(failed("an empty root"))?;
    // The old root comes to lie on top of the new one (pivot_root(2), "pivot_root(".", ".")").
    pivot_root(".", ".").map_err(failed("an empty root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("leaving the host's file tree"))?;
    chdir("/").map_err(failed("an empty root"))
}

/// That of open files was set before the file server was made. No limit on processes: the kernel
/// does not apply it to root, and the filter lets none be made. None on the size of files: it
/// would be one on the container's.
fn set_limits() -> Result<(), Error> {
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    // A core dump would be the guest's memory. Of the others the monitor has no use.
    for resource in [
        Resource::Core,
        Resource::Memlock,
        Resource::Msgqueue,
        Resource::Rtprio,
    ] {
        setrlimit(resource, none).map_err(failed("limits of resources"))?;
    }
    Ok(())
}

/// Keeps `kept` of the capabilities that the process has, and lets it get no other: not by a
/// program, of which it cannot execute any, and not by being root.
fn give_up_capabilities(kept: CapabilitySet) -> Result<(), Error> {
    let lacks = failed("giving up capabilities");
    let give_up = || {
        use CapabilitiesSecureBits as Bits;
        set_capabilities_secure_bits(
            Bits::NO_ROOT
                | Bits::NO_ROOT_LOCKED
                | Bits::NO_SETUID_FIXUP
                | Bits::NO_SETUID_FIXUP_LOCKED
                | Bits::KEEP_CAPS_LOCKED
                | Bits::NO_CAP_AMBIENT_RAISE
                | Bits::NO_CAP_AMBIENT_RAISE_LOCKED,
        )?;
        for number in 0..u64::BITS {
            match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number))
            {
                Ok(()) => {}
                // Behind the last one that this kernel knows.
                Err(Errno::INVAL) => break,
                Err(errno) => return Err(errno),
            }
        }
        clear_ambient_capability_set()?;
        let kept = kept & capabilities(None)?.permitted;
        let sets = CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        };
        set_capabilities(None, sets)
    };
    give_up().map_err(lacks)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::AsRawFd as _};

    use rustix::{
        fs::{CWD, Mode, OFlags, openat},
        mount::{MountPropagationFlags, mount_change},
        process::umask,
        thread::{UnshareFlags, unshare_unsafe},
    };

    use super::*;

    /// What a confined process still can; 0 if that is as it should be, else the number of the step.
    fn confined(export: &std::path::Path) -> i32 {
        let path = OFlags::PATH | OFlags::DIRECTORY;
        let enter = || {
            // SAFETY: the flags do not include the table of descriptors.
            unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private)?;
            umask(Mode::empty());
            Ok::<_, Errno>((
                openat(CWD, export, path, Mode::empty())?,
                openat(CWD, "/proc/self/fd", path, Mode::empty())?,
            ))
        };
        let Ok((export, descriptors)) = enter() else {
            return 1;
        };
        if confine(true).is_err() {
            return 2;
        }
        if File::open("/etc/passwd").is_ok()
            || std::fs::read_dir("/").is_ok_and(|mut all| all.next().is_some())
        {
            return 3;
        }
        // The export, opened by its descriptor's number as the file server does it.
        let number = export.as_raw_fd().to_string();
        let opened = openat(&descriptors, number, OFlags::RDONLY, Mode::empty());
        if !opened.is_ok_and(|folder| openat(&folder, "file", OFlags::RDWR, Mode::empty()).is_ok())
        {
            return 4;
        }
        let kept =
            capabilities(None).map(|sets| (sets.effective, sets.permitted, sets.inheritable));
        if kept != Ok((fs::SERVING, fs::SERVING, CapabilitySet::empty())) {
            return 5;
        }
        if rustix::thread::capability_is_in_bounding_set(CapabilitySet::CHOWN) != Ok(false) {
            return 6;
        }
        let more = Rlimit {
            current: Some(1),
            maximum: Some(1),
        };
        if setrlimit(Resource::Core, more).is_ok() {
            return 7;
        }
        0
    }

    #[test]
    fn a_confined_process_has_its_descriptors_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("file"), "text").unwrap();
        // SAFETY: the child changes nothing but itself, and ends by _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let step = confined(folder.path());
            // SAFETY: ends the child without running what the parent has registered.
            unsafe { libc::_exit(step) };
        }
        let mut status = 0;
        // SAFETY: the child is ours and nobody else waits for it.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(
            status,
            0,
            "step {}; run this as root",
            libc::WEXITSTATUS(status)
        );
    }
}
