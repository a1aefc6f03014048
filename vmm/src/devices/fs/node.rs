//! A node: one file that the guest knows by number.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::host::{FileKey, FileStat};

/// The number by which the guest knows a file. Never used twice.
pub(super) type NodeId = u64;

/// The synthetic root (`FUSE_ROOT_ID`).
pub(super) const ROOT: NodeId = fuse_backend_rs::abi::fuse_abi::ROOT_ID;

/// Most names kept of one node. More hard links may exist; the oldest are forgotten, and found
/// again by the file's identity when they are looked up.
const MAX_NAMES: usize = 16;

/// What tells a file from every other even when no descriptor of it is held: its inode number may
/// be used again then, but not with the same time of creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) key: FileKey,
    pub(super) born: Option<(i64, u32)>,
}

impl From<&FileStat> for Identity {
    fn from(stat: &FileStat) -> Self {
        Identity {
            key: stat.key(),
            born: stat.born(),
        }
    }
}

/// The attributes by which the guest decides whether pages it holds are still right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version {
    size: u64,
    modified: (i64, u32),
    changed: (i64, u32),
}

impl From<&FileStat> for Version {
    fn from(stat: &FileStat) -> Self {
        let stx = &stat.0;
        Version {
            size: stx.stx_size,
            modified: (stx.stx_mtime.tv_sec, stx.stx_mtime.tv_nsec),
            changed: (stx.stx_ctime.tv_sec, stx.stx_ctime.tv_nsec),
        }
    }
}

/// A file's place: the directory's node and its name there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) parent: NodeId,
    pub(super) name: Arc<CStr>,
}

/// One node.
#[derive(Debug)]
pub(super) struct Node {
    /// Index of the export it belongs to; none for the root.
    pub(super) export: Option<usize>,
    /// File type bits of the mode (`S_IFMT`): never changes.
    pub(super) kind: u32,
    /// Where it is found, the latest first. A directory has one place at most. None: unlinked.
    pub(super) places: Vec<Place>,
    /// For a directory: its entries that are nodes.
    pub(super) children: HashMap<Arc<CStr>, NodeId>,
    /// How often the guest was told of it, less what it has forgotten.
    pub(super) lookups: u64,
    /// Open files and directories.
    pub(super) handles: usize,
    /// A descriptor (`O_PATH`), if one is held.
    pub(super) file: Option<Arc<OwnedFd>>,
    /// What it was when it was last seen. None: restored, and not found again yet.
    pub(super) identity: Option<Identity>,
    /// The version of the contents that the guest was last told.
    pub(super) told: Option<Version>,
    /// Used since the clock last passed.
    pub(super) used: bool,
}

impl Node {
    pub(super) fn new(export: Option<usize>, kind: u32) -> Self {
        Node {
            export,
            kind,
            places: Vec::new(),
            children: HashMap::new(),
            lookups: 0,
            handles: 0,
            file: None,
            identity: None,
            told: None,
            used: false,
        }
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    /// Nothing knows the node any more.
    pub(super) fn is_garbage(&self) -> bool {
        self.lookups == 0 && self.handles == 0 && self.children.is_empty()
    }

    /// The descriptor may be closed: the file can be opened again by its path. An export's own
    /// descriptor has no path.
    pub(super) fn is_evictable(&self) -> bool {
        let has_path = self
            .places
            .first()
            .is_some_and(|place| place.parent != ROOT);
        has_path && self.handles == 0
    }

    /// Puts a place first. Returns the places that fall out.
    pub(super) fn add_place(&mut self, place: Place) -> Vec<Place> {
        self.places.retain(|known| *known != place);
        self.places.insert(0, place);
        let keep = if self.is_dir() { 1 } else { MAX_NAMES };
        if self.places.len() > keep {
            self.places.split_off(keep)
        } else {
            Vec::new()
        }
    }
}
