//! The template store: frozen virtual machines on disk, from which children are forked.
//!
//! ```text
//! <root>/<id>/memory          the guest's memory, sparse
//! <root>/<id>/state           everything else of the machine (see `snapshot`)
//! <root>/<id>/manifest.json   what it was made from and where it fits
//! <root>/.lock-<id>           held by the one builder of this id
//! <root>/.building-<id>-<pid> a template that is being made
//! <root>/.digests.json        digests of kernels, initramfs and this machine, to save work
//! ```
//! A template never changes once its folder has its name.

mod build;
pub mod digest;
pub mod machine;
pub mod manifest;
mod store;

use std::{io, path::PathBuf};

pub use build::Progress;
pub use machine::Machine;
pub use manifest::Manifest;
pub use store::{Store, Template};

/// What a base template is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateSpec {
    /// The guest kernel, an uncompressed ELF vmlinux.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
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
    #[error("there is no template {id} in {root}: run `forkvm template build base`")]
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
    #[error("template {id} is damaged ({what}): run `forkvm template build base`")]
    Damaged {
        /// The template.
        id: String,
        /// What is wrong.
        what: String,
    },
    /// Made on another machine.
    #[error("template {id} does not fit this machine ({what}): run `forkvm template build base`")]
    OtherMachine {
        /// The template.
        id: String,
        /// What differs.
        what: String,
    },
    /// Children of it run.
    #[error("template {id} is in use by running containers: stop them first")]
    InUse {
        /// The template.
        id: String,
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
