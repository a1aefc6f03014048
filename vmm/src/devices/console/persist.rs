//! Saving and restoring.

use std::convert::Infallible;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Console, Output};
use crate::devices::virtio::Persist;

/// Nothing: the queues are the transport's to save, and the file is this child's own, with the
/// whole limit before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {}

impl Persist for Console {
    type State = ConsoleState;
    type Args = Option<Arc<Output>>;
    type Error = Infallible;

    fn save(&self) -> ConsoleState {
        ConsoleState {}
    }

    fn restore(output: Option<Arc<Output>>, _: &ConsoleState) -> Result<Self, Infallible> {
        Ok(Self::new(output))
    }
}
