//! Socket device (virtio 1.2, section 5.10).
use super::event_loop::Registrar;
use super::virtio::*;
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
/// x
pub struct Vsock {
    queues: Vec<Virtqueue>,
    config: Arc<ConfigSpace>,
}
/// x
pub struct VsockArgs {
    /// x
    pub registrar: Registrar,
}
/// x
#[derive(Debug, Serialize, Deserialize)]
pub struct VsockState {}
/// x
#[derive(Debug, thiserror::Error)]
#[error("no vsock device")]
pub struct ConnectError;
impl Vsock {
    /// x
    pub fn new(_: VsockArgs) -> Self {
        Self {
            queues: vec![],
            config: Arc::new(ConfigSpace::new(3u64.to_le_bytes().to_vec())),
        }
    }
    /// x
    pub fn connect(&mut self, _: u32, _: UnixStream) -> Result<(), ConnectError> {
        Err(ConnectError)
    }
}
impl Persist for Vsock {
    type State = VsockState;
    type Args = VsockArgs;
    type Error = Infallible;
    fn save(&self) -> VsockState {
        VsockState {}
    }
    fn restore(args: VsockArgs, _: &VsockState) -> Result<Self, Infallible> {
        Ok(Self::new(args))
    }
}
impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        19
    }
    fn features(&self) -> u64 {
        F_EVENT_IDX
    }
    fn queue_sizes(&self) -> &[u16] {
        &[64, 128, 8]
    }
    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }
    fn activate(&mut self, activation: Activation) {
        self.queues = activation.queues;
    }
    fn queues(&self) -> &[Virtqueue] {
        &self.queues
    }
    fn reset(&mut self) {
        self.queues.clear();
    }
    fn process_queue(&mut self, _: usize) -> Result<(), QueueError> {
        Ok(())
    }
    fn drain(&mut self) -> Result<(), DrainError> {
        Ok(())
    }
}
