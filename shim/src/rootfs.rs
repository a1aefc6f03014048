//! The container's files on the host: mounting its root file system, and handing trees to the
//! monitor.

use std::{
    fs, io,
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use containerd_shim_protos::api::Mount;
use rustix::{
    fs::CWD,
    io::Errno,
    mount::{OpenTreeFlags, UnmountFlags, open_tree, unmount as unmount_one},
};

/// What can go wrong with files of the host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("root file system {0} is not there")]
    Missing(PathBuf),
    #[error("cannot mount the root file system at {path}: {message}")]
    Mount { path: PathBuf, message: String },
    #[error("cannot hand {path} to the monitor: {source}")]
    Export { path: PathBuf, source: io::Error },
    #[error("cannot unmount {path}: {source}")]
    Unmount { path: PathBuf, source: io::Error },
}

/// Mounts what the client gave, in order, at `target`, in the shim's own mount namespace. What has
/// been mounted when one fails is for the caller to [`unmount`].
pub(crate) fn mount(mounts: &[Mount], target: &Path) -> Result<(), Error> {
    let failed = |message: String| Error::Mount {
        path: target.to_owned(),
        message,
    };
    fs::create_dir_all(target).map_err(|error| failed(error.to_string()))?;
    for mount in mounts {
        // containerd gives further mounts of a root file system a place of their own in it.
        let place = if mount.target.is_empty() {
            target.to_owned()
        } else {
            target.join(mount.target.trim_start_matches('/'))
        };
        let kind = Some(mount.type_.as_str()).filter(|kind| !kind.is_empty());
        let source = Some(mount.source.as_str()).filter(|source| !source.is_empty());
        containerd_shim::mount::mount_rootfs(kind, source, &mount.options, &place)
            .map_err(|error| failed(error.to_string()))?;
    }
    Ok(())
}

/// Unmounts everything that is mounted at `target`, however often. Nothing there is fine.
pub(crate) fn unmount(target: &Path) -> Result<(), Error> {
    loop {
        match unmount_one(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            // Not a mount point, or not there at all.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => {
                return Err(Error::Unmount {
                    path: target.to_owned(),
                    source: error.into(),
                });
            }
        }
    }
}

/// Whether a folder or file is there, as the place of a container's root.
pub(crate) fn check_root(path: &Path) -> Result<(), Error> {
    if path.is_dir() {
        Ok(())
    } else {
        Err(Error::Missing(path.to_owned()))
    }
}

/// A detached copy of the mount at `path`, with what is mounted below it if `recursive`
/// (open_tree(2)): what the host mounts or unmounts there later does not change it.
///
/// Through it nobody opens a device, executes a program, gains by a set-user-ID bit, follows a
/// symbolic link, or writes if `read_only`: for the guest's own kernel none of this changes a thing,
/// and a guest that has broken into its monitor cannot make the host's disk a file and open it.
pub(crate) fn export(path: &Path, recursive: bool, read_only: bool) -> Result<OwnedFd, Error> {
    let failed = |source| Error::Export {
        path: path.to_owned(),
        source,
    };
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(CWD, path, flags).map_err(|errno| failed(errno.into()))?;
    restrict(&tree, read_only).map_err(failed)?;
    Ok(tree)
}

/// `struct mount_attr` (linux/mount.h).
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Restricts a detached tree of mounts (mount_setattr(2), since Linux 5.12).
fn restrict(tree: &OwnedFd, read_only: bool) -> io::Result<()> {
    // linux/mount.h.
    const RDONLY: u64 = 0x1;
    const NOSUID: u64 = 0x2;
    const NODEV: u64 = 0x4;
    const NOEXEC: u64 = 0x8;
    const NOSYMFOLLOW: u64 = 0x20_0000;
    let attributes = MountAttributes {
        set: NOSUID | NODEV | NOEXEC | NOSYMFOLLOW | if read_only { RDONLY } else { 0 },
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    // SAFETY: needed because neither libc nor rustix has a wrapper. The path ends with a zero, and the structure is
    // alive and as long as said; the kernel reads both and keeps neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    Err(io::Error::last_os_error())
}
