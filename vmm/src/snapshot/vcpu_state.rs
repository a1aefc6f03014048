//! State of one vCPU.
use serde::{Deserialize, Serialize};
/// Everything of one vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState;
