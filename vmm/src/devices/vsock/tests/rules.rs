//! One rule of the protocol, or of what the host sees of it, in each test.

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
fn a_request_waits_for_the_driver_and_for_a_buffer() {
    let mut machine = Machine::new();
    machine.device.reset();
    let (mut stream, theirs) = UnixStream::pair().unwrap();
    machine.device.connect(1, theirs).unwrap();
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
    machine.device.connect(5, theirs).unwrap();
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

#[test]
fn the_end_of_the_hosts_bytes_comes_behind_them() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 1 << 20);
    let sent = pattern(20_000);
    stream.write_all(&sent).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    machine.settle();
    let mut packets = machine.received();
    let (last, _) = packets.pop().unwrap();
    assert_eq!((last.op, last.flags), (op::SHUTDOWN, SHUTDOWN_SEND));
    let bytes: Vec<u8> = packets.into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert!(bytes == sent);
    // The other way is still open.
    machine.send(guest.packet(op::RW), b"answer");
    assert_eq!(read(&mut stream), (b"answer".to_vec(), false));
    machine.send(guest.shutdown(SHUTDOWN_SEND), &[]);
    assert_eq!(read(&mut stream), (vec![], true));
    // The guest's socket is closed, which it confirms by a reset.
    machine.send(guest.packet(op::RST), &[]);
    machine.device.drain().unwrap();
}

#[test]
fn the_end_of_the_guests_bytes_comes_behind_them() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 1 << 20);
    // More than the stream takes at once, so that some of it waits here.
    let sent = pattern(BUFFER as usize);
    for piece in sent.chunks(0x1_0000) {
        machine.send(guest.packet(op::RW), piece);
    }
    // Then more, as far as credit allows.
    machine.send(guest.shutdown(SHUTDOWN_SEND), &[]);
    let mut bytes: Vec<u8> = Vec::new();
    let ended = loop {
        let (more, ended) = read(&mut stream);
        bytes.extend(&more);
        if ended || more.is_empty() {
            break ended;
        }
        machine.settle();
    };
    assert!(bytes == sent);
    assert!(ended);
    // The host still may send.
    stream.write_all(b"on").unwrap();
    machine.settle();
    let packets = machine.receive_all();
    assert!(
        packets
            .iter()
            .any(|(packet, data)| packet.op == op::RW && data == b"on")
    );
}

#[test]
fn a_socket_that_the_guest_closes_is_reset_at_once() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 1 << 20);
    machine.send(guest.packet(op::RW), b"last words");
    machine.send(guest.shutdown(SHUTDOWN_RECEIVE | SHUTDOWN_SEND), &[]);
    let packets = machine.received();
    assert_eq!(packets.last().unwrap().0.op, op::RST);
    assert_eq!(read(&mut stream), (b"last words".to_vec(), true));
    machine.device.drain().unwrap();
}

#[test]
fn bytes_that_nobody_took_do_not_make_the_end_an_error() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 0);
    stream.write_all(b"the guest has no room for this").unwrap();
    machine.send(guest.packet(op::RW), b"output");
    machine.send(guest.shutdown(SHUTDOWN_RECEIVE | SHUTDOWN_SEND), &[]);
    assert_eq!(read(&mut stream), (b"output".to_vec(), true));
}

#[test]
fn bytes_reach_a_slow_reader_after_the_guest_has_gone() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 1 << 20);
    let sent = pattern(3 * BUFFER as usize);
    let (mut position, mut taken) = (0, 0);
    // Fills the stream's own buffer and then ours.
    while position - taken < BUFFER as usize {
        let count = 0x8000.min(BUFFER as usize - (position - taken));
        machine.send(guest.packet(op::RW), &sent[position..position + count]);
        position += count;
        if let Some((packet, _)) = machine.receive_all().last() {
            taken = packet.fwd_cnt as usize;
        }
    }
    let mut bytes: Vec<u8> = Vec::new();
    machine.send(guest.packet(op::RST), &[]);
    assert!(matches!(
        machine.device.drain(),
        Err(DrainError::InFlight(_))
    ));
    loop {
        let (more, ended) = read(&mut stream);
        bytes.extend(&more);
        machine.settle();
        if ended {
            break;
        }
    }
    assert!(bytes == sent[..position]);
    machine.device.drain().unwrap();
}

#[test]
fn a_host_that_closes_is_heard_to_the_end_and_the_guest_is_told() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 1 << 20);
    stream.write_all(b"bye").unwrap();
    drop(stream);
    machine.settle();
    let packets = machine.received();
    let data: Vec<u8> = packets
        .iter()
        .flat_map(|(_, bytes)| bytes.clone())
        .collect();
    assert_eq!(data, b"bye");
    let last = packets.last().unwrap().0;
    assert_eq!(
        (last.op, last.flags),
        (op::SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE)
    );
    // What the guest still sends is dropped, and credit flows on.
    machine.send(guest.packet(op::RW), &pattern(1000));
    assert!(
        machine
            .received()
            .iter()
            .all(|(packet, _)| packet.op != op::RST)
    );
    machine.send(guest.packet(op::RST), &[]);
    machine.device.drain().unwrap();
}

#[test]
fn a_guest_that_will_not_receive_stops_the_hosts_writer() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 1 << 20);
    machine.send(guest.shutdown(SHUTDOWN_RECEIVE), &[]);
    assert_eq!(
        stream.write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
    machine.send(guest.packet(op::RW), b"still sending");
    assert_eq!(read(&mut stream), (b"still sending".to_vec(), false));
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut machine = Machine::new();
    let (mut stream, mut guest) = machine.connect(5, 1000);
    let sent = pattern(2500);
    stream.write_all(&sent).unwrap();
    let mut bytes: Vec<u8> = Vec::new();
    for (forwarded, expected) in [(0, 1000), (1000, 1000), (1300, 300), (2300, 200), (2500, 0)] {
        guest.forwarded = forwarded;
        machine.send(guest.packet(op::CREDIT_UPDATE), &[]);
        let packets = machine.receive_all();
        let data: Vec<u8> = packets.into_iter().flat_map(|(_, data)| data).collect();
        assert_eq!(data.len(), expected, "when {forwarded} were taken");
        bytes.extend(data);
    }
    assert!(bytes == sent);
}

#[test]
fn a_guest_that_lies_about_its_credit_gets_none() {
    let mut machine = Machine::new();
    let (mut stream, mut guest) = machine.connect(5, 1000);
    guest.forwarded = 1;
    machine.send(guest.packet(op::CREDIT_UPDATE), &[]);
    stream.write_all(&pattern(100)).unwrap();
    let packets = machine.receive_all();
    // It has taken a byte that was never sent: the window is seen as full, not as endless.
    assert!(
        packets
            .iter()
            .all(|(packet, _)| packet.op == op::CREDIT_REQUEST)
    );
    assert_eq!(packets.len(), 1, "asked once");
}

#[test]
fn more_than_the_credit_ends_the_connection() {
    let mut machine = Machine::new();
    let (stream, guest) = machine.connect(5, 1000);
    let piece = pattern(0x1_0000);
    let mut sent = 0;
    let reset = loop {
        machine.send(guest.packet(op::RW), &piece);
        sent += piece.len();
        if let Some((reset, _)) = machine
            .receive_all()
            .into_iter()
            .find(|(packet, _)| packet.op == op::RST)
        {
            break reset;
        }
        assert!(sent < 8 << 20, "it takes without end");
    };
    assert_eq!(reset.dst_port, 5);
    drop(stream);
    machine.settle();
    machine.device.drain().unwrap();
}

#[test]
fn a_request_for_credit_is_answered() {
    let mut machine = Machine::new();
    let (_stream, guest) = machine.connect(5, 1000);
    machine.send(guest.packet(op::RW), b"12345");
    machine.send(guest.packet(op::CREDIT_REQUEST), &[]);
    let (update, _) = machine.received().pop().unwrap();
    assert_eq!(
        (update.op, update.buf_alloc, update.fwd_cnt),
        (op::CREDIT_UPDATE, BUFFER, 5)
    );
}

#[test]
fn packets_out_of_turn_end_the_connection() {
    for (accepted, operation) in [
        (false, op::RW),
        (false, op::SHUTDOWN),
        (false, op::CREDIT_UPDATE),
        (false, op::REQUEST),
        (true, op::RESPONSE),
        (true, op::REQUEST),
        (true, 0),
        (true, 8),
        (true, u16::MAX),
    ] {
        let mut machine = Machine::new();
        let (mut stream, request) = machine.request(5);
        let guest = Guest {
            request,
            buffer: 1000,
            forwarded: 0,
        };
        if accepted {
            machine.send(guest.packet(op::RESPONSE), &[]);
        }
        machine.send(guest.packet(operation), &[]);
        let (reset, _) = machine.received().pop().unwrap();
        assert_eq!(reset.op, op::RST, "operation {operation}");
        assert_eq!(read(&mut stream), (vec![], true));
        machine.device.drain().unwrap();
    }
}

#[test]
fn bytes_after_their_end_end_the_connection() {
    let mut machine = Machine::new();
    let (_stream, guest) = machine.connect(5, 1000);
    machine.send(guest.shutdown(SHUTDOWN_SEND), &[]);
    machine.send(guest.packet(op::RW), b"more");
    assert_eq!(machine.received().pop().unwrap().0.op, op::RST);
}

#[test]
fn another_guest_port_is_another_connection() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 1000);
    let stranger = Packet {
        src_port: 6,
        ..guest.packet(op::RW)
    };
    machine.send(stranger, b"not for you");
    let (reset, _) = machine.received().pop().unwrap();
    assert_eq!((reset.op, reset.dst_port), (op::RST, 6));
    machine.send(guest.packet(op::RW), b"for you");
    assert_eq!(read(&mut stream), (b"for you".to_vec(), false));
}

#[test]
fn a_slow_reader_holds_up_only_its_own_connection() {
    let mut machine = Machine::new();
    let (mut slow, first) = machine.connect(5, 1000);
    let (mut fast, second) = machine.connect(6, 1000);
    for _ in 0..4 {
        machine.send(first.packet(op::RW), &pattern(0x1_0000));
    }
    machine.send(second.packet(op::RW), b"quick");
    assert_eq!(read(&mut fast), (b"quick".to_vec(), false));
    let mut bytes = 0;
    while bytes < 4 * 0x1_0000 {
        bytes += read(&mut slow).0.len();
        machine.settle();
    }
    // All credit is back, and the guest knows.
    let packets = machine.receive_all();
    let told = packets.iter().rfind(|(packet, _)| packet.dst_port == 5);
    assert!(told.unwrap().0.fwd_cnt >= BUFFER / 2);
}

#[test]
fn connections_take_turns() {
    let mut machine = Machine::new();
    let (mut first, _) = machine.connect(5, 1 << 20);
    let (mut second, _) = machine.connect(6, 1 << 20);
    machine.use_up_buffers(&mut first);
    first.write_all(&pattern(100_000)).unwrap();
    second.write_all(b"me too").unwrap();
    machine.settle();
    let packets = machine.receive_all();
    let position = packets
        .iter()
        .position(|(packet, _)| packet.dst_port == 6)
        .unwrap();
    assert!(
        position < packets.len() / 2,
        "{position} of {}",
        packets.len()
    );
}

#[test]
fn a_connection_with_much_to_send_does_not_keep_the_device() {
    let mut machine = Machine::new();
    let (mut stream, _) = machine.connect(5, 1 << 20);
    stream.write_all(&pattern(150_000)).unwrap();
    machine.use_up_buffers(&mut stream);
    // Small buffers, so that the stream has something for more than the queue holds.
    machine.rx_buffer = 44 + 100;
    while machine.rx.free_descriptors() > 0 {
        machine.give_buffer();
    }
    machine.device.process_queue(RX).unwrap();
    assert_eq!(machine.received().len(), 64);
    assert!(machine.board.rescheduled(RX), "it goes on after the others");
}

#[test]
fn resets_wait_for_buffers_and_hold_the_guests_packets_up() {
    let mut machine = Machine::new();
    let request = Packet {
        src_cid: GUEST_CID,
        dst_cid: HOST_CID,
        kind: TYPE_STREAM,
        op: op::REQUEST,
        ..Packet::default()
    };
    // No buffers are given: the answers cannot be sent.
    let mut left = 0;
    for port in 0..300u32 {
        if machine.tx.free_descriptors() < 2 {
            left = 300 - port;
            break;
        }
        machine.send(
            Packet {
                src_port: port,
                ..request
            },
            &[],
        );
    }
    assert!(left > 0, "the guest may go on for ever");
    assert!(matches!(
        machine.device.drain(),
        Err(DrainError::InFlight(_))
    ));
    let answered = machine.receive_all().len() as u32;
    assert_eq!(answered, 300 - left, "every one is answered in the end");
    machine.device.drain().unwrap();
}

#[test]
fn a_packet_may_be_laid_out_in_any_way() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 1000);
    let data = pattern(500);
    let packet = Packet {
        len: 500,
        ..guest.packet(op::RW)
    };
    let at = TX_BUFFERS;
    machine
        .memory
        .write_obj(Header::from(packet), GuestAddress(at))
        .unwrap();
    machine
        .memory
        .write_slice(&data, GuestAddress(at + 44))
        .unwrap();
    for layout in [
        &[544][..],
        &[44, 500],
        &[10, 34, 500],
        &[43, 2, 1, 498],
        &[100, 100, 344],
        &[44, 400, 144],
    ] {
        let mut start = at;
        let pieces: Vec<_> = layout
            .iter()
            .map(|&length| {
                start += u64::from(length);
                (start - u64::from(length), length, false)
            })
            .collect();
        machine.tx.offer(&pieces);
        machine.device.process_queue(TX).unwrap();
        assert!(read(&mut stream).0 == data, "{layout:?}");
    }
}

#[test]
fn a_buffer_may_be_laid_out_in_any_way() {
    let mut machine = Machine::new();
    let (mut stream, _) = machine.connect(5, 1 << 20);
    while machine.received().pop().is_some() {}
    machine.device.reset();
    // A device whose buffers come in pieces.
    let mut machine = Machine::new();
    drop(stream);
    let at = RX_BUFFERS;
    let (ours, theirs) = UnixStream::pair().unwrap();
    stream = ours;
    machine.rx.offer(&[(at, 20, true), (at + 20, 30, true)]);
    machine.device.connect(5, theirs).unwrap();
    assert_eq!(machine.rx.take_used().unwrap().1, 44);
    let request: Header = machine.memory.read_obj(GuestAddress(at)).unwrap();
    let guest = Guest {
        request: request.into(),
        buffer: 1 << 20,
        forwarded: 0,
    };
    machine.send(guest.packet(op::RESPONSE), &[]);
    machine.rx.offer(&[
        (at, 10, true),
        (at + 10, 34, true),
        (at + 44, 1, true),
        (at + 45, 9, true),
    ]);
    machine
        .rx
        .offer(&[(at + 0x1000, 44, true), (at + 0x2000, 100, true)]);
    stream.write_all(b"0123456789abcdef").unwrap();
    machine.settle();
    machine.device.process_queue(RX).unwrap();
    assert_eq!(machine.rx.take_used().unwrap().1, 44 + 10);
    assert_eq!(machine.rx.take_used().unwrap().1, 44 + 6);
    let mut data = [0; 10];
    machine
        .memory
        .read_slice(&mut data, GuestAddress(at + 44))
        .unwrap();
    assert_eq!(&data, b"0123456789");
    machine
        .memory
        .read_slice(&mut data, GuestAddress(at + 0x2000))
        .unwrap();
    assert_eq!(&data[..6], b"abcdef");
}

#[test]
fn buffers_of_no_use_are_given_back() {
    let mut machine = Machine::new();
    let (mut stream, _) = machine.connect(5, 1 << 20);
    machine.use_up_buffers(&mut stream);
    let unusable: [&[(u64, u32, bool)]; 5] = [
        &[(RX_BUFFERS, 10, true)],
        &[(RX_BUFFERS, 44, true)],
        &[(RX_BUFFERS, 4000, false)],
        &[(0x80_0000, 4000, true)],
        &[(RX_BUFFERS, 44, true), (u64::MAX - 10, 4000, true)],
    ];
    for pieces in unusable {
        machine.rx.offer(pieces);
    }
    machine.buffers.fill(RX_BUFFERS);
    machine.device.process_queue(RX).unwrap();
    for pieces in unusable {
        assert_eq!(machine.rx.take_used().unwrap().1, 0, "{pieces:x?}");
    }
    // In the middle of good ones, too.
    for _ in 0..3 {
        machine.give_buffer();
        machine.rx.offer(unusable[3]);
    }
    machine.device.process_queue(RX).unwrap();
    machine.settle();
    let used: Vec<_> = std::iter::from_fn(|| machine.rx.take_used()).collect();
    assert!(
        used.iter().filter(|(_, written)| *written > 44).count() == 3,
        "{used:?}"
    );
}

#[test]
fn what_is_no_packet_is_dropped() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 1000);
    let too_long = Packet {
        len: 501,
        ..guest.packet(op::RW)
    };
    machine
        .memory
        .write_obj(Header::from(too_long), GuestAddress(TX_BUFFERS))
        .unwrap();
    for pieces in [
        &[(TX_BUFFERS, 43, false)][..],
        &[(TX_BUFFERS, 544, false)],
        &[(TX_BUFFERS, 1000, true)],
        &[(0x80_0000, 1000, false)],
        &[(u64::MAX - 20, 1000, false)],
    ] {
        machine.tx.offer(pieces);
        machine.device.process_queue(TX).unwrap();
        assert!(machine.tx.take_used().is_some());
    }
    assert!(machine.received().is_empty());
    assert_eq!(read(&mut stream), (vec![], false));
}

#[test]
fn data_outside_memory_ends_the_connection() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 1000);
    let packet = Packet {
        len: 100,
        ..guest.packet(op::RW)
    };
    machine
        .memory
        .write_obj(Header::from(packet), GuestAddress(TX_BUFFERS))
        .unwrap();
    machine
        .tx
        .offer(&[(TX_BUFFERS, 44, false), (0x7f_fff0, 100, false)]);
    machine.device.process_queue(TX).unwrap();
    assert_eq!(machine.received().pop().unwrap().0.op, op::RST);
    assert_eq!(read(&mut stream), (vec![], true));
}

#[test]
fn the_number_of_connections_is_bounded() {
    let mut machine = Machine::new();
    let mut streams = Vec::new();
    let refused = loop {
        let (ours, theirs) = UnixStream::pair().unwrap();
        streams.push(ours);
        if let Err(error) = machine.device.connect(5, theirs) {
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
    machine.device.connect(5, theirs).unwrap();
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
