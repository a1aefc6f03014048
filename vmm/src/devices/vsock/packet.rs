//! The header of a packet (virtio 1.2, section 5.10.6).

use vm_memory::{ByteValued, Le16, Le32, Le64};

/// Bytes of a header.
pub(super) const HEADER_SIZE: usize = size_of::<Header>();

/// The only type of socket that is served: a stream (`VIRTIO_VSOCK_TYPE_STREAM`).
pub(super) const TYPE_STREAM: u16 = 1;

/// Operations (`VIRTIO_VSOCK_OP_*`).
pub(super) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// Flag of [`op::SHUTDOWN`]: the sender will not receive any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of [`op::SHUTDOWN`]: the sender will not send any more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// `struct virtio_vsock_hdr`.
///
/// Not that of the crate virtio-vsock: it finds a packet only if the driver uses one or two
/// descriptors for it, which no driver has to (virtio 1.2, section 2.7.4) and Linux does not when
/// its socket buffer has fragments; and it writes each field by itself.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    src_cid: Le64,
    dst_cid: Le64,
    src_port: Le32,
    dst_port: Le32,
    len: Le32,
    kind: Le16,
    op: Le16,
    flags: Le32,
    buf_alloc: Le32,
    fwd_cnt: Le32,
}

// SAFETY: unsafe because the type must allow every bit pattern and have no padding: it is packed
// and made of integers alone.
unsafe impl ByteValued for Header {}

/// A header's fields, in the host's byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of data behind the header.
    pub(super) len: u32,
    /// Type of the socket.
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Size of the sender's receive buffer.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender has taken out of that buffer so far, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl From<Header> for Packet {
    fn from(header: Header) -> Self {
        Self {
            src_cid: { header.src_cid }.to_native(),
            dst_cid: { header.dst_cid }.to_native(),
            src_port: { header.src_port }.to_native(),
            dst_port: { header.dst_port }.to_native(),
            len: { header.len }.to_native(),
            kind: { header.kind }.to_native(),
            op: { header.op }.to_native(),
            flags: { header.flags }.to_native(),
            buf_alloc: { header.buf_alloc }.to_native(),
            fwd_cnt: { header.fwd_cnt }.to_native(),
        }
    }
}

impl From<Packet> for Header {
    fn from(packet: Packet) -> Self {
        Self {
            src_cid: packet.src_cid.into(),
            dst_cid: packet.dst_cid.into(),
            src_port: packet.src_port.into(),
            dst_port: packet.dst_port.into(),
            len: packet.len.into(),
            kind: packet.kind.into(),
            op: packet.op.into(),
            flags: packet.flags.into(),
            buf_alloc: packet.buf_alloc.into(),
            fwd_cnt: packet.fwd_cnt.into(),
        }
    }
}

impl Packet {
    /// The reset that answers this packet, for which there is no connection.
    pub(super) fn reset(&self) -> Packet {
        Packet {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Packet::default()
        }
    }
}

/// What a connection sends to the guest next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A packet without data, of this operation.
    Packet(u16),
    /// Bytes from the stream.
    Data {
        /// Most buffers to use.
        buffers: usize,
        /// Most bytes to send.
        limit: usize,
    },
}
