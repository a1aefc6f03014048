//! A descriptor that is read and written without blocking: a stream connection, the agent's end of
//! a pipe, or a terminal's master.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{buffer::spare_capacity, io::Errno, net::Shutdown};
use tokio::io::{Interest, unix::AsyncFd};

/// Bytes that are moved at once: what a pipe holds (pipe(7)), and what one vsock packet carries at most (Linux'
/// `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`). Fewer of them would be more packets, each with its exits and its change of tasks on
/// the host. What a stream does not need of it is not touched, and so no page of a child's own.
pub(crate) const CHUNK: usize = 64 * 1024;

/// Registers a non-blocking descriptor with the runtime.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the registration is only sound while the descriptor stays the same open file: an
    // OwnedFd does, and AsyncFd hands out nothing but shared references to it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}

/// Reads once without waiting: `None` if there is nothing yet, 0 at the end.
fn attempt(mut read: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<Option<usize>> {
    loop {
        return match read() {
            Ok(length) => Ok(Some(length)),
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => Ok(None),
            // A terminal's master when the last slave has been closed: the end of its output.
            Err(Errno::IO) => Ok(Some(0)),
            Err(error) => Err(error.into()),
        };
    }
}

/// One descriptor registered with the runtime.
#[derive(Debug)]
pub(crate) struct Channel {
    fd: AsyncFd<OwnedFd>,
}

impl Channel {
    /// Takes the descriptor over and makes it non-blocking.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        let interest = match flags & rustix::fs::OFlags::ACCMODE {
            rustix::fs::OFlags::RDONLY => Interest::READABLE,
            rustix::fs::OFlags::WRONLY => Interest::WRITABLE,
            _ => Interest::READABLE | Interest::WRITABLE,
        };
        Ok(Self {
            fd: register(fd, interest)?,
        })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.get_ref().as_fd()
    }

    /// Reads what is there without waiting, as much as the buffer has capacity for, in place of what it held: `None`
    /// if that is nothing yet, 0 at the end.
    pub(crate) fn try_read(&self, buffer: &mut Vec<u8>) -> io::Result<Option<usize>> {
        buffer.clear();
        attempt(|| rustix::io::read(&self.fd, spare_capacity(buffer)))
    }

    /// Waits until there is something to read, or the end.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        let mut guard = self.fd.readable().await?;
        // What is left is found out by reading until `try_read` answers `None`; from then on the
        // next wait is for the next event.
        guard.clear_ready();
        Ok(())
    }

    /// Reads at least one byte as [`Channel::try_read`] does, or 0 at the end.
    pub(crate) async fn read(&self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        loop {
            let mut guard = self.fd.readable().await?;
            match self.try_read(buffer)? {
                Some(length) => return Ok(length),
                None => guard.clear_ready(),
            }
        }
    }

    /// Fills the buffer or fails.
    pub(crate) async fn read_exact(&self, buffer: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            let mut guard = self.fd.readable().await?;
            match attempt(|| rustix::io::read(&self.fd, &mut buffer[filled..]))? {
                Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(length) => filled += length,
                None => guard.clear_ready(),
            }
        }
        Ok(())
    }

    /// Writes all of it, waiting for the reader.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.fd.writable().await?;
            match rustix::io::write(&self.fd, bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => guard.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Half-closes a connection: the other side reads the end.
    pub(crate) fn end_output(&self) {
        // The other side may have gone already, which is the end as well.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }
}
