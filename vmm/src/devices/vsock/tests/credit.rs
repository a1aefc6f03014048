//! Who may send how much, and who comes next.

use super::*;

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
fn a_slow_reader_costs_no_more_than_its_buffer() {
    let mut machine = Machine::new();
    let (mut stream, guest) = machine.connect(5, 0x1_0000);
    let data = pattern(50_000);
    let (mut taken, mut sent) = (0, 0_u32);
    // Always as much as the credit allows, while the host takes a little at a time.
    for _ in 0..200 {
        machine.send(guest.packet(op::CREDIT_REQUEST), &[]);
        for (packet, _) in machine.receive_all() {
            taken = packet.fwd_cnt;
        }
        let room = (BUFFER - (sent - taken)).min(data.len() as u32);
        machine.send(guest.packet(op::RW), &data[..room as usize]);
        sent += room;
        assert!(machine.device.kept().1 <= BUFFER as usize);
        let _ = stream.read(&mut [0; 9000]).unwrap();
    }
    assert!(sent > 4 * BUFFER, "{sent} bytes were sent");
    assert_eq!(machine.device.kept().0, 1, "the connection is still there");
}
