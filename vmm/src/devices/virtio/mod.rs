//! What every virtio device has in common: the traits a device implements, its virtqueues, its
//! interrupt, its configuration space, and the MMIO transport through which a driver finds it.
//!
//! Numbers and rules are those of the virtio specification 1.2 ("virtio 1.2" below).

mod config;
mod interrupt;
pub mod mmio;
mod queue;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use config::ConfigSpace;
pub use interrupt::{Interrupt, InterruptLine};
pub use queue::{Chain, QueueError, QueueState, Virtqueue, signal};

use std::sync::Arc;

use serde::{Serialize, de::DeserializeOwned};
use vmm_sys_util::epoll::EventSet;

/// Feature bit: the device follows virtio 1.0 or newer (virtio 1.2, section 6). The transport
/// offers it for every device and refuses a driver that does not take it.
pub const F_VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
/// Feature bit: descriptors may refer to tables of descriptors (virtio 1.2, section 2.7.5.3).
/// [`Chain`] follows them.
pub const F_INDIRECT_DESC: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
/// Feature bit: notifications are suppressed by ring index (virtio 1.2, section 2.7.7).
/// [`Virtqueue`] does it for every device that offers the bit.
pub const F_EVENT_IDX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Why a device could not be brought to rest: something of its is in flight that no saved state
/// could hold. The message names it.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// A queue is broken; the driver would have to reset the device.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// Something is in flight.
    #[error("{0} is in flight")]
    InFlight(String),
}

/// What a device is handed when the driver has set `DRIVER_OK`, and again when it is restored.
pub struct Activation {
    /// One for each of [`VirtioDevice::queue_sizes`], in that order. A queue that the driver did
    /// not set up is there too; it is never ready and always empty.
    pub queues: Vec<Virtqueue>,
    /// The features that driver and device agreed on.
    pub features: u64,
    /// For changes of the configuration space; queues carry their own.
    pub interrupt: Interrupt,
}

/// A virtio device, behind the MMIO transport.
///
/// A device sits in a mutex. Its event loop takes the lock for each event; a vCPU's thread takes
/// it only to activate and to reset the device. A reset waits for the event being processed:
/// once the driver's write is done, the device must not touch its memory any more. All other
/// registers are answered by the transport without the lock, so a vCPU never waits for data to
/// move.
///
/// The guest is hostile: nothing that comes out of a queue may make a method panic, loop without
/// bound, or allocate without bound.
pub trait VirtioDevice: Send {
    /// The device's number (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// Features offered, without [`F_VERSION_1`], which the transport adds.
    fn features(&self) -> u64;

    /// The largest size of each queue, in descriptors: powers of two, at most 32768. Their number
    /// is the number of queues. Both are fixed for the device's life.
    fn queue_sizes(&self) -> &[u16];

    /// The configuration space that drivers read.
    fn config(&self) -> Arc<ConfigSpace>;

    /// The queues, empty while the device is not active. Read to save their state.
    fn queues(&self) -> &[Virtqueue];

    /// Where the device keeps them.
    fn queues_mut(&mut self) -> &mut Vec<Virtqueue>;

    /// Takes the queues. Must not wait and must not touch guest memory: it runs in a vCPU's
    /// thread or in a fork, and every touched page of a fork costs.
    fn activate(&mut self, activation: Activation) {
        *self.queues_mut() = activation.queues;
    }

    /// Gives up the queues and everything that came from the driver. When this returns the device
    /// does not touch guest memory until it is activated again.
    fn reset(&mut self) {
        self.queues_mut().clear();
    }

    /// The driver has notified queue `index`; also called once for each queue after a start (see
    /// [`super::Devices::start`]), so there may be nothing in it. Never called while inactive.
    ///
    /// An error means that the driver broke the rules of the ring: the caller resets the device
    /// and sets `DEVICE_NEEDS_RESET`.
    fn process_queue(&mut self, index: usize) -> Result<(), QueueError>;

    /// A descriptor that the device registered under `token` (see
    /// [`super::event_loop::Registrar`]) is ready. Also called while inactive: readiness is
    /// told only once.
    fn process_source(&mut self, token: u32, ready: EventSet) -> Result<(), QueueError> {
        let _ = (token, ready);
        Ok(())
    }

    /// Brings the device to rest, so that its state can be saved: processes whatever the driver
    /// made available. vCPUs are paused and the event loop has stopped; called while inactive too.
    fn drain(&mut self) -> Result<(), DrainError>;
}

/// Saving and restoring: how a device gets from a template into a fork.
pub trait Persist: Sized {
    /// What is saved. It goes into the template's state file; its layout is part of the state
    /// format version.
    type State: Serialize + DeserializeOwned;
    /// What the restored object needs beside its state: this child's own backends.
    type Args;
    /// Why a state cannot be restored.
    type Error: std::error::Error;

    /// The state, only after [`VirtioDevice::drain`]. Queues are not part of it: the transport
    /// saves them.
    fn save(&self) -> Self::State;

    /// An inactive device with this state. The transport activates it afterwards.
    fn restore(args: Self::Args, state: &Self::State) -> Result<Self, Self::Error>;
}
