//! The named time points of a start, in the order in which they are passed.
//!
//! Each is a reading of the host's CLOCK_MONOTONIC in nanoseconds. The shim and the monitor record
//! them on every start; `forkvm ps --timings` and the benchmarks read them.

use std::time::Duration;

/// A machine was asked for, by a launcher that is not the shim (`forkvm bench`): not a point of a container's start.
pub const REQUESTED: &str = "requested";
/// `Create` arrived at the shim.
pub const CREATE_RECEIVED: &str = "create.received";
/// The container's root file system is mounted and exported.
pub const ROOTFS_MOUNTED: &str = "rootfs.mounted";
/// The monitor's process exists (taken by the shim).
pub const VMM_SPAWNED: &str = "vmm.spawned";
/// The monitor has read its launch request.
pub const VMM_LAUNCHED: &str = "vmm.launched";
/// The template's memory is mapped and its state is read.
pub const TEMPLATE_MAPPED: &str = "template.mapped";
/// KVM has a virtual machine with its memory slots and vCPUs.
pub const VM_CREATED: &str = "vm.created";
/// The devices are restored; what follows up to the next point are calls of KVM.
pub const DEVICES_RESTORED: &str = "devices.restored";
/// vCPUs, interrupt controllers and clock are restored too.
pub const STATE_RESTORED: &str = "state.restored";
/// The first KVM_RUN of vCPU 0 is about to be entered.
pub const VCPU_ENTERED: &str = "vcpu.entered";
/// vCPU 0 has come back from its first exit: the guest has executed instructions.
pub const VCPU_FIRST_EXIT: &str = "vcpu.first_exit";
/// The agent has applied the identity: the moment of its answer less the time that it says it
/// then took to make the container.
pub const IDENTITY_APPLIED: &str = "identity.applied";
/// The agent's answer to Create has arrived: identity applied, container made.
pub const AGENT_ANSWERED: &str = "agent.answered";
/// `Create` is answered.
pub const CREATE_DONE: &str = "create.done";
/// `Start` arrived at the shim.
pub const START_RECEIVED: &str = "start.received";
/// The agent has executed the container's process.
pub const PROCESS_STARTED: &str = "process.started";

/// All of them in order.
pub const ALL: &[&str] = &[
    CREATE_RECEIVED,
    ROOTFS_MOUNTED,
    VMM_SPAWNED,
    VMM_LAUNCHED,
    TEMPLATE_MAPPED,
    VM_CREATED,
    DEVICES_RESTORED,
    STATE_RESTORED,
    VCPU_ENTERED,
    VCPU_FIRST_EXIT,
    IDENTITY_APPLIED,
    AGENT_ANSWERED,
    CREATE_DONE,
    START_RECEIVED,
    PROCESS_STARTED,
];

/// Those that the monitor passes, and tells the shim about. The shim passes all others.
pub const MONITOR: &[&str] = &[
    VMM_LAUNCHED,
    TEMPLATE_MAPPED,
    VM_CREATED,
    DEVICES_RESTORED,
    STATE_RESTORED,
    VCPU_ENTERED,
    VCPU_FIRST_EXIT,
];

/// The builder of a template has its lock, and found that there is none that can be used.
pub const BUILD_STARTED: &str = "build.started";
/// Its monitor has got the launch request.
pub const BUILD_BOOTING: &str = "build.booting";
/// The guest's agent listens.
pub const BUILD_FREEZING: &str = "build.freezing";
/// Memory and state are on disk, and the monitor has ended.
pub const BUILD_FROZEN: &str = "build.frozen";
/// The template is whole, under a temporary name.
pub const BUILD_WRITTEN: &str = "build.written";
/// It has its name.
pub const BUILD_PUBLISHED: &str = "build.published";

/// The points of a build in order; its builder passes them. They are not recorded.
pub const BUILD: &[&str] = &[
    BUILD_STARTED,
    BUILD_BOOTING,
    BUILD_FREEZING,
    BUILD_FROZEN,
    BUILD_WRITTEN,
    BUILD_PUBLISHED,
];

/// Nanoseconds of a duration, as a time point is written down.
pub fn nanoseconds(reading: Duration) -> u64 {
    u64::try_from(reading.as_nanos()).unwrap_or(u64::MAX)
}
