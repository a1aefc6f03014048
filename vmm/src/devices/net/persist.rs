//! Saving and restoring.

use std::convert::Infallible;

use serde::{Deserialize, Serialize};

use super::Net;
use crate::devices::virtio::Persist;

/// Nothing: the queues are the transport's to save, the MAC address follows from the slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {}

impl Persist for Net {
    type State = NetState;
    type Args = u8;
    type Error = Infallible;

    fn save(&self) -> NetState {
        NetState {}
    }

    fn restore(slot: u8, _: &NetState) -> Result<Self, Infallible> {
        Ok(Self::new(slot))
    }
}
