//! Saving and restoring the transport, queues included.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::{DRIVER_OK, FEATURES_OK, MmioTransport, Notifications, Registers, rings_valid};
use crate::devices::event_loop::{SharedDevice, lock};
use crate::devices::virtio::{InterruptLine, Persist, QueueError, QueueState, Virtqueue};
use crate::memory::GuestMemory;

/// What is saved of a transport: every register, and the queues where they stand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    pub(super) device_type: u32,
    pub(super) status: u32,
    pub(super) device_features_sel: u32,
    pub(super) driver_features_sel: u32,
    pub(super) driver_features: u64,
    pub(super) queue_sel: u32,
    pub(super) interrupt_status: u32,
    pub(super) config_generation: u32,
    pub(super) queues: Vec<QueueState>,
}

/// What a transport needs beside its state.
pub struct TransportArgs {
    /// The device, restored and not yet active.
    pub(crate) device: SharedDevice,
    /// This child's memory.
    pub memory: Arc<GuestMemory>,
    /// Where the device's interrupts go.
    pub line: Box<dyn InterruptLine>,
    /// How the driver's notifications reach the device.
    pub notifications: Notifications,
}

/// A saved state that is not one of this device.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Another kind of device.
    #[error("state is of a device of type {saved}, this one is of type {expected}")]
    DeviceType {
        /// In the state.
        saved: u32,
        /// The device's.
        expected: u32,
    },
    /// The driver uses features that this device does not offer.
    #[error("state has features {saved:#x}, the device offers {offered:#x}")]
    Features {
        /// In the state.
        saved: u64,
        /// The device's.
        offered: u64,
    },
    /// Another number of queues, other maximal sizes, or rings outside memory.
    #[error("state has queues that do not fit the device or its memory")]
    Queues,
    /// An impossible queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
}

impl Persist for MmioTransport {
    type State = TransportState;
    type Args = TransportArgs;
    type Error = RestoreError;

    fn save(&self) -> TransportState {
        let registers = lock(&self.registers).clone();
        let device = lock(&self.device);
        let queues = match device.queues() {
            [] => registers.queues,
            active => active.iter().map(Virtqueue::state).collect(),
        };
        TransportState {
            device_type: self.device_type,
            status: registers.status,
            device_features_sel: registers.device_features_sel,
            driver_features_sel: registers.driver_features_sel,
            driver_features: registers.driver_features,
            queue_sel: registers.queue_sel,
            interrupt_status: self.interrupt.status(),
            config_generation: self.config.generation(),
            queues,
        }
    }

    /// Activates the device if it was active. Does not touch guest memory.
    fn restore(args: TransportArgs, state: &TransportState) -> Result<Self, RestoreError> {
        let mut transport = Self::new(args.device, args.memory, args.line, args.notifications);
        transport.check(state)?;
        let mut registers = Registers {
            status: state.status,
            device_features_sel: state.device_features_sel,
            driver_features_sel: state.driver_features_sel,
            driver_features: state.driver_features,
            queue_sel: state.queue_sel,
            queues: state.queues.clone(),
        };
        transport.interrupt.restore_status(state.interrupt_status);
        transport.config.restore_generation(state.config_generation);
        if registers.status & DRIVER_OK != 0 {
            transport.activate(&mut registers)?;
        }
        transport.registers = Mutex::new(registers);
        Ok(transport)
    }
}

impl MmioTransport {
    /// Sends the interrupt again if the driver had not acknowledged it when the state was saved.
    /// An edge may have been on its way to the interrupt controller, whose state was saved
    /// without it; one too many finds nothing to do. The interrupt controllers are restored by
    /// then.
    pub(crate) fn repeat_interrupt(&self) {
        if self.interrupt.status() != 0 {
            self.interrupt.repeat();
        }
    }

    fn check(&self, state: &TransportState) -> Result<(), RestoreError> {
        if state.device_type != self.device_type {
            return Err(RestoreError::DeviceType {
                saved: state.device_type,
                expected: self.device_type,
            });
        }
        // Before FEATURES_OK the driver may have written anything.
        if state.status & FEATURES_OK != 0 && !self.acceptable(state.driver_features) {
            return Err(RestoreError::Features {
                saved: state.driver_features,
                offered: self.offered,
            });
        }
        let fits = state.queues.len() == self.queue_sizes.len()
            && state
                .queues
                .iter()
                .zip(&self.queue_sizes)
                .all(|(queue, &max_size)| {
                    queue.max_size == max_size && (!queue.ready || rings_valid(queue, &self.memory))
                });
        if fits {
            Ok(())
        } else {
            Err(RestoreError::Queues)
        }
    }
}
