//! A virtqueue as devices use it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;
use crate::memory::GuestMemory;

/// A descriptor chain that the driver made available. Iterating it yields its descriptors, at
/// most as many as the queue (or the indirect table) has; each descriptor's address and length
/// are as the driver wrote them, unchecked.
pub type Chain = DescriptorChain<Arc<GuestMemory>>;

/// The driver broke the rules of the ring, so that the device cannot go on with it.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// A ring lies outside guest memory, or its indexes contradict each other.
    #[error("virtqueue: {0}")]
    Ring(#[from] virtio_queue::Error),
    /// The available ring names a descriptor that the table does not have.
    #[error("virtqueue: descriptor {head} in a table of {size}")]
    Head {
        /// Index found in the ring.
        head: u16,
        /// Number of descriptors.
        size: u16,
    },
    /// More is available than the queue has room for, while the driver is at rest: rings that lie
    /// upon each other, or upon buffers, fill themselves.
    #[error("virtqueue: it is not empty after as many chains as it has descriptors")]
    Endless,
}

/// What is saved of a queue: [`virtio_queue::QueueState`], which has no serde, field by field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Largest number of descriptors.
    pub max_size: u16,
    /// Number of descriptors that the driver chose.
    pub size: u16,
    /// Whether the driver has enabled the queue.
    pub ready: bool,
    /// Whether notifications are suppressed by index.
    pub event_idx: bool,
    /// Guest-physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest-physical address of the available ring.
    pub avail_ring: u64,
    /// Guest-physical address of the used ring.
    pub used_ring: u64,
    /// Index of the next chain to take from the available ring.
    pub next_avail: u16,
    /// Index of the next entry of the used ring.
    pub next_used: u16,
}

impl QueueState {
    /// The state of a queue that was never set up.
    pub(super) fn empty(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            ready: false,
            event_idx: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
            next_avail: 0,
            next_used: 0,
        }
    }
}

impl From<&Queue> for QueueState {
    fn from(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
            next_avail: state.next_avail,
            next_used: state.next_used,
        }
    }
}

impl TryFrom<&QueueState> for Queue {
    type Error = virtio_queue::Error;

    fn try_from(state: &QueueState) -> Result<Self, Self::Error> {
        Queue::try_from(virtio_queue::QueueState {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        })
    }
}

/// Interrupts the driver if chains were given back to any of these queues of one device since the
/// last call and it wants to know: one interrupt for all of them.
pub fn signal<'q>(queues: impl IntoIterator<Item = &'q mut Virtqueue>) -> Result<(), QueueError> {
    let mut interrupt = None;
    for queue in queues {
        if queue.needs_signal()? {
            interrupt = Some(&queue.interrupt);
        }
    }
    if let Some(interrupt) = interrupt {
        interrupt.signal_used();
    }
    Ok(())
}

/// A virtqueue with the memory that it lies in and the interrupt that tells of its progress.
///
/// The order in which a device uses it: [`pop`](Self::pop) until empty, each chain given back
/// with [`add_used`](Self::add_used); one [`signal`](Self::signal) for the whole batch; then
/// [`wait_for_more`](Self::wait_for_more), and again from the start if that says so.
pub struct Virtqueue {
    queue: Queue,
    memory: Arc<GuestMemory>,
    interrupt: Interrupt,
    notification: Arc<EventFd>,
    /// Whether chains were given back since the last signal.
    unsignalled: bool,
}

impl Virtqueue {
    /// A queue with this state. Does not touch guest memory.
    pub(crate) fn new(
        state: &QueueState,
        memory: Arc<GuestMemory>,
        interrupt: Interrupt,
        notification: Arc<EventFd>,
    ) -> Result<Self, QueueError> {
        Ok(Self {
            queue: Queue::try_from(state)?,
            memory,
            interrupt,
            notification,
            unsignalled: false,
        })
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The next chain that the driver made available.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let size = self.queue.size();
        let Some(chain) = self.queue.iter(Arc::clone(&self.memory))?.next() else {
            return Ok(None);
        };
        // add_used() would refuse it, too late for whoever has done the work by then.
        match chain.head_index() {
            head if head < size => Ok(Some(chain)),
            head => Err(QueueError::Head { head, size }),
        }
    }

    /// Puts back the chain that [`pop`](Self::pop) returned last.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver. `written` is the number of bytes that the device wrote
    /// into its device-writable part, from its start (virtio 1.2, section 2.7.8).
    pub fn add_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.unsignalled = true;
        Ok(self.queue.add_used(&*self.memory, head, written)?)
    }

    /// Interrupts the driver if chains were given back since the last call and it wants to know.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        signal([self])
    }

    /// Whether the driver wants to know of the chains given back since the last call.
    fn needs_signal(&mut self) -> Result<bool, QueueError> {
        let unsignalled = std::mem::take(&mut self.unsignalled);
        Ok(unsignalled && self.queue.needs_notification(&*self.memory)?)
    }

    /// Asks the driver to notify about the next chain. True if there is one already.
    pub fn wait_for_more(&mut self) -> Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        Ok(self.queue.enable_notification(&*self.memory)?)
    }

    /// Serves the chains of a queue in which each is answered at once. `answer` returns the number
    /// of bytes that it wrote into the chain. After as many chains as the queue is long the event
    /// loop gets its turn. One interrupt is sent for all of them.
    pub fn serve(&mut self, mut answer: impl FnMut(Chain) -> u32) -> Result<(), QueueError> {
        for _ in 0..self.size() {
            let Some(chain) = self.pop()? else { break };
            let head = chain.head_index();
            let written = answer(chain);
            self.add_used(head, written)?;
        }
        if self.unsignalled {
            self.signal()?;
            if self.wait_for_more()? {
                self.reschedule();
            }
        }
        Ok(())
    }

    /// [`serve`](Self::serve) until the queue is empty, with the driver at rest.
    pub fn serve_all(&mut self, answer: impl FnMut(Chain) -> u32) -> Result<(), QueueError> {
        // As many as there can be.
        self.serve(answer)?;
        if self.is_empty()? {
            Ok(())
        } else {
            Err(QueueError::Endless)
        }
    }

    /// Whether the driver has made nothing available. Only reads guest memory.
    pub fn is_empty(&self) -> Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(true);
        }
        let available = self.queue.avail_idx(&*self.memory, Ordering::Acquire)?;
        Ok(available.0 == self.queue.next_avail())
    }

    /// Has the event loop process this queue again after what else is ready: a device that has
    /// done a fair share calls it instead of going on for as long as the driver has work.
    pub fn reschedule(&self) {
        if let Err(error) = self.notification.write(1) {
            log::error!("cannot reschedule a virtqueue: {error}");
        }
    }

    /// The state to save.
    pub fn state(&self) -> QueueState {
        QueueState::from(&self.queue)
    }
}
