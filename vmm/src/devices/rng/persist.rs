//! Saving and restoring.

use std::convert::Infallible;

use serde::{Deserialize, Serialize};

use super::Rng;
use crate::devices::virtio::Persist;

/// Nothing: the queue is the transport's to save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}

impl Persist for Rng {
    type State = RngState;
    /// Whether it gives random bytes.
    type Args = bool;
    type Error = Infallible;

    fn save(&self) -> RngState {
        RngState {}
    }

    fn restore(gives: bool, _: &RngState) -> Result<Self, Infallible> {
        Ok(Self::new(gives))
    }
}
