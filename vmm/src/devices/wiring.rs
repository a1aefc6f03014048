//! How a slot reaches the machine: its interrupt line, and KVM's signal for its queues.

use std::io;
use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, VmFd};

use super::event_loop::lock;
use super::virtio::InterruptLine;
use super::virtio::mmio::{self, Connect};
use super::{FIRST_GSI, slot_address};

/// Connects a slot to the machine.
pub(super) trait Wiring {
    /// The slot's interrupt line.
    fn line(&self, slot: usize) -> Box<dyn InterruptLine>;
    /// How KVM is asked to signal notifications of the slot's queues.
    fn connect(&self, slot: usize) -> Connect;
}

impl Wiring for Arc<VmFd> {
    fn line(&self, slot: usize) -> Box<dyn InterruptLine> {
        Box::new(KvmLine {
            vm: Arc::clone(self),
            gsi: FIRST_GSI + slot as u32,
            pulse: Mutex::new(()),
        })
    }

    fn connect(&self, slot: usize) -> Connect {
        let vm = Arc::clone(self);
        let address = IoEventAddress::Mmio(slot_address(slot) + mmio::QUEUE_NOTIFY);
        Box::new(move |queue, event| Ok(vm.register_ioevent(event, &address, queue)?))
    }
}

/// An interrupt input of KVM's own interrupt controllers.
///
/// Not an eventfd (`KVM_IRQFD`): for lines that go to both the PIC and the I/O APIC, as these do,
/// KVM leaves it to a kernel thread to turn the eventfd into an interrupt. That takes a change of
/// threads each time, and an interrupt may be under way when the machine is frozen. Two calls
/// from here take neither.
struct KvmLine {
    vm: Arc<VmFd>,
    gsi: u32,
    /// Held for a pulse: two at once would be one edge, too early for the second.
    pulse: Mutex<()>,
}

impl InterruptLine for KvmLine {
    fn pulse(&self) -> io::Result<()> {
        let _pulse = lock(&self.pulse);
        self.vm.set_irq_line(self.gsi, true)?;
        Ok(self.vm.set_irq_line(self.gsi, false)?)
    }
}
