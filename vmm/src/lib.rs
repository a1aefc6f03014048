//! forkvm's monitor as a library: the control protocol, the template store, guest memory, the
//! devices, and the virtual machine itself.

pub mod control;
pub mod devices;
pub mod memory;
pub(crate) mod no_devices;
pub mod snapshot;
pub mod template;
