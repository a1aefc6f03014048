//! The connections of the vsock device.
//!
//! *The attacker* is the guest: any packet at any time, for connections that exist and others, its
//! data behind it in any pieces, and buffers of any size or none for what the host sends. The host
//! reads and writes its streams when it likes.
//!
//! *What must hold*: no panic; a stream gets only what was sent on its own connection, and not
//! more; what a slow reader leaves behind is bounded by the credit given; every packet of the device
//! is one that its buffer has room for; and descriptors are closed with their connections.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use forkvm_vmm::devices::vsock::GUEST_CID;
use forkvm_vmm::devices::{Backends, vsock};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{BUFFERS, Guest};
use crate::heap;
use crate::input::{Input, Output};

const RX: usize = 0;
const TX: usize = 1;

/// The host's address, and bytes of a packet's header (virtio 1.2, section 5.10).
const HOST_CID: u64 = 2;
const HEADER: usize = 44;

/// Most steps of an input, connections in its life, and bytes of a packet's data.
const STEPS: usize = 400;
const CONNECTIONS: usize = 40;
const DATA: usize = 0x1_0000;

/// Most bytes allocated at a time: what the connections may hold, and as much again while it grows.
const HEAP: usize = (8 << 20) + 2 * CONNECTIONS * vsock::BUFFER as usize;

/// Where packets to the device lie, and buffers for packets from it, of this many bytes at most.
const PACKET: u64 = BUFFERS;
const RECEIVE: u64 = BUFFERS + 0x1_8000;
const BUFFER: u64 = 0x1000;
const RECEIVERS: u64 = 16;

mod step {
    pub(super) const CONNECT: u8 = 0;
    pub(super) const WRITE: u8 = 1;
    pub(super) const READ: u8 = 2;
    pub(super) const CLOSE: u8 = 3;
    pub(super) const PACKET: u8 = 4;
    pub(super) const BUFFERS: u8 = 5;
    pub(super) const RAW: u8 = 6;
    pub(super) const KINDS: u8 = 7;
}

/// Operations of packets.
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;

/// A connection as both ends know it. Its data is its number, again and again.
struct Connection {
    /// The host's end, until it is closed.
    stream: Option<UnixStream>,
    guest_port: u32,
    /// From the request; none before it has come.
    host_port: Option<u32>,
    sent: usize,
    read: usize,
    /// A packet for it was longer or shorter than it said.
    lied_to: bool,
}

struct World {
    guest: Guest,
    connections: Vec<Connection>,
    /// Where the buffer of each chain is, and its length, by its head.
    buffers: Vec<(u64, u32)>,
    given: u64,
}

/// Runs an input.
pub fn run(bytes: &[u8]) {
    let before = open_descriptors();
    heap::bounded(HEAP, || {
        let mut guest = Guest::new(VIRTIO_ID_VSOCK, Backends::default());
        guest.bring_up(u64::MAX, 64);
        let mut world = World {
            guest,
            connections: Vec::new(),
            buffers: vec![(0, 0); 64],
            given: 0,
        };
        let mut input = Input::new(bytes);
        for _ in 0..STEPS {
            if world.take(&mut input).is_none() {
                break;
            }
            world.guest.settle();
            world.receive();
        }
        world.guest.finish();
    });
    assert_eq!(open_descriptors(), before, "descriptors were left open");
}

/// The lowest descriptor that is free tells whether those before it were closed.
fn open_descriptors() -> i32 {
    use std::os::fd::AsRawFd;
    std::fs::File::open("/dev/null")
        .expect("a descriptor")
        .as_raw_fd()
}

impl World {
    fn take(&mut self, input: &mut Input<'_>) -> Option<()> {
        match input.u8()? % step::KINDS {
            step::CONNECT => self.connect(input.u8()?.into()),
            step::WRITE => {
                let (which, length) = (input.u8()?, input.u16()?);
                let number = self.number(which)?;
                if let Some(stream) = &mut self.connections[number].stream {
                    // A stream that is full or closed at the other end takes less.
                    let _ = stream.write(&vec![number as u8; length.into()]);
                }
            }
            step::READ => {
                let (which, length) = (input.u8()?, input.u16()?);
                let number = self.number(which)?;
                self.connections[number].read(number, length.into());
            }
            step::CLOSE => {
                let (which, how) = (input.u8()?, input.u8()?);
                let number = self.number(which)?;
                let stream = &mut self.connections[number].stream;
                match (how % 4, stream.as_ref()) {
                    (0, _) | (_, None) => *stream = None,
                    // Closed at the other end already, maybe.
                    (1, Some(stream)) => drop(stream.shutdown(Shutdown::Read)),
                    (_, Some(stream)) => drop(stream.shutdown(Shutdown::Write)),
                }
            }
            step::PACKET => self.packet(input)?,
            step::BUFFERS => {
                let (count, length) = (input.u8()?, input.u16()?);
                // Not upon each other.
                let free = (RECEIVERS as u16).saturating_sub(self.guest.outstanding(RX));
                for _ in 0..u16::from(count).min(free) {
                    self.give(u32::from(length).min(BUFFER as u32));
                }
                self.guest.notify(RX);
            }
            _ => {
                let (bytes, length) = (input.bytes()?, input.u32()?);
                self.send(bytes.to_vec(), &[(PACKET, length, false)]);
            }
        }
        Some(())
    }

    fn number(&self, which: u8) -> Option<usize> {
        usize::from(which).checked_rem(self.connections.len())
    }

    fn connect(&mut self, guest_port: u32) {
        if self.connections.len() == CONNECTIONS {
            return;
        }
        // Each to another port, so that requests are told apart.
        let guest_port = guest_port << 8 | self.connections.len() as u32;
        let (ours, theirs) = UnixStream::pair().expect("a stream");
        ours.set_nonblocking(true).expect("a stream");
        let devices = self.guest.machine.devices();
        devices
            .connect(guest_port, [theirs])
            .expect("fewer than the bound");
        self.connections.push(Connection {
            stream: Some(ours),
            guest_port,
            host_port: None,
            sent: 0,
            read: 0,
            lied_to: false,
        });
    }

    /// A packet, most of the time for a connection that there is.
    fn packet(&mut self, input: &mut Input<'_>) -> Option<()> {
        let (which, op, flags) = (input.u8()?, input.u8()?, input.u8()?);
        let (length, room, forwarded) = (input.u16()?, input.u32()?, input.u32()?);
        let number = self.number(which)?;
        let connection = &self.connections[number];
        let length = usize::from(length);
        let mut header = Output::default()
            .u64(GUEST_CID)
            .u64(HOST_CID)
            .u32(connection.guest_port)
            .u32(connection.host_port.unwrap_or(0))
            .u32(length as u32)
            .u16(1)
            .u16(u16::from(op) % 9)
            .u32(u32::from(flags & 3))
            .u32(room)
            .u32(forwarded)
            .0;
        // One byte of the header may be another.
        if flags & 4 != 0 {
            let (at, value) = (input.u8()?, input.u8()?);
            header[usize::from(at) % HEADER] = value;
        }
        header.resize(HEADER + length, 0);
        // In one piece, or cut anywhere.
        let total = header.len() as u32;
        let cut = if flags & 8 != 0 {
            u32::from(input.u16()?) % total
        } else {
            0
        };
        let pieces = [
            (PACKET, cut, false),
            (PACKET + u64::from(cut), total - cut, false),
        ];
        self.send(header, &pieces[usize::from(cut == 0)..]);
        Some(())
    }

    /// Sends what may be a packet. Its data, if it is one for a connection, is that connection's.
    fn send(&mut self, mut bytes: Vec<u8>, pieces: &[(u64, u32, bool)]) {
        assert!(bytes.len() <= HEADER + DATA);
        while self.guest.take_used(TX).is_some() {}
        if self.guest.outstanding(TX) > 0 {
            // Too many answers wait; the packet that waits with them lies where this one would.
            return;
        }
        // Nothing of the packet before.
        bytes.resize(bytes.len().max(HEADER), 0);
        if let Some((header, data)) = bytes.split_first_chunk_mut::<HEADER>() {
            let (ports, length) = header[16..28].split_at(8);
            let addressed = self.connections.iter_mut().enumerate().find(|(_, known)| {
                let port = known.host_port.unwrap_or(0).to_le_bytes();
                [known.guest_port.to_le_bytes(), port].concat() == ports
            });
            if let Some((number, connection)) = addressed {
                data.fill(number as u8);
                connection.sent += data.len();
                // What lies behind is another packet's.
                connection.lied_to |= length != (data.len() as u32).to_le_bytes();
            }
        }
        self.guest.write(PACKET, &bytes);
        self.guest.offer(TX, pieces);
        self.guest.notify(TX);
    }

    fn give(&mut self, length: u32) {
        let address = RECEIVE + (self.given % RECEIVERS) * BUFFER;
        self.given += 1;
        let head = self.guest.offer(RX, &[(address, length, true)]);
        self.buffers[usize::from(head)] = (address, length);
    }

    /// Looks at the device's packets.
    fn receive(&mut self) {
        while let Some((head, written)) = self.guest.take_used(RX) {
            let (address, length) = self.buffers[usize::from(head)];
            assert!(written <= length, "{written} bytes in a buffer of {length}");
            if written == 0 {
                continue;
            }
            let mut header = [0; HEADER];
            let read = self
                .guest
                .memory
                .read_slice(&mut header, GuestAddress(address));
            read.expect("a buffer in memory");
            let mut fields = Input::new(&header);
            let (Some(HOST_CID), Some(_)) = (fields.u64(), fields.u64()) else {
                // An answer to a packet that was said to be for somebody else.
                continue;
            };
            let (Some(from), Some(to)) = (fields.u32(), fields.u32()) else {
                continue;
            };
            let (Some(bytes), Some(_), Some(op)) = (fields.u32(), fields.u16(), fields.u16())
            else {
                continue;
            };
            assert!(op == RW || bytes == 0, "a packet {op} with data");
            assert_eq!(written, HEADER as u32 + bytes, "of a packet {op}");
            if op == REQUEST {
                let mut waiting = self.connections.iter_mut();
                let asked =
                    waiting.find(|known| known.guest_port == to && known.host_port.is_none());
                if let Some(connection) = asked {
                    connection.host_port = Some(from);
                }
            }
        }
    }
}

impl Connection {
    fn read(&mut self, number: usize, length: usize) {
        let Some(stream) = &mut self.stream else {
            return;
        };
        let mut bytes = vec![0; length];
        match stream.read(&mut bytes) {
            Ok(count) => {
                self.read += count;
                let own = bytes[..count]
                    .iter()
                    .all(|byte| usize::from(*byte) == number);
                assert!(
                    own || self.lied_to,
                    "connection {number} got another's bytes"
                );
                assert!(
                    self.lied_to || self.read <= self.sent,
                    "connection {number} got more than was sent"
                );
            }
            Err(error) => {
                let kind = error.kind();
                assert!(
                    matches!(kind, ErrorKind::WouldBlock | ErrorKind::ConnectionReset),
                    "{error}"
                );
            }
        }
    }
}

/// A packet for a connection: which, operation, flags, bytes, room and count of the sender.
fn packet(to: Output, which: u8, op: u16, flags: u8, length: u16) -> Output {
    to.raw(&[step::PACKET, which, op as u8, flags])
        .u16(length)
        .u32(0x1_0000)
        .u32(0)
}

/// Two connections, from their requests to their ends.
pub fn seeds() -> Vec<Vec<u8>> {
    let buffers = |to: Output| to.raw(&[step::BUFFERS, 60]).u16(3776);
    let mut start = buffers(Output::default());
    start = start.raw(&[step::CONNECT, 9, step::CONNECT, 10]);
    let open = packet(packet(buffers(start), 0, RESPONSE, 0, 0), 1, RESPONSE, 0, 0);
    let mut busy = open.clone();
    for which in 0..2 {
        busy = busy.raw(&[step::WRITE, which]).u16(20_000);
        busy = packet(busy, which, RW, 0, 5000);
        busy = packet(busy, which, RW, 8, 60_000).u16(1000);
        busy = buffers(busy).raw(&[step::READ, which]).u16(40_000);
    }
    let mut slow = open.clone();
    // As much as the stream's own buffer takes, then as the credit allows; a little at a time later.
    for _ in 0..7 {
        slow = packet(slow, 0, RW, 0, 60_000);
    }
    for _ in 0..6 {
        slow = slow.raw(&[step::READ, 0]).u16(50_000);
        slow = packet(slow, 0, RW, 0, 40_000);
    }
    slow = slow.raw(&[step::READ, 0]).u16(u16::MAX);
    let ended =
        packet(busy.clone(), 0, SHUTDOWN, 3, 0).raw(&[step::CLOSE, 1, 2, step::CLOSE, 1, 0]);
    let reset = packet(busy.clone(), 0, RST, 0, 0);
    let lie = packet(busy.clone(), 0, RW, 4, 100).raw(&[24, 200]);
    let raw = open.clone().u8(step::RAW).bytes(&[3; 60]).u32(u32::MAX);
    let refused = packet(Output::default().raw(&[step::CONNECT, 9]), 0, REQUEST, 0, 0);
    [busy, slow, buffers(ended), reset, lie, raw, refused]
        .into_iter()
        .map(|seed| seed.0)
        .collect()
}
