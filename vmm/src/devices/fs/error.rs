//! What can go wrong with the file server as a whole.

use std::io;

/// An error of the file server or its device. Errors of single requests go to the guest as error
/// numbers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/proc/self/fd` cannot be opened.
    #[error("cannot open /proc/self/fd, which the file server needs; is /proc mounted? ({0})")]
    OpenProc(#[source] io::Error),
    /// The process may not act on files as it must.
    #[error("the file server lacks {missing}; the monitor must be started as root")]
    Capabilities {
        /// Names of the capabilities.
        missing: String,
    },
    /// An export's name is no file name.
    #[error("{name:?} cannot be the name of an export: it must be a file name")]
    ExportName {
        /// The name.
        name: String,
    },
    /// Two exports have one name.
    #[error("two exports are named {name:?}")]
    ExportTwice {
        /// The name.
        name: String,
    },
    /// An export's descriptor cannot be looked at.
    #[error("cannot stat the export {name:?}: {source}")]
    ExportStat {
        /// The export.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// An export is neither a directory nor a regular file.
    #[error("the export {name:?} is neither a directory nor a regular file")]
    ExportKind {
        /// The export.
        name: String,
    },
    /// A saved state contradicts itself.
    #[error("the saved state of the file server is damaged: {what}")]
    State {
        /// What is wrong.
        what: String,
    },
}
