//! A device's configuration space.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

/// Configuration space of a device (virtio 1.2, section 2.5): bytes that the driver reads and the
/// device may change. None of our devices has a field that the driver may write, so writes are
/// ignored by the transport.
#[derive(Debug, Default)]
pub struct ConfigSpace {
    bytes: Mutex<Vec<u8>>,
    /// Changes with the bytes, so that a driver that reads in several accesses knows whether what
    /// it has belongs together (virtio 1.2, section 4.2.2.1).
    generation: AtomicU32,
}

impl ConfigSpace {
    /// A space with this content, little-endian as the device's section of virtio 1.2 lays it out.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            generation: AtomicU32::new(0),
        }
    }

    /// Fills `data` from `offset`. What lies behind the end reads as zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(tail) = usize::try_from(offset)
            .ok()
            .and_then(|start| bytes.get(start..))
        else {
            return;
        };
        let length = tail.len().min(data.len());
        data[..length].copy_from_slice(&tail[..length]);
    }

    /// Changes the content. The device calls [`super::Interrupt::signal_config`] afterwards.
    pub fn update(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut bytes);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// The generation of the content.
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Sets the generation of a restored space.
    pub(super) fn restore_generation(&self, generation: u32) {
        self.generation.store(generation, Ordering::Release);
    }
}
