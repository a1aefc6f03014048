//! Console device (virtio 1.2, section 5.3): what the guest prints goes to a file.

mod device;
mod persist;
#[cfg(test)]
mod tests;

pub use device::{Console, MAX_OUTPUT};
pub use persist::ConsoleState;
