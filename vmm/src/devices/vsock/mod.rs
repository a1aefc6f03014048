//! Socket device (virtio 1.2, section 5.10): connections from the host to ports of the guest.
//!
//! Each connection joins a Unix stream with one of the guest's sockets. Only the host opens
//! connections; what the guest tries to open is refused with a reset. Bytes are moved straight
//! between the stream and guest memory; only what a slow reader on the host leaves behind is kept
//! here, and the credit given to the guest bounds it.

mod connection;
mod device;
mod multiplexer;
mod packet;
mod persist;
mod rings;
mod stream;
#[cfg(test)]
mod tests;

pub use connection::BUFFER;
pub use device::{GUEST_CID, Vsock};
pub use multiplexer::{ConnectError, MAX_CONNECTIONS};
pub use persist::{VsockArgs, VsockState};
