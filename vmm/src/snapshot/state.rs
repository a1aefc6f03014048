//! The state file.
//!
//! | bytes | what |
//! |---|---|
//! | 0..8 | magic, `FORKVMST` |
//! | 8..12 | format version, little-endian |
//! | 12..16 | CRC-32 (as in zip) of the payload, little-endian |
//! | 16..24 | length of the payload, little-endian |
//! | 24.. | payload: a [`Snapshot`] in postcard's format |

use std::{fs::File, io, os::unix::fs::FileExt};

use super::Snapshot;

/// First bytes of every state file.
pub const MAGIC: [u8; 8] = *b"FORKVMST";

/// Version of the format. It changes with anything that is saved, and is part of a template's id.
pub const VERSION: u32 = 2;

/// Upper bound of a state file's length in bytes.
pub const MAX_BYTES: u64 = 16 << 20;

const HEADER: usize = 24;

/// What can be wrong with a state file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Read(#[from] io::Error),
    /// Longer than [`MAX_BYTES`].
    #[error("it is longer than {MAX_BYTES} bytes")]
    TooLong,
    /// Another kind of file.
    #[error("it is no state file")]
    Magic,
    /// Another version of the format.
    #[error("its format is version {0}, this monitor has version {VERSION}")]
    Version(u32),
    /// Shorter or longer than its header says.
    #[error("it is cut short or too long")]
    Length,
    /// Changed since it was written.
    #[error("its checksum differs")]
    Checksum,
    /// The checksum is right and the content is not.
    #[error("its content is not valid: {0}")]
    Content(#[from] postcard::Error),
}

/// Reads a whole state file into memory, bounded. The file's offset, which others share, plays no
/// part.
///
/// # Errors
/// [`Error::Read`], [`Error::TooLong`].
pub fn read(file: &File) -> Result<Vec<u8>, Error> {
    let length = file.metadata()?.len();
    if length > MAX_BYTES {
        return Err(Error::TooLong);
    }
    let mut bytes = vec![0; usize::try_from(length).map_err(|_| Error::TooLong)?];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The bytes of a state file.
///
/// # Errors
/// [`Error::TooLong`].
pub fn serialize(snapshot: &Snapshot) -> Result<Vec<u8>, Error> {
    let payload = postcard::to_stdvec(snapshot)?;
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(crc32fast::hash(&payload).to_le_bytes());
    bytes.extend((payload.len() as u64).to_le_bytes());
    bytes.extend(payload);
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::TooLong);
    }
    Ok(bytes)
}

/// Parses a state file; everything that was not written by [`serialize`] is an error.
///
/// # Errors
/// Every variant but [`Error::Read`].
pub fn parse(bytes: &[u8]) -> Result<Snapshot, Error> {
    match postcard::take_from_bytes(payload(bytes)?)? {
        (snapshot, []) => Ok(snapshot),
        _ => Err(Error::Length),
    }
}

/// The payload behind a header that fits it.
fn payload(bytes: &[u8]) -> Result<&[u8], Error> {
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::TooLong);
    }
    let (header, payload) = bytes.split_at_checked(HEADER).ok_or(Error::Length)?;
    if header[..8] != MAGIC {
        return Err(Error::Magic);
    }
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
    if word(8) != VERSION {
        return Err(Error::Version(word(8)));
    }
    let length = u64::from(word(16)) | u64::from(word(20)) << 32;
    if length != payload.len() as u64 {
        return Err(Error::Length);
    }
    if word(12) != crc32fast::hash(payload) {
        return Err(Error::Checksum);
    }
    Ok(payload)
}

#[cfg(test)]
mod tests;
