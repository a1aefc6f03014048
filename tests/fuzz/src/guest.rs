//! A guest's driver that keeps to the rules as far as it is told to, and a machine around it.

use std::sync::atomic::Ordering;

use forkvm_vmm::devices::Backends;
use forkvm_vmm::devices::vsock;
use forkvm_vmm::fuzzing::Machine;
use forkvm_vmm::memory::GuestMemory;
use virtio_bindings::virtio_mmio::*;
use vm_memory::{Bytes, GuestAddress};

use crate::ram;

/// Most queues of a device that are laid out, and most descriptors of one.
pub const QUEUES: usize = 6;
/// See [`QUEUES`].
pub const SIZE: u16 = 512;
/// Where the queues lie, each in this many bytes.
const RINGS: u64 = 0x1000;
const RING_BYTES: u64 = 0x4000;
/// Behind the rings.
pub const BUFFERS: u64 = RINGS + QUEUES as u64 * RING_BYTES;

/// Most forks of one machine.
const FORKS: u8 = 2;

/// Descriptor flags.
const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;

/// Bits of the status register in their order: ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK.
const STATUS: [u32; 4] = [1, 3, 11, 15];

/// A piece of a chain: address, length, whether the device writes.
pub type Piece = (u64, u32, bool);

/// One queue as the driver knows it.
#[derive(Clone, Copy, Default)]
struct Ring {
    size: u16,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

/// A machine, and the driver of one of its devices.
pub struct Guest {
    /// Its memory.
    pub memory: GuestMemory,
    /// Its devices.
    pub machine: Machine,
    /// Where the device's registers are.
    registers: u64,
    rings: [Ring; QUEUES],
    forks: u8,
}

impl Guest {
    /// The machine after its reset. The one before, of this thread, must be gone.
    pub fn new(device_type: u32, backends: Backends) -> Self {
        let memory = ram::fresh();
        let machine = Machine::new(memory.clone(), backends, None).expect("devices");
        let registers = machine
            .registers(device_type)
            .expect("a device of the type");
        Self {
            memory,
            machine,
            registers,
            rings: Default::default(),
            forks: 0,
        }
    }

    /// Replaces the machine by a fork of it, if it can be frozen. The first times only: it takes as
    /// long as all else.
    pub fn fork(&mut self, backends: Backends) {
        let devices = self.machine.devices();
        if self.forks == FORKS || devices.quiesce().is_err() {
            return;
        }
        self.forks += 1;
        let state = postcard::to_stdvec(&devices.save().expect("every slot")).expect("bytes");
        let state = postcard::from_bytes(&state).expect("what was saved can be read");
        let memory = self.memory.clone();
        self.machine = Machine::new(memory, backends, Some(&state)).expect("and be restored");
    }

    /// Writes a register.
    pub fn set(&self, register: u32, value: u32) {
        let address = self.registers + u64::from(register);
        self.machine
            .devices()
            .mmio_write(address, &value.to_le_bytes());
    }

    /// Reads a register.
    pub fn get(&self, register: u32) -> u32 {
        let mut value = [0; 4];
        self.access(u64::from(register), &mut value, false);
        u32::from_le_bytes(value)
    }

    /// Any access to the device's page.
    pub fn access(&self, offset: u64, data: &mut [u8], write: bool) {
        let address = self.registers + offset % 0x1000;
        if write {
            self.machine.devices().mmio_write(address, data);
        } else {
            self.machine.devices().mmio_read(address, data);
        }
    }

    /// Where descriptors, available ring and used ring of a queue are.
    pub fn rings(queue: usize) -> [u64; 3] {
        let start = RINGS + (queue % QUEUES) as u64 * RING_BYTES;
        [start, start + 0x2000, start + 0x2800]
    }

    /// Sets the device up with those of the features that it offers, and queues of at most this size.
    pub fn bring_up(&mut self, features: u64, size: u16) {
        self.set(VIRTIO_MMIO_STATUS, 0);
        self.set(VIRTIO_MMIO_STATUS, STATUS[0]);
        self.set(VIRTIO_MMIO_STATUS, STATUS[1]);
        for half in 0..2 {
            self.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            let offered = self.get(VIRTIO_MMIO_DEVICE_FEATURES);
            let wanted = (features >> (32 * half)) as u32;
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, offered & wanted);
        }
        self.set(VIRTIO_MMIO_STATUS, STATUS[2]);
        for index in 0..QUEUES {
            self.set(VIRTIO_MMIO_QUEUE_SEL, index as u32);
            let most = self.get(VIRTIO_MMIO_QUEUE_NUM_MAX) as u16;
            if most == 0 {
                break;
            }
            let ring = Ring {
                size: most.min(size).min(SIZE),
                ..Ring::default()
            };
            self.rings[index] = ring;
            self.set(VIRTIO_MMIO_QUEUE_NUM, ring.size.into());
            let addresses = Self::rings(index);
            for (register, address) in [
                (VIRTIO_MMIO_QUEUE_DESC_LOW, addresses[0]),
                (VIRTIO_MMIO_QUEUE_AVAIL_LOW, addresses[1]),
                (VIRTIO_MMIO_QUEUE_USED_LOW, addresses[2]),
            ] {
                self.set(register, address as u32);
                self.set(register + 4, 0);
            }
            let zeroes = [0; 16];
            for address in &addresses[1..] {
                self.write(*address, &zeroes);
            }
            self.set(VIRTIO_MMIO_QUEUE_READY, 1);
        }
        self.set(VIRTIO_MMIO_STATUS, STATUS[3]);
    }

    /// Writes memory, as far as there is some.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        let _ = self.memory.write_slice(bytes, GuestAddress(address));
    }

    /// Writes a descriptor as it is: address, length, flags, next.
    pub fn describe(&self, queue: usize, index: u16, descriptor: (u64, u32, u16, u16)) {
        let (address, length, flags, next) = descriptor;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(Self::rings(queue)[0] + 16 * u64::from(index % SIZE), &bytes);
    }

    /// Makes a head available, whatever it is.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue % QUEUES];
        if ring.size == 0 {
            return;
        }
        let slot = u64::from(ring.next_available % ring.size);
        ring.next_available = ring.next_available.wrapping_add(1);
        let index = ring.next_available;
        let available = Self::rings(queue)[1];
        self.write(available + 4 + 2 * slot, &head.to_le_bytes());
        self.set_available(queue, index);
    }

    /// Sets the index of the available ring, whatever it is.
    pub fn set_available(&mut self, queue: usize, index: u16) {
        self.rings[queue % QUEUES].next_available = index;
        let at = GuestAddress(Self::rings(queue)[1] + 2);
        self.memory
            .store(index, at, Ordering::Release)
            .expect("rings in memory");
    }

    /// Makes a chain available; descriptors are used again in turn. Answers its head.
    pub fn offer(&mut self, queue: usize, pieces: &[Piece]) -> u16 {
        let ring = self.rings[queue % QUEUES];
        if ring.size == 0 {
            return 0;
        }
        let at = |position: usize| (ring.next_descriptor + position as u16) % ring.size;
        for (position, &(address, length, write)) in pieces.iter().enumerate() {
            let next = if position + 1 < pieces.len() { NEXT } else { 0 };
            let flags = next | if write { WRITE } else { 0 };
            let descriptor = (address, length, flags, at(position + 1));
            self.describe(queue, at(position), descriptor);
        }
        self.rings[queue % QUEUES].next_descriptor = at(pieces.len());
        let head = at(0);
        self.publish(queue, head);
        head
    }

    /// Takes the next used chain: its head, and the bytes that the device says to have written.
    pub fn take_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = &mut self.rings[queue % QUEUES];
        let used = Self::rings(queue)[2];
        let load = |at| self.memory.load::<u32>(GuestAddress(at), Ordering::Acquire);
        let index = (load(used).expect("rings in memory") >> 16) as u16;
        if ring.size == 0 || index == ring.next_used {
            return None;
        }
        let entry = used + 4 + 8 * u64::from(ring.next_used % ring.size);
        ring.next_used = ring.next_used.wrapping_add(1);
        let head = load(entry).expect("rings in memory");
        let written = load(entry + 4).expect("rings in memory");
        Some((head as u16, written))
    }

    /// Chains that were made available and not taken back.
    pub fn outstanding(&self, queue: usize) -> u16 {
        let ring = self.rings[queue % QUEUES];
        ring.next_available.wrapping_sub(ring.next_used)
    }

    /// Notifies the device, and lets it work until it rests, for some rounds at most: a guest whose
    /// rings overlap can keep it busy for ever, a round at a time.
    pub fn notify(&self, queue: usize) {
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
        self.settle();
    }

    /// See [`notify`](Self::notify).
    pub fn settle(&self) {
        for _ in 0..32 {
            if !self.machine.turn().expect("epoll") {
                break;
            }
        }
        self.check();
    }

    /// What holds at every moment: nothing is given back that was not made available, and nothing
    /// is kept beyond its bound.
    pub fn check(&self) {
        for queue in self.machine.queues(self.registers) {
            let taken = queue.next_avail.wrapping_sub(queue.next_used);
            assert!(
                taken <= queue.size,
                "more was given back than made available: {queue:?}"
            );
        }
        let kept = self.machine.kept();
        assert!(kept.connections <= vsock::MAX_CONNECTIONS, "{kept:?}");
        assert!(kept.bytes <= vsock::BUFFER as usize, "{kept:?}");
        for (held, most) in kept.files.iter().zip(kept.most_files) {
            assert!(*held <= most, "{kept:?}");
        }
    }

    /// The end of every input: after a reset the device leaves the guest's memory alone.
    pub fn finish(self) {
        self.set(VIRTIO_MMIO_STATUS, 0);
        let before = ram::checksum(&self.memory);
        for queue in 0..QUEUES {
            self.notify(queue);
        }
        let after = ram::checksum(&self.memory);
        assert_eq!(before, after, "memory was touched after a reset");
    }
}
