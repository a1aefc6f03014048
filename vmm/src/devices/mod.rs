//! The devices of a machine.

pub mod event_loop;
pub mod virtio;
