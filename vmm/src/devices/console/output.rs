//! The file that a guest's consoles go to, and how much of it there may be.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryError};

use crate::memory::GuestMemory;

/// Most bytes written in a VM's life: 4 MiB. The guest cannot fill the host's disk.
pub const MAX_OUTPUT: u64 = 4 << 20;

/// Last line of a file that has reached [`MAX_OUTPUT`].
const CUT: &[u8] = b"\n[console output ends here: the limit is reached]\n";

/// A regular file (one that could block would hold up the devices) and how much still fits into
/// it. The console device and the early serial port share it.
#[derive(Debug)]
pub struct Output {
    file: File,
    left: AtomicU64,
}

impl Output {
    /// The whole limit before `file`.
    pub fn shared(file: File) -> Arc<Self> {
        Arc::new(Self {
            file,
            left: AtomicU64::new(MAX_OUTPUT),
        })
    }

    /// Appends bytes.
    pub fn write(&self, bytes: &[u8]) {
        self.append(bytes.len() as u64, |mut file, fits| {
            file.write_all(&bytes[..fits])
        });
    }

    /// Appends `length` bytes of guest memory.
    pub(super) fn write_from(&self, memory: &GuestMemory, start: GuestAddress, length: u32) {
        // A buffer outside memory is the guest's own loss. Looked at before: what lies inside would be written.
        if !memory.check_range(start, length as usize) {
            return;
        }
        self.append(length.into(), |mut file, fits| {
            match memory.write_all_volatile_to(start, &mut file, fits) {
                Err(GuestMemoryError::IOError(error)) => Err(error),
                _ => Ok(()),
            }
        });
    }

    fn append(&self, length: u64, write: impl FnOnce(&File, usize) -> io::Result<()>) {
        let taken = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                (left > 0).then(|| left - length.min(left))
            });
        let Ok(left) = taken else { return };
        // A file that cannot be written is given up: a full disk will not get better by trying.
        if let Err(error) = write(&self.file, length.min(left) as usize) {
            log::warn!("console output is lost from here on: {error}");
            self.left.store(0, Ordering::Relaxed);
        } else if length >= left
            && let Err(error) = (&self.file).write_all(CUT)
        {
            log::warn!("cannot end the console's file: {error}");
        }
    }
}
