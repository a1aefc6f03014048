//! The device.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use crate::devices::virtio::{
    Activation, Chain, ConfigSpace, DrainError, F_EVENT_IDX, QueueError, VirtioDevice, Virtqueue,
};
use crate::memory::GuestMemory;

/// receiveq and transmitq of port 0 (virtio 1.2, section 5.3.2). Few descriptors: Linux fills the
/// receive queue with a page for each, which would all be part of the template.
const QUEUES: [u16; 2] = [8, 64];
const TRANSMIT: usize = 1;

/// Most bytes written to the console's file in a VM's life: 4 MiB. The guest cannot fill the
/// host's disk.
pub const MAX_OUTPUT: u64 = 4 << 20;

/// Last line of a file that has reached [`MAX_OUTPUT`].
const CUT: &[u8] = b"\n[console output ends here: the limit is reached]\n";

/// Console with one port, output only. Buffers for input are left in the queue.
pub struct Console {
    queues: Vec<Virtqueue>,
    config: Arc<ConfigSpace>,
    output: Output,
}

/// The file and how much still fits into it.
struct Output {
    file: Option<File>,
    left: u64,
}

impl Console {
    /// A console that writes to `file`, a regular file: one that could block would hold up the
    /// other devices. Without one, output is discarded.
    pub fn new(file: Option<File>) -> Self {
        Self {
            queues: Vec::new(),
            // Columns, rows, maximal number of ports, emergency write: none of the features that
            // would give them a meaning is offered (virtio 1.2, section 5.3.4).
            config: Arc::new(ConfigSpace::new(vec![0; 12])),
            output: Output {
                file,
                left: MAX_OUTPUT,
            },
        }
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

    fn activate(&mut self, activation: Activation) {
        self.queues = activation.queues;
    }

    fn queues(&self) -> &[Virtqueue] {
        &self.queues
    }

    fn reset(&mut self) {
        self.queues.clear();
    }

    fn process_queue(&mut self, index: usize) -> Result<(), QueueError> {
        if index != TRANSMIT {
            return Ok(());
        }
        let Self { queues, output, .. } = self;
        queues[TRANSMIT].serve(|chain| output.write(chain))
    }

    fn drain(&mut self) -> Result<(), DrainError> {
        let Self { queues, output, .. } = self;
        if let Some(queue) = queues.get_mut(TRANSMIT) {
            queue.serve_all(|chain| output.write(chain))?;
        }
        Ok(())
    }
}

impl Output {
    /// Writes the device-readable part of a chain. Nothing is written into the chain: 0.
    fn write(&mut self, chain: Chain) -> u32 {
        for descriptor in chain.clone().readable() {
            self.append(chain.memory(), descriptor.addr(), descriptor.len());
        }
        0
    }

    fn append(&mut self, memory: &GuestMemory, start: GuestAddress, length: u32) {
        let Some(file) = &mut self.file else { return };
        let length = u64::from(length);
        let fits = length.min(self.left) as usize;
        // A buffer outside memory is the guest's own loss. Looked at before: what lies inside would
        // be written, and not be counted.
        if !memory.check_range(start, fits) {
            return;
        }
        // A file that cannot be written is given up: a full disk will not get better by trying.
        let failed = match memory.write_all_volatile_to(start, file, fits) {
            Ok(()) => None,
            Err(vm_memory::GuestMemoryError::IOError(error)) => Some(error),
            Err(_) => return,
        };
        self.left -= fits as u64;
        if let Some(error) = failed {
            log::warn!("console output is lost from here on: {error}");
            self.file = None;
        } else if self.left == 0 {
            if let Err(error) = file.write_all(CUT) {
                log::warn!("cannot end the console's file: {error}");
            }
            self.file = None;
        }
    }
}
