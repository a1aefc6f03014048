//! Reads and writes between a file and the guest's memory, without a copy in between.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;

use super::host::errno;

/// Most pieces of one transfer (`UIO_MAXIOV`, linux/uio.h); the caller goes on with the rest.
const MAX_PIECES: usize = libc::UIO_MAXIOV as usize;

/// One open file as the source or the target of a transfer at an offset.
pub(super) struct GuestTransfer<'a> {
    file: &'a File,
    /// Writes go to the end of the file, wherever that is, instead of the offset.
    append: bool,
}

impl<'a> GuestTransfer<'a> {
    pub(super) fn new(file: &'a File, append: bool) -> Self {
        GuestTransfer { file, append }
    }
}

/// The pieces of guest memory as the kernel wants them.
fn pieces(buffers: &[FileVolatileSlice]) -> Vec<libc::iovec> {
    buffers
        .iter()
        .take(MAX_PIECES)
        .map(|buffer| libc::iovec {
            iov_base: buffer.as_ptr().cast(),
            iov_len: buffer.len(),
        })
        .collect()
}

fn signed(offset: u64) -> io::Result<libc::off64_t> {
    libc::off64_t::try_from(offset).map_err(|_| errno(libc::EINVAL))
}

fn count(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

impl FileReadWriteVolatile for GuestTransfer<'_> {
    fn read_vectored_at_volatile(
        &mut self,
        buffers: &[FileVolatileSlice],
        offset: u64,
    ) -> io::Result<usize> {
        let pieces = pieces(buffers);
        let offset = signed(offset)?;
        let fd = self.file.as_raw_fd();
        // SAFETY: each piece is guest memory that stays mapped while its slice is borrowed, and
        // the kernel writes nothing beyond it; other users of guest memory expect it to change.
        let read = unsafe { libc::preadv64(fd, pieces.as_ptr(), pieces.len() as i32, offset) };
        count(read)
    }

    fn write_vectored_at_volatile(
        &mut self,
        buffers: &[FileVolatileSlice],
        offset: u64,
    ) -> io::Result<usize> {
        let pieces = pieces(buffers);
        let offset = signed(offset)?;
        let flags = if self.append { libc::RWF_APPEND } else { 0 };
        let fd = self.file.as_raw_fd();
        // SAFETY: each piece is guest memory that stays mapped while its slice is borrowed; the
        // kernel only reads it.
        let written =
            unsafe { libc::pwritev2(fd, pieces.as_ptr(), pieces.len() as i32, offset, flags) };
        count(written)
    }

    fn read_at_volatile(&mut self, slice: FileVolatileSlice, offset: u64) -> io::Result<usize> {
        self.read_vectored_at_volatile(&[slice], offset)
    }

    fn write_at_volatile(&mut self, slice: FileVolatileSlice, offset: u64) -> io::Result<usize> {
        self.write_vectored_at_volatile(&[slice], offset)
    }

    // A FUSE request always names its offset.
    fn read_volatile(&mut self, _slice: FileVolatileSlice) -> io::Result<usize> {
        Err(errno(libc::ESPIPE))
    }

    fn write_volatile(&mut self, _slice: FileVolatileSlice) -> io::Result<usize> {
        Err(errno(libc::ESPIPE))
    }
}
