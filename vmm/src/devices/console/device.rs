//! The device.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::Output;
use crate::devices::virtio::{
    Chain, ConfigSpace, DrainError, F_EVENT_IDX, QueueError, VirtioDevice, Virtqueue,
};

/// receiveq and transmitq of port 0 (virtio 1.2, section 5.3.2). Few descriptors: Linux fills the
/// receive queue with a page for each, which would all be part of the template.
const QUEUES: [u16; 2] = [8, 64];
const TRANSMIT: usize = 1;

/// Console with one port, output only. Buffers for input are left in the queue.
pub struct Console {
    queues: Vec<Virtqueue>,
    config: Arc<ConfigSpace>,
    output: Option<Arc<Output>>,
}

impl Console {
    /// A console that writes to `output`. Without one, what the guest prints is discarded.
    pub fn new(output: Option<Arc<Output>>) -> Self {
        Self {
            queues: Vec::new(),
            // Columns, rows, maximal number of ports, emergency write: none of the features that
            // would give them a meaning is offered (virtio 1.2, section 5.3.4).
            config: Arc::new(ConfigSpace::new(vec![0; 12])),
            output,
        }
    }

    /// Prints the device-readable part of a chain. Nothing is written into the chain: 0.
    fn print(output: Option<&Output>, chain: Chain) -> u32 {
        if let Some(output) = output {
            for descriptor in chain.clone().readable() {
                output.write_from(chain.memory(), descriptor.addr(), descriptor.len());
            }
        }
        0
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX
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
        if index != TRANSMIT {
            return Ok(());
        }
        let Self { queues, output, .. } = self;
        queues[TRANSMIT].serve(|chain| Self::print(output.as_deref(), chain))
    }

    fn drain(&mut self) -> Result<(), DrainError> {
        let Self { queues, output, .. } = self;
        if let Some(queue) = queues.get_mut(TRANSMIT) {
            queue.serve_all(|chain| Self::print(output.as_deref(), chain))?;
        }
        Ok(())
    }
}
