//! One end of the control socket: JSON packets with descriptors beside them.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};
use serde::{Serialize, de::DeserializeOwned};

use super::{MAX_DESCRIPTORS, MAX_PACKET};

/// What can go wrong on a control socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system call failed. `WouldBlock` on a non-blocking socket is passed on as it is.
    #[error("control socket: {0}")]
    Io(#[from] io::Error),
    /// A packet longer than [`MAX_PACKET`], or with more than [`MAX_DESCRIPTORS`].
    #[error("a control packet is larger than {MAX_PACKET} bytes or {MAX_DESCRIPTORS} descriptors")]
    TooLarge,
    /// A packet that is not the JSON value it should be.
    #[error("a control packet cannot be understood: {0}")]
    Syntax(#[from] serde_json::Error),
}

impl Error {
    /// Whether a non-blocking socket has nothing to read, or no room.
    pub fn would_block(&self) -> bool {
        matches!(self, Error::Io(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

/// One end of a control socket.
#[derive(Debug)]
pub struct Socket(OwnedFd);

impl Socket {
    /// Wraps a `SOCK_SEQPACKET` socket.
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Makes both ends; both are close-on-exec and blocking.
    ///
    /// # Errors
    /// The system call's.
    pub fn pair() -> Result<(Self, Self), Error> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(io::Error::from)?;
        Ok((Self(ours), Self(theirs)))
    }

    /// Switches non-blocking mode, for an owner that waits for readiness itself.
    ///
    /// # Errors
    /// The system call's.
    pub fn set_nonblocking(&self, on: bool) -> Result<(), Error> {
        rustix::io::ioctl_fionbio(&self.0, on).map_err(io::Error::from)?;
        Ok(())
    }

    /// The descriptor itself.
    pub fn into_inner(self) -> OwnedFd {
        self.0
    }

    /// Sends one packet.
    ///
    /// # Errors
    /// [`Error::TooLarge`] before anything is sent; else the system call's.
    pub fn send<M: Serialize>(&self, message: &M, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_PACKET || fds.len() > MAX_DESCRIPTORS {
            return Err(Error::TooLarge);
        }
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds.len()))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        loop {
            match sendmsg(
                &self.0,
                &[IoSlice::new(&bytes)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            ) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        }
    }

    /// Receives one packet, or `None` when the peer has closed its end. Descriptors that arrive
    /// are close-on-exec.
    ///
    /// # Errors
    /// A packet that is too large or not an `M`; the descriptors that came with it are closed.
    pub fn receive<M: DeserializeOwned>(&self) -> Result<Option<(M, Vec<OwnedFd>)>, Error> {
        let mut bytes = vec![0; MAX_PACKET];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match recvmsg(
                &self.0,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(received) => break received,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Err(errno) => return Err(io::Error::from(errno).into()),
            }
        };
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(Error::TooLarge);
        }
        if received.bytes == 0 {
            return Ok(None);
        }
        Ok(Some((
            serde_json::from_slice(&bytes[..received.bytes])?,
            fds,
        )))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests;
