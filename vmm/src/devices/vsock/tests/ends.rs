//! The ends of a connection, from either side: what comes before them arrives.

use super::*;

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
