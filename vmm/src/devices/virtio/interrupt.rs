//! How a device interrupts its driver.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// Bit of `InterruptStatus`: a used ring has moved (virtio 1.2, section 4.2.2).
pub(super) const USED_RING: u32 = virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_VRING;
/// Bit of `InterruptStatus`: the configuration has changed.
pub(super) const CONFIG: u32 = virtio_bindings::virtio_mmio::VIRTIO_MMIO_INT_CONFIG;

/// An edge-triggered interrupt input of the machine's interrupt controllers.
pub trait InterruptLine: Send + Sync {
    /// Sends one edge. Must not wait for the guest.
    fn pulse(&self) -> io::Result<()>;
}

/// An eventfd that KVM turns into an interrupt (`KVM_IRQFD`), or that a test reads.
impl InterruptLine for EventFd {
    fn pulse(&self) -> io::Result<()> {
        self.write(1)
    }
}

/// A device's interrupt: the line and the reasons that the driver reads from `InterruptStatus`.
/// Clones are the same interrupt.
#[derive(Clone)]
pub struct Interrupt(Arc<Shared>);

struct Shared {
    line: Box<dyn InterruptLine>,
    status: AtomicU32,
    needs_reset: AtomicBool,
}

impl Interrupt {
    /// An interrupt on `line`, with no reason yet.
    pub(crate) fn new(line: Box<dyn InterruptLine>) -> Self {
        Self(Arc::new(Shared {
            line,
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        }))
    }

    /// Tells the driver that a used ring has moved. [`super::Virtqueue::signal`] calls it when
    /// the driver wants to know.
    pub(super) fn signal_used(&self) {
        self.raise(USED_RING);
    }

    /// Tells the driver that the configuration space has changed.
    pub fn signal_config(&self) {
        self.raise(CONFIG);
    }

    /// Tells the driver that the device cannot go on without a reset (virtio 1.2, section 2.1.2).
    pub(crate) fn signal_needs_reset(&self) {
        self.0.needs_reset.store(true, Ordering::Release);
        self.raise(CONFIG);
    }

    fn raise(&self, reason: u32) {
        // The reason first: the driver's handler reads it as soon as the edge is there. An edge
        // is sent even if the reason was set already: whether the handler has read it cannot be
        // known here.
        self.0.status.fetch_or(reason, Ordering::SeqCst);
        self.repeat();
    }

    /// Sends the edge again, for reasons that were not acknowledged when the state was saved.
    pub(super) fn repeat(&self) {
        if let Err(error) = self.0.line.pulse() {
            log::error!("cannot interrupt the guest: {error}");
        }
    }

    pub(super) fn status(&self) -> u32 {
        self.0.status.load(Ordering::SeqCst)
    }

    /// Sets the reasons that the driver had not acknowledged when the state was saved.
    pub(super) fn restore_status(&self, status: u32) {
        self.0
            .status
            .store(status & (USED_RING | CONFIG), Ordering::SeqCst);
    }

    pub(super) fn acknowledge(&self, reasons: u32) {
        self.0.status.fetch_and(!reasons, Ordering::SeqCst);
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.0.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn set_needs_reset(&self) {
        self.0.needs_reset.store(true, Ordering::Release);
    }

    pub(super) fn reset(&self) {
        self.0.status.store(0, Ordering::SeqCst);
        self.0.needs_reset.store(false, Ordering::Release);
    }
}
