//! The targets.

pub mod agent;
pub mod control;
pub mod device;
pub mod files;
pub mod state;
pub mod template;
pub mod vsock;

use virtio_bindings::virtio_ids::{
    VIRTIO_ID_BALLOON, VIRTIO_ID_CONSOLE, VIRTIO_ID_FS, VIRTIO_ID_NET, VIRTIO_ID_RNG,
    VIRTIO_ID_VSOCK,
};

use crate::Target;

/// The target of a device, by its number: a new device is one more line in [`ALL`].
const fn device<const TYPE: u32>(name: &'static str) -> Target {
    Target {
        name,
        run: device::run::<TYPE>,
        seeds: device::seeds,
    }
}

/// All targets.
pub const ALL: &[Target] = &[
    device::<VIRTIO_ID_BALLOON>("device-balloon"),
    device::<VIRTIO_ID_CONSOLE>("device-console"),
    device::<VIRTIO_ID_FS>("device-fs"),
    device::<VIRTIO_ID_NET>("device-net"),
    device::<VIRTIO_ID_RNG>("device-rng"),
    device::<VIRTIO_ID_VSOCK>("device-vsock"),
    Target {
        name: "vsock",
        run: vsock::run,
        seeds: vsock::seeds,
    },
    Target {
        name: "files",
        run: files::run,
        seeds: files::seeds,
    },
    Target {
        name: "state",
        run: state::run,
        seeds: state::seeds,
    },
    Target {
        name: "template",
        run: template::run,
        seeds: template::seeds,
    },
    Target {
        name: "control",
        run: control::run,
        seeds: control::seeds,
    },
    Target {
        name: "agent",
        run: agent::run,
        seeds: agent::seeds,
    },
];
