//! The device as a whole: its bound, its reset, its freeze and fork.

use super::*;

#[test]
fn the_number_of_connections_is_bounded() {
    let mut machine = Machine::new();
    let mut streams = Vec::new();
    let refused = loop {
        let (ours, theirs) = UnixStream::pair().unwrap();
        streams.push(ours);
        if let Err(error) = machine.device.connect(5, [theirs]) {
            break error;
        }
    };
    assert_eq!(streams.len(), MAX_CONNECTIONS + 1);
    assert_eq!(refused.to_string(), "there are 512 connections already");
    assert_eq!(read(streams.last_mut().unwrap()), (vec![], true));
    machine.device.reset();
    machine.device.drain().unwrap();
}

#[test]
fn a_reset_of_the_device_closes_the_streams() {
    let mut machine = Machine::new();
    let (mut stream, _) = machine.connect(5, 1000);
    machine.device.reset();
    assert_eq!(read(&mut stream), (vec![], true));
    machine.device.drain().unwrap();
}

#[test]
fn a_broken_ring_is_an_error_and_connecting_is_not() {
    let mut machine = Machine::new();
    machine.rx.set_available_index(1000);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    machine.device.connect(5, [theirs]).unwrap();
    assert!(
        machine.board.rescheduled(RX),
        "the event loop is to find it"
    );
    assert!(matches!(
        machine.device.process_queue(RX),
        Err(QueueError::Ring(_))
    ));
}

#[test]
fn a_connection_is_named_when_it_prevents_a_freeze() {
    let mut machine = Machine::new();
    let (_stream, guest) = machine.connect(1025, 1000);
    let error = machine.device.drain().unwrap_err().to_string();
    let port = guest.request.src_port;
    let expected =
        format!("vsock connection from host port {port} to guest port 1025 (and 0 more)");
    assert!(error.contains(&expected), "{error}");
}

#[test]
fn a_fork_goes_on_where_the_template_stopped() {
    let mut machine = Machine::new();
    let (stream, guest) = machine.connect(5, 1000);
    drop(stream);
    machine.settle();
    machine.send(guest.packet(op::RST), &[]);
    // Packets that nobody has looked at yet are drained.
    let request = Packet {
        src_port: 9,
        ..guest.packet(op::REQUEST)
    };
    machine.put(request, &[]);
    machine.device.drain().unwrap();
    let state = machine.device.save();
    let queues: Vec<_> = machine
        .device
        .queues()
        .iter()
        .map(|queue| queue.state())
        .collect();

    let registrar = Registrar::on(&machine.epoll);
    let mut child = Vsock::restore(VsockArgs { registrar }, &state).unwrap();
    child.activate(crate::devices::virtio::Activation {
        queues: machine.board.queues(&queues),
        features: child.features(),
        interrupt: machine.board.interrupt.clone(),
    });
    assert_eq!(child.save(), state);
    machine.device = child;
    let packets = machine.received();
    assert_eq!(
        packets.last().unwrap().0.op,
        op::RST,
        "the drained packet was answered"
    );
    let (mut stream, guest) = machine.connect(6, 1000);
    assert_eq!(guest.request.src_port, state_port(&state), "ports go on");
    stream.write_all(b"hello").unwrap();
    machine.settle();
    assert_eq!(machine.received().pop().unwrap().1, b"hello");
}

fn state_port(state: &VsockState) -> u32 {
    postcard::from_bytes(&postcard::to_stdvec(state).unwrap()).unwrap()
}
