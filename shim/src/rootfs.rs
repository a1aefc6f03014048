//! The container's files on the host: mounting its root file system, and handing trees to the
//! monitor.

use std::{
    fs, io,
    os::fd::OwnedFd,
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
pub(crate) fn export(path: &Path, recursive: bool) -> Result<OwnedFd, Error> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(CWD, path, flags).map_err(|error| Error::Export {
        path: path.to_owned(),
        source: error.into(),
    })
}
