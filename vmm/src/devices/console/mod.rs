//! Console device (virtio 1.2, section 5.3): what the guest prints goes to a file.

mod device;
mod output;
mod persist;
#[cfg(test)]
mod tests;

pub use device::Console;
pub use output::{MAX_OUTPUT, Output};
pub use persist::ConsoleState;
