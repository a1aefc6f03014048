//! What the shim, the monitor and the agent in the guest have in common: the agent's ttrpc API,
//! the vsock ports, the header of a stream connection, the ready port and the named time points.

pub mod fault;
pub mod points;
pub mod stream;

/// The messages of `proto/agent.proto`.
#[allow(
    missing_docs,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unused,
    clippy::all,
    clippy::unwrap_used
)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// Client and server of the service `forkvm.agent.v1.Agent`.
#[allow(
    missing_docs,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unused,
    clippy::all,
    clippy::unwrap_used
)]
pub mod agent_ttrpc {
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

/// vsock port on which the agent serves [`agent_ttrpc`].
pub const AGENT_PORT: u32 = 1024;

/// vsock port on which the agent takes the connections of standard streams (see [`stream`]).
pub const STREAM_PORT: u32 = 1025;

/// vsock port by which the monitor asks the guest to give back what it has cached of files: a
/// connection is the question, and the agent closes it when that is done. No byte passes.
pub const RECLAIM_PORT: u32 = 1026;

/// x86 I/O port by which the agent tells the monitor how far it is. It is outside every range
/// that a PC assigns (and that the guest kernel probes).
pub const READY_PORT: u16 = 0x510;

/// Value written to [`READY_PORT`] when the agent listens on both vsock ports. A template is
/// frozen right behind this write.
pub const READY_LISTENING: u8 = 1;

/// Value written to [`READY_PORT`] next: the first exit of a forked child.
pub const READY_RESUMED: u8 = 2;

/// A word on the guest kernel's command line: the guest will become a template, so the agent runs one container before it
/// says that it listens. A machine that boots for one container alone would only lose time by that.
pub const WARM_UP: &str = "forkvm.warm_up";

/// Tag of the virtio-fs device (virtio 1.2, section 5.11.4).
pub const FS_TAG: &str = "forkvm";

/// Where the agent mounts the virtio-fs device in the guest; each export is an entry in it.
pub const HOST_MOUNT: &str = "/run/forkvm/host";

/// Name of the export that is the container's root file system.
pub const ROOTFS_EXPORT: &str = "rootfs";
