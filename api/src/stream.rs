//! The header by which a connection to [`crate::STREAM_PORT`] says which stream it is.
//!
//! Layout: the stream's id, an unsigned 64-bit integer in little-endian order; the stream's bytes
//! follow without framing. A half-close by the host ends the process's stdin (CloseIO); a
//! half-close by the guest is the end of its output.

/// Length of the header in bytes.
pub const HEADER_LEN: usize = 8;

/// The header of the stream `id`.
pub fn header(id: u64) -> [u8; HEADER_LEN] {
    id.to_le_bytes()
}

/// The id that a header names.
pub fn id(header: [u8; HEADER_LEN]) -> u64 {
    u64::from_le_bytes(header)
}

#[cfg(test)]
mod tests {
    #[test]
    fn id_is_little_endian() {
        assert_eq!(super::header(0x0102), [2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(super::id(super::header(u64::MAX - 1)), u64::MAX - 1);
    }
}
