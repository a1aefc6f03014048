//! The device.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vmm_sys_util::epoll::EventSet;

use super::multiplexer::{ConnectError, Multiplexer};
use crate::devices::event_loop::Registrar;
use crate::devices::virtio::{
    ConfigSpace, DrainError, F_EVENT_IDX, QueueError, VirtioDevice, Virtqueue, signal,
};

/// The host's address (virtio 1.2, section 5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// The guest's address, the same in every VM: each has a host of its own.
pub const GUEST_CID: u64 = 3;

/// rx, tx and event queue (virtio 1.2, section 5.10.2). Linux keeps the rx queue filled with
/// buffers of 4 KiB, and each that is used is a page that a fork has to copy: a short queue is
/// used again and again, and is still filled faster than it is emptied. Events are never sent.
const QUEUES: [u16; 3] = [64, 128, 8];
const RX: usize = 0;
const TX: usize = 1;

/// Socket device.
pub struct Vsock {
    queues: Vec<Virtqueue>,
    config: Arc<ConfigSpace>,
    multiplexer: Multiplexer,
    /// The guest's packets were left in the queue until it takes our answers.
    has_packets: bool,
}

impl Vsock {
    pub(super) fn with_port(registrar: Registrar, next_port: u32) -> Self {
        Self {
            queues: Vec::new(),
            config: Arc::new(ConfigSpace::new(GUEST_CID.to_le_bytes().to_vec())),
            multiplexer: Multiplexer::new(registrar, next_port),
            has_packets: false,
        }
    }

    /// Connects each stream to a port of the guest. Does not wait: when the guest accepts, bytes
    /// start to pass; if it refuses, the stream is closed. What is written to the stream before
    /// is not lost. The requests are sent from here, in the caller's thread, with one interrupt, once
    /// the driver is there. At an error that stream and those behind it are closed.
    pub fn connect(
        &mut self,
        port: u32,
        streams: impl IntoIterator<Item = UnixStream>,
    ) -> Result<(), ConnectError> {
        let connected = streams
            .into_iter()
            .try_for_each(|stream| self.multiplexer.connect(port, stream));
        if let Err(error) = self.work(false) {
            // The event loop will find the same and take the device out of service.
            log::debug!("vsock: {error}");
            self.queues.iter().for_each(Virtqueue::reschedule);
        }
        connected
    }

    /// Connections, and the most bytes that one of them holds for a slow reader.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn kept(&self) -> (usize, usize) {
        self.multiplexer.kept()
    }

    pub(super) fn next_port(&self) -> u32 {
        self.multiplexer.next_port()
    }

    /// Takes from the tx queue, if there may be something in it, and fills the rx queue.
    fn work(&mut self, transmit: bool) -> Result<(), QueueError> {
        let [rx, tx, _] = &mut self.queues[..] else {
            return Ok(());
        };
        self.has_packets |= transmit;
        if self.has_packets {
            self.has_packets = !self.multiplexer.take(tx)?;
        }
        self.multiplexer.fill(rx)?;
        if self.has_packets && !self.multiplexer.is_blocked() {
            // Packets were left in the queue, whose notification has passed.
            tx.reschedule();
        }
        signal([rx, tx])
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
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

    fn reset(&mut self) {
        self.queues.clear();
        self.multiplexer.clear();
        self.has_packets = false;
    }

    fn process_queue(&mut self, index: usize) -> Result<(), QueueError> {
        match index {
            RX => self.work(false),
            TX => self.work(true),
            _ => Ok(()),
        }
    }

    fn process_source(&mut self, token: u32, ready: EventSet) -> Result<(), QueueError> {
        self.multiplexer.ready(token, ready);
        self.work(false)
    }

    fn drain(&mut self) -> Result<(), DrainError> {
        // Takes as many packets as there can be, unless too many answers wait.
        self.work(true)?;
        if let Some(tx) = self.queues.get(TX)
            && !tx.is_empty()?
            && !self.multiplexer.is_blocked()
        {
            return Err(QueueError::Endless.into());
        }
        match self.multiplexer.in_flight() {
            Some(what) => Err(DrainError::InFlight(what)),
            None => Ok(()),
        }
    }
}
