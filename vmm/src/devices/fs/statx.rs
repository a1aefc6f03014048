//! FUSE_STATX (linux/fuse.h, protocol 7.39): attributes with the time of creation.

use std::io;

use fuse_backend_rs::abi::fuse_abi::GETATTR_FH;
use rustix::fs::{StatxFlags, StatxTimestamp};
use vm_memory::ByteValued;

use super::host::errno;
use super::node::{NodeId, ROOT};
use super::server::FileServer;

/// `struct fuse_statx_in`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StatxIn {
    pub(super) getattr_flags: u32,
    reserved: u32,
    pub(super) fh: u64,
    sx_flags: u32,
    sx_mask: u32,
}

// SAFETY: plain integers without padding, as linux/fuse.h lays them out.
unsafe impl ByteValued for StatxIn {}

/// `struct fuse_sx_time`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Time {
    seconds: i64,
    nanoseconds: u32,
    reserved: i32,
}

impl From<StatxTimestamp> for Time {
    fn from(time: StatxTimestamp) -> Self {
        Time {
            seconds: time.tv_sec,
            nanoseconds: time.tv_nsec,
            reserved: 0,
        }
    }
}

/// `struct fuse_statx_out` with the `struct fuse_statx` in it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct StatxOut {
    attr_valid: u64,
    attr_valid_nsec: u32,
    flags: u32,
    spare: [u64; 2],
    mask: u32,
    blksize: u32,
    attributes: u64,
    nlink: u32,
    uid: u32,
    gid: u32,
    mode: u16,
    spare0: u16,
    ino: u64,
    size: u64,
    blocks: u64,
    attributes_mask: u64,
    atime: Time,
    btime: Time,
    ctime: Time,
    mtime: Time,
    rdev_major: u32,
    rdev_minor: u32,
    dev_major: u32,
    dev_minor: u32,
    spare2: [u64; 14],
}

// SAFETY: plain integers without padding, as linux/fuse.h lays them out.
unsafe impl ByteValued for StatxOut {}

impl FileServer {
    /// FUSE_STATX. The root has no more than FUSE_GETATTR tells: `ENOSYS` would make the guest
    /// give up the request for all files, so it gets the basic attributes.
    pub(super) fn extended_attributes(&self, id: NodeId, args: StatxIn) -> io::Result<StatxOut> {
        if id == ROOT {
            let root = super::lookup::root_attributes();
            return Ok(StatxOut {
                mask: StatxFlags::BASIC_STATS.bits(),
                blksize: 4096,
                nlink: 2,
                mode: u16::try_from(root.st_mode).map_err(|_| errno(libc::EIO))?,
                ino: ROOT,
                ..StatxOut::default()
            });
        }
        let handle = (args.getattr_flags & GETATTR_FH != 0).then_some(args.fh);
        let stat = self.stat_node(id, handle)?;
        let timeout = self.remember(id, &stat);
        let stx = &stat.0;
        let mask = (StatxFlags::BASIC_STATS | StatxFlags::BTIME).bits() & stx.stx_mask;
        Ok(StatxOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            mask,
            blksize: stx.stx_blksize,
            attributes: stx.stx_attributes.bits(),
            nlink: stx.stx_nlink,
            uid: stx.stx_uid,
            gid: stx.stx_gid,
            mode: stx.stx_mode,
            ino: stx.stx_ino,
            size: stx.stx_size,
            blocks: stx.stx_blocks,
            attributes_mask: stx.stx_attributes_mask.bits(),
            atime: stx.stx_atime.into(),
            btime: stx.stx_btime.into(),
            ctime: stx.stx_ctime.into(),
            mtime: stx.stx_mtime.into(),
            rdev_major: stx.stx_rdev_major,
            rdev_minor: stx.stx_rdev_minor,
            ..StatxOut::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use std::mem::size_of;

    use super::{StatxIn, StatxOut};

    #[test]
    fn the_layouts_are_those_of_the_kernel() {
        assert_eq!(size_of::<StatxIn>(), 24);
        // 32 bytes of fuse_statx_out, 256 of fuse_statx.
        assert_eq!(size_of::<StatxOut>(), 288);
    }
}
