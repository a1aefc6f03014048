//! Network device (virtio 1.2, section 5.1): slots that wait for a backend.

mod device;
mod persist;
#[cfg(test)]
mod tests;

pub use device::{Net, mac_address};
pub use persist::NetState;
