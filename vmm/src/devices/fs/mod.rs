//! The virtio-fs device and its file server.
//!
//! One device (tag `forkvm`) exports one tree: a synthetic, read-only root whose entries are the
//! [`Export`]s. The server keeps what the guest knows by number in a node table by path (so that
//! it can be saved with a template and found again in a child), and binds each number to one file
//! for the machine's life. `docs/files.md` tells the whole story.
//!
//! Sources: virtio 1.2, section 5.11; linux/fuse.h (protocol 7.33 and what of later versions is
//! named in `request`); fuse-backend-rs for the messages.

mod attributes;
mod credentials;
mod data;
mod device;
mod directories;
mod error;
mod export;
mod filesystem;
mod handles;
mod host;
mod limits;
mod lookup;
mod names;
mod node;
mod persist;
mod request;
mod server;
mod statx;
mod table;
#[cfg(test)]
mod tests;
mod traffic;
mod transfer;
mod xattrs;

pub(crate) use credentials::SERVING;
pub use device::{Fs, TAG};
pub use error::Error;
pub use export::Export;
pub use limits::Limits;
pub use persist::{FsState, NodeState};
pub use server::FileServer;
pub use traffic::Traffic;
