//! The template store: frozen virtual machines on disk, from which children are forked.
//!
//! ```text
//! <root>/<id>/memory           the guest's memory, sparse
//! <root>/<id>/state            everything else of the machine (see `snapshot`)
//! <root>/<id>/manifest.json    what it was made from and where it fits
//! <root>/.lock-<id>            held by the one builder of this id, and gone after it
//! <root>/.building-<id>-<pid>  a template that is being made
//! <root>/.removing-<id>-<...>  one that is being removed
//! <root>/.digests.json         digests of kernel, initramfs, monitor and this machine, to save work
//! ```
//! A template's files never change once its folder has its name. The folder's time of modification is when the last
//! child was forked. Docs: `docs/templates.md`.

mod budget;
mod build;
pub mod digest;
#[cfg(any(test, feature = "fuzzing"))]
mod example;
mod fault;
mod freeze;
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
mod identity;
mod leftovers;
mod lock;
pub mod machine;
pub mod manifest;
mod record;
mod settings;
mod store;
mod survey;
#[cfg(test)]
mod testing;

use std::{fmt, io, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use budget::Limits;
pub use build::{Attempt, Progress};
pub use identity::Identity;
pub use machine::Machine;
pub use manifest::Manifest;
pub use record::{Record, RecordFile};
pub use settings::{domain, spec, store};
pub use store::{Store, Template};
pub use survey::{Condition, Listed};

/// Whose containers may be forked from a template: its children have unwritten pages in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Domain {
    /// All of this machine.
    Host,
    /// Those of one containerd namespace.
    Namespace(String),
}

impl fmt::Display for Domain {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Domain::Host => formatter.write_str("host"),
            Domain::Namespace(name) => write!(formatter, "namespace {name}"),
        }
    }
}

/// What a base template is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateSpec {
    /// The guest kernel, an uncompressed ELF vmlinux.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The monitor's program.
    pub monitor: PathBuf,
    /// Whose it is.
    pub domain: Domain,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Memory in bytes, a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Added to the guest kernel's command line.
    pub cmdline: String,
}

/// What can go wrong with templates. Each message is one sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such template.
    #[error("there is no template {id} in {root}: run `forkvm template build`")]
    Missing {
        /// The template.
        id: String,
        /// The store's folder.
        root: PathBuf,
    },
    /// An id that is not one.
    #[error(
        "{id:?} is not a template id: it has 16 hexadecimal digits, `forkvm template ls` shows them"
    )]
    BadId {
        /// What was given.
        id: String,
    },
    /// Files that do not belong together or are cut or changed.
    #[error("template {id} is damaged ({what}): run `forkvm template build`")]
    Damaged {
        /// The template.
        id: String,
        /// What is wrong.
        what: String,
    },
    /// Made on another machine, or by another version of forkvm.
    #[error("template {id} does not fit any more ({what}): run `forkvm template build`")]
    Outdated {
        /// The template.
        id: String,
        /// What differs.
        what: String,
    },
    /// Older than the limit.
    #[error(
        "template {id} is {days} days old, older than templates.max_age_days allows: run `forkvm template build`"
    )]
    Expired {
        /// The template.
        id: String,
        /// Its age in whole days.
        days: u64,
    },
    /// Children of it run.
    #[error("template {id} is in use by running containers: stop them first")]
    InUse {
        /// The template.
        id: String,
    },
    /// Less room than a template surely takes.
    #[error(
        "{available_mib} MiB are free in {root} and a template needs {needed_mib} MiB: free some, or set paths.templates \
         in the configuration to a folder on another file system"
    )]
    NoRoom {
        /// The store's folder.
        root: PathBuf,
        /// MiB that are free.
        available_mib: u64,
        /// MiB that are needed.
        needed_mib: u64,
    },
    /// A build that failed a moment ago.
    #[error("its build failed {seconds} s ago and is not tried again within a minute: {reason}")]
    FailedBefore {
        /// How long ago.
        seconds: u64,
        /// Why.
        reason: String,
    },
    /// A file of the store or of the guest image.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// KVM does not answer.
    #[error("/dev/kvm cannot be used: {0}: run `forkvm check`")]
    Kvm(String),
    /// The monitor that should have made the template failed.
    #[error("cannot build the template: {0}")]
    Build(String),
    /// The monitor's process or its control socket.
    #[error("cannot build the template: {0}")]
    Monitor(#[from] crate::control::monitor::Error),
}

impl Error {
    /// Whether it says that there is no template that can be forked, which building one puts right.
    pub fn needs_build(&self) -> bool {
        matches!(
            self,
            Error::Missing { .. }
                | Error::Damaged { .. }
                | Error::Outdated { .. }
                | Error::Expired { .. }
        )
    }

    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::File {
            action,
            path,
            source,
        }
    }
}
