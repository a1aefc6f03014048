//! The devices of a machine without KVM and without threads, for the fuzz targets.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_DEVICE_ID;

use super::event_loop::lock;
use super::virtio::mmio::Connect;
use super::virtio::{InterruptLine, QueueState, Virtqueue};
use super::{Backends, Devices, DevicesState, Error, MMIO_SIZE, SLOTS, Wiring, slot_address};
use crate::memory::GuestMemory;

/// Interrupts that reach nobody; notifications that are never handed to KVM.
struct Unwired;

impl InterruptLine for Unwired {
    fn pulse(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Wiring for Unwired {
    fn line(&self, _: usize) -> Box<dyn InterruptLine> {
        Box::new(Unwired)
    }

    fn connect(&self, _: usize) -> Connect {
        Box::new(|_, _| Ok(()))
    }
}

/// What a guest has made the devices keep, and the bounds of it where they depend on the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// vsock connections, at most [`super::vsock::MAX_CONNECTIONS`].
    pub connections: usize,
    /// The most bytes that one of them holds, at most [`super::vsock::BUFFER`].
    pub bytes: usize,
    /// Nodes of the file server, nodes with a descriptor, and open files.
    pub files: [usize; 3],
    /// Their bounds.
    pub most_files: [usize; 3],
}

/// The devices of one machine.
pub struct Machine(Devices);

impl Machine {
    /// Devices in the state after reset, or in a saved one.
    ///
    /// # Errors
    /// Those of [`Devices::restore`].
    pub fn new(
        memory: GuestMemory,
        backends: Backends,
        state: Option<&DevicesState>,
    ) -> Result<Self, Error> {
        Devices::assemble(memory, &Unwired, backends, state).map(Self)
    }

    /// The devices as the vCPUs' threads see them.
    pub fn devices(&self) -> &Devices {
        &self.0
    }

    /// Guest-physical address of the registers of the first device of a type (virtio 1.2, section 5).
    pub fn registers(&self, device_type: u32) -> Option<u64> {
        (0..SLOTS).map(slot_address).find(|address| {
            let mut found = [0; 4];
            self.0
                .mmio_read(address + u64::from(VIRTIO_MMIO_DEVICE_ID), &mut found);
            u32::from_le_bytes(found) == device_type
        })
    }

    /// One round of the devices' work, without waiting. False if there was none.
    ///
    /// # Errors
    /// Those of epoll(7).
    pub fn turn(&self) -> io::Result<bool> {
        Ok(self.0.event_loop.turn()? | self.0.fs_loop.turn()?)
    }

    /// The queues of the device whose registers are at `address`; none while it is not active.
    pub fn queues(&self, address: u64) -> Vec<QueueState> {
        let slot = (address - slot_address(0)) / MMIO_SIZE;
        let transport = usize::try_from(slot)
            .ok()
            .and_then(|slot| self.0.transports.get(slot)?.as_ref());
        transport.map_or_else(Vec::new, |transport| {
            let device = Arc::clone(transport.device());
            let device = lock(&device);
            device.queues().iter().map(Virtqueue::state).collect()
        })
    }

    /// What the guest has made the devices keep.
    pub fn kept(&self) -> Kept {
        let (connections, bytes) = lock(&self.0.vsock).kept();
        let (files, limits) = lock(&self.0.fs).kept();
        Kept {
            connections,
            bytes,
            files,
            most_files: [limits.nodes, limits.open_nodes, limits.handles],
        }
    }
}
