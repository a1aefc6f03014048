//! Acting as the guest's process: what is created gets its owner, and the thread keeps the
//! capabilities by which it serves.
//!
//! The guest's kernel has checked the permissions (`default_permissions`, with supplementary
//! groups and capabilities that the host cannot know), so only the *owner* of a new file is taken
//! from the request. The host's kernel sets it as it creates the file, with everything that
//! depends on it: directories with the set-group-ID bit, default ACLs, quotas.

use std::cell::Cell;
use std::io;

use fuse_backend_rs::api::filesystem::Context;
use rustix::fs::Mode;
use rustix::thread::CapabilitySet;

use super::Error;
use super::host::{Descriptors, errno};

/// `SECBIT_NO_SETUID_FIXUP` (linux/securebits.h): capabilities stay as they are when the
/// file-system user ID changes, see capabilities(7).
const SECBIT_NO_SETUID_FIXUP: libc::c_int = 1 << 2;

/// What serving takes, so that files of any owner are read, written, made and changed as the
/// guest's kernel decided (capabilities(7)). Not `CAP_SYS_ADMIN`: what it would add, `trusted.*`
/// attributes, a guest may not have. Not `CAP_DAC_READ_SEARCH`: `CAP_DAC_OVERRIDE` reads too, and it
/// would open files by handle. Not `CAP_SYS_RESOURCE`: blocks that a file system reserves are the
/// host's.
pub(crate) const SERVING: CapabilitySet = NEEDED
    .difference(CapabilitySet::SETPCAP)
    // Special files in the container's tree; they are never opened here.
    .union(CapabilitySet::MKNOD)
    // Capabilities of files (`security.capability`).
    .union(CapabilitySet::SETFCAP);

/// What a server cannot do without.
const NEEDED: CapabilitySet = CapabilitySet::CHOWN // any owner for any file
    .union(CapabilitySet::DAC_OVERRIDE) // the guest's kernel has checked the permissions
    .union(CapabilitySet::FOWNER) // modes, times and attributes of files of any owner
    .union(CapabilitySet::FSETID) // set-user-ID bits stay where the guest says so
    .union(CapabilitySet::SETUID) // setfsuid(2)
    .union(CapabilitySet::SETGID) // setfsgid(2)
    .union(CapabilitySet::SETPCAP); // the thread's secure bits; not once they are set

/// Checks that the process has the capabilities that serving takes.
pub(super) fn check_capabilities() -> Result<(), Error> {
    let held =
        rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    let missing = NEEDED - held;
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = missing
        .iter_names()
        .map(|(name, _)| format!("CAP_{name}"))
        .collect();
    Err(Error::Capabilities {
        missing: names.join(", "),
    })
}

thread_local! {
    /// The file-creation mask of this thread, once it is its own.
    static MASK: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Makes the calling thread fit to serve: its own working directory (`/proc/self/fd`) and file
/// creation mask, and capabilities that do not depend on its user. Does its work once a thread.
///
/// # Errors
/// `EPERM` if the process lacks `CAP_SETPCAP`.
pub(super) fn prepare_thread(descriptors: &Descriptors) -> io::Result<()> {
    if MASK.get().is_some() {
        return Ok(());
    }
    // SAFETY: CLONE_FS only separates this thread's working directory, root and mask from those
    // of the other threads; no memory is passed.
    if unsafe { libc::unshare(libc::CLONE_FS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    descriptors.enter()?;
    // SAFETY: takes and gives integers only; capabilities of this thread alone are concerned.
    let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS) };
    if bits < 0 {
        return Err(io::Error::last_os_error());
    }
    if bits & SECBIT_NO_SETUID_FIXUP == 0 {
        let bits = bits | SECBIT_NO_SETUID_FIXUP;
        // SAFETY: as above.
        if unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    set_mask(0);
    Ok(())
}

fn set_mask(mask: u32) {
    if MASK.get() != Some(mask) {
        rustix::process::umask(Mode::from_raw_mode(mask));
        MASK.set(Some(mask));
    }
}

/// Runs `create` with the file-system user and group of the guest's process, and its file creation
/// mask (which the kernel ignores where the directory has a default ACL, as it must be).
pub(super) fn as_caller<T>(
    descriptors: &Descriptors,
    context: &Context,
    mask: u32,
    create: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    // The kernel takes -1 for "no change".
    if context.uid == u32::MAX || context.gid == u32::MAX {
        return Err(errno(libc::EINVAL));
    }
    prepare_thread(descriptors)?;
    set_mask(mask & 0o777);
    let _owner = Owner::assume(context.uid, context.gid)?;
    create()
}

/// The file-system user and group of this thread while it lives; those of the process again when
/// it is dropped.
struct Owner {
    user: Option<libc::uid_t>,
    group: Option<libc::gid_t>,
}

impl Owner {
    fn assume(uid: libc::uid_t, gid: libc::gid_t) -> io::Result<Self> {
        let mut owner = Owner {
            user: None,
            group: None,
        };
        if gid != rustix::process::getegid().as_raw() {
            owner.group = Some(set_group(gid)?);
        }
        if uid != rustix::process::geteuid().as_raw() {
            owner.user = Some(set_user(uid)?);
        }
        Ok(owner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Going back to a process' own effective IDs is always allowed.
        if let Some(uid) = self.user {
            let _ = set_user(uid);
        }
        if let Some(gid) = self.group {
            let _ = set_group(gid);
        }
    }
}

/// Sets the thread's file-system user (setfsuid(2)); gives the one before.
fn set_user(uid: libc::uid_t) -> io::Result<libc::uid_t> {
    // SAFETY: integers only; concerns this thread alone (glibc has no wrapper that spreads it).
    let before = unsafe { libc::syscall(libc::SYS_setfsuid, uid) };
    // SAFETY: as above. -1 changes nothing and tells the present one: there is no other answer.
    let now = unsafe { libc::syscall(libc::SYS_setfsuid, u32::MAX) };
    if now as u32 == uid {
        Ok(before as u32)
    } else {
        Err(errno(libc::EPERM))
    }
}

/// Sets the thread's file-system group (setfsgid(2)); gives the one before.
fn set_group(gid: libc::gid_t) -> io::Result<libc::gid_t> {
    // SAFETY: integers only; concerns this thread alone (glibc has no wrapper that spreads it).
    let before = unsafe { libc::syscall(libc::SYS_setfsgid, gid) };
    // SAFETY: as above.
    let now = unsafe { libc::syscall(libc::SYS_setfsgid, u32::MAX) };
    if now as u32 == gid {
        Ok(before as u32)
    } else {
        Err(errno(libc::EPERM))
    }
}
