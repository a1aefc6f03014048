//! How a connection comes about, or does not.

use super::*;

#[test]
fn a_request_goes_out_with_the_connection() {
    let mut machine = Machine::new();
    let (_stream, request) = machine.request(1024);
    assert_eq!((request.src_cid, request.dst_cid), (HOST_CID, GUEST_CID));
    assert_eq!(
        (request.dst_port, request.kind, request.len),
        (1024, TYPE_STREAM, 0)
    );
    assert_eq!((request.buf_alloc, request.fwd_cnt), (BUFFER, 0));
    assert_eq!(machine.board.interrupts(), 1);
    let (_second, other) = machine.request(1024);
    assert_ne!(other.src_port, request.src_port);
}

#[test]
fn connections_that_are_asked_for_at_once_take_one_interrupt() {
    let mut machine = Machine::new();
    machine.refill();
    let mut pairs: Vec<_> = (0..3).map(|_| UnixStream::pair().unwrap()).collect();
    for (ours, _) in &mut pairs {
        ours.write_all(b"header").unwrap();
    }
    let (_ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    machine.device.connect(1025, theirs).unwrap();
    assert_eq!(machine.board.interrupts(), 1);
    let requests = machine.received();
    assert_eq!(requests.len(), 3);
    machine.refill();
    for (request, _) in requests {
        assert_eq!((request.op, request.dst_port), (op::REQUEST, 1025));
        let guest = Guest {
            request,
            buffer: 4096,
            forwarded: 0,
        };
        machine.send(guest.packet(op::RESPONSE), &[]);
    }
    let first: Vec<_> = machine.received().into_iter().map(|(_, it)| it).collect();
    assert_eq!(first, [b"header"; 3]);
}

#[test]
fn a_request_waits_for_the_driver_and_for_a_buffer() {
    let mut machine = Machine::new();
    machine.device.reset();
    let (mut stream, theirs) = UnixStream::pair().unwrap();
    machine.device.connect(1, [theirs]).unwrap();
    // Readiness is told once, and must not be forgotten until it is of use.
    stream.write_all(b"early").unwrap();
    machine.settle();
    let drivers = [&machine.rx, &machine.tx, &machine.event];
    machine.board.activate(&mut machine.device, &drivers);
    machine.device.process_queue(RX).unwrap();
    assert!(machine.received().is_empty());
    machine.refill();
    let [(request, _)] = machine.received()[..] else {
        panic!("no request")
    };
    let guest = Guest {
        request,
        buffer: 4096,
        forwarded: 0,
    };
    machine.send(guest.packet(op::RESPONSE), &[]);
    assert_eq!(machine.received().pop().unwrap().1, b"early");
}

#[test]
fn bytes_pass_both_ways() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 1 << 20);
    stream.write_all(b"to the guest").unwrap();
    machine.settle();
    let packets = machine.received();
    assert_eq!(packets.len(), 1);
    assert_eq!(
        (packets[0].0.op, &packets[0].1[..]),
        (op::RW, &b"to the guest"[..])
    );
    machine.send(guest.packet(op::RW), b"to the host");
    assert_eq!(read(&mut stream), (b"to the host".to_vec(), false));
}

#[test]
fn what_was_written_before_the_guest_accepts_is_not_lost() {
    let mut machine = Machine::new();
    let (mut stream, request) = machine.request(5);
    stream.write_all(b"early").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    machine.settle();
    assert!(machine.received().is_empty());
    let guest = Guest {
        request,
        buffer: 4096,
        forwarded: 0,
    };
    machine.send(guest.packet(op::RESPONSE), &[]);
    let packets = machine.received();
    assert_eq!(packets[0].1, b"early");
    assert_eq!(
        (packets[1].0.op, packets[1].0.flags),
        (op::SHUTDOWN, SHUTDOWN_SEND)
    );
}

#[test]
fn a_closed_port_closes_the_stream() {
    let mut machine = Machine::new();
    let (mut stream, request) = machine.request(5);
    let guest = Guest {
        request,
        buffer: 0,
        forwarded: 0,
    };
    stream.write_all(b"in vain").unwrap();
    machine.send(guest.packet(op::RST), &[]);
    assert_eq!(read(&mut stream), (vec![], true));
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    assert!(machine.received().is_empty());
    machine.device.drain().unwrap();
}

#[test]
fn an_abandoned_request_is_reset() {
    let mut machine = Machine::new();
    let (stream, request) = machine.request(5);
    drop(stream);
    machine.settle();
    let packets = machine.received();
    assert_eq!(
        (packets[0].0.op, packets[0].0.src_port),
        (op::RST, request.src_port)
    );
    machine.device.drain().unwrap();
}

#[test]
fn an_abandoned_request_that_was_never_sent_is_forgotten() {
    let mut machine = Machine::new();
    let (ours, theirs) = UnixStream::pair().unwrap();
    machine.device.connect(5, [theirs]).unwrap();
    drop(ours);
    machine.settle();
    machine.refill();
    assert!(machine.received().is_empty());
    machine.device.drain().unwrap();
}

#[test]
fn the_guest_cannot_open_a_connection() {
    let mut machine = Machine::new();
    machine.refill();
    for (source, destination, kind) in [
        (GUEST_CID, HOST_CID, TYPE_STREAM),
        (GUEST_CID, GUEST_CID, TYPE_STREAM),
        (GUEST_CID, 99, 2),
    ] {
        let request = Packet {
            src_cid: source,
            dst_cid: destination,
            src_port: 7,
            dst_port: 8,
            kind,
            op: op::REQUEST,
            buf_alloc: 4096,
            ..Packet::default()
        };
        machine.send(request, &[]);
        let packets = machine.received();
        assert_eq!(packets.len(), 1);
        let reset = packets[0].0;
        assert_eq!(reset.op, op::RST);
        assert_eq!((reset.src_cid, reset.dst_cid), (destination, source));
        assert_eq!((reset.src_port, reset.dst_port, reset.kind), (8, 7, kind));
    }
}

#[test]
fn a_reset_is_not_answered() {
    let mut machine = Machine::new();
    machine.refill();
    let stray = Packet {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        op: op::RST,
        ..Packet::default()
    };
    machine.send(stray, &[]);
    assert!(machine.received().is_empty());
}
