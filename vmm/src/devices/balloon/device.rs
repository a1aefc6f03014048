//! The device.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::{Address, Bytes, GuestAddress, Le32};

use crate::devices::virtio::{
    Chain, ConfigSpace, DrainError, F_EVENT_IDX, QueueError, VirtioDevice, Virtqueue,
};
use crate::memory::{Backing, PAGE};

/// Feature bit: the driver tells which pages are free, with the queue `reporting_vq`
/// (virtio 1.2, section 5.5.3, `VIRTIO_BALLOON_F_PAGE_REPORTING`).
const F_PAGE_REPORTING: u64 = 1 << 5;

/// inflateq, deflateq, and reporting_vq. The number of the last is the lowest that is free: the
/// queues between belong to features that are not offered, and drivers do not count those. Linux
/// wants 32 descriptors to report with (`PAGE_REPORTING_CAPACITY`).
const QUEUES: [u16; 3] = [8, 8, 32];
const INFLATE: usize = 0;
const REPORTING: usize = 2;

/// num_pages and actual, both 0 (virtio 1.2, section 5.5.4): nobody wants the balloon to be
/// larger, so the driver has nothing to write there.
const CONFIG_BYTES: usize = 8;

/// Page numbers taken from one chain of the inflateq at most: as many as Linux puts into one.
const MAX_NUMBERS: u32 = 256;

/// A host that refuses once may refuse always; the log is not the guest's to fill.
const MAX_REFUSALS_LOGGED: u32 = 8;

/// Balloon device.
///
/// It is never inflated from here: a guest's size is that of its template. It is there for free
/// page reporting, by which the driver tells of its own accord what is free, some seconds after it
/// became so, and does not hand it out until it has the answer.
///
/// Poisoning is not offered (`VIRTIO_BALLOON_F_PAGE_POISON`), so what a page holds when the driver
/// takes it into use again is undefined; a driver that relies on it does not report. Neither is
/// deflating when memory is short: there is nothing to deflate.
pub struct Balloon {
    queues: Vec<Virtqueue>,
    config: Arc<ConfigSpace>,
    backing: Backing,
    refusals: u32,
}

impl Balloon {
    /// A device of a machine whose memory is mapped from `backing`.
    pub fn new(backing: Backing) -> Self {
        Self {
            queues: Vec::new(),
            config: Arc::new(ConfigSpace::new(vec![0; CONFIG_BYTES])),
            backing,
            refusals: 0,
        }
    }

    fn give_back(&mut self, chain: &Chain, start: GuestAddress, bytes: u64) {
        if let Err(error) = self.backing.give_back(chain.memory(), start, bytes) {
            self.refusals = self.refusals.saturating_add(1);
            if self.refusals <= MAX_REFUSALS_LOGGED {
                log::warn!("memory that the guest does not need is kept: {error}");
            }
        }
    }

    /// Each descriptor is a range of free pages.
    fn report(&mut self, chain: &Chain) {
        for range in chain.clone().writable() {
            self.give_back(chain, range.addr(), range.len().into());
        }
    }

    /// The chain holds page numbers, 32 bits each, little-endian.
    fn inflate(&mut self, chain: &Chain) {
        let mut left = MAX_NUMBERS;
        for piece in chain.clone().readable() {
            for index in 0..left.min(piece.len() / 4) {
                let number = piece.addr().checked_add(4 * u64::from(index));
                let number = number.and_then(|at| chain.memory().read_obj::<Le32>(at).ok());
                let Some(number) = number else { return };
                let page = u64::from(u32::from(number)) * PAGE;
                self.give_back(chain, GuestAddress(page), PAGE);
                left -= 1;
            }
        }
    }

    /// What is taken out of the balloon (deflateq) can be used at once: the host has the memory
    /// when it is touched.
    fn answer(&mut self, index: usize, chain: &Chain) {
        match index {
            INFLATE => self.inflate(chain),
            REPORTING => self.report(chain),
            _ => {}
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX | F_PAGE_REPORTING
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
        // Taken out, as what answers the chains is the rest of the device.
        let mut queues = std::mem::take(&mut self.queues);
        let outcome = queues.get_mut(index).map_or(Ok(()), |queue| {
            queue.serve(|chain| {
                self.answer(index, &chain);
                0
            })
        });
        self.queues = queues;
        outcome
    }

    fn drain(&mut self) -> Result<(), DrainError> {
        let mut queues = std::mem::take(&mut self.queues);
        let outcome = queues
            .iter_mut()
            .enumerate()
            .try_for_each(|(index, queue)| {
                queue.serve_all(|chain| {
                    self.answer(index, &chain);
                    0
                })
            });
        self.queues = queues;
        Ok(outcome?)
    }
}
