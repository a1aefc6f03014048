//! Random sequences: whatever the guest sends and whenever the host reads, nothing panics, no
//! byte is lost, doubled or out of order, and nobody gets more than the credit allows.

use proptest::prelude::*;

use super::*;

/// A step of a well-behaved guest and host.
#[derive(Clone, Debug)]
enum Step {
    HostWrites(usize),
    HostReads,
    GuestSends(usize),
    GuestTakes(usize),
    GuestGivesBuffers(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1usize..40_000).prop_map(Step::HostWrites),
        Just(Step::HostReads),
        (1usize..70_000).prop_map(Step::GuestSends),
        (1usize..20_000).prop_map(Step::GuestTakes),
        (1usize..40).prop_map(Step::GuestGivesBuffers),
    ]
}

/// Both ends of a connection, what each has sent, and what the other has seen of it.
struct Model {
    machine: Machine,
    stream: UnixStream,
    guest: Guest,
    to_guest: VecDeque<u8>,
    to_host: VecDeque<u8>,
    /// Bytes in the guest's receive buffer.
    held: usize,
    /// Bytes that the guest has sent, and that the host has said to have taken.
    sent: u32,
    forwarded: u32,
    counter: u8,
    host_ended: bool,
    guest_ended: bool,
    saw_host_end: bool,
    saw_guest_end: bool,
}

impl Model {
    fn new(guest_buffer: u32) -> Self {
        let mut machine = Machine::new();
        let (stream, guest) = machine.connect(5, guest_buffer);
        Self {
            machine,
            stream,
            guest,
            to_guest: VecDeque::new(),
            to_host: VecDeque::new(),
            held: 0,
            sent: 0,
            forwarded: 0,
            counter: 0,
            host_ended: false,
            guest_ended: false,
            saw_host_end: false,
            saw_guest_end: false,
        }
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count)
            .map(|_| {
                self.counter = self.counter.wrapping_mul(5).wrapping_add(1);
                self.counter
            })
            .collect()
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::HostWrites(count) => self.host_writes(count),
            Step::HostReads => self.host_reads(),
            Step::GuestSends(count) => self.guest_sends(count),
            Step::GuestTakes(count) => {
                let count = count.min(self.held);
                self.held -= count;
                self.guest.forwarded += count as u32;
                self.machine.send(self.guest.packet(op::CREDIT_UPDATE), &[]);
            }
            Step::GuestGivesBuffers(count) => {
                for _ in 0..count.min(self.machine.rx.free_descriptors()) {
                    self.machine.give_buffer();
                }
                self.machine.device.process_queue(RX).unwrap();
            }
        }
        self.machine.settle();
        self.guest_receives();
    }

    fn host_writes(&mut self, count: usize) {
        let bytes = self.bytes(count);
        match self.stream.write(&bytes) {
            Ok(written) => self.to_guest.extend(&bytes[..written]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    fn host_reads(&mut self) {
        let (bytes, ended) = read(&mut self.stream);
        for byte in bytes {
            assert_eq!(self.to_host.pop_front(), Some(byte));
        }
        if ended {
            assert!(
                self.guest_ended && self.to_host.is_empty(),
                "an end too early"
            );
            self.saw_guest_end = true;
        }
    }

    fn guest_sends(&mut self, count: usize) {
        let credit = BUFFER - (self.sent - self.forwarded);
        let count = count.min(credit as usize).min(0x1_0000);
        let bytes = self.bytes(count);
        self.sent += count as u32;
        self.to_host.extend(&bytes);
        self.machine.send(self.guest.packet(op::RW), &bytes);
    }

    fn guest_receives(&mut self) {
        for (packet, data) in self.machine.received() {
            assert!(!self.saw_host_end || data.is_empty(), "bytes after the end");
            assert_ne!(packet.op, op::RST);
            assert!(packet.fwd_cnt <= self.sent && packet.fwd_cnt >= self.forwarded);
            self.forwarded = packet.fwd_cnt;
            self.held += data.len();
            assert!(
                self.held <= self.guest.buffer as usize,
                "more than the guest has room for"
            );
            for byte in data {
                assert_eq!(self.to_guest.pop_front(), Some(byte));
            }
            if packet.op == op::SHUTDOWN {
                assert_eq!(packet.flags, SHUTDOWN_SEND);
                assert!(
                    self.host_ended && self.to_guest.is_empty(),
                    "an end too early"
                );
                self.saw_host_end = true;
            }
        }
    }

    /// Everything arrives if both go on reading, and so do both ends.
    fn finish(mut self) {
        self.host_ended = true;
        self.stream.shutdown(Shutdown::Write).unwrap();
        self.guest_ended = true;
        self.machine.send(self.guest.shutdown(SHUTDOWN_SEND), &[]);
        for _ in 0..1000 {
            self.take(&Step::HostReads);
            self.take(&Step::GuestTakes(usize::MAX));
            self.take(&Step::GuestGivesBuffers(64));
            if self.saw_host_end && self.saw_guest_end {
                break;
            }
        }
        assert!(
            self.saw_host_end && self.saw_guest_end,
            "the ends do not arrive"
        );
        assert!(self.to_guest.is_empty() && self.to_host.is_empty());
        self.machine.send(self.guest.packet(op::RST), &[]);
        self.machine.device.drain().unwrap();
    }
}

/// A packet as a hostile guest may send it, most of the time for a connection that is there.
fn hostile(host_port: u32) -> impl Strategy<Value = (Packet, usize, u32)> {
    let ports = (
        prop_oneof![9 => Just(5u32), 1 => any::<u32>()],
        prop_oneof![9 => host_port..host_port + 3, 1 => any::<u32>()],
    );
    let cids = (
        prop_oneof![19 => Just(GUEST_CID), 1 => any::<u64>()],
        prop_oneof![19 => Just(HOST_CID), 1 => any::<u64>()],
    );
    let fields = (
        prop_oneof![9 => 0u16..9, 1 => any::<u16>()],
        prop_oneof![9 => Just(TYPE_STREAM), 1 => any::<u16>()],
        prop_oneof![9 => 0u32..4, 1 => any::<u32>()],
        any::<u32>(),
        prop_oneof![0u32..1000, any::<u32>()],
    );
    let length = (
        0usize..0x4000,
        prop_oneof![9 => Just(0u32), 1 => any::<u32>()],
    );
    (ports, cids, fields, length).prop_map(|(ports, cids, fields, (length, lie))| {
        let packet = Packet {
            src_cid: cids.0,
            dst_cid: cids.1,
            src_port: ports.0,
            dst_port: ports.1,
            len: 0,
            kind: fields.1,
            op: fields.0,
            flags: fields.2,
            buf_alloc: fields.3,
            fwd_cnt: fields.4,
        };
        (packet, length, lie)
    })
}

const FIRST_PORT: u32 = 1 << 30;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn bytes_arrive_once_and_in_order(
        guest_buffer in prop_oneof![Just(1u32 << 18), 1000u32..100_000],
        steps in proptest::collection::vec(step(), 0..60),
    ) {
        let mut model = Model::new(guest_buffer);
        for step in &steps {
            model.take(step);
        }
        model.finish();
    }

    #[test]
    fn no_packet_does_harm(
        packets in proptest::collection::vec((hostile(FIRST_PORT), any::<bool>()), 0..80),
    ) {
        let mut machine = Machine::new();
        let mut streams: Vec<UnixStream> = (0..3)
            .map(|_| {
                let (ours, theirs) = UnixStream::pair().unwrap();
                ours.set_nonblocking(true).unwrap();
                machine.device.connect(5, [theirs]).unwrap();
                ours
            })
            .collect();
        machine.refill();
        for ((packet, length, lie), read_too) in packets {
            let packet = Packet { len: lie.max(length as u32), ..packet };
            while machine.tx.take_used().is_some() {}
            if machine.tx.free_descriptors() < 2 {
                machine.receive_all();
            }
            let at = TX_BUFFERS;
            machine.memory.write_obj(Header::from(packet), GuestAddress(at)).unwrap();
            machine.tx.offer(&[(at, 44, false), (at + 44, length as u32, false)]);
            machine.device.process_queue(TX).unwrap();
            for stream in &mut streams {
                if read_too {
                    read(stream);
                }
                let _ = stream.write(&[7; 100]);
            }
            machine.settle();
        }
        machine.receive_all();
        drop(streams);
        machine.settle();
        machine.receive_all();
    }

    #[test]
    fn no_descriptor_does_harm(
        chains in proptest::collection::vec(
            (any::<bool>(), proptest::collection::vec(
                (prop_oneof![0u64..0x81_0000, any::<u64>()],
                 prop_oneof![0u32..5000, any::<u32>()],
                 any::<bool>()),
                1..5,
            )),
            0..60,
        ),
    ) {
        let mut machine = Machine::new();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        machine.device.connect(5, [theirs]).unwrap();
        for (transmit, pieces) in chains {
            let queue = if transmit { &mut machine.tx } else { &mut machine.rx };
            while queue.take_used().is_some() {}
            if queue.free_descriptors() < pieces.len() {
                break;
            }
            // Rings are left alone: what is written into them is the transport's test.
            let pieces: Vec<_> = pieces
                .into_iter()
                .map(|(address, length, write)| (address.max(0x4_0000), length, write))
                .collect();
            queue.offer(&pieces);
            machine.device.process_queue(usize::from(transmit)).unwrap();
        }
    }

    #[test]
    fn a_header_survives_its_encoding(
        bytes in proptest::array::uniform32(any::<u8>()),
        more in proptest::array::uniform12(any::<u8>()),
    ) {
        use vm_memory::ByteValued;
        let mut header = Header::default();
        header.as_mut_slice()[..32].copy_from_slice(&bytes);
        header.as_mut_slice()[32..].copy_from_slice(&more);
        prop_assert_eq!(Header::from(Packet::from(header)), header);
    }
}
