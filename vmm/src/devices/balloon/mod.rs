//! Balloon device (virtio 1.2, section 5.5): the guest's free memory goes back to the host.

mod device;
mod persist;
#[cfg(test)]
mod tests;

pub use device::Balloon;
pub use persist::BalloonState;
