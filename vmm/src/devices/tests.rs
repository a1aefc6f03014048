//! Tests of the devices together, with threads and without KVM.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;

use vm_memory::{Bytes, GuestAddress};

use super::virtio::InterruptLine;
use super::virtio::mmio::Connect;
use super::*;
use crate::devices::virtio::testing::DriverQueue;
use virtio_bindings::virtio_mmio::*;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

/// A machine without KVM: interrupts are eventfds, notifications are written by the test's driver
/// through the register, as a vCPU does it.
struct Bench {
    lines: Mutex<VecDeque<(usize, EventFd)>>,
}

impl Wiring for Bench {
    fn line(&self, slot: usize) -> Box<dyn InterruptLine> {
        let line = EventFd::new(EFD_CLOEXEC).unwrap();
        lock(&self.lines).push_back((slot, line.try_clone().unwrap()));
        Box::new(line)
    }

    fn connect(&self, _: usize) -> Connect {
        Box::new(|_, _| Ok(()))
    }
}

impl Bench {
    fn new() -> Self {
        Self {
            lines: Mutex::default(),
        }
    }

    fn take_line(&self, slot: usize) -> EventFd {
        let mut lines = lock(&self.lines);
        let position = lines.iter().position(|(of, _)| *of == slot).unwrap();
        lines.remove(position).unwrap().1
    }
}

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 0x40_0000)]).unwrap()
}

fn set(devices: &Devices, slot: usize, register: u32, value: u32) {
    devices.mmio_write(
        slot_address(slot) + u64::from(register),
        &value.to_le_bytes(),
    );
}

fn get(devices: &Devices, slot: usize, register: u32) -> u32 {
    let mut data = [0; 4];
    devices.mmio_read(slot_address(slot) + u64::from(register), &mut data);
    u32::from_le_bytes(data)
}

/// Drives a device up with these queues and all features.
fn bring_up(devices: &Devices, slot: usize, drivers: &[&DriverQueue]) {
    for status in [0, 1, 3] {
        set(devices, slot, VIRTIO_MMIO_STATUS, status);
    }
    for half in 0..2 {
        set(devices, slot, VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
        set(devices, slot, VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
        let features = get(devices, slot, VIRTIO_MMIO_DEVICE_FEATURES);
        set(devices, slot, VIRTIO_MMIO_DRIVER_FEATURES, features);
    }
    set(devices, slot, VIRTIO_MMIO_STATUS, 11);
    for (index, driver) in drivers.iter().enumerate() {
        set(devices, slot, VIRTIO_MMIO_QUEUE_SEL, index as u32);
        set(devices, slot, VIRTIO_MMIO_QUEUE_NUM, driver.size.into());
        for (register, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, driver.base),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, driver.available_ring()),
            (VIRTIO_MMIO_QUEUE_USED_LOW, driver.used_ring()),
        ] {
            set(devices, slot, register, address as u32);
            set(devices, slot, register + 4, (address >> 32) as u32);
        }
        set(devices, slot, VIRTIO_MMIO_QUEUE_READY, 1);
        assert_eq!(get(devices, slot, VIRTIO_MMIO_QUEUE_READY), 1);
    }
    set(devices, slot, VIRTIO_MMIO_STATUS, 15);
    assert_eq!(get(devices, slot, VIRTIO_MMIO_STATUS), 15);
}

/// What a machine that runs has, and a template has not.
fn backends() -> Backends {
    Backends {
        entropy: true,
        ..Backends::default()
    }
}

/// The state of a machine's devices, for tests of what holds it.
pub(crate) fn example() -> DevicesState {
    let devices = Devices::assemble(memory(), &Bench::new(), Backends::default(), None);
    devices.unwrap().save().unwrap()
}

#[test]
fn every_slot_has_its_device_and_its_word_on_the_command_line() {
    let devices = Devices::assemble(memory(), &Bench::new(), Backends::default(), None).unwrap();
    let types: Vec<_> = (0..SLOTS)
        .map(|slot| get(&devices, slot, VIRTIO_MMIO_DEVICE_ID))
        .collect();
    assert_eq!(types, [19, 26, 4, 3, 1, 1, 5]);
    assert_eq!(
        devices.kernel_cmdline(),
        [
            "virtio_mmio.device=4K@0xd0000000:5",
            "virtio_mmio.device=4K@0xd0001000:6",
            "virtio_mmio.device=4K@0xd0002000:7",
            "virtio_mmio.device=4K@0xd0003000:8",
            "virtio_mmio.device=4K@0xd0004000:9",
            "virtio_mmio.device=4K@0xd0005000:10",
            "virtio_mmio.device=4K@0xd0006000:11",
        ]
    );
}

#[test]
fn addresses_without_a_device_read_ones() {
    let devices = Devices::assemble(memory(), &Bench::new(), Backends::default(), None).unwrap();
    for address in [0, MMIO_BASE - 4, slot_address(SLOTS), u64::MAX - 3] {
        let mut data = [0; 4];
        devices.mmio_read(address, &mut data);
        assert_eq!(data, [0xff; 4]);
        devices.mmio_write(address, &data);
    }
}

#[test]
fn more_taps_than_slots_are_refused() {
    let taps = (0..3).map(|_| tempfile::tempfile().unwrap()).collect();
    let backends = Backends {
        taps,
        ..Backends::default()
    };
    let error = Devices::assemble(memory(), &Bench::new(), backends, None)
        .err()
        .unwrap();
    assert_eq!(error.to_string(), "3 taps for 2 network devices");
}

const RNG: usize = Slot::Rng as usize;
const VSOCK: usize = Slot::Vsock as usize;

#[test]
fn a_device_answers_in_its_thread_before_and_after_a_fork() {
    let bench = Bench::new();
    let memory = memory();
    let devices = Devices::assemble(memory.clone(), &bench, backends(), None).unwrap();
    let mut driver = DriverQueue::new(&Arc::new(memory.clone()), 0x1_0000, 8);
    let line = bench.take_line(RNG);
    devices.start().unwrap();
    bring_up(&devices, RNG, &[&driver]);
    for _ in 0..100 {
        driver.offer(&[(0x8000, 64, true)]);
        set(&devices, RNG, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        // Waits for the interrupt.
        line.read().unwrap();
        assert_eq!(get(&devices, RNG, VIRTIO_MMIO_INTERRUPT_STATUS), 1);
        set(&devices, RNG, VIRTIO_MMIO_INTERRUPT_ACK, 1);
        assert_eq!(driver.take_used().unwrap().1, 64);
    }
    devices.quiesce().unwrap();
    // Notified after the thread has ended: nobody but the one that starts next can know.
    driver.offer(&[(0x8000, 64, true)]);
    set(&devices, RNG, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    let state = postcard::to_stdvec(&devices.save().unwrap()).unwrap();
    drop(devices);

    let state: DevicesState = postcard::from_bytes(&state).unwrap();
    let bench = Bench::new();
    let child = Devices::assemble(memory, &bench, backends(), Some(&state)).unwrap();
    let line = bench.take_line(RNG);
    child.start().unwrap();
    line.read().unwrap();
    assert_eq!(driver.take_used().unwrap().1, 64);
    child.quiesce().unwrap();
    let again = postcard::to_stdvec(&child.save().unwrap()).unwrap();
    assert!(!again.is_empty());
}

#[test]
fn an_interrupt_that_was_not_acknowledged_comes_again_after_a_fork() {
    let bench = Bench::new();
    let memory = memory();
    let devices = Devices::assemble(memory.clone(), &bench, backends(), None).unwrap();
    let mut driver = DriverQueue::new(&Arc::new(memory.clone()), 0x1_0000, 8);
    bring_up(&devices, RNG, &[&driver]);
    driver.offer(&[(0x8000, 64, true)]);
    devices.quiesce().unwrap();
    let state = devices.save().unwrap();
    let bench = Bench::new();
    let child = Devices::assemble(memory, &bench, backends(), Some(&state)).unwrap();
    assert_eq!(get(&child, RNG, VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    child.start().unwrap();
    bench.take_line(RNG).read().unwrap();
}

#[test]
fn a_broken_device_is_out_of_service_until_it_is_reset() {
    let bench = Bench::new();
    let memory = memory();
    let devices = Devices::assemble(memory.clone(), &bench, backends(), None).unwrap();
    let mut driver = DriverQueue::new(&Arc::new(memory.clone()), 0x1_0000, 8);
    let line = bench.take_line(RNG);
    devices.start().unwrap();
    bring_up(&devices, RNG, &[&driver]);
    driver.publish(100);
    set(&devices, RNG, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    line.read().unwrap();
    assert_eq!(get(&devices, RNG, VIRTIO_MMIO_STATUS), 15 | 64);
    assert_eq!(get(&devices, RNG, VIRTIO_MMIO_INTERRUPT_STATUS), 2);
    set(&devices, RNG, VIRTIO_MMIO_INTERRUPT_ACK, 2);
    let error = devices.quiesce().unwrap_err().to_string();
    assert_eq!(error, "device 2 cannot be frozen: its driver has broken it");

    devices.start().unwrap();
    let zeroes = [0; 0x4000];
    memory.write_slice(&zeroes, GuestAddress(0x1_0000)).unwrap();
    let mut driver = DriverQueue::new(&Arc::new(memory), 0x1_0000, 8);
    bring_up(&devices, RNG, &[&driver]);
    driver.offer(&[(0x8000, 64, true)]);
    set(&devices, RNG, VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    line.read().unwrap();
    assert!(driver.take_used().is_some());
    devices.quiesce().unwrap();
}

#[test]
fn a_connection_keeps_the_machine_from_being_frozen() {
    let bench = Bench::new();
    let memory = memory();
    let devices = Devices::assemble(memory, &bench, backends(), None).unwrap();
    devices.start().unwrap();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    devices.connect(1024, [theirs]).unwrap();
    let error = devices.quiesce().unwrap_err().to_string();
    assert!(
        error.starts_with("device 0 cannot be frozen: vsock connection from host port"),
        "{error}"
    );
    assert!(error.contains("to guest port 1024"), "{error}");
    // It goes on, and nothing is lost.
    devices.start().unwrap();
    ours.write_all(b"still there").unwrap();
    ours.shutdown(Shutdown::Both).unwrap();
    set(&devices, VSOCK, VIRTIO_MMIO_STATUS, 0);
    let mut rest = Vec::new();
    ours.read_to_end(&mut rest).unwrap();
    devices.quiesce().unwrap();
}
