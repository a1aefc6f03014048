//! Fuzz targets: each takes any bytes for what somebody who is not trusted may send, and panics
//! when something does not hold that must. docs/testing.md tells how they are run.
//!
//! The bytes of a target are a list of steps (see [`input`]); its seeds are valid messages, made by
//! the target's own code. What a target may allocate is bounded by [`heap`].

// A panic is what a target finds things by.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod guest;
pub mod heap;
pub mod input;
pub mod place;
pub mod ram;
pub mod targets;

/// A fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, as in `make fuzz TARGET=name`.
    pub name: &'static str,
    /// Takes one input.
    pub run: fn(&[u8]),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

impl Target {
    /// The target of that name.
    pub fn find(name: &str) -> Option<&'static Self> {
        targets::ALL.iter().find(|target| target.name == name)
    }
}

/// Takes the process for one that fuzzes: few descriptors, so that bounds by descriptors are
/// reached, and no signal for a file that has become too long.
pub fn prepare_process() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let files = Rlimit {
        current: Some(256),
        ..getrlimit(Resource::Nofile)
    };
    setrlimit(Resource::Nofile, files).expect("a lower limit of descriptors");
}
