//! State of the machine as a whole.
use serde::{Deserialize, Serialize};
/// Interrupt controllers, timers and clock.
#[derive(Debug, Serialize, Deserialize)]
pub struct VmState;
