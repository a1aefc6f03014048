//! The contents of files: open, read, write, and what else goes by a handle.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use fuse_backend_rs::abi::fuse_abi::{FOPEN_IN_KILL_SUIDGID, OpenOptions, WRITE_KILL_PRIV};
use fuse_backend_rs::api::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};

use super::host::{self, errno};
use super::node::{Identity, NodeId, Version};
use super::server::FileServer;
use super::table::Released;
use super::transfer::GuestTransfer;

/// Flags of open(2) that are the host's business. Not `O_DIRECT`: the guest's kernel passes its
/// own cache by, and the host's needs no aligned buffers. Not `O_APPEND`: each write says it, as
/// the guest may set and clear it on an open file, and pages written back never append.
const OPEN_FLAGS: OFlags = OFlags::RWMODE
    .union(OFlags::TRUNC)
    .union(OFlags::SYNC)
    .union(OFlags::DSYNC)
    .union(OFlags::NOATIME);

/// `FOPEN_NOFLUSH` (linux/fuse.h): no FUSE_FLUSH at close(2). The library has no name for it.
const FOPEN_NOFLUSH: u32 = 1 << 5;

/// Most bytes that one FUSE_COPY_FILE_RANGE copies, so that it does not hold up other requests for
/// long. The guest goes on from there.
const MAX_COPY: usize = 16 << 20;

/// The host's flags for a guest's open(2).
pub(super) fn open_flags(flags: u32) -> OFlags {
    OFlags::from_bits_retain(flags) & OPEN_FLAGS
}

fn may_write(flags: OFlags) -> bool {
    flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC)
}

impl FileServer {
    /// FUSE_OPEN.
    pub(super) fn open_file(
        &self,
        id: NodeId,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(u64, OpenOptions)> {
        let flags = open_flags(flags);
        if may_write(flags) && self.export_of(id)?.read_only {
            return Err(errno(libc::EROFS));
        }
        if self.handles().is_full() {
            return Err(errno(libc::ENFILE));
        }
        if fuse_flags & FOPEN_IN_KILL_SUIDGID != 0 && flags.contains(OFlags::TRUNC) {
            self.clear_privileges(self.file(id)?.as_ref())?;
        }
        let file = self.reopen(id, flags)?;
        let options = self.open_options(id, &file, flags);
        self.add_handle(id, file).map(|handle| (handle, options))
    }

    /// What the guest is told about a file that it opens: it keeps the pages it has if they are of
    /// the very version that is there now, in an export that only it changes.
    pub(super) fn open_options(&self, id: NodeId, file: &File, flags: OFlags) -> OpenOptions {
        let mut options = 0;
        if !may_write(flags) {
            options |= FOPEN_NOFLUSH;
        }
        if let Ok(stat) = host::stat(file) {
            let now = Version::from(&stat);
            let mut nodes = self.nodes();
            // Opening for writing copies up in an overlay.
            nodes.identify(id, Identity::from(&stat));
            if let Some(node) = nodes.get_mut(id) {
                let private = node
                    .export()
                    .and_then(|index| self.exports.get(index))
                    .is_some_and(|export| !export.shared);
                if private && node.held == Some(now) {
                    options |= OpenOptions::KEEP_CACHE.bits();
                }
                // Otherwise it drops them, and reads those of this version.
                node.held = Some(now);
            }
        }
        // SAFETY: the type is a plain set of bits that are copied to the guest as they are; a bit
        // without a name in the library breaks nothing.
        unsafe { OpenOptions::from_bits_unchecked(options) }
    }

    /// Gives an open file a number.
    pub(super) fn add_handle(&self, id: NodeId, file: File) -> io::Result<u64> {
        let handle = self.handles().insert(id, file)?;
        if let Some(node) = self.nodes().get_mut(id) {
            node.handles += 1;
        }
        Ok(handle)
    }

    /// FUSE_RELEASE and FUSE_RELEASEDIR.
    pub(super) fn close_handle(&self, id: NodeId, handle: u64) -> io::Result<()> {
        let handle = self
            .handles()
            .remove(id, handle)
            .ok_or_else(|| errno(libc::EBADF))?;
        let mut released = Released::default();
        self.nodes().drop_handle(id, &mut released);
        drop(handle);
        drop(released);
        Ok(())
    }

    /// FUSE_READ, from the file straight into the guest's memory.
    pub(super) fn read_file(
        &self,
        id: NodeId,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        let handle = self.handle(id, handle)?;
        let size = (size as usize).min(writer.available_bytes());
        let mut transfer = GuestTransfer::new(&handle.file, false);
        writer.write_from(&mut transfer, size, offset)
    }

    /// FUSE_WRITE, from the guest's memory straight into the file. `flags` are those of the open
    /// file at this moment; `write_back` is for pages that the guest writes back.
    #[allow(clippy::too_many_arguments)] // The fields of the request.
    pub(super) fn write_file(
        &self,
        id: NodeId,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        write_back: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handle(id, handle)?;
        if fuse_flags & WRITE_KILL_PRIV != 0 {
            self.clear_privileges(&handle.file)?;
        }
        let append = !write_back && OFlags::from_bits_retain(flags).contains(OFlags::APPEND);
        let mut transfer = GuestTransfer::new(&handle.file, append);
        let mut written = 0;
        // A short write is no error by itself (a full disk shows at the next); go on until the
        // file takes no more.
        while written < size as usize {
            let at = offset
                .checked_add(written as u64)
                .ok_or_else(|| errno(libc::EFBIG))?;
            match reader.read_to(&mut transfer, size as usize - written, at) {
                Ok(0) => break,
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) if written > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(written)
    }

    /// FUSE_FLUSH: what close(2) of a copy of the descriptor reports (some file systems tell only
    /// then that data could not be stored).
    pub(super) fn flush_file(&self, id: NodeId, handle: u64) -> io::Result<()> {
        let handle = self.handle(id, handle)?;
        let copy = OwnedFd::from(handle.file.try_clone()?);
        close(copy)
    }

    /// FUSE_FSYNC and FUSE_FSYNCDIR.
    pub(super) fn sync_handle(&self, id: NodeId, handle: u64, data_only: bool) -> io::Result<()> {
        let handle = self.handle(id, handle)?;
        if data_only {
            rustix::fs::fdatasync(&handle.file)?;
        } else {
            rustix::fs::fsync(&handle.file)?;
        }
        Ok(())
    }

    /// FUSE_SYNCFS: the host's file system that holds the node.
    pub(super) fn sync_filesystem(&self, id: NodeId) -> io::Result<()> {
        let Ok(export) = self.export_of(id) else {
            return Ok(()); // The synthetic root holds nothing.
        };
        if export.read_only {
            return Ok(());
        }
        let flags = if self.kind(id)? == libc::S_IFDIR {
            OFlags::RDONLY | OFlags::DIRECTORY
        } else {
            OFlags::RDONLY
        };
        Ok(rustix::fs::syncfs(self.reopen(id, flags)?)?)
    }

    /// FUSE_FALLOCATE.
    pub(super) fn allocate(
        &self,
        id: NodeId,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let handle = self.handle(id, handle)?;
        let mode = FallocateFlags::from_bits_retain(mode);
        Ok(rustix::fs::fallocate(&handle.file, mode, offset, length)?)
    }

    /// FUSE_LSEEK: where data and holes are. Everything else the guest knows by itself.
    pub(super) fn seek(
        &self,
        id: NodeId,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let handle = self.handle(id, handle)?;
        if self.kind(id)? != libc::S_IFREG {
            return Err(errno(libc::EINVAL));
        }
        let to = match whence as i32 {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(errno(libc::EINVAL)),
        };
        // The shared position that this moves is used by nothing: reads and writes name theirs.
        Ok(rustix::fs::seek(&handle.file, to)?)
    }

    /// FUSE_COPY_FILE_RANGE.
    pub(super) fn copy_range(
        &self,
        from: (NodeId, u64, u64),
        to: (NodeId, u64, u64),
        length: u64,
        flags: u64,
    ) -> io::Result<usize> {
        if flags != 0 {
            return Err(errno(libc::EINVAL));
        }
        let (source, mut source_offset) = (self.handle(from.0, from.1)?, from.2);
        let (target, mut target_offset) = (self.handle(to.0, to.1)?, to.2);
        let length = usize::try_from(length).unwrap_or(MAX_COPY).min(MAX_COPY);
        Ok(rustix::fs::copy_file_range(
            &source.file,
            Some(&mut source_offset),
            &target.file,
            Some(&mut target_offset),
            length,
        )?)
    }
}

/// Closes a descriptor and gives the error that close(2) reports.
fn close(file: OwnedFd) -> io::Result<()> {
    use std::os::fd::IntoRawFd;
    // SAFETY: the descriptor was owned here and is given up, so nothing else closes or uses it.
    if unsafe { libc::close(file.into_raw_fd()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
