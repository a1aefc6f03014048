//! Moving bytes between a Unix stream and guest memory, without a copy in between.

use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use vm_memory::{GuestAddress, GuestMemory as _};

use crate::memory::GuestMemory;

/// Most pieces of guest memory moved by one system call. 64 KiB in pages and a header are 17.
const MAX_VECTORS: usize = 64;

/// Pieces of guest memory for one system call.
pub(super) struct Vectors<'m> {
    vectors: [libc::iovec; MAX_VECTORS],
    count: usize,
    bytes: usize,
    /// The pieces lie in it: it stays mapped for as long as this borrows it.
    memory: &'m GuestMemory,
    _not_send: PhantomData<*mut u8>,
}

/// Why a piece cannot be added.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// There are [`MAX_VECTORS`] of them.
    Full,
    /// It does not lie in guest memory.
    Address,
}

impl<'m> Vectors<'m> {
    pub(super) fn new(memory: &'m GuestMemory) -> Self {
        let empty = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Self {
            vectors: [empty; MAX_VECTORS],
            count: 0,
            bytes: 0,
            memory,
            _not_send: PhantomData,
        }
    }

    /// Adds `length` bytes at `start`.
    pub(super) fn push(&mut self, start: GuestAddress, length: usize) -> Result<(), Refused> {
        if length == 0 {
            return Ok(());
        }
        let slice = self
            .memory
            .get_slice(start, length)
            .map_err(|_| Refused::Address)?;
        let vector = self.vectors.get_mut(self.count).ok_or(Refused::Full)?;
        vector.iov_base = slice.ptr_guard_mut().as_ptr().cast();
        vector.iov_len = length;
        self.count += 1;
        self.bytes += length;
        Ok(())
    }

    /// Sum of the lengths.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets all pieces behind the first `bytes` bytes.
    pub(super) fn truncate(&mut self, bytes: usize) {
        while self.bytes > bytes {
            let surplus = self.bytes - bytes;
            let last = &mut self.vectors[self.count - 1];
            if last.iov_len > surplus {
                last.iov_len -= surplus;
                self.bytes -= surplus;
            } else {
                self.bytes -= last.iov_len;
                self.count -= 1;
            }
        }
    }

    /// Receives into the pieces, in their order. Never waits. Zero is the end of the stream.
    pub(super) fn receive(&mut self, stream: &UnixStream) -> io::Result<usize> {
        let mut message = self.message();
        loop {
            // SAFETY: unsafe because the kernel writes through raw pointers. `message` points to
            // `count` initialised vectors of `self`, each of which lies in guest memory (checked
            // in push) that stays mapped while `self.memory` is borrowed. Guest memory is shared
            // with the guest and holds no Rust value, so that writing to it breaks none.
            let result =
                unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
            match outcome(result) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                outcome => return outcome,
            }
        }
    }

    /// Sends the pieces, in their order, as far as the stream takes them. Never waits.
    pub(super) fn send(&mut self, stream: &UnixStream) -> io::Result<usize> {
        let message = self.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        loop {
            // SAFETY: unsafe because the kernel reads through raw pointers; sound for the reasons
            // given in receive(). That the guest changes the bytes meanwhile is its own affair:
            // they are copied by the kernel and not looked at here.
            let result = unsafe { libc::sendmsg(stream.as_raw_fd(), &message, flags) };
            match outcome(result) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                outcome => return outcome,
            }
        }
    }

    fn message(&mut self) -> libc::msghdr {
        // SAFETY: unsafe because the fields are not given one by one: the structure has private
        // padding on some systems. It is made of integers and pointers, for which zero is valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.vectors.as_mut_ptr();
        message.msg_iovlen = self.count as _;
        message
    }
}

fn outcome(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
