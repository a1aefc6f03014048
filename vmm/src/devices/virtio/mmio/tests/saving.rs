//! A transport that is saved, and restored from that.

use super::*;

/// Restores a machine from what was saved of another, in the same memory.
pub(super) fn restore(machine: &Machine, state: &TransportState) -> Result<Machine, RestoreError> {
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
