//! Tests of the device with a guest that is simulated packet by packet, and real Unix streams.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use super::device::HOST_CID;
use super::packet::{
    HEADER_SIZE, Header, Packet, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op,
};
use super::*;
use crate::devices::event_loop::Registrar;
use crate::devices::virtio::testing::{Board, DriverQueue, memory};
use crate::devices::virtio::{DrainError, Persist, QueueError, VirtioDevice};
use crate::memory::GuestMemory;

mod credit;
mod ends;
mod layout;
mod life;
mod model;
mod opening;

const RX: usize = 0;
const TX: usize = 1;
/// Size of the guest's buffers for packets to it, as Linux has them.
const RX_BUFFER: u32 = 3776;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x20_0000;

/// A device, the guest's driver, and the part of the event loop that watches streams.
struct Machine {
    memory: Arc<GuestMemory>,
    board: Board,
    device: Vsock,
    epoll: Arc<Epoll>,
    rx: DriverQueue,
    tx: DriverQueue,
    event: DriverQueue,
    rx_buffer: u32,
    next_buffer: u64,
    /// Where the buffer of each rx chain is, by its head.
    buffers: Vec<u64>,
}

impl Machine {
    fn new() -> Self {
        Self::with_buffers(RX_BUFFER)
    }

    fn with_buffers(rx_buffer: u32) -> Self {
        let memory = memory(0x80_0000);
        let board = Board::new(&memory, 3);
        let epoll = Arc::new(Epoll::new().unwrap());
        let registrar = Registrar::on(&epoll);
        let mut machine = Self {
            device: Vsock::new(VsockArgs { registrar }),
            epoll,
            rx: DriverQueue::new(&memory, 0x1_0000, 64),
            tx: DriverQueue::new(&memory, 0x2_0000, 128),
            event: DriverQueue::new(&memory, 0x3_0000, 8),
            memory,
            board,
            rx_buffer,
            next_buffer: 0,
            buffers: vec![0; 64],
        };
        let drivers = [&machine.rx, &machine.tx, &machine.event];
        machine.board.activate(&mut machine.device, &drivers);
        machine
    }

    /// Gives the device as many buffers as there are.
    fn refill(&mut self) {
        while self.rx.free_descriptors() > 0 {
            self.give_buffer();
        }
        self.device.process_queue(RX).unwrap();
    }

    fn give_buffer(&mut self) {
        let address = RX_BUFFERS + (self.next_buffer % 64) * 0x4000;
        self.next_buffer += 1;
        let head = self.rx.offer(&[(address, self.rx_buffer, true)]);
        self.buffers[usize::from(head)] = address;
    }

    /// The packets that the device has sent.
    fn received(&mut self) -> Vec<(Packet, Vec<u8>)> {
        let mut packets = Vec::new();
        while let Some((head, written)) = self.rx.take_used() {
            let address = self.buffers[usize::from(head)];
            if written == 0 {
                continue;
            }
            let mut bytes = vec![0; written as usize];
            self.memory
                .read_slice(&mut bytes, GuestAddress(address))
                .unwrap();
            let header: Header = self.memory.read_obj(GuestAddress(address)).unwrap();
            let packet = Packet::from(header);
            assert_eq!(bytes.len() - HEADER_SIZE, packet.len as usize);
            packets.push((packet, bytes.split_off(HEADER_SIZE)));
        }
        packets
    }

    /// What the device sends when it has all buffers that it wants.
    fn receive_all(&mut self) -> Vec<(Packet, Vec<u8>)> {
        let mut packets = Vec::new();
        loop {
            self.refill();
            self.settle();
            let new = self.received();
            if new.is_empty() {
                return packets;
            }
            packets.extend(new);
        }
    }

    /// Sends a packet of the guest, its data behind the header in one piece.
    fn send(&mut self, packet: Packet, data: &[u8]) {
        self.put(packet, data);
        self.device.process_queue(TX).unwrap();
        self.settle();
    }

    /// Puts a packet into the tx queue.
    fn put(&mut self, packet: Packet, data: &[u8]) {
        while self.tx.take_used().is_some() {}
        let address = TX_BUFFERS + (u64::from(self.tx.next_available()) % 32) * 0x1_8000;
        let packet = Packet {
            len: data.len() as u32,
            ..packet
        };
        self.memory
            .write_obj(Header::from(packet), GuestAddress(address))
            .unwrap();
        self.memory
            .write_slice(data, GuestAddress(address + 44))
            .unwrap();
        self.tx.offer(&[
            (address, 44, false),
            (address + 44, data.len() as u32, false),
        ]);
    }

    /// Lets the device work on what streams and rescheduled queues have for it.
    fn settle(&mut self) {
        let mut events = [EpollEvent::default(); 16];
        for _ in 0..10_000 {
            let count = self.epoll.wait(0, &mut events).unwrap();
            for event in &events[..count] {
                let (token, ready) = (event.data() as u32, event.event_set());
                self.device.process_source(token, ready).unwrap();
            }
            let mut idle = count == 0;
            for queue in [RX, TX] {
                if self.board.rescheduled(queue) {
                    self.device.process_queue(queue).unwrap();
                    idle = false;
                }
            }
            if idle {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    /// Lets the device use all buffers that it has for bytes of this stream.
    fn use_up_buffers(&mut self, stream: &mut UnixStream) {
        loop {
            let _ = stream.write(&pattern(50_000)).unwrap();
            self.settle();
            if self.received().is_empty() {
                return;
            }
        }
    }

    /// Connects a stream to a guest's port; returns the host's end and the request.
    fn request(&mut self, port: u32) -> (UnixStream, Packet) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        self.refill();
        self.device.connect(port, [theirs]).unwrap();
        let packets = self.received();
        let [(request, _)] = &packets[..] else {
            panic!("{packets:?}")
        };
        assert_eq!(request.op, op::REQUEST);
        (ours, *request)
    }

    /// Connects, and has the guest accept with a buffer of that many bytes.
    fn connect(&mut self, port: u32, buffer: u32) -> (UnixStream, Guest) {
        let (stream, request) = self.request(port);
        let guest = Guest {
            request,
            buffer,
            forwarded: 0,
        };
        self.send(guest.packet(op::RESPONSE), &[]);
        (stream, guest)
    }
}

use std::os::unix::net::UnixStream;

/// The guest's side of a connection.
#[derive(Clone, Copy, Debug)]
struct Guest {
    request: Packet,
    buffer: u32,
    forwarded: u32,
}

impl Guest {
    fn packet(&self, op: u16) -> Packet {
        Packet {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: self.request.dst_port,
            dst_port: self.request.src_port,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.buffer,
            fwd_cnt: self.forwarded,
            ..Packet::default()
        }
    }

    fn shutdown(&self, flags: u32) -> Packet {
        Packet {
            flags,
            ..self.packet(op::SHUTDOWN)
        }
    }
}

/// What can be read from a stream now, and whether its end was reached.
fn read(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let mut piece = [0; 65536];
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return (bytes, true),
            Ok(count) => bytes.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return (bytes, false),
            Err(error) => panic!("{error}"),
        }
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|index| (index * 7 + index / 251) as u8)
        .collect()
}
