//! What the fuzz targets (`tests/fuzz`) reach of the monitor's inside. Compiled with the feature
//! `fuzzing` alone, which nothing that is installed has.

use std::os::fd::OwnedFd;

pub use crate::devices::fuzzing::{Kept, Machine};
pub use crate::template::fuzzing::{digests, example_texts, fix_manifest, manifest_id};

use crate::control::Launch;
use crate::launch::Parts;

/// Puts the descriptors of a launch in their places, as the monitor does before anything else.
/// Answers the number of exports.
///
/// # Errors
/// The monitor's message.
pub fn launch(launch: Launch, descriptors: Vec<OwnedFd>) -> Result<usize, String> {
    Parts::new(launch, descriptors)
        .map(|parts| parts.exports.len())
        .map_err(|error| error.to_string())
}
