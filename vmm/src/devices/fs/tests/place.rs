//! Places on the host: file systems of the test's own, gone with it.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount,
};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// A tmpfs in a mount namespace of the test's thread.
pub(super) struct Place {
    // Kept for the directory's life.
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Drop for Place {
    fn drop(&mut self) {
        // With everything that is mounted below; then the directory can be removed.
        if let Err(error) = unmount(&self.path, UnmountFlags::DETACH) {
            eprintln!("{} stays mounted: {error}", self.path.display());
        }
    }
}

fn need_root(what: &str, error: rustix::io::Errno) -> ! {
    panic!("{what}: {error}. These tests mount file systems: run them as root with CAP_SYS_ADMIN.")
}

impl Place {
    /// An empty tmpfs.
    pub(super) fn new() -> Self {
        // SAFETY: only this thread's mounts, working directory and mask become its own.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
            .unwrap_or_else(|error| need_root("cannot make a mount namespace", error));
        mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
        .unwrap_or_else(|error| need_root("cannot make the mounts private", error));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap();
        let place = Place { _dir: dir, path };
        place.mount_tmpfs("");
        place
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes a directory.
    pub(super) fn dir(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Makes a file with contents.
    pub(super) fn file(&self, name: &str, contents: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, contents).unwrap();
        path
    }

    pub(super) fn mount_tmpfs(&self, name: &str) -> PathBuf {
        let path = self.dir(name);
        mount(
            "tmpfs",
            &path,
            "tmpfs",
            MountFlags::empty(),
            Some(c"mode=755"),
        )
        .unwrap_or_else(|error| need_root("cannot mount a tmpfs", error));
        path
    }

    /// Mounts an overlay of `lower` (seen first to last) at `name`. With `separate`, what is
    /// written lies in another file system than what is read.
    pub(super) fn mount_overlay(&self, name: &str, lower: &Path, separate: bool) -> PathBuf {
        let above = format!("{name}-above");
        if separate {
            self.mount_tmpfs(&above);
        }
        let upper = self.dir(&format!("{above}/upper"));
        let work = self.dir(&format!("{above}/work"));
        let path = self.dir(name);
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        let options = std::ffi::CString::new(options).unwrap();
        mount(
            "overlay",
            &path,
            "overlay",
            MountFlags::empty(),
            Some(options.as_c_str()),
        )
        .unwrap_or_else(|error| {
            need_root(
                "cannot mount an overlay (is overlayfs in the kernel?)",
                error,
            )
        });
        path
    }
}

/// An `O_PATH` descriptor, as the launcher hands it over.
pub(super) fn open_path(path: &Path) -> OwnedFd {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).unwrap()
}
