//! Where a packet's header and data lie in a descriptor chain.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::{Address, ByteValued, Bytes, GuestAddress};

use super::packet::{HEADER_SIZE, Header, Packet};
use super::stream::{Refused, Vectors};
use crate::devices::virtio::{Chain, QueueError, Virtqueue};
use crate::memory::GuestMemory;

/// A run of guest memory: address and length in bytes.
type Piece = (GuestAddress, usize);

/// Descriptors that are read of a chain; what a driver puts behind them does not exist for us.
/// Linux needs 18 for the largest packet.
const MAX_PIECES: usize = 64;

/// A chain, its descriptors in [`Pieces`].
#[derive(Clone, Debug)]
pub(super) struct Buffer {
    head: u16,
    pieces: Range<usize>,
    /// Bytes.
    len: usize,
}

/// The descriptors of some chains, kept to be used again: a packet costs no allocation.
#[derive(Default)]
pub(super) struct Pieces(Vec<Piece>);

impl Pieces {
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Reads a chain. Its descriptors count if the device may write them, or may not, as asked.
    pub(super) fn read(&mut self, chain: Chain, writable: bool) -> Buffer {
        let head = chain.head_index();
        let start = self.0.len();
        let mut len = 0;
        let descriptors = chain.filter(|descriptor| descriptor.is_write_only() == writable);
        for descriptor in descriptors.take(MAX_PIECES) {
            len += descriptor.len() as usize;
            self.0.push((descriptor.addr(), descriptor.len() as usize));
        }
        Buffer {
            head,
            pieces: start..self.0.len(),
            len,
        }
    }

    /// The part of a buffer from `skip` on, at most `limit` bytes of it.
    fn part(&self, buffer: &Buffer, skip: usize, limit: usize) -> impl Iterator<Item = Piece> + '_ {
        let mut skip = skip;
        let mut left = limit;
        self.0[buffer.pieces.clone()]
            .iter()
            .filter_map(move |&(start, length)| {
                let skipped = skip.min(length);
                skip -= skipped;
                let taken = (length - skipped).min(left);
                left -= taken;
                // An address that overflows does not lie in memory, nor does the last one.
                let start = start
                    .checked_add(skipped as u64)
                    .unwrap_or(GuestAddress(u64::MAX));
                (taken > 0).then_some((start, taken))
            })
    }

    /// Reads the header of a packet that the driver sent. None if there is no whole header and as
    /// much data as it says, or not all of it in memory.
    pub(super) fn packet(&self, buffer: &Buffer, memory: &GuestMemory) -> Option<Packet> {
        let mut header = [0; HEADER_SIZE];
        self.copy(buffer, 0, &mut header, memory)?;
        let mut parsed = Header::default();
        parsed.as_mut_slice().copy_from_slice(&header);
        let packet = Packet::from(parsed);
        (packet.len as usize <= buffer.len - HEADER_SIZE).then_some(packet)
    }

    /// Copies bytes of a buffer from `skip` on. None if they are not all there.
    fn copy(
        &self,
        buffer: &Buffer,
        skip: usize,
        to: &mut [u8],
        memory: &GuestMemory,
    ) -> Option<()> {
        let mut done = 0;
        for (start, length) in self.part(buffer, skip, to.len()) {
            memory
                .read_slice(&mut to[done..done + length], start)
                .ok()?;
            done += length;
        }
        (done == to.len()).then_some(())
    }

    /// Writes the header of a packet for the driver into its buffer.
    fn write_header(&self, buffer: &Buffer, packet: Packet, memory: &GuestMemory) -> Option<()> {
        let header = Header::from(packet);
        let bytes = header.as_slice();
        let mut done = 0;
        for (start, length) in self.part(buffer, 0, HEADER_SIZE) {
            memory
                .write_slice(&bytes[done..done + length], start)
                .ok()?;
            done += length;
        }
        (done == HEADER_SIZE).then_some(())
    }
}

/// The data of a packet that the driver sent.
pub(super) struct Payload<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) pieces: &'a Pieces,
    pub(super) buffer: &'a Buffer,
    pub(super) len: usize,
}

impl<'a> Payload<'a> {
    /// The data for a system call. None if not all of it lies in memory.
    pub(super) fn vectors(&self) -> Option<Vectors<'a>> {
        let mut vectors = Vectors::new(self.memory);
        for (start, length) in self.pieces.part(self.buffer, HEADER_SIZE, self.len) {
            vectors.push(start, length).ok()?;
        }
        Some(vectors)
    }

    /// Copies the data from `skip` on behind what is in `to`. None if it does not lie in memory.
    pub(super) fn append(&self, skip: usize, to: &mut Vec<u8>) -> Option<()> {
        let old = to.len();
        to.resize(old + (self.len - skip), 0);
        self.pieces
            .copy(self.buffer, HEADER_SIZE + skip, &mut to[old..], self.memory)
    }
}

/// Where [`Receiver::fill`] gets data from.
pub(super) trait Source {
    /// Receives into the pieces, without waiting. Zero is the end.
    fn receive(&mut self, vectors: &mut Vectors<'_>) -> io::Result<usize>;
    /// The packet for the next `len` bytes of what was received.
    fn packet(&mut self, len: u32) -> Packet;
}

/// Buffers that the driver has made available for packets to it.
pub(super) struct Receiver<'q> {
    queue: &'q mut Virtqueue,
    pieces: &'q mut Pieces,
}

impl<'q> Receiver<'q> {
    pub(super) fn new(queue: &'q mut Virtqueue, pieces: &'q mut Pieces) -> Self {
        Self { queue, pieces }
    }

    fn pop(&mut self) -> Result<Option<Buffer>, QueueError> {
        let chain = self.queue.pop()?;
        Ok(chain.map(|chain| self.pieces.read(chain, true)))
    }

    /// Completes a buffer with a packet whose data, if it has any, is there already.
    fn complete(&mut self, buffer: &Buffer, packet: Packet) -> Result<(), QueueError> {
        let header = self
            .pieces
            .write_header(buffer, packet, self.queue.memory());
        // A header outside memory, or in too small a buffer, is lost to the driver that put it
        // there.
        let written = header.map_or(0, |()| HEADER_SIZE as u32 + packet.len);
        self.queue.add_used(buffer.head, written)
    }

    /// Sends a packet without data. False if there is no buffer.
    pub(super) fn send(&mut self, packet: impl FnOnce() -> Packet) -> Result<bool, QueueError> {
        self.pieces.clear();
        let Some(buffer) = self.pop()? else {
            return Ok(false);
        };
        self.complete(&buffer, packet())?;
        Ok(true)
    }

    /// Receives up to `limit` bytes, in one go, into up to `buffers` buffers, and sends them as
    /// one packet for each buffer. None if the driver has made no buffer available.
    pub(super) fn fill(
        &mut self,
        buffers: usize,
        limit: usize,
        source: &mut impl Source,
    ) -> Result<Option<Filled>, QueueError> {
        self.pieces.clear();
        let memory = Arc::clone(self.queue.memory());
        let mut vectors = Vectors::new(&memory);
        // Each with the number of bytes that will be received into it, at least one, so that the
        // buffers that stay empty are the last ones and can be put back.
        let mut taken: Vec<(Buffer, usize)> = Vec::with_capacity(buffers);
        while taken.len() < buffers && vectors.bytes() < limit {
            let Some(buffer) = self.pop()? else { break };
            let before = vectors.bytes();
            let mut parts = self.pieces.part(&buffer, HEADER_SIZE, limit - before);
            let refused = parts.find_map(|(start, length)| vectors.push(start, length).err());
            drop(parts);
            let first = taken.is_empty();
            match refused {
                // More pieces than fit: if it is one chain that has them all, some are used.
                None => {}
                Some(Refused::Full) if first => {}
                Some(_) => vectors.truncate(before),
            }
            let room = vectors.bytes() - before;
            if room > 0 {
                taken.push((buffer, room));
            } else if first {
                // No room for data, or not in memory: of no use, now or later.
                self.queue.add_used(buffer.head, 0)?;
            } else {
                self.queue.undo_pop();
                break;
            }
        }
        if taken.is_empty() {
            return Ok(None);
        }
        let room = vectors.bytes();
        let result = source.receive(&mut vectors);
        let mut left = *result.as_ref().unwrap_or(&0);
        let mut used = 0;
        for (buffer, room) in &taken {
            let length = left.min(*room);
            if length > 0 {
                self.complete(buffer, source.packet(length as u32))?;
                used += 1;
            } else {
                self.queue.undo_pop();
            }
            left -= length;
        }
        Ok(Some(Filled {
            room,
            result,
            buffers: used,
        }))
    }
}

/// What became of [`Receiver::fill`].
pub(super) struct Filled {
    /// Bytes that there was room for.
    pub(super) room: usize,
    /// What the source said: bytes received, 0 at the end of the stream.
    pub(super) result: io::Result<usize>,
    /// Buffers that were used.
    pub(super) buffers: usize,
}
