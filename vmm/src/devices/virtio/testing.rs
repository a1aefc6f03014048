//! A driver for tests: guest memory, rings laid out in it, and a device's interrupt and
//! notifications without KVM.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, Interrupt, QueueState, VirtioDevice, Virtqueue};
use crate::memory::GuestMemory;

/// Guest memory of `size` bytes from address 0.
pub(crate) fn memory(size: usize) -> Arc<GuestMemory> {
    Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), size)]).unwrap())
}

/// Descriptor flags.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;

/// The driver's side of one queue. The rings take 16 KiB from `base`, which is enough for 256
/// descriptors.
pub(crate) struct DriverQueue {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) base: u64,
    pub(crate) size: u16,
    next_available: u16,
    next_used: u16,
    free: Vec<u16>,
    /// The descriptors of each chain, by its head.
    chains: Vec<Vec<u16>>,
}

impl DriverQueue {
    pub(crate) fn new(memory: &Arc<GuestMemory>, base: u64, size: u16) -> Self {
        assert!(size <= 256);
        Self {
            memory: Arc::clone(memory),
            base,
            size,
            next_available: 0,
            next_used: 0,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); size.into()],
        }
    }

    pub(crate) fn available_ring(&self) -> u64 {
        self.base + 0x1000
    }

    pub(crate) fn used_ring(&self) -> u64 {
        self.base + 0x2000
    }

    /// The queue as the driver sets it up.
    pub(crate) fn state(&self) -> QueueState {
        QueueState {
            ready: true,
            event_idx: true,
            desc_table: self.base,
            avail_ring: self.available_ring(),
            used_ring: self.used_ring(),
            ..QueueState::empty(self.size)
        }
    }

    pub(crate) fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Writes a descriptor as it is.
    pub(crate) fn describe(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = self.base + 16 * u64::from(index);
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a chain of these pieces available: address, length, whether the device writes.
    pub(crate) fn offer(&mut self, pieces: &[(u64, u32, bool)]) -> u16 {
        let indexes: Vec<u16> = pieces.iter().map(|_| self.free.pop().unwrap()).collect();
        for (position, &(address, length, write)) in pieces.iter().enumerate() {
            let next = indexes.get(position + 1);
            let flags = if next.is_some() { NEXT } else { 0 } | if write { WRITE } else { 0 };
            let next = next.copied().unwrap_or(0);
            self.describe(indexes[position], address, length, flags, next);
        }
        let head = indexes[0];
        self.chains[usize::from(head)] = indexes;
        self.publish(head);
        head
    }

    /// Puts a head into the available ring, whatever it is.
    pub(crate) fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        let entry = GuestAddress(self.available_ring() + 4 + 2 * slot);
        self.memory.write_obj(head, entry).unwrap();
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available);
    }

    pub(crate) fn set_available_index(&self, index: u16) {
        let at = GuestAddress(self.available_ring() + 2);
        self.memory.store(index, at, Ordering::Release).unwrap();
    }

    /// Takes the next used chain: its head and the bytes written. Asks for an interrupt behind it.
    pub(crate) fn take_used(&mut self) -> Option<(u16, u32)> {
        let index: u16 = self
            .memory
            .load(GuestAddress(self.used_ring() + 2), Ordering::Acquire)
            .unwrap();
        if index == self.next_used {
            return None;
        }
        let entry = self.used_ring() + 4 + 8 * u64::from(self.next_used % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let written: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        let event = self.available_ring() + 4 + 2 * u64::from(self.size);
        self.memory
            .store(self.next_used, GuestAddress(event), Ordering::Release)
            .unwrap();
        let head = head as u16;
        let indexes = std::mem::take(&mut self.chains[usize::from(head)]);
        assert!(!indexes.is_empty(), "chain {head} was given back twice");
        self.free.extend(indexes);
        Some((head, written))
    }

    /// Whether the driver has to notify the device about what it offered since `old`.
    pub(crate) fn must_notify(&self, old: u16) -> bool {
        let event = self.used_ring() + 4 + 8 * u64::from(self.size);
        let event: u16 = self
            .memory
            .load(GuestAddress(event), Ordering::Acquire)
            .unwrap();
        let new = self.next_available;
        new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
    }

    pub(crate) fn next_available(&self) -> u16 {
        self.next_available
    }
}

/// A device's interrupt and notifications, and what a test sees of them.
pub(crate) struct Board {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) line: EventFd,
    pub(crate) interrupt: Interrupt,
    pub(crate) notifications: Vec<Arc<EventFd>>,
}

impl Board {
    pub(crate) fn new(memory: &Arc<GuestMemory>, queues: usize) -> Self {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            memory: Arc::clone(memory),
            interrupt: Interrupt::new(Box::new(line.try_clone().unwrap())),
            line,
            notifications: events(queues),
        }
    }

    /// The device's side of these queues.
    pub(crate) fn queues(&self, states: &[QueueState]) -> Vec<Virtqueue> {
        states
            .iter()
            .zip(&self.notifications)
            .map(|(state, notification)| {
                let (memory, interrupt) = (Arc::clone(&self.memory), self.interrupt.clone());
                Virtqueue::new(state, memory, interrupt, Arc::clone(notification)).unwrap()
            })
            .collect()
    }

    /// Activates a device whose queues are driven by `drivers`.
    pub(crate) fn activate(&self, device: &mut dyn VirtioDevice, drivers: &[&DriverQueue]) {
        let states: Vec<_> = drivers.iter().map(|driver| driver.state()).collect();
        device.activate(Activation {
            queues: self.queues(&states),
            features: device.features(),
            interrupt: self.interrupt.clone(),
        });
    }

    /// Number of interrupts since the last call.
    pub(crate) fn interrupts(&self) -> u64 {
        self.line.read().unwrap_or(0)
    }

    /// Whether the device has asked for queue `index` to be processed again.
    pub(crate) fn rescheduled(&self, index: usize) -> bool {
        self.notifications[index].read().is_ok()
    }
}

/// One eventfd for each of `count` queues.
pub(crate) fn events(count: usize) -> Vec<Arc<EventFd>> {
    (0..count)
        .map(|_| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()))
        .collect()
}
