//! The device.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS};

use crate::devices::virtio::{
    ConfigSpace, DrainError, F_EVENT_IDX, QueueError, VirtioDevice, Virtqueue,
};

/// receiveq1 and transmitq1 (virtio 1.2, section 5.1.2).
const QUEUES: [u16; 2] = [256, 256];
const TRANSMIT: usize = 1;

/// Value of the field `status`: no `VIRTIO_NET_S_LINK_UP` (virtio 1.2, section 5.1.4).
const LINK_DOWN: u16 = 0;

/// The MAC address that the slot's device has in every template. Locally administered, unicast;
/// the agent gives the interface its own address before it is used.
pub fn mac_address(slot: u8) -> [u8; 6] {
    [0x02, b'f', b'k', b'v', b'm', slot]
}

/// Network device without a backend: the link is down, nothing is received, and what the driver
/// sends all the same is discarded.
///
/// Offload features are not offered: whether they hold depends on the backend, but drivers
/// negotiate them once, in the template.
pub struct Net {
    queues: Vec<Virtqueue>,
    config: Arc<ConfigSpace>,
}

impl Net {
    /// The device of network slot `slot`, counted from 0.
    pub fn new(slot: u8) -> Self {
        let mut config = mac_address(slot).to_vec();
        config.extend(LINK_DOWN.to_le_bytes());
        Self {
            queues: Vec::new(),
            config: Arc::new(ConfigSpace::new(config)),
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX | 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn queues(&self) -> &[Virtqueue] {
        &self.queues
    }

    fn queues_mut(&mut self) -> &mut Vec<Virtqueue> {
        &mut self.queues
    }

    fn process_queue(&mut self, index: usize) -> Result<(), QueueError> {
        if index == TRANSMIT {
            self.queues[TRANSMIT].serve(|_| 0)
        } else {
            Ok(())
        }
    }

    fn drain(&mut self) -> Result<(), DrainError> {
        if let Some(queue) = self.queues.get_mut(TRANSMIT) {
            queue.serve_all(|_| 0)?;
        }
        Ok(())
    }
}
