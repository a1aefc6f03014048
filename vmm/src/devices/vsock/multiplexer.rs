//! The connections of one device, and the order in which they are served.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Verdict};
use super::device::{GUEST_CID, HOST_CID};
use super::packet::{Next, Packet, TYPE_STREAM, op};
use super::rings::{Payload, Pieces, Receiver};
use crate::devices::event_loop::Registrar;
use crate::devices::virtio::{QueueError, Virtqueue};

/// Most connections at a time. Each may hold [`super::BUFFER`] bytes, so this makes 128 MiB, if
/// nobody on the host reads from any.
pub const MAX_CONNECTIONS: usize = 512;

/// Resets that wait for a buffer of the guest. When there are so many the guest's packets have to
/// wait: it only gets answers as fast as it takes them.
const MAX_RESETS: usize = 128;

/// Ports below are left to the guest's own ideas of what lives on a host.
const FIRST_PORT: u32 = 1 << 30;

/// Why a connection cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// [`MAX_CONNECTIONS`].
    #[error("there are {MAX_CONNECTIONS} connections already")]
    TooMany,
    /// The stream cannot be watched.
    #[error("cannot watch the stream: {0}")]
    Watch(#[from] io::Error),
}

/// Events of a stream that are always watched for.
fn input() -> EventSet {
    EventSet::IN | EventSet::READ_HANG_UP
}

pub(super) struct Multiplexer {
    registrar: Registrar,
    /// By the host's port, which is also the token in the event loop.
    connections: HashMap<u32, Connection>,
    /// The port of the next connection.
    next_port: u32,
    /// Ports of connections that have something for the guest, each once, in turn.
    ready: VecDeque<u32>,
    /// Resets for packets and connections that there is no other record of.
    resets: VecDeque<Packet>,
    pieces: Pieces,
}

impl Multiplexer {
    pub(super) fn new(registrar: Registrar, next_port: u32) -> Self {
        Self {
            registrar,
            connections: HashMap::new(),
            next_port: next_port.max(FIRST_PORT),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            pieces: Pieces::default(),
        }
    }

    /// The port of the next connection, to be saved. A guest may remember those before.
    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn kept(&self) -> (usize, usize) {
        let bytes = self.connections.values().map(Connection::kept).max();
        (self.connections.len(), bytes.unwrap_or(0))
    }

    /// Describes one of the connections, if there are any.
    pub(super) fn in_flight(&self) -> Option<String> {
        if let Some((host, connection)) = self.connections.iter().next() {
            let others = self.connections.len() - 1;
            let guest = connection.guest_port();
            return Some(format!(
                "vsock connection from host port {host} to guest port {guest} (and {others} more)"
            ));
        }
        self.resets.front().map(|reset| {
            format!(
                "reset of a vsock connection from guest port {}",
                reset.dst_port
            )
        })
    }

    /// Closes all connections without a word to the guest, whose driver has forgotten them.
    pub(super) fn clear(&mut self) {
        self.connections
            .drain()
            .for_each(|(_, connection)| connection.close());
        self.ready.clear();
        self.resets.clear();
    }

    /// Adds a connection, whose request is sent by the next [`fill`](Self::fill).
    pub(super) fn connect(
        &mut self,
        guest_port: u32,
        stream: UnixStream,
    ) -> Result<(), ConnectError> {
        if self.connections.len() >= MAX_CONNECTIONS {
            return Err(ConnectError::TooMany);
        }
        let mut port = self.next_port;
        // Ends: there are more ports than connections.
        while self.connections.contains_key(&port) {
            port = following(port);
        }
        self.next_port = following(port);
        self.registrar.add(stream.as_fd(), port, input())?;
        self.connections
            .insert(port, Connection::new(stream, port, guest_port));
        self.schedule(port);
        Ok(())
    }

    /// Takes the guest's packets until there are no more, or as many as the queue is long were
    /// taken, or too many answers to them wait: then it returns false.
    pub(super) fn take(&mut self, queue: &mut Virtqueue) -> Result<bool, QueueError> {
        let memory = std::sync::Arc::clone(queue.memory());
        for _ in 0..queue.size() {
            if self.is_blocked() {
                return Ok(false);
            }
            let Some(chain) = queue.pop()? else {
                if queue.wait_for_more()? {
                    continue;
                }
                return Ok(true);
            };
            let head = chain.head_index();
            let mut pieces = std::mem::take(&mut self.pieces);
            pieces.clear();
            let buffer = pieces.read(chain, false);
            // What is no packet has no sender that could be answered.
            if let Some(packet) = pieces.packet(&buffer, &memory) {
                let (pieces, buffer, len) = (&pieces, &buffer, packet.len as usize);
                self.take_packet(
                    &packet,
                    &Payload {
                        memory: &memory,
                        pieces,
                        buffer,
                        len,
                    },
                );
            }
            self.pieces = pieces;
            queue.add_used(head, 0)?;
        }
        queue.reschedule();
        Ok(true)
    }

    /// Whether the guest has to take resets before more of its packets are looked at.
    pub(super) fn is_blocked(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    fn take_packet(&mut self, packet: &Packet, payload: &Payload<'_>) {
        let ours =
            packet.kind == TYPE_STREAM && packet.src_cid == GUEST_CID && packet.dst_cid == HOST_CID;
        let port = packet.dst_port;
        let connection = self.connections.get_mut(&port).filter(|connection| {
            ours && connection.is_live() && connection.guest_port() == packet.src_port
        });
        match connection {
            Some(connection) => {
                let verdict = connection.take(packet, payload);
                self.settle(port, verdict);
            }
            // Nobody listens on the host.
            None if packet.op != op::RST => self.resets.push_back(packet.reset()),
            None => {}
        }
    }

    /// The stream of a connection is ready for something.
    pub(super) fn ready(&mut self, port: u32, ready: EventSet) {
        // An event may have been taken from the kernel before the connection was closed.
        if let Some(connection) = self.connections.get_mut(&port) {
            let verdict = connection.ready(ready);
            self.settle(port, verdict);
        }
    }

    /// Does with a connection what an event has led to.
    fn settle(&mut self, port: u32, verdict: Verdict) {
        let Some(connection) = self.connections.get_mut(&port) else {
            return;
        };
        if verdict == Verdict::Reset {
            let reset = connection.reset();
            self.resets.push_back(reset);
        }
        if verdict != Verdict::Keep && !connection.drain() {
            if let Some(connection) = self.connections.remove(&port) {
                connection.close();
            }
            return;
        }
        let backlogged = connection.is_backlogged();
        if backlogged != connection.watches_output {
            let interest = if backlogged {
                input() | EventSet::OUT
            } else {
                input()
            };
            match self
                .registrar
                .change(connection.stream.as_fd(), port, interest)
            {
                Ok(()) => connection.watches_output = backlogged,
                Err(error) => log::error!("cannot watch a vsock stream: {error}"),
            }
        }
        self.schedule(port);
    }

    /// Queues a connection if it has something for the guest.
    fn schedule(&mut self, port: u32) {
        if let Some(connection) = self.connections.get_mut(&port)
            && !connection.queued
            && connection.has_next()
        {
            connection.queued = true;
            self.ready.push_back(port);
        }
    }

    /// Sends what there is for the guest, connection by connection in turn, until there is
    /// nothing more, or no buffer, or as many buffers were used as the queue is long.
    pub(super) fn fill(&mut self, queue: &mut Virtqueue) -> Result<(), QueueError> {
        let mut budget = usize::from(queue.size());
        while budget > 0 {
            let mut pieces = std::mem::take(&mut self.pieces);
            let turn = self.turn(&mut Receiver::new(queue, &mut pieces));
            self.pieces = pieces;
            match turn? {
                Turn::Idle => return Ok(()),
                Turn::Done { buffers } => budget = budget.saturating_sub(buffers.max(1)),
                Turn::NoBuffer => {
                    if !queue.wait_for_more()? {
                        return Ok(());
                    }
                    budget -= 1;
                }
            }
        }
        queue.reschedule();
        Ok(())
    }

    fn turn(&mut self, receiver: &mut Receiver<'_>) -> Result<Turn, QueueError> {
        if let Some(&reset) = self.resets.front() {
            if !receiver.send(|| reset)? {
                return Ok(Turn::NoBuffer);
            }
            self.resets.pop_front();
            return Ok(Turn::Done { buffers: 1 });
        }
        let Some(&port) = self.ready.front() else {
            return Ok(Turn::Idle);
        };
        // A connection that is no more, or has lost what it had, just leaves the queue.
        let Some(connection) = self.connections.get_mut(&port) else {
            self.ready.pop_front();
            return Ok(Turn::Done { buffers: 0 });
        };
        let buffers = match connection.next() {
            None => 0,
            Some(Next::Packet(operation)) => {
                if !receiver.send(|| connection.control(operation))? {
                    return Ok(Turn::NoBuffer);
                }
                1
            }
            Some(Next::Data { buffers, limit }) => {
                let filled = receiver.fill(buffers, limit, connection)?;
                let Some(filled) = filled else {
                    return Ok(Turn::NoBuffer);
                };
                connection.has_read(filled.room, filled.result);
                filled.buffers
            }
        };
        self.ready.pop_front();
        connection.queued = false;
        self.schedule(port);
        Ok(Turn::Done { buffers })
    }
}

/// What became of a turn.
enum Turn {
    /// Nothing is there to be sent.
    Idle,
    /// Something was done, with so many buffers.
    Done { buffers: usize },
    /// The guest has made no buffer available.
    NoBuffer,
}

/// The port after `port`.
fn following(port: u32) -> u32 {
    port.checked_add(1).unwrap_or(FIRST_PORT)
}
