//! Saving and restoring.

use std::convert::Infallible;
use std::fs::File;

use serde::{Deserialize, Serialize};

use super::Console;
use crate::devices::virtio::Persist;

/// Nothing: the queues are the transport's to save, and the file is this child's own, with the
/// whole limit before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {}

impl Persist for Console {
    type State = ConsoleState;
    type Args = Option<File>;
    type Error = Infallible;

    fn save(&self) -> ConsoleState {
        ConsoleState {}
    }

    fn restore(file: Option<File>, _: &ConsoleState) -> Result<Self, Infallible> {
        Ok(Self::new(file))
    }
}
