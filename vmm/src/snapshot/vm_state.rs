//! State of the machine as a whole: interrupt controllers, timer and clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

/// A KVM call that failed.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {source}")]
pub struct Error {
    call: &'static str,
    source: kvm_ioctls::Error,
}

/// Interrupt controllers, timer and clock.
#[derive(Clone, Serialize, Deserialize)]
pub struct VmState {
    /// The two 8259, then the I/O APIC.
    irqchips: [kvm_irqchip; 3],
    /// The 8254, if the machine has one.
    pit: Option<kvm_pit_state2>,
    /// kvm-clock: nanoseconds since the guest's boot.
    clock: kvm_clock_data,
}

#[cfg(test)]
impl VmState {
    /// Any state, for tests of what holds it.
    pub(crate) fn example() -> Self {
        Self {
            irqchips: Default::default(),
            pit: Some(Default::default()),
            clock: Default::default(),
        }
    }
}

fn failed(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error { call, source }
}

impl VmState {
    /// Whether the machine has an 8254.
    pub(crate) fn has_pit(&self) -> bool {
        self.pit.is_some()
    }

    /// Saves a machine whose vCPUs do not run.
    pub(crate) fn save(vm: &VmFd, pit: bool) -> Result<Self, Error> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(failed("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        };
        Ok(Self {
            irqchips: [
                chip(KVM_IRQCHIP_PIC_MASTER)?,
                chip(KVM_IRQCHIP_PIC_SLAVE)?,
                chip(KVM_IRQCHIP_IOAPIC)?,
            ],
            pit: if pit {
                Some(vm.get_pit2().map_err(failed("KVM_GET_PIT2"))?)
            } else {
                None
            },
            clock: vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?,
        })
    }

    /// Restores it, after the vCPUs. The clock comes last and goes on from where it stopped,
    /// however long the template has lain on the disk: the guest's monotonic time has no jump,
    /// and its real time is set by the agent.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), Error> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip).map_err(failed("KVM_SET_IRQCHIP"))?;
        }
        if let Some(pit) = &self.pit {
            vm.set_pit2(pit).map_err(failed("KVM_SET_PIT2"))?;
        }
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            // No KVM_CLOCK_REALTIME: it would add the time since the freeze.
            flags: 0,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }
}

impl std::fmt::Debug for VmState {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("VmState")
            .field("pit", &self.pit.is_some())
            .field("clock", &self.clock.clock)
            .finish_non_exhaustive()
    }
}
