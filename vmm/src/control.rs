//! The control protocol between the process that starts a monitor (the shim, or `forkvm template
//! build`) and the monitor.
//!
//! The monitor's standard input is one end of a Unix socket pair of type `SOCK_SEQPACKET`. Each
//! packet is one JSON value, at most [`MAX_PACKET`] bytes; file descriptors travel beside it as
//! `SCM_RIGHTS`, at most [`MAX_DESCRIPTORS`] a packet, in the order in which the message names
//! them. The first packet is [`Request::Launch`], but for a [`Request::StopAt`]. When the launcher closes its end the monitor
//! exits, whatever its guest does.

pub mod monitor;
pub mod socket;

pub use monitor::{Monitor, describe};
pub use socket::Socket;

use serde::{Deserialize, Serialize};

use crate::written::Written;

/// Upper bound of a packet's length in bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// Upper bound of the descriptors in one packet: the kernel's own (`SCM_MAX_FD`, unix(7)).
pub const MAX_DESCRIPTORS: usize = 253;

/// What a launcher asks of a monitor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// For forkvm's own tests, before the launch: the monitor tells when it passes this time point
    /// ([`Event::Reached`]) and waits there for its end, or that of its launcher.
    StopAt {
        /// One of `forkvm_api::points::MONITOR`.
        point: String,
    },
    /// Makes the virtual machine and runs it. Descriptors: see [`Launch`].
    Launch(Launch),
    /// Bridges each stream socket that comes with it (one descriptor or more) to a connection of its own to a vsock port on
    /// which the guest listens. What is in a socket already is what the guest reads first. The monitor closes a socket if the
    /// guest refuses.
    Connect {
        /// The guest's port.
        port: u32,
    },
    /// Stops all vCPUs; answered by [`Event::Paused`].
    Pause,
    /// Lets them go on; answered by [`Event::Resumed`].
    Resume,
    /// The container is made: asks for the pages that were written to ([`Writes::Record`]); answered by [`Event::Written`].
    Written,
    /// Freezes a machine that was launched for it ([`Purpose::Freeze`]) and writes the template; answered by
    /// [`Event::Frozen`], after which the process ends. Two descriptors, both read-write and empty: the memory file and the
    /// state file. No connection may be open.
    Freeze,
}

/// Everything that a virtual machine is made of.
///
/// Descriptors come in this order: those of [`Source`], [`NetworkNamespace`], the console if [`Launch::console`] is set,
/// then one for each export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// Where the machine's first state comes from.
    pub source: Source,
    /// What the machine is for.
    pub purpose: Purpose,
    /// The network namespace that the monitor enters before it does anything else.
    pub network_namespace: NetworkNamespace,
    /// One descriptor: a file to which the guest's console is appended.
    pub console: bool,
    /// The trees and files that the guest sees, an `O_PATH` descriptor each.
    pub exports: Vec<Export>,
}

/// Where a machine's first state comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Source {
    /// A cold boot. Two descriptors: the kernel (an ELF vmlinux) and the initramfs.
    Boot {
        /// Number of vCPUs.
        vcpus: u8,
        /// Memory in bytes, a multiple of 2 MiB.
        memory_bytes: u64,
        /// Added to the guest kernel's command line.
        cmdline: String,
    },
    /// A fork. Two descriptors: the template's memory and its state, both read-only; and those of [`Writes`].
    Fork {
        /// The template's id, for messages.
        template: String,
        /// The pages that its start will write to.
        writes: Writes,
    },
}

/// What is done about the pages that a start writes to ([`crate::written`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Writes {
    /// Nothing.
    Ignore,
    /// They are recorded, for [`Request::Written`].
    Record,
    /// They are copied beforehand. One descriptor: the record, read-only.
    Expect,
}

/// What a machine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Purpose {
    /// It runs containers.
    Run,
    /// It becomes a template when that is asked for ([`Request::Freeze`]): a machine that boots when its agent listens, a fork
    /// when it was changed. It gets nothing of any container, and no random bytes.
    Freeze,
}

/// The network namespace of a monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum NetworkNamespace {
    /// The launcher's own.
    Inherit,
    /// A fresh one.
    New,
    /// One descriptor: the namespace.
    Join,
}

/// One tree or file that the guest sees as an entry of the file system's root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// The entry's name: not empty, no `/`, not `.` or `..`.
    pub name: String,
    /// Writes are refused with `EROFS`.
    pub read_only: bool,
    /// Others change it too, so the guest asks anew at every use (volumes); otherwise it may keep
    /// names and attributes for a second (the container's own root).
    pub shared: bool,
}

/// What a monitor tells its launcher.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// The point of [`Request::StopAt`] is passed.
    Reached {
        /// The point.
        point: String,
    },
    /// The guest runs: vCPU 0 has come back from its first exit.
    Running {
        /// The time points passed so far.
        points: Vec<TimePoint>,
    },
    /// The guest's agent listens (after a boot).
    AgentListening,
    /// The template's memory and state are written and on disk.
    Frozen(Frozen),
    /// The pages that the start has written to.
    Written(Written),
    /// How far a freeze is, for a progress display.
    Progress {
        /// What is being done.
        step: String,
    },
    /// All vCPUs have stopped.
    Paused,
    /// They run again.
    Resumed,
    /// The guest has ended; the monitor's process ends after this.
    Stopped {
        /// Why, as one sentence.
        reason: String,
    },
    /// The monitor cannot go on; its process ends after this.
    Failed {
        /// What kind of failure it is.
        kind: FailureKind,
        /// One sentence that says what to do.
        message: String,
    },
}

/// Kinds of failure that a launcher tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// `/dev/kvm` is missing or cannot do what is needed.
    NoKvm,
    /// The template is damaged or was made on another machine.
    Template,
    /// The request cannot be carried out as it stands.
    Invalid,
    /// Everything else.
    Internal,
}

/// A named reading of the host's CLOCK_MONOTONIC (see `forkvm_api::points`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimePoint {
    /// One of `forkvm_api::points::ALL`.
    pub name: String,
    /// Nanoseconds.
    pub at_ns: u64,
}

/// What a freeze wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// Bytes of memory that hold data (the file's holes are zero).
    pub data_bytes: u64,
    /// Length of the state file.
    pub state_bytes: u64,
}
