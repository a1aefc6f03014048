//! The exports: the trees and single files that a guest sees below the synthetic root.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::Error;
use super::host::{self, FileStat};

/// How long a guest may keep names and attributes of an export that only it changes. A change made
/// by the host's administrator (`docker cp`) is seen after that time at the latest.
const PRIVATE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a guest may keep the attributes and names of the synthetic root: they stay what they are for as long as the
/// monitor lives. Not for longer than it takes: a guest that is frozen carries what it keeps into children, whose exports are
/// others, and then meets a stale number once, upon which Linux looks the name up again.
pub(super) const ROOT_TIMEOUT: Duration = Duration::from_secs(1);

/// Longest name of an export in bytes (`NAME_MAX`, limits.h).
const NAME_MAX: usize = 255;

/// One tree or single file, as the launcher hands it over.
#[derive(Debug)]
pub struct Export {
    /// The entry's name in the root.
    pub name: String,
    /// An `O_PATH` descriptor of a directory or a regular file: the root of what the guest sees.
    /// Mounts below it are seen too, so it is best a detached clone (`open_tree(2)`) of one mount.
    pub file: OwnedFd,
    /// Every change is refused with `EROFS`.
    pub read_only: bool,
    /// Others change it too, so that the guest has to ask at every use.
    pub shared: bool,
}

/// An export that has been checked.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) name: String,
    pub(super) file: Arc<OwnedFd>,
    pub(super) read_only: bool,
    pub(super) shared: bool,
    pub(super) stat: FileStat,
}

impl Root {
    /// Checks an export: its name, and that it is a directory or a regular file.
    pub(super) fn new(export: Export) -> Result<Self, Error> {
        let Export {
            name,
            file,
            read_only,
            shared,
        } = export;
        if name.is_empty()
            || name.len() > NAME_MAX
            || name == "."
            || name == ".."
            || name.contains(['/', '\0'])
        {
            return Err(Error::ExportName { name });
        }
        let stat = host::stat(&file).map_err(|source| Error::ExportStat {
            name: name.clone(),
            source,
        })?;
        if !stat.is_dir() && !stat.is_regular() {
            return Err(Error::ExportKind { name });
        }
        Ok(Root {
            name,
            file: Arc::new(file),
            read_only,
            shared,
            stat,
        })
    }

    /// How long the guest may keep a name or attributes of this export.
    pub(super) fn timeout(&self) -> Duration {
        if self.shared {
            Duration::ZERO
        } else {
            PRIVATE_TIMEOUT
        }
    }
}
