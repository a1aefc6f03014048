//! The state of a frozen machine.

pub mod state;
pub mod vcpu_state;
pub mod vm_state;

pub use vcpu_state::VcpuState;
pub use vm_state::VmState;

use serde::{Deserialize, Serialize};

use crate::{devices::DevicesState, memory::Segment};

/// Everything of a frozen machine but the bytes of its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// The memory file.
    pub memory: MemoryState,
    /// Interrupt controllers, timers and clock.
    pub vm: VmState,
    /// The vCPUs in the order of their ids.
    pub vcpus: Vec<VcpuState>,
    /// The devices.
    pub devices: DevicesState,
}

/// Size of the memory and where its file has data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryState {
    /// Bytes of memory, and of the file.
    pub bytes: u64,
    /// Data, in order; the rest is zero.
    pub segments: Vec<Segment>,
}
