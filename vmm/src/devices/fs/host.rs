//! System calls on the host's files, each by descriptor and at most one name deep, so that no
//! symbolic link and no `..` is ever followed on the guest's behalf.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use fuse_backend_rs::abi::fuse_abi::stat64;
use rustix::fs::{AtFlags, Mode, OFlags, Statx, StatxFlags, StatxTimestamp};
use rustix::path::DecInt;

/// What is asked of statx(2) for every file.
const STATX_MASK: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

/// An error by its number.
pub(super) fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// Tells a file of the host from every other while a descriptor of it is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileKey {
    /// Device number.
    pub(super) device: u64,
    /// Inode number on that device.
    pub(super) inode: u64,
    /// The mount through which it is reached (`stx_mnt_id`): one file seen through two mounts is
    /// two nodes, because in the guest it is part of two file systems.
    pub(super) mount: u64,
}

/// Attributes of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileStat(pub(super) Statx);

impl FileStat {
    pub(super) fn key(&self) -> FileKey {
        FileKey {
            device: rustix::fs::makedev(self.0.stx_dev_major, self.0.stx_dev_minor),
            inode: self.0.stx_ino,
            mount: self.0.stx_mnt_id,
        }
    }

    /// The file type bits of the mode (`S_IFMT`).
    pub(super) fn kind(&self) -> u32 {
        self.mode() & libc::S_IFMT
    }

    pub(super) fn mode(&self) -> u32 {
        u32::from(self.0.stx_mode)
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind() == libc::S_IFDIR
    }

    pub(super) fn is_regular(&self) -> bool {
        self.kind() == libc::S_IFREG
    }

    pub(super) fn links(&self) -> u32 {
        self.0.stx_nlink
    }

    /// Time of creation, where the file system keeps one.
    pub(super) fn born(&self) -> Option<StatxTimestamp> {
        (self.0.stx_mask & StatxFlags::BTIME.bits() != 0).then_some(self.0.stx_btime)
    }

    /// The same attributes in the form of the FUSE library.
    pub(super) fn to_stat64(self) -> stat64 {
        let stx = &self.0;
        // SAFETY: stat64 is a plain C structure of integers, for which all zero bytes are valid;
        // the library gives no other way to make one.
        let mut out: stat64 = unsafe { std::mem::zeroed() };
        out.st_dev = rustix::fs::makedev(stx.stx_dev_major, stx.stx_dev_minor);
        out.st_ino = stx.stx_ino;
        out.st_nlink = u64::from(stx.stx_nlink);
        out.st_mode = u32::from(stx.stx_mode);
        out.st_uid = stx.stx_uid;
        out.st_gid = stx.stx_gid;
        out.st_rdev = rdev(stx);
        out.st_size = stx.stx_size as i64;
        out.st_blksize = i64::from(stx.stx_blksize);
        out.st_blocks = stx.stx_blocks as i64;
        out.st_atime = stx.stx_atime.tv_sec;
        out.st_atime_nsec = i64::from(stx.stx_atime.tv_nsec);
        out.st_mtime = stx.stx_mtime.tv_sec;
        out.st_mtime_nsec = i64::from(stx.stx_mtime.tv_nsec);
        out.st_ctime = stx.stx_ctime.tv_sec;
        out.st_ctime_nsec = i64::from(stx.stx_ctime.tv_nsec);
        out
    }
}

/// A device number in the kernel's own 32-bit form (`new_encode_dev`, linux/kdev_t.h), which is
/// what FUSE carries in both directions.
fn rdev(stx: &Statx) -> u64 {
    let (major, minor) = (stx.stx_rdev_major, stx.stx_rdev_minor);
    u64::from((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// The inverse of [`rdev`]: (major, minor).
pub(super) fn split_rdev(rdev: u32) -> (u32, u32) {
    (
        (rdev & 0xfff00) >> 8,
        (rdev & 0xff) | ((rdev >> 12) & 0xfff00),
    )
}

/// Attributes of the file behind a descriptor.
pub(super) fn stat(file: impl AsFd) -> io::Result<FileStat> {
    let stx = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, STATX_MASK)?;
    Ok(FileStat(stx))
}

/// Attributes of a directory's entry, no link followed.
pub(super) fn stat_child(dir: impl AsFd, name: &CStr) -> io::Result<FileStat> {
    let stx = rustix::fs::statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, STATX_MASK)?;
    Ok(FileStat(stx))
}

/// A descriptor (`O_PATH`) of a directory's entry, no link followed and nothing opened.
pub(super) fn open_child(dir: impl AsFd, name: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

/// The process's own descriptors as a directory (`/proc/self/fd`), opened once: by it an `O_PATH`
/// descriptor becomes one that reads and writes, also after `/proc` is out of reach.
#[derive(Debug)]
pub(super) struct Descriptors(OwnedFd);

impl Descriptors {
    /// Opens `/proc/self/fd` of the running process.
    pub(super) fn open() -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(c"/proc/self/fd", flags, Mode::empty())?;
        Ok(Descriptors(dir))
    }

    /// Opens the very file that an `O_PATH` descriptor stands for. Only for regular files and
    /// directories: opening anything else could block, or act on a device.
    pub(super) fn reopen(&self, file: &OwnedFd, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let fd = rustix::fs::openat(&self.0, name_of(file), flags, Mode::empty())?;
        Ok(File::from(fd))
    }

    /// An `O_PATH` descriptor of an open file.
    pub(super) fn path_only(&self, file: &File) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(
            &self.0,
            name_of(file),
            flags,
            Mode::empty(),
        )?)
    }

    /// Changes the mode bits of a file that is not a symbolic link.
    pub(super) fn chmod(&self, file: impl AsFd, mode: u32) -> io::Result<()> {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        Ok(rustix::fs::chmodat(
            &self.0,
            name_of(file),
            mode,
            AtFlags::empty(),
        )?)
    }

    /// Makes a further name of a file.
    pub(super) fn link(&self, file: &OwnedFd, dir: &OwnedFd, name: &CStr) -> io::Result<()> {
        let follow = AtFlags::SYMLINK_FOLLOW;
        Ok(rustix::fs::linkat(
            &self.0,
            name_of(file),
            dir,
            name,
            follow,
        )?)
    }

    /// Makes this directory the calling thread's own working directory, for the calls that take
    /// nothing but a path (extended attributes). The thread must have a working directory of its
    /// own, see [`super::credentials`].
    pub(super) fn enter(&self) -> io::Result<()> {
        Ok(rustix::process::fchdir(&self.0)?)
    }
}

/// A descriptor's name in `/proc/self/fd`.
pub(super) fn name_of(file: impl AsFd) -> DecInt {
    DecInt::new(file.as_fd().as_raw_fd())
}
