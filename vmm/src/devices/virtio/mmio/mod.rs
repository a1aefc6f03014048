//! The MMIO transport (virtio 1.2, section 4.2): registers through which a driver finds a device,
//! agrees with it on features and hands it queues.
//!
//! Nothing here trusts the driver. A write that the specification does not allow in the state the
//! device is in, or a value out of its range, is ignored, so that the registers always describe
//! something that the device can work with.

mod persist;
#[cfg(test)]
mod tests;

pub use persist::{RestoreError, TransportArgs, TransportState};

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_bindings::virtio_mmio::*;
use vm_memory::{GuestAddress, GuestMemory as _};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    Activation, ConfigSpace, F_EVENT_IDX, F_VERSION_1, Interrupt, InterruptLine, QueueError,
    QueueState, Virtqueue,
};
use crate::devices::event_loop::{SharedDevice, lock};
use crate::memory::GuestMemory;

/// Offset of the register whose writes notify a queue, for `KVM_IOEVENTFD`.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// "virt", little-endian (virtio 1.2, section 4.2.2).
const MAGIC: u32 = 0x7472_6976;
/// The register layout of virtio 1.0 and newer.
const VERSION: u32 = 2;
/// Vendor of the virtual device; drivers do not care. "fkvm", little-endian.
const VENDOR: u32 = 0x6d76_6b66;
const CONFIG_SPACE: u64 = VIRTIO_MMIO_CONFIG as u64;

const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

/// Notifications of a queue that a vCPU's thread passes on before KVM is asked to do it. Few: each
/// takes the vCPU out of the kernel. But more than a short-lived guest makes on the queues it
/// hardly uses, since to ask KVM costs as much as several, and a fork would have to ask for all.
const SLOW_NOTIFICATIONS: u32 = 8;

/// How notifications of the driver reach the device.
pub struct Notifications {
    /// What they signal, one for each queue.
    events: Vec<Arc<EventFd>>,
    /// How many of each queue a vCPU's thread has passed on.
    passed: Vec<AtomicU32>,
    connect: Connect,
}

/// Has KVM signal the event when the driver notifies the queue of that index.
pub type Connect = Box<dyn Fn(u32, &EventFd) -> io::Result<()> + Send + Sync>;

impl Notifications {
    /// Notifications of `queues` queues.
    pub fn new(queues: usize, connect: Connect) -> io::Result<Self> {
        let event = |_| Ok(Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?));
        Ok(Self {
            events: (0..queues).map(event).collect::<io::Result<_>>()?,
            passed: (0..queues).map(|_| AtomicU32::new(0)).collect(),
            connect,
        })
    }

    /// What notifications signal, one event for each queue.
    pub(crate) fn events(&self) -> &[Arc<EventFd>] {
        &self.events
    }

    /// Passes on a notification that KVM has not.
    fn pass(&self, queue: u32) -> io::Result<()> {
        let index = queue as usize;
        let (Some(event), Some(passed)) = (self.events.get(index), self.passed.get(index)) else {
            return Ok(());
        };
        event.write(1)?;
        // The one that counts to the limit connects, once.
        if passed.fetch_add(1, Ordering::Relaxed) + 1 == SLOW_NOTIFICATIONS {
            (self.connect)(queue, event)?;
        }
        Ok(())
    }
}

/// One device's registers, and the device behind them.
pub struct MmioTransport {
    device: SharedDevice,
    device_type: u32,
    /// Features offered, with those of the transport.
    offered: u64,
    /// Number and largest sizes of the queues.
    queue_sizes: Vec<u16>,
    config: Arc<ConfigSpace>,
    interrupt: Interrupt,
    memory: Arc<GuestMemory>,
    notifications: Notifications,
    /// Held for one access. The device's lock is taken inside it, to activate and to reset, and
    /// never the other way round.
    registers: Mutex<Registers>,
}

#[derive(Clone)]
struct Registers {
    /// Without `NEEDS_RESET`, which the interrupt holds: devices set it.
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    /// The features that the driver has accepted.
    driver_features: u64,
    queue_sel: u32,
    /// As the driver set them up; stale once the device is active, then the device has them.
    queues: Vec<QueueState>,
}

impl Registers {
    fn new(queue_sizes: &[u16]) -> Self {
        Self {
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: queue_sizes
                .iter()
                .map(|&size| QueueState::empty(size))
                .collect(),
        }
    }

    fn selected(&self) -> Option<&QueueState> {
        self.queues.get(self.queue_sel as usize)
    }

    /// The selected queue if the driver may change it: after it has agreed on features and before
    /// it drives the device (virtio 1.2, section 3.1.1), unless it enabled the queue already
    /// (section 4.2.2.2).
    fn configurable(&mut self) -> Option<&mut QueueState> {
        if self.status & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            return None;
        }
        self.queues
            .get_mut(self.queue_sel as usize)
            .filter(|queue| !queue.ready)
    }
}

/// Replaces one half of a 64-bit register.
fn set_half(register: &mut u64, high: bool, value: u32) {
    let shift = if high { 32 } else { 0 };
    *register = *register & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
}

/// The half of a 64-bit set of features that a selector names; there are only two.
fn half(features: u64, selector: u32) -> u32 {
    match selector {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

impl MmioTransport {
    /// A transport in the state after reset.
    pub(crate) fn new(
        device: SharedDevice,
        memory: Arc<GuestMemory>,
        line: Box<dyn InterruptLine>,
        notifications: Notifications,
    ) -> Self {
        let locked = lock(&device);
        let device_type = locked.device_type();
        let offered = locked.features() | F_VERSION_1;
        let queue_sizes = locked.queue_sizes().to_vec();
        let config = locked.config();
        drop(locked);
        Self {
            device,
            device_type,
            offered,
            registers: Mutex::new(Registers::new(&queue_sizes)),
            queue_sizes,
            config,
            interrupt: Interrupt::new(line),
            memory,
            notifications,
        }
    }

    /// The device behind the registers.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn device(&self) -> &SharedDevice {
        &self.device
    }

    /// The device's interrupt.
    pub(crate) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// A vCPU reads `data.len()` bytes at `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG_SPACE {
            return self.config.read(offset - CONFIG_SPACE, data);
        }
        data.fill(0);
        // Registers are 32 bits wide and aligned (virtio 1.2, section 4.2.2.2).
        if let (Ok(offset), Ok(register)) = (u32::try_from(offset), <&mut [u8; 4]>::try_from(data))
        {
            *register = self.read_register(offset).to_le_bytes();
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.device_type,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt.status(),
            VIRTIO_MMIO_CONFIG_GENERATION => self.config.generation(),
            // No shared memory: each region has length -1 (virtio 1.2, section 4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW
            | VIRTIO_MMIO_SHM_LEN_HIGH
            | VIRTIO_MMIO_SHM_BASE_LOW
            | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_DEVICE_FEATURES => {
                half(self.offered, lock(&self.registers).device_features_sel)
            }
            VIRTIO_MMIO_QUEUE_NUM_MAX => lock(&self.registers)
                .selected()
                .map_or(0, |queue| queue.max_size.into()),
            VIRTIO_MMIO_QUEUE_READY => lock(&self.registers)
                .selected()
                .is_some_and(|queue| queue.ready)
                .into(),
            VIRTIO_MMIO_STATUS => self.status(&lock(&self.registers)),
            _ => 0,
        }
    }

    fn status(&self, registers: &Registers) -> u32 {
        // Only meaningful to a driver that is there (virtio 1.2, section 2.1.2).
        if registers.status != 0 && self.interrupt.needs_reset() {
            registers.status | NEEDS_RESET
        } else {
            registers.status
        }
    }

    /// A vCPU writes `data` at `offset`.
    pub fn write(&self, offset: u64, data: &[u8]) {
        // No device has a configuration field that drivers may write.
        if offset < CONFIG_SPACE
            && let (Ok(offset), Ok(register)) = (u32::try_from(offset), <[u8; 4]>::try_from(data))
        {
            self.write_register(offset, u32::from_le_bytes(register));
        }
    }

    fn write_register(&self, offset: u32, value: u32) {
        match offset {
            // First what is frequent; without the lock.
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            VIRTIO_MMIO_STATUS => self.write_status(value),
            _ => self.configure(&mut lock(&self.registers), offset, value),
        }
    }

    fn configure(&self, registers: &mut Registers, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_sel = value,
            VIRTIO_MMIO_QUEUE_SEL => registers.queue_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => {
                let selector = registers.driver_features_sel;
                if registers.status & (DRIVER | FEATURES_OK | FAILED) == DRIVER && selector < 2 {
                    set_half(&mut registers.driver_features, selector == 1, value);
                }
            }
            VIRTIO_MMIO_QUEUE_NUM => {
                if let Some(queue) = registers.configurable()
                    && let Ok(size) = u16::try_from(value)
                    && size.is_power_of_two()
                    && size <= queue.max_size
                {
                    queue.size = size;
                }
            }
            VIRTIO_MMIO_QUEUE_READY => self.write_queue_ready(registers, value),
            VIRTIO_MMIO_QUEUE_DESC_LOW | VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                if let Some(queue) = registers.configurable() {
                    let high = offset == VIRTIO_MMIO_QUEUE_DESC_HIGH;
                    set_half(&mut queue.desc_table, high, value);
                }
            }
            VIRTIO_MMIO_QUEUE_AVAIL_LOW | VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                if let Some(queue) = registers.configurable() {
                    let high = offset == VIRTIO_MMIO_QUEUE_AVAIL_HIGH;
                    set_half(&mut queue.avail_ring, high, value);
                }
            }
            VIRTIO_MMIO_QUEUE_USED_LOW | VIRTIO_MMIO_QUEUE_USED_HIGH => {
                if let Some(queue) = registers.configurable() {
                    let high = offset == VIRTIO_MMIO_QUEUE_USED_HIGH;
                    set_half(&mut queue.used_ring, high, value);
                }
            }
            _ => {}
        }
    }

    fn notify(&self, queue: u32) {
        // The event loop ignores a notification of a device that is not active.
        if let Err(error) = self.notifications.pass(queue) {
            log::error!(
                "cannot notify queue {queue} of device {}: {error}",
                self.device_type
            );
        }
    }

    fn write_queue_ready(&self, registers: &mut Registers, value: u32) {
        if value == 1 {
            let memory = &*self.memory;
            let Some(queue) = registers.configurable() else {
                return;
            };
            if rings_valid(queue, memory) {
                queue.ready = true;
            } else {
                // The driver does not look whether it stays zero; this it will notice.
                self.interrupt.set_needs_reset();
            }
        } else if value == 0 && registers.status & DRIVER_OK == 0 {
            // While the device is driven, a queue is only taken back by a reset:
            // VIRTIO_F_RING_RESET is not offered. The driver reads back that it is still ready.
            let selected = registers.queue_sel as usize;
            if let Some(queue) = registers.queues.get_mut(selected) {
                queue.ready = false;
            }
        }
    }

    fn write_status(&self, value: u32) {
        let mut registers = lock(&self.registers);
        if value == 0 {
            return self.reset(&mut registers);
        }
        let old = registers.status;
        let mut new = value & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        // Drivers only ever set bits (virtio 1.2, section 2.1.1), in the order of section 3.1.1,
        // and have given up after FAILED.
        let in_order = (new & DRIVER == 0 || new & ACKNOWLEDGE != 0)
            && (new & FEATURES_OK == 0 || new & DRIVER != 0)
            && (new & DRIVER_OK == 0 || new & FEATURES_OK != 0);
        if new & old != old || !in_order || old & FAILED != 0 {
            return;
        }
        if new & !old & FEATURES_OK != 0 && !self.acceptable(registers.driver_features) {
            // The driver reads back that the bit is not set and gives up.
            new &= !(FEATURES_OK | DRIVER_OK);
        }
        registers.status = new;
        if new & !old & DRIVER_OK != 0
            && let Err(error) = self.activate(&mut registers)
        {
            log::warn!("device {} cannot be activated: {error}", self.device_type);
            self.interrupt.signal_needs_reset();
        }
    }

    /// Whether a driver may choose these features: some of those offered, `F_VERSION_1` among
    /// them (virtio 1.2, section 6.1).
    fn acceptable(&self, features: u64) -> bool {
        features & !self.offered == 0 && features & F_VERSION_1 != 0
    }

    fn activate(&self, registers: &mut Registers) -> Result<(), QueueError> {
        let features = registers.driver_features;
        for queue in &mut registers.queues {
            queue.event_idx = features & F_EVENT_IDX != 0;
        }
        let queues = registers
            .queues
            .iter()
            .zip(self.notifications.events())
            .map(|(state, notification)| {
                let memory = Arc::clone(&self.memory);
                Virtqueue::new(
                    state,
                    memory,
                    self.interrupt.clone(),
                    Arc::clone(notification),
                )
            })
            .collect::<Result<Vec<_>, _>>()?;
        let interrupt = self.interrupt.clone();
        lock(&self.device).activate(Activation {
            queues,
            features,
            interrupt,
        });
        Ok(())
    }

    fn reset(&self, registers: &mut Registers) {
        // The one register that waits for the device: see VirtioDevice.
        lock(&self.device).reset();
        self.interrupt.reset();
        *registers = Registers::new(&self.queue_sizes);
    }
}

/// Whether all three rings lie in guest memory, aligned as virtio 1.2, section 2.7, wants it.
fn rings_valid(queue: &QueueState, memory: &GuestMemory) -> bool {
    let size = usize::from(queue.size);
    [
        (queue.desc_table, 16, 16 * size),
        (queue.avail_ring, 2, 6 + 2 * size),
        (queue.used_ring, 4, 6 + 8 * size),
    ]
    .into_iter()
    // Address 0 is what a queue has that was never set up.
    .all(|(start, align, length)| {
        start != 0 && start % align == 0 && memory.check_range(GuestAddress(start), length)
    })
}
