//! Saving and restoring.

use std::convert::Infallible;

use serde::{Deserialize, Serialize};

use super::Vsock;
use crate::devices::event_loop::Registrar;
use crate::devices::virtio::Persist;

/// What is saved: no connection, as there is none when a VM is frozen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    next_port: u32,
}

/// What the device needs beside its state.
pub struct VsockArgs {
    /// Where streams are watched.
    pub registrar: Registrar,
}

impl Vsock {
    /// The device of a machine that boots.
    pub fn new(args: VsockArgs) -> Self {
        Self::with_port(args.registrar, 0)
    }
}

impl Persist for Vsock {
    type State = VsockState;
    type Args = VsockArgs;
    type Error = Infallible;

    fn save(&self) -> VsockState {
        VsockState {
            next_port: self.next_port(),
        }
    }

    fn restore(args: VsockArgs, state: &VsockState) -> Result<Self, Infallible> {
        Ok(Self::with_port(args.registrar, state.next_port))
    }
}
