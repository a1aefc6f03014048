//! The thread in which devices do their work.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::virtio::{Interrupt, QueueError, VirtioDevice};

/// Events taken from the kernel at once.
const BATCH: usize = 32;

/// A guest can reset and break a device again and again; the log is not its to fill.
const MAX_BREAKAGES_LOGGED: u32 = 8;

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
    /// A registrar of slot 0 of a loop that a test runs itself.
    #[cfg(test)]
    pub(crate) fn on(epoll: &Arc<Epoll>) -> Self {
        Self {
            epoll: Arc::clone(epoll),
            slot: 0,
        }
    }

    /// From now on, readiness of `source` arrives at [`VirtioDevice::process_source`] with
    /// `token`. Closing the descriptor ends it; an event already taken from the kernel may still
    /// arrive, so a device does not use a token twice in short order.
    pub fn add(&self, source: BorrowedFd<'_>, token: u32, interest: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, source, token, interest)
    }

    /// Changes what is watched for. What `source` is ready for at that time is an event.
    pub fn change(&self, source: BorrowedFd<'_>, token: u32, interest: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, source, token, interest)
    }

    fn control(
        &self,
        operation: ControlOperation,
        source: BorrowedFd<'_>,
        token: u32,
        interest: EventSet,
    ) -> io::Result<()> {
        let value = ((self.slot as u64) << SLOT_SHIFT) | u64::from(token);
        let event = EpollEvent::new(interest | EventSet::EDGE_TRIGGERED, value);
        self.epoll.ctl(operation, source.as_raw_fd(), event)
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
    /// How often the driver has broken this device; see [`MAX_BREAKAGES_LOGGED`].
    breakages: AtomicU32,
}

impl Slot {
    /// Has the device look into queue `index`, if it is active.
    fn process_queue(&self, index: usize) {
        let mut device = lock(&self.device);
        if index < device.queues().len() {
            let outcome = device.process_queue(index);
            self.conclude(&mut *device, outcome);
        }
    }

    /// Tells the device that a descriptor of its own is ready.
    fn process_source(&self, token: u32, ready: EventSet) {
        let mut device = lock(&self.device);
        let outcome = device.process_source(token, ready);
        self.conclude(&mut *device, outcome);
    }

    /// Takes the device out of service if the driver has broken the rules of a ring.
    fn conclude(&self, device: &mut dyn VirtioDevice, outcome: Result<(), QueueError>) {
        if let Err(error) = outcome {
            device.reset();
            self.interrupt.signal_needs_reset();
            if self.breakages.fetch_add(1, Ordering::Relaxed) < MAX_BREAKAGES_LOGGED {
                log::warn!("device {} is out of service: {error}", device.device_type());
            }
        }
    }
}

/// One thread, and the devices that work in it, one event at a time.
pub(super) struct EventLoop {
    name: &'static str,
    epoll: Arc<Epoll>,
    stop: EventFd,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    slots: Vec<Arc<Slot>>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// A loop without devices, not started. `name` is the thread's.
    pub(super) fn new(name: &'static str) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        epoll.ctl(
            ControlOperation::Add,
            stop.as_raw_fd(),
            EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, STOP),
        )?;
        Ok(Self {
            name,
            epoll,
            stop,
            state: Mutex::default(),
        })
    }

    /// What the device that is added next uses to register its own descriptors.
    pub(super) fn next_registrar(&self) -> Registrar {
        Registrar {
            epoll: Arc::clone(&self.epoll),
            slot: lock(&self.state).slots.len(),
        }
    }

    /// Adds a device; `notifications` has one eventfd for each of its queues.
    pub(super) fn add(
        &self,
        device: SharedDevice,
        interrupt: Interrupt,
        notifications: Vec<Arc<EventFd>>,
    ) -> io::Result<()> {
        let mut state = lock(&self.state);
        let slot = (state.slots.len() as u64) << SLOT_SHIFT;
        for (index, notification) in notifications.iter().enumerate() {
            // Edge-triggered, so that nobody has to read the eventfd: every write to it, by the
            // kernel or by a vCPU's thread, is an event, whatever count it has.
            self.epoll.ctl(
                ControlOperation::Add,
                notification.as_raw_fd(),
                EpollEvent::new(
                    EventSet::IN | EventSet::EDGE_TRIGGERED,
                    slot | QUEUE | index as u64,
                ),
            )?;
        }
        let breakages = AtomicU32::new(0);
        state.slots.push(Arc::new(Slot {
            device,
            interrupt,
            notifications,
            breakages,
        }));
        Ok(())
    }

    /// Starts the thread. It looks into every queue once before it waits for events.
    pub(super) fn start(&self) -> io::Result<()> {
        let mut state = lock(&self.state);
        if state.thread.is_some() {
            return Ok(());
        }
        let epoll = Arc::clone(&self.epoll);
        let slots = state.slots.clone();
        let thread = std::thread::Builder::new()
            .name(self.name.into())
            .spawn(move || run(&epoll, &slots))?;
        state.thread = Some(thread);
        Ok(())
    }

    /// One round of the thread's work in the caller's, without waiting. False if there was none.
    #[cfg(feature = "fuzzing")]
    pub(super) fn turn(&self) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); BATCH];
        let count = self.epoll.wait(0, &mut events)?;
        dispatch(&events[..count], &lock(&self.state).slots);
        Ok(count > 0)
    }

    /// Ends the thread after the event it is processing.
    pub(super) fn stop(&self) -> io::Result<()> {
        let Some(thread) = lock(&self.state).thread.take() else {
            return Ok(());
        };
        self.stop.write(1)?;
        thread
            .join()
            .map_err(|_| io::Error::other(format!("thread {} panicked", self.name)))
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::error!("{error}");
        }
    }
}

fn run(epoll: &Epoll, slots: &[Arc<Slot>]) {
    // Whatever was made available while no thread was there to be told. After a fork that is
    // nothing, as the queues were drained behind the last instruction of the template's vCPUs;
    // but a queue that was missed would hang for ever, and looking costs one read.
    for slot in slots {
        for index in 0..slot.notifications.len() {
            slot.process_queue(index);
        }
    }
    let mut events = [EpollEvent::default(); BATCH];
    let mut stopping = false;
    while !stopping {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                log::error!("devices stop: epoll: {error}");
                return;
            }
        };
        // The events taken together with the last one are processed: nobody is told of them again.
        stopping = dispatch(&events[..count], slots);
    }
}

/// Has the devices work on these events. True if one of them ends the thread.
fn dispatch(events: &[EpollEvent], slots: &[Arc<Slot>]) -> bool {
    let mut stopping = false;
    for event in events {
        let value = event.data();
        if value == STOP {
            stopping = true;
            continue;
        }
        let Some(slot) = slots.get((value >> SLOT_SHIFT) as usize) else {
            continue;
        };
        let low = value as u32;
        if value & QUEUE != 0 {
            slot.process_queue(low as usize);
        } else {
            slot.process_source(low, event.event_set());
        }
    }
    stopping
}
