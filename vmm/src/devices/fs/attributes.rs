//! Attributes: getattr, setattr, statx, statfs, access.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{SetattrValid, stat64, statvfs64};
use rustix::fs::{AtFlags, Gid, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid};

use super::export::ROOT_TIMEOUT;
use super::host::{self, FileStat, errno};
use super::lookup::root_attributes;
use super::node::{NodeId, ROOT};
use super::server::FileServer;

impl FileServer {
    /// Attributes of a node or of an open handle of it, as the guest is about to be told them.
    pub(super) fn stat_node(&self, id: NodeId, handle: Option<u64>) -> io::Result<FileStat> {
        match handle.and_then(|handle| self.handle(id, handle).ok()) {
            Some(handle) => host::stat(&handle.file),
            None => host::stat(self.file(id)?.as_fd()),
        }
    }

    /// FUSE_GETATTR.
    pub(super) fn get_attributes(
        &self,
        id: NodeId,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        if id == ROOT {
            return Ok((root_attributes(), ROOT_TIMEOUT));
        }
        let stat = self.stat_node(id, handle)?;
        let timeout = self.remember(id, &stat);
        Ok((stat.to_stat64(), timeout))
    }

    /// FUSE_SETATTR. The owner comes before the mode: chown(2) clears bits that the same request
    /// may set.
    pub(super) fn set_attributes(
        &self,
        id: NodeId,
        wanted: &stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let file = self.writable(id)?;
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            // The kernel takes -1 for "no change", and so does FUSE.
            let uid = valid.contains(SetattrValid::UID) && wanted.st_uid != u32::MAX;
            let gid = valid.contains(SetattrValid::GID) && wanted.st_gid != u32::MAX;
            rustix::fs::chownat(
                &file,
                c"",
                uid.then(|| Uid::from_raw(wanted.st_uid)),
                gid.then(|| Gid::from_raw(wanted.st_gid)),
                AtFlags::EMPTY_PATH,
            )?;
        }
        if valid.contains(SetattrValid::MODE) {
            if self.kind(id)? == libc::S_IFLNK {
                return Err(errno(libc::EOPNOTSUPP));
            }
            self.descriptors.chmod(&file, wanted.st_mode)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(wanted.st_size).map_err(|_| errno(libc::EINVAL))?;
            if valid.contains(SetattrValid::KILL_SUIDGID) {
                self.clear_privileges(&file)?;
            }
            self.truncate(id, handle, size)?;
        }
        set_times(&file, wanted, valid)?;
        let stat = host::stat(&file)?;
        let timeout = self.remember(id, &stat);
        Ok((stat.to_stat64(), timeout))
    }

    /// Sets a file's length, by a handle that may write if there is one.
    fn truncate(&self, id: NodeId, handle: Option<u64>, size: u64) -> io::Result<()> {
        if let Some(handle) = handle.and_then(|handle| self.handle(id, handle).ok()) {
            match rustix::fs::ftruncate(&handle.file, size) {
                // Not open for writing (ftruncate(2)).
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::BADF) => {}
                done => return Ok(done?),
            }
        }
        let file = self.reopen(id, rustix::fs::OFlags::WRONLY)?;
        Ok(rustix::fs::ftruncate(&file, size)?)
    }

    /// FUSE_STATFS.
    pub(super) fn stat_filesystem(&self, id: NodeId) -> io::Result<statvfs64> {
        // SAFETY: statvfs64 is a plain C structure of integers, for which all zero bytes are
        // valid; the library gives no other way to make one.
        let mut out: statvfs64 = unsafe { std::mem::zeroed() };
        if id == ROOT {
            out.f_bsize = 4096;
            out.f_frsize = 4096;
            out.f_namemax = 255;
            return Ok(out);
        }
        let found = rustix::fs::fstatvfs(self.file(id)?.as_fd())?;
        out.f_bsize = found.f_bsize;
        out.f_frsize = found.f_frsize;
        out.f_blocks = found.f_blocks;
        out.f_bfree = found.f_bfree;
        out.f_bavail = found.f_bavail;
        out.f_files = found.f_files;
        out.f_ffree = found.f_ffree;
        out.f_favail = found.f_favail;
        out.f_namemax = found.f_namemax;
        Ok(out)
    }

    /// FUSE_ACCESS: the guest's kernel has checked the permissions; what it cannot know is that
    /// an export is read-only.
    pub(super) fn check_access(&self, id: NodeId, mask: u32) -> io::Result<()> {
        if mask & libc::W_OK as u32 == 0 {
            return self.kind(id).map(drop);
        }
        let kind = self.kind(id)?;
        let stored = matches!(kind, libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK);
        match self.export_of(id) {
            Ok(export) if export.read_only && stored => Err(errno(libc::EROFS)),
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Sets the times that a request names.
fn set_times(file: &OwnedFd, wanted: &stat64, valid: SetattrValid) -> io::Result<()> {
    if !valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
        return Ok(());
    }
    let time = |set, now, seconds, nanoseconds| Timespec {
        tv_sec: seconds,
        tv_nsec: if !valid.contains(set) {
            UTIME_OMIT
        } else if valid.contains(now) {
            UTIME_NOW
        } else {
            nanoseconds
        },
    };
    let times = Timestamps {
        last_access: time(
            SetattrValid::ATIME,
            SetattrValid::ATIME_NOW,
            wanted.st_atime,
            wanted.st_atime_nsec,
        ),
        last_modification: time(
            SetattrValid::MTIME,
            SetattrValid::MTIME_NOW,
            wanted.st_mtime,
            wanted.st_mtime_nsec,
        ),
    };
    Ok(rustix::fs::utimensat(
        file,
        c"",
        &times,
        AtFlags::EMPTY_PATH,
    )?)
}
