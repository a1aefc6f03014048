//! The device.

use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::Bytes;

use crate::devices::virtio::{
    Chain, ConfigSpace, DrainError, F_EVENT_IDX, QueueError, VirtioDevice, Virtqueue,
};

/// One queue, requestq. Linux has one buffer in it at a time.
const QUEUES: [u16; 1] = [8];

/// Most bytes given for one buffer, however large it is. A device may write fewer than asked for
/// (virtio 1.2, section 5.4.6.1); a driver asks again.
const MAX_BYTES: usize = 4096;

/// Entropy device.
///
/// In a template it gives nothing: drivers ask for bytes before anybody wants them (Linux keeps 64
/// of them), and what is given before the freeze would be the same in all children. So the
/// request stays in the queue, and each child answers it with bytes of its own, as soon as it
/// starts: fresh entropy for the guest's kernel that no agent has to bring.
pub struct Rng {
    queues: Vec<Virtqueue>,
    config: Arc<ConfigSpace>,
    gives: bool,
}

impl Rng {
    /// A device that gives the host's random bytes, or, in a template, none.
    pub fn new(gives: bool) -> Self {
        Self {
            queues: Vec::new(),
            config: Arc::default(),
            gives,
        }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
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
        match self.queues.get_mut(index) {
            Some(queue) if self.gives => queue.serve(fill),
            _ => Ok(()),
        }
    }

    fn drain(&mut self) -> Result<(), DrainError> {
        if self.gives {
            self.queues
                .iter_mut()
                .try_for_each(|queue| queue.serve_all(fill))?;
        }
        Ok(())
    }
}

/// Fills the device-writable part of a chain, up to [`MAX_BYTES`]. Returns the number of bytes
/// written, which ends at the first descriptor that does not lie in memory.
fn fill(chain: Chain) -> u32 {
    let mut random = [0; MAX_BYTES];
    let mut written = 0;
    for descriptor in chain.clone().writable() {
        let wanted = (MAX_BYTES - written).min(descriptor.len() as usize);
        let bytes = &mut random[..wanted];
        // At most 256 bytes come without the chance of a short read (getrandom(2)).
        for piece in bytes.chunks_mut(256) {
            if let Err(error) = getrandom(&mut *piece, GetRandomFlags::empty()) {
                log::error!("cannot get random bytes: {error}");
                return written as u32;
            }
        }
        if chain
            .memory()
            .write_slice(bytes, descriptor.addr())
            .is_err()
        {
            break;
        }
        written += wanted;
        if written == MAX_BYTES {
            break;
        }
    }
    written as u32
}
