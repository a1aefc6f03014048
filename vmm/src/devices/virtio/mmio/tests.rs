//! Tests of the transport: register sequences as drivers write them, and as they must not.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::devices::virtio::testing::{DriverQueue, memory};
use crate::devices::virtio::{DrainError, Persist, VirtioDevice};

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

#[test]
fn a_driver_without_version_1_is_refused() {
    let machine = Machine::new();
    machine.negotiate(OFFERED);
    assert_eq!(machine.get(VIRTIO_MMIO_STATUS), ACKNOWLEDGE | DRIVER);
    machine.set(VIRTIO_MMIO_STATUS, RUNNING);
    assert!(!machine.is_active());
}

#[test]
fn a_feature_that_is_not_offered_is_refused() {
    let machine = Machine::new();
    machine.negotiate(F_VERSION_1 | 1 << 6);
    assert_eq!(machine.get(VIRTIO_MMIO_STATUS), ACKNOWLEDGE | DRIVER);
}

#[test]
fn features_cannot_be_changed_once_agreed_upon() {
    let machine = Machine::new();
    machine.negotiate(F_VERSION_1);
    machine.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 0);
    machine.set(VIRTIO_MMIO_DRIVER_FEATURES, OFFERED as u32);
    machine.set(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(machine.device.lock().unwrap().features, F_VERSION_1);
}

#[test]
fn status_bits_are_only_set_in_order() {
    let machine = Machine::new();
    for skipped in [
        DRIVER,
        DRIVER | FEATURES_OK,
        ACKNOWLEDGE | FEATURES_OK,
        ACKNOWLEDGE | DRIVER | DRIVER_OK,
        DRIVER_OK,
    ] {
        machine.set(VIRTIO_MMIO_STATUS, 0);
        machine.set(VIRTIO_MMIO_STATUS, skipped);
        assert_eq!(machine.get(VIRTIO_MMIO_STATUS), 0, "after {skipped:#x}");
    }
    machine.negotiate(F_VERSION_1);
    machine.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    assert_eq!(
        machine.get(VIRTIO_MMIO_STATUS),
        ACKNOWLEDGE | DRIVER | FEATURES_OK,
        "bits are not taken back"
    );
    machine.set(VIRTIO_MMIO_STATUS, !DRIVER_OK);
    assert_eq!(
        machine.get(VIRTIO_MMIO_STATUS),
        ACKNOWLEDGE | DRIVER | FEATURES_OK | FAILED,
        "a driver cannot set what is the device's"
    );
    machine.set(VIRTIO_MMIO_STATUS, RUNNING | FAILED);
    assert!(!machine.is_active(), "it has given up");
}

#[test]
fn a_reset_takes_everything_back() {
    let (machine, drivers) = Machine::running();
    machine.transport.interrupt().signal_config();
    machine.set(VIRTIO_MMIO_STATUS, 0);
    assert!(!machine.is_active());
    assert_eq!(machine.get(VIRTIO_MMIO_STATUS), 0);
    assert_eq!(machine.get(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    for queue in 0..2 {
        machine.set(VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(machine.get(VIRTIO_MMIO_QUEUE_READY), 0);
    }
    machine.negotiate(F_VERSION_1);
    machine.set_up(0, &drivers[0]);
    machine.set(VIRTIO_MMIO_STATUS, RUNNING);
    let device = machine.device.lock().unwrap();
    assert!(device.queues[0].state().ready && !device.queues[1].state().ready);
    assert_eq!(device.features, F_VERSION_1);
}

#[test]
fn a_queue_out_of_range_is_not_there() {
    let machine = Machine::new();
    machine.negotiate(F_VERSION_1);
    for (queue, size) in [(0, 8), (1, 16), (2, 0), (u32::MAX, 0)] {
        machine.set(VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(machine.get(VIRTIO_MMIO_QUEUE_NUM_MAX), size);
    }
    machine.set(VIRTIO_MMIO_QUEUE_SEL, 2);
    machine.set(VIRTIO_MMIO_QUEUE_NUM, 8);
    machine.set(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(machine.get(VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn a_queue_takes_only_sizes_that_it_can_have() {
    let machine = Machine::new();
    let driver = &machine.drivers()[0];
    machine.negotiate(F_VERSION_1);
    machine.set_up(0, driver);
    machine.set(VIRTIO_MMIO_QUEUE_READY, 0);
    machine.set(VIRTIO_MMIO_QUEUE_NUM, 4);
    for size in [0, 3, 9, 16, 0x1_0004, u32::MAX] {
        machine.set(VIRTIO_MMIO_QUEUE_NUM, size);
    }
    machine.set(VIRTIO_MMIO_QUEUE_READY, 1);
    machine.set(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(machine.device.lock().unwrap().queues[0].size(), 4);
}

#[test]
fn rings_outside_memory_or_out_of_line_are_refused() {
    let good = (0x4000, 0x5000, 0x6000);
    for (desc, avail, used) in [
        (0x4008, good.1, good.2),
        (good.0, 0x5001, good.2),
        (good.0, good.1, 0x6002),
        (0, good.1, good.2),
        (good.0, 0, good.2),
        (good.0, good.1, 0),
        (0x2_0000, good.1, good.2),
        (0x1_ffc0, good.1, good.2),
        (good.0, 0x1_fff0, good.2),
        (good.0, good.1, 0x1_fff0),
        (!15, good.1, good.2),
        (good.0, !1, good.2),
        (good.0, good.1, !3),
    ] {
        let machine = Machine::new();
        machine.negotiate(F_VERSION_1);
        machine.set(VIRTIO_MMIO_QUEUE_SEL, 0);
        machine.set_address(VIRTIO_MMIO_QUEUE_DESC_LOW, desc);
        machine.set_address(VIRTIO_MMIO_QUEUE_AVAIL_LOW, avail);
        machine.set_address(VIRTIO_MMIO_QUEUE_USED_LOW, used);
        machine.set(VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(
            machine.get(VIRTIO_MMIO_QUEUE_READY),
            0,
            "{desc:#x} {avail:#x} {used:#x}"
        );
        assert_ne!(machine.get(VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0);
    }
}

#[test]
fn a_queue_that_is_ready_or_driven_does_not_change() {
    let (machine, drivers) = Machine::running();
    let before = machine.device.lock().unwrap().queues[0].state();
    machine.set(VIRTIO_MMIO_QUEUE_SEL, 0);
    machine.set(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(
        machine.get(VIRTIO_MMIO_QUEUE_READY),
        1,
        "only a reset takes it back"
    );
    machine.set(VIRTIO_MMIO_QUEUE_NUM, 2);
    machine.set_address(VIRTIO_MMIO_QUEUE_DESC_LOW, drivers[1].base);
    machine.set(VIRTIO_MMIO_QUEUE_READY, 1);
    assert_eq!(machine.device.lock().unwrap().queues[0].state(), before);
}

#[test]
fn queues_are_set_up_only_after_features() {
    let machine = Machine::new();
    let drivers = machine.drivers();
    machine.set_up(0, &drivers[0]);
    machine.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    machine.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
    machine.set_up(0, &drivers[0]);
    assert_eq!(machine.get(VIRTIO_MMIO_QUEUE_READY), 0);
}

#[test]
fn accesses_of_another_width_or_out_of_line_do_nothing() {
    let machine = Machine::new();
    for (offset, length) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0x70, 8), (0xff, 1)] {
        let mut data = vec![0xaa; length];
        machine.transport.read(offset, &mut data);
        assert!(
            data.iter().all(|&byte| byte == 0),
            "{length} bytes at {offset:#x}"
        );
        machine.transport.write(offset, &data);
    }
    machine.transport.write(VIRTIO_MMIO_STATUS.into(), &[1]);
    machine
        .transport
        .write(VIRTIO_MMIO_STATUS.into(), &[1, 0, 0, 0, 0, 0, 0, 0]);
    machine.transport.write(VIRTIO_MMIO_STATUS.into(), &[]);
    assert_eq!(machine.get(VIRTIO_MMIO_STATUS), 0);
}

#[test]
fn the_configuration_space_is_read_in_any_width() {
    let machine = Machine::new();
    for (offset, expected) in [
        (0, &[1u8][..]),
        (1, &[2, 3]),
        (2, &[3, 4, 5, 6]),
        (4, &[5, 6, 0]),
    ] {
        let mut data = vec![0xaa; expected.len()];
        machine.transport.read(CONFIG_SPACE + offset, &mut data);
        assert_eq!(data, expected);
    }
    machine.transport.write(CONFIG_SPACE, &[9]);
    let mut data = [0];
    machine.transport.read(CONFIG_SPACE, &mut data);
    assert_eq!(data, [1]);
    let before = machine.get(VIRTIO_MMIO_CONFIG_GENERATION);
    machine
        .device
        .lock()
        .unwrap()
        .config
        .update(|bytes| bytes[0] = 7);
    assert_ne!(machine.get(VIRTIO_MMIO_CONFIG_GENERATION), before);
}

/// Restores a machine from what was saved of another, in the same memory.
fn restore(machine: &Machine, state: &TransportState) -> Result<Machine, RestoreError> {
    let device = Arc::new(Mutex::new(Probe {
        config: Arc::clone(&machine.device.lock().unwrap().config),
        ..Probe::default()
    }));
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let transport = MmioTransport::restore(
        TransportArgs {
            device: Arc::clone(&device) as SharedDevice,
            memory: Arc::clone(&machine.memory),
            line: Box::new(line.try_clone().unwrap()),
            notifications: notifications(),
        },
        state,
    )?;
    Ok(Machine {
        memory: Arc::clone(&machine.memory),
        device,
        line,
        transport,
    })
}

#[test]
fn a_running_device_is_restored_in_the_middle_of_traffic() {
    let (machine, mut drivers) = Machine::running();
    for _ in 0..3 {
        drivers[0].offer(&[(0x10000, 4, true)]);
        drivers[1].offer(&[(0x10000, 4, true)]);
    }
    machine.device.lock().unwrap().process_queue(1).unwrap();
    machine.transport.interrupt().signal_config();
    machine.set(VIRTIO_MMIO_QUEUE_SEL, 1);
    let state = machine.transport.save();
    let bytes = postcard::to_stdvec(&state).unwrap();
    let state: TransportState = postcard::from_bytes(&bytes).unwrap();

    let child = restore(&machine, &state).unwrap();
    assert_eq!(child.transport.save(), state);
    assert_eq!(child.get(VIRTIO_MMIO_STATUS), RUNNING);
    assert_eq!(child.get(VIRTIO_MMIO_INTERRUPT_STATUS), 3);
    assert_eq!(
        child.get(VIRTIO_MMIO_QUEUE_NUM_MAX),
        16,
        "queue 1 is still selected"
    );
    assert!(
        child.line.read().is_err(),
        "the interrupt controller is not there yet"
    );
    child.transport.repeat_interrupt();
    assert_eq!(child.line.read().unwrap(), 1);
    assert_eq!(child.device.lock().unwrap().features, F_VERSION_1 | OFFERED);
    child.device.lock().unwrap().process_queue(0).unwrap();
    drivers[1].offer(&[(0x10000, 4, true)]);
    child.device.lock().unwrap().process_queue(1).unwrap();
    assert_eq!(std::iter::from_fn(|| drivers[0].take_used()).count(), 3);
    assert_eq!(std::iter::from_fn(|| drivers[1].take_used()).count(), 4);
}

#[test]
fn a_half_configured_device_is_restored_where_it_was() {
    let machine = Machine::new();
    let drivers = machine.drivers();
    machine.negotiate(F_VERSION_1 | OFFERED);
    machine.set_up(0, &drivers[0]);
    let child = restore(&machine, &machine.transport.save()).unwrap();
    assert!(!child.is_active());
    child.set_up(1, &drivers[1]);
    child.set(VIRTIO_MMIO_STATUS, RUNNING);
    let device = child.device.lock().unwrap();
    assert!(device.queues.iter().all(|queue| queue.state().ready));
}

#[test]
fn a_state_of_another_device_is_refused() {
    let (machine, _) = Machine::running();
    let state = machine.transport.save();
    let refused = |change: &dyn Fn(&mut TransportState)| {
        let mut state = state.clone();
        change(&mut state);
        restore(&machine, &state)
            .err()
            .map(|error| error.to_string())
    };
    assert_eq!(refused(&|_| ()), None);
    for (change, message) in [
        (
            &(|state: &mut TransportState| state.device_type = 1) as &dyn Fn(&mut _),
            "type 1",
        ),
        (
            &|state: &mut TransportState| state.driver_features |= 1 << 40,
            "features",
        ),
        (
            &|state: &mut TransportState| state.queues.truncate(1),
            "queues",
        ),
        (
            &|state: &mut TransportState| state.queues[0].max_size = 16,
            "queues",
        ),
        (
            &|state: &mut TransportState| state.queues[0].used_ring = 0x20000,
            "queues",
        ),
        (
            &|state: &mut TransportState| state.queues[0].size = 5,
            "virtqueue",
        ),
    ] {
        let error = refused(change).unwrap();
        assert!(error.contains(message), "{error}");
    }
}

/// Registers, and offsets around them.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..0x40).prop_map(|register| register * 4),
        1 => 0u64..0x1000,
    ]
}

/// Values that mean something, and others.
fn value() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0u32..0x100,
        2 => (0u32..8).prop_map(|page| page << 12),
        1 => any::<u32>(),
        1 => Just(RUNNING),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever a driver writes, and in whatever order, the device is only ever active with
    /// queues that lie in memory and features that were offered, and can be saved and restored.
    #[test]
    fn no_sequence_of_accesses_does_harm(
        prefix in 0usize..4,
        writes in proptest::collection::vec((offset(), value()), 0..200),
        filler in any::<u64>(),
    ) {
        let (machine, _) = Machine::running();
        if prefix == 0 {
            machine.set(VIRTIO_MMIO_STATUS, 0);
        }
        let garbage: Vec<u8> = (0..0x8000u64)
            .map(|index| (filler.wrapping_mul(index | 1) >> (filler % 50)) as u8)
            .collect();
        machine.memory.write_slice(&garbage, GuestAddress(0x4000)).unwrap();
        for (offset, value) in writes {
            machine.transport.write(offset, &value.to_le_bytes());
            let mut data = [0; 4];
            machine.transport.read(offset, &mut data);
            let mut device = machine.device.lock().unwrap();
            for index in 0..device.queues.len() {
                let state = device.queues[index].state();
                prop_assert!(!state.ready || rings_valid(&state, &machine.memory));
                // An error is as good as a result.
                let _ = device.process_queue(index);
            }
            prop_assert_eq!(device.features & !(OFFERED | F_VERSION_1), 0);
        }
        let state = machine.transport.save();
        let child = restore(&machine, &state).unwrap();
        prop_assert_eq!(child.transport.save(), state);
        prop_assert_eq!(child.is_active(), machine.is_active());
    }
}
