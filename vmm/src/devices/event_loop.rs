//! The thread in which devices do their work.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::virtio::{Interrupt, VirtioDevice};

/// Events taken from the kernel at once.
const BATCH: usize = 32;

/// Value of an epoll event that ends the thread; no device has this slot.
const STOP: u64 = u64::MAX;
/// Marks the event of a queue, in contrast to one of a descriptor of the device's own.
const QUEUE: u64 = 1 << 32;
/// Where the slot is in an event's value; the lower half is the queue's index or the token.
const SLOT_SHIFT: u32 = 33;

/// Lets a device register descriptors of its own with the loop that it runs in. Registration is
/// edge-triggered, from any thread.
#[derive(Clone)]
pub struct Registrar {
    epoll: Arc<Epoll>,
    slot: usize,
}

impl Registrar {
    /// From now on, readiness of `source` arrives at [`VirtioDevice::process_source`] with
    /// `token`. Closing the descriptor ends it; an event already taken from the kernel may still
    /// arrive, so a device does not use a token twice in short order.
    pub fn add(&self, source: BorrowedFd<'_>, token: u32, interest: EventSet) -> io::Result<()> {
        let value = (self.slot as u64) << SLOT_SHIFT | u64::from(token);
        let event = EpollEvent::new(interest | EventSet::EDGE_TRIGGERED, value);
        self.epoll.ctl(ControlOperation::Add, source.as_raw_fd(), event)
    }
}

/// A device as the transport and the loop share it.
pub(super) type SharedDevice = Arc<Mutex<dyn VirtioDevice>>;

/// Locks a device. A panic in another thread (there is none in a release build: it aborts) leaves
/// nothing in a device that a guest could not have brought about itself.
pub(super) fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Slot {
    device: SharedDevice,
    interrupt: Interrupt,
    /// What the driver's notifications signal, one for each queue.
    notifications: Vec<Arc<EventFd>>,
}

/// One thread, and the devices that work in it, one at a time.
pub(super) struct EventLoop {
    name: &'static str,
    epoll: Arc<Epoll>,
    stop: EventFd,
    slots: Vec<Slot>,
    thread: Option<JoinHandle<Vec<Slot>>>,
}
