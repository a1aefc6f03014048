//! One connection: a Unix stream on the host, a socket of the guest, and what is owed to each.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, SendFlags};
use vmm_sys_util::epoll::EventSet;

use super::device::{GUEST_CID, HOST_CID};
use super::packet::{Next, Packet, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::rings::{Payload, Source};
use super::stream::Vectors;

/// Bytes that the guest may send ahead of what the stream has taken (`buf_alloc`): 256 KiB, what
/// Linux gives us. It bounds the memory that a connection takes.
pub const BUFFER: u32 = 256 << 10;

/// The guest is told about freed space when there is this much more than it knows. Half: when the
/// guest has run out of credit and the stream has taken all, it is told for certain.
const CREDIT_STEP: u32 = BUFFER / 2;

/// What the multiplexer does with a connection after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on.
    Keep,
    /// It is over for the guest, which knows that. What it had sent is still delivered.
    Over,
    /// As [`Verdict::Over`], and the guest is told by a reset.
    Reset,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has not answered the request.
    Requested,
    /// Both may send.
    Established,
    /// Over for the guest; only undelivered bytes keep it.
    Draining,
}

/// Packets that wait for a buffer of the guest. Each is sent at most once however often it was
/// asked for, so nothing grows.
#[derive(Default)]
struct Pending {
    request: bool,
    credit_update: bool,
}

pub(super) struct Connection {
    pub(super) stream: UnixStream,
    host_port: u32,
    guest_port: u32,
    phase: Phase,
    pending: Pending,
    /// Whether the connection is in the multiplexer's queue.
    pub(super) queued: bool,
    /// Whether the event loop reports when the stream takes more.
    pub(super) watches_output: bool,

    /// Bytes from the guest that the stream has not taken yet, from `start`. At most [`BUFFER`].
    backlog: Vec<u8>,
    start: usize,
    /// Bytes received from the guest, and how many of them the stream has taken.
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// The value of `forwarded` that the guest knows.
    forwarded_told: Wrapping<u32>,
    /// The guest will not send any more.
    guest_sent_all: bool,
    /// The stream takes nothing any more: its other end was closed, or our sending side was.
    host_deaf: bool,

    /// Bytes sent to the guest, and what it has said about its buffer.
    sent: Wrapping<u32>,
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    /// The guest will not receive any more.
    guest_deaf: bool,
    /// The guest was asked for credit since it last had some.
    credit_asked: bool,
    /// There may be something to read from the stream.
    readable: bool,
    /// The other end of the stream has shut down its sending side, so that a read that comes
    /// short does not mean that nothing is left: the end of the stream is.
    ending: bool,
    /// The end of the stream was read.
    host_sent_all: bool,
    /// Flags of [`op::SHUTDOWN`] that the guest knows.
    shutdown_told: u32,
    /// Buffers tried with the next read: few while there is little, more while there is much.
    buffers: usize,
}

/// Most buffers of the guest filled by one read. Linux' hold some 3.7 KiB each, so this makes a
/// turn of 59 KiB.
const MAX_BUFFERS: usize = 16;

impl Connection {
    pub(super) fn new(stream: UnixStream, host_port: u32, guest_port: u32) -> Self {
        Self {
            stream,
            host_port,
            guest_port,
            phase: Phase::Requested,
            pending: Pending {
                request: true,
                ..Pending::default()
            },
            queued: false,
            watches_output: false,
            backlog: Vec::new(),
            start: 0,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            guest_sent_all: false,
            host_deaf: false,
            sent: Wrapping(0),
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            guest_deaf: false,
            credit_asked: false,
            readable: false,
            ending: false,
            host_sent_all: false,
            shutdown_told: 0,
            buffers: 1,
        }
    }

    pub(super) fn guest_port(&self) -> u32 {
        self.guest_port
    }

    /// Bytes held for the stream.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn kept(&self) -> usize {
        self.backlog.capacity()
    }

    /// Whether the guest still knows the connection.
    pub(super) fn is_live(&self) -> bool {
        self.phase != Phase::Draining
    }

    // From the guest.

    /// Takes a packet of the guest.
    pub(super) fn take(&mut self, packet: &Packet, payload: &Payload<'_>) -> Verdict {
        self.guest_buffer = packet.buf_alloc;
        self.guest_forwarded = Wrapping(packet.fwd_cnt);
        match (self.phase, packet.op) {
            (_, op::RST) => Verdict::Over,
            (Phase::Requested, op::RESPONSE) if !self.pending.request => {
                self.phase = Phase::Established;
                Verdict::Keep
            }
            (Phase::Established, op::RW) => self.take_data(payload),
            (Phase::Established, op::SHUTDOWN) => self.take_shutdown(packet.flags),
            (Phase::Established, op::CREDIT_UPDATE) => Verdict::Keep,
            (Phase::Established, op::CREDIT_REQUEST) => {
                self.pending.credit_update = true;
                Verdict::Keep
            }
            _ => Verdict::Reset,
        }
    }

    fn take_data(&mut self, payload: &Payload<'_>) -> Verdict {
        let outstanding = (self.received - self.forwarded).0 as usize;
        if self.guest_sent_all || payload.len > BUFFER as usize - outstanding {
            // After its end, or more than it was given credit for.
            return Verdict::Reset;
        }
        if payload.len == 0 {
            return Verdict::Keep;
        }
        self.received += payload.len as u32;
        let mut done = 0;
        if self.host_deaf {
            done = payload.len;
        } else if self.backlog.is_empty() {
            let Some(mut vectors) = payload.vectors() else {
                return Verdict::Reset;
            };
            match vectors.send(&self.stream) {
                Ok(count) => done = count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => {
                    self.hear_nothing();
                    done = payload.len;
                }
            }
        }
        self.forwarded += done as u32;
        if done < payload.len {
            self.make_room(payload.len - done);
            if payload.append(done, &mut self.backlog).is_none() {
                return Verdict::Reset;
            }
        }
        self.offer_credit();
        Verdict::Keep
    }

    /// Makes room in the backlog for `more` bytes, for which there is credit, and for at most
    /// [`BUFFER`] in all: a vector left to itself would keep what was taken, and grow to twice that.
    fn make_room(&mut self, more: usize) {
        if self.backlog.len() + more > self.backlog.capacity() {
            self.backlog.drain(..self.start);
            self.start = 0;
            let length = self.backlog.len();
            // A power of two as BUFFER is, so that many small packets are not as many copies.
            let room = (length + more).next_power_of_two();
            self.backlog.reserve_exact(room - length);
        }
    }

    fn take_shutdown(&mut self, flags: u32) -> Verdict {
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sent_all = true;
            self.pass_end();
        }
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            // Whoever writes to the stream learns that nobody reads.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        // The guest has closed its socket, and waits for a reset to forget it.
        if self.guest_sent_all && self.guest_deaf {
            Verdict::Reset
        } else {
            Verdict::Keep
        }
    }

    /// The guest no longer knows the connection. False if nothing is left to deliver.
    pub(super) fn drain(&mut self) -> bool {
        self.phase = Phase::Draining;
        self.pending = Pending::default();
        !self.backlog.is_empty()
    }

    /// Closes the stream. What was sent to its other end can still be read there.
    pub(super) fn close(self) {
        // Bytes that nobody took would turn the end of the stream into ECONNRESET (unix(7)) for
        // a reader that has no part in that, so they are taken. Once both sides are shut down
        // nothing is added, and what is there fits into a socket's buffer.
        let _ = self.stream.shutdown(Shutdown::Both);
        let mut scrap = [0u8; 4096];
        while matches!(
            rustix::net::recv(&self.stream, &mut scrap[..], RecvFlags::DONTWAIT),
            Ok((_, 1..))
        ) {}
    }

    // To the stream.

    /// Whether bytes wait until the stream takes more.
    pub(super) fn is_backlogged(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Hands the backlog to the stream as far as it takes it.
    fn flush(&mut self) {
        while self.start < self.backlog.len() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.stream, &self.backlog[self.start..], flags) {
                Ok(count) => {
                    self.start += count;
                    self.forwarded += count as u32;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => self.hear_nothing(),
            }
        }
        if self.start == self.backlog.len() {
            // Given back: a connection at rest takes no memory.
            self.backlog = Vec::new();
            self.start = 0;
            self.pass_end();
        } else if self.start > self.backlog.len() / 2 {
            self.backlog.drain(..self.start);
            self.start = 0;
        }
        self.offer_credit();
    }

    /// Nobody reads from the stream any more: what the guest sent is dropped, and it is told.
    fn hear_nothing(&mut self) {
        self.host_deaf = true;
        self.forwarded += (self.backlog.len() - self.start) as u32;
        self.backlog = Vec::new();
        self.start = 0;
    }

    /// Passes the end of what the guest sent on, once all of it is delivered.
    fn pass_end(&mut self) {
        if self.guest_sent_all && self.backlog.is_empty() && !self.host_deaf {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// Lets the guest know if it may send much more than it knows.
    fn offer_credit(&mut self) {
        if (self.forwarded - self.forwarded_told).0 >= CREDIT_STEP {
            self.pending.credit_update = true;
        }
    }

    // From the stream.

    /// The stream is ready for something.
    pub(super) fn ready(&mut self, ready: EventSet) -> Verdict {
        if ready.intersects(EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR) {
            self.ending = true;
        }
        if ready.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP) {
            self.readable = true;
        }
        if ready.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            if self.phase == Phase::Requested && self.is_abandoned() {
                // Nobody is left to be connected. A request that was not sent needs no reset.
                return if self.pending.request {
                    Verdict::Over
                } else {
                    Verdict::Reset
                };
            }
            if !self.guest_sent_all || self.is_backlogged() {
                self.hear_nothing();
            }
        } else if ready.contains(EventSet::OUT) {
            self.flush();
        }
        match self.phase {
            Phase::Draining if self.backlog.is_empty() => Verdict::Over,
            _ => Verdict::Keep,
        }
    }

    /// Whether the stream's other end was closed without leaving anything to read.
    fn is_abandoned(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        !matches!(
            rustix::net::recv(&self.stream, &mut [0u8; 1][..], flags),
            Ok((_, 1..))
        )
    }

    // To the guest.

    /// Bytes that the guest has room for.
    fn credit(&self) -> usize {
        let outstanding = (self.sent - self.guest_forwarded).0;
        self.guest_buffer.saturating_sub(outstanding) as usize
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Established && self.readable && !self.host_sent_all && !self.guest_deaf
    }

    /// Flags of [`op::SHUTDOWN`] that the guest has to learn.
    fn shutdown(&self) -> u32 {
        let mut flags = 0;
        if self.host_sent_all {
            flags |= SHUTDOWN_SEND;
        }
        if self.host_deaf {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags & !self.shutdown_told
    }

    /// Whether there is something to send to the guest.
    pub(super) fn has_next(&self) -> bool {
        match self.phase {
            Phase::Draining => false,
            Phase::Requested => self.pending.request,
            Phase::Established => {
                self.shutdown() != 0
                    || self.pending.credit_update
                    || self.may_read() && (self.credit() > 0 || !self.credit_asked)
            }
        }
    }

    /// What to send to the guest next, if anything.
    pub(super) fn next(&mut self) -> Option<Next> {
        match self.phase {
            Phase::Draining => return None,
            Phase::Requested => return self.pending.request.then_some(Next::Packet(op::REQUEST)),
            Phase::Established => {}
        }
        if self.shutdown() != 0 {
            return Some(Next::Packet(op::SHUTDOWN));
        }
        if self.may_read() {
            match self.credit() {
                0 => {
                    // Once for each time that the guest has run dry.
                    if !std::mem::replace(&mut self.credit_asked, true) {
                        return Some(Next::Packet(op::CREDIT_REQUEST));
                    }
                }
                limit => {
                    self.credit_asked = false;
                    return Some(Next::Data {
                        buffers: self.buffers,
                        limit,
                    });
                }
            }
        }
        self.pending
            .credit_update
            .then_some(Next::Packet(op::CREDIT_UPDATE))
    }

    /// The packet that [`next`](Self::next) asked for, about to be sent.
    pub(super) fn control(&mut self, operation: u16) -> Packet {
        let mut flags = 0;
        match operation {
            op::REQUEST => self.pending.request = false,
            op::SHUTDOWN => {
                self.shutdown_told |= self.shutdown();
                flags = self.shutdown_told;
            }
            _ => {}
        }
        self.header(operation, flags, 0)
    }

    /// Every packet carries our side's credit.
    fn header(&mut self, op: u16, flags: u32, len: u32) -> Packet {
        self.forwarded_told = self.forwarded;
        self.pending.credit_update = false;
        Packet {
            src_cid: HOST_CID,
            dst_cid: GUEST_CID,
            src_port: self.host_port,
            dst_port: self.guest_port,
            len,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: BUFFER,
            fwd_cnt: self.forwarded.0,
        }
    }

    /// The reset that ends the connection.
    pub(super) fn reset(&mut self) -> Packet {
        self.header(op::RST, 0, 0)
    }

    /// Takes note of a read from the stream that had room for `room` bytes.
    pub(super) fn has_read(&mut self, room: usize, result: io::Result<usize>) {
        match result {
            Ok(0) => self.host_sent_all = true,
            Ok(count) => {
                // A short read has emptied the stream, and more bytes will be an event of their
                // own; but its end may have been one already.
                self.readable = count == room || self.ending;
                let buffers = if count == room {
                    self.buffers * 2
                } else {
                    self.buffers / 2
                };
                self.buffers = buffers.clamp(1, MAX_BUFFERS);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            Err(_) => {
                self.host_sent_all = true;
                self.hear_nothing();
            }
        }
    }
}

impl Source for Connection {
    fn receive(&mut self, vectors: &mut Vectors<'_>) -> io::Result<usize> {
        vectors.receive(&self.stream)
    }

    fn packet(&mut self, len: u32) -> Packet {
        self.sent += len;
        self.header(op::RW, 0, len)
    }
}
