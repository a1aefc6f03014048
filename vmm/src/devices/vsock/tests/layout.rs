//! Packets and buffers in any pieces, and those of no use.

use super::*;

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
    machine.device.connect(5, [theirs]).unwrap();
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
