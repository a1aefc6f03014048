//! What a driver must not write is refused or ignored.

use super::*;

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
