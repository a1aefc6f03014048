//! Saving and restoring.

use std::convert::Infallible;

use serde::{Deserialize, Serialize};

use super::Balloon;
use crate::{devices::virtio::Persist, memory::Backing};

/// Nothing: the queues are the transport's to save, and what a template's guest has given back is
/// a hole in its memory file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {}

impl Persist for Balloon {
    type State = BalloonState;
    /// What this machine's memory is mapped from.
    type Args = Backing;
    type Error = Infallible;

    fn save(&self) -> BalloonState {
        BalloonState {}
    }

    fn restore(backing: Backing, _: &BalloonState) -> Result<Self, Infallible> {
        Ok(Self::new(backing))
    }
}
