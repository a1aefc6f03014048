//! Tests of the transport: register sequences as drivers write them, and as they must not.

use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::devices::virtio::testing::{DriverQueue, memory};
use crate::devices::virtio::{DrainError, Persist, VirtioDevice};

mod refusals;
mod saving;
mod sequences;

/// A device that answers each chain with its number of queue.
#[derive(Default)]
struct Probe {
    queues: Vec<Virtqueue>,
    features: u64,
    resets: u32,
    config: Arc<ConfigSpace>,
}

const OFFERED: u64 = F_EVENT_IDX | 1 << 5;

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        OFFERED
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8, 16]
    }
    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }
    fn activate(&mut self, activation: Activation) {
        self.queues = activation.queues;
        self.features = activation.features;
    }
    fn queues(&self) -> &[Virtqueue] {
        &self.queues
    }
    fn queues_mut(&mut self) -> &mut Vec<Virtqueue> {
        &mut self.queues
    }
    fn reset(&mut self) {
        self.queues.clear();
        self.resets += 1;
    }
    fn process_queue(&mut self, index: usize) -> Result<(), QueueError> {
        self.queues[index].serve(|_| index as u32)
    }
    fn drain(&mut self) -> Result<(), DrainError> {
        Ok(())
    }
}

fn notifications() -> Notifications {
    Notifications::new(2, Box::new(|_, _| Ok(()))).unwrap()
}

struct Machine {
    memory: Arc<GuestMemory>,
    device: Arc<Mutex<Probe>>,
    line: EventFd,
    transport: MmioTransport,
}

impl Machine {
    fn new() -> Self {
        let memory = memory(0x20000);
        let device = Arc::new(Mutex::new(Probe {
            config: Arc::new(ConfigSpace::new(vec![1, 2, 3, 4, 5, 6])),
            ..Probe::default()
        }));
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let transport = MmioTransport::new(
            Arc::clone(&device) as SharedDevice,
            Arc::clone(&memory),
            Box::new(line.try_clone().unwrap()),
            notifications(),
        );
        Self {
            memory,
            device,
            line,
            transport,
        }
    }

    fn get(&self, register: u32) -> u32 {
        let mut data = [0xaa; 4];
        self.transport.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, register: u32, value: u32) {
        self.transport.write(register.into(), &value.to_le_bytes());
    }

    /// Steps 1 to 5 of virtio 1.2, section 3.1.1.
    fn negotiate(&self, features: u64) {
        self.set(VIRTIO_MMIO_STATUS, 0);
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        for (selector, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, selector);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, half);
        }
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_up(&self, index: u32, driver: &DriverQueue) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, index);
        self.set(VIRTIO_MMIO_QUEUE_NUM, driver.size.into());
        self.set_address(VIRTIO_MMIO_QUEUE_DESC_LOW, driver.base);
        self.set_address(VIRTIO_MMIO_QUEUE_AVAIL_LOW, driver.available_ring());
        self.set_address(VIRTIO_MMIO_QUEUE_USED_LOW, driver.used_ring());
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    fn set_address(&self, low: u32, address: u64) {
        self.set(low, address as u32);
        self.set(low + 4, (address >> 32) as u32);
    }

    fn drivers(&self) -> [DriverQueue; 2] {
        [
            DriverQueue::new(&self.memory, 0x4000, 8),
            DriverQueue::new(&self.memory, 0x8000, 16),
        ]
    }

    /// A machine whose driver drives the device.
    fn running() -> (Self, [DriverQueue; 2]) {
        let machine = Self::new();
        let drivers = machine.drivers();
        machine.negotiate(F_VERSION_1 | OFFERED);
        machine.set_up(0, &drivers[0]);
        machine.set_up(1, &drivers[1]);
        machine.set(VIRTIO_MMIO_STATUS, RUNNING);
        (machine, drivers)
    }

    fn is_active(&self) -> bool {
        !self.device.lock().unwrap().queues.is_empty()
    }
}

const RUNNING: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

#[test]
fn the_identity_is_that_of_virtio_mmio() {
    let machine = Machine::new();
    assert_eq!(machine.get(VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(machine.get(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(machine.get(VIRTIO_MMIO_DEVICE_ID), 42);
    assert_eq!(machine.get(VIRTIO_MMIO_STATUS), 0);
    machine.set(VIRTIO_MMIO_SHM_SEL, 0);
    assert_eq!(machine.get(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
    assert_eq!(machine.get(VIRTIO_MMIO_SHM_LEN_HIGH), u32::MAX);
}

#[test]
fn features_are_shown_in_two_halves() {
    let machine = Machine::new();
    for (selector, expected) in [(0, OFFERED as u32), (1, 1), (2, 0), (u32::MAX, 0)] {
        machine.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, selector);
        assert_eq!(machine.get(VIRTIO_MMIO_DEVICE_FEATURES), expected);
    }
}

#[test]
fn a_driver_brings_the_device_up() {
    let (machine, mut drivers) = Machine::running();
    assert_eq!(machine.get(VIRTIO_MMIO_STATUS), RUNNING);
    assert!(machine.is_active());
    assert_eq!(
        machine.device.lock().unwrap().features,
        F_VERSION_1 | OFFERED
    );
    drivers[1].offer(&[(0x10000, 4, true)]);
    machine.device.lock().unwrap().process_queue(1).unwrap();
    assert_eq!(drivers[1].take_used().unwrap().1, 1);
    assert_eq!(machine.line.read().unwrap(), 1);
    assert_eq!(machine.get(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    machine.set(VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(machine.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn a_notification_reaches_its_queue_alone() {
    let (machine, _) = Machine::running();
    machine.set(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    for queue in [2, 3, 0x10000, u32::MAX] {
        machine.set(VIRTIO_MMIO_QUEUE_NOTIFY, queue);
    }
    assert!(machine.transport.notifications.events()[0].read().is_err());
    assert_eq!(
        machine.transport.notifications.events()[1].read().unwrap(),
        1
    );
}

#[test]
fn a_busy_queue_is_connected_to_kvm_once() {
    let connected = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&connected);
    let notifications = Notifications::new(
        2,
        Box::new(move |queue, _| {
            record.lock().unwrap().push(queue);
            Ok(())
        }),
    )
    .unwrap();
    for count in 1..100 {
        notifications.pass(1).unwrap();
        assert_eq!(notifications.events()[1].read().unwrap(), 1);
        let expected: &[u32] = if count < SLOW_NOTIFICATIONS {
            &[]
        } else {
            &[1]
        };
        assert_eq!(*connected.lock().unwrap(), expected);
    }
}
