//! Entropy device (virtio 1.2, section 5.4): random bytes of the host.

mod device;
mod persist;
#[cfg(test)]
mod tests;

pub use device::Rng;
pub use persist::RngState;
