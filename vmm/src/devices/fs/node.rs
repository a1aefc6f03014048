//! A node: one file that the guest knows by number.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::StatxTimestamp;

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
    /// In nanoseconds since 1970, where the file system keeps it.
    born: Option<i64>,
}

impl From<&FileStat> for Identity {
    fn from(stat: &FileStat) -> Self {
        Identity {
            key: stat.key(),
            born: stat.born().map(nanoseconds),
        }
    }
}

/// What tells one version of a file's contents from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Version {
    size: u64,
    modified: i64,
    changed: i64,
}

impl From<&FileStat> for Version {
    fn from(stat: &FileStat) -> Self {
        let stx = &stat.0;
        Version {
            size: stx.stx_size,
            modified: nanoseconds(stx.stx_mtime),
            changed: nanoseconds(stx.stx_ctime),
        }
    }
}

/// A time as one number; those before 1677 or after 2262 wrap.
fn nanoseconds(time: StatxTimestamp) -> i64 {
    time.tv_sec
        .wrapping_mul(1_000_000_000)
        .wrapping_add(i64::from(time.tv_nsec))
}

/// A file's place: the directory's node and its name there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) parent: NodeId,
    pub(super) name: Arc<CStr>,
}

/// One node. There may be hundreds of thousands.
#[derive(Debug)]
pub(super) struct Node {
    /// Index of the export it belongs to; none for the root.
    export: Option<u32>,
    /// File type bits of the mode (`S_IFMT`): never changes.
    pub(super) kind: u32,
    /// Where it was found last. None: unlinked.
    place: Option<Place>,
    /// Other places where it is found, the latest first. None of a directory.
    #[expect(clippy::box_collection, reason = "most nodes have none")]
    others: Option<Box<Vec<Place>>>,
    /// For a directory: its entries that are nodes.
    #[expect(clippy::box_collection, reason = "most nodes have none")]
    children: Option<Box<HashMap<Arc<CStr>, NodeId>>>,
    /// How often the guest was told of it, less what it has forgotten.
    pub(super) lookups: u64,
    /// Open files and directories.
    pub(super) handles: u32,
    /// A descriptor (`O_PATH`), if one is held.
    pub(super) file: Option<Arc<OwnedFd>>,
    /// What it was when it was last seen. None: restored, and not found again yet.
    pub(super) identity: Option<Identity>,
    /// The version of the contents whose pages the guest may hold. None: not known.
    pub(super) held: Option<Version>,
    /// Used since the clock last passed.
    pub(super) used: bool,
}

impl Node {
    pub(super) fn new(export: Option<usize>, kind: u32) -> Self {
        Node {
            export: export.and_then(|index| u32::try_from(index).ok()),
            kind,
            place: None,
            others: None,
            children: None,
            lookups: 0,
            handles: 0,
            file: None,
            identity: None,
            held: None,
            used: false,
        }
    }

    /// Index of the export it belongs to; none for the root.
    pub(super) fn export(&self) -> Option<usize> {
        self.export.map(|index| index as usize)
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    /// Nothing knows the node any more.
    pub(super) fn is_garbage(&self) -> bool {
        self.lookups == 0 && self.handles == 0 && self.children.is_none()
    }

    /// The descriptor may be closed: the file can be opened again by its path. An export's own
    /// descriptor has no path.
    pub(super) fn is_evictable(&self) -> bool {
        self.handles == 0
            && self
                .place
                .as_ref()
                .is_some_and(|place| place.parent != ROOT)
    }

    /// The guest is told that the file is now of this version. It drops its pages if the size or
    /// the time of modification differ from what it was told before. If nothing but the time of
    /// change does (the host may have put other contents of the same size and time there), it keeps
    /// them: then they are those of the version before.
    pub(super) fn tell(&mut self, now: Version) {
        if let Some(held) = &mut self.held
            && (held.size, held.modified) != (now.size, now.modified)
        {
            *held = now;
        }
    }

    /// Where it was found last.
    pub(super) fn place(&self) -> Option<&Place> {
        self.place.as_ref()
    }

    /// Everywhere it is found, the latest first.
    pub(super) fn places(&self) -> impl DoubleEndedIterator<Item = &Place> {
        self.place
            .iter()
            .chain(self.others.iter().flat_map(|others| others.iter()))
    }

    /// Puts a place first. Returns one that falls out.
    pub(super) fn add_place(&mut self, place: Place) -> Option<Place> {
        self.remove_place(&place);
        let before = self.place.replace(place)?;
        if self.is_dir() {
            return Some(before);
        }
        let others = self.others.get_or_insert_default();
        others.insert(0, before);
        (others.len() >= MAX_NAMES).then(|| others.pop()).flatten()
    }

    /// Takes a place away.
    pub(super) fn remove_place(&mut self, place: &Place) {
        if let Some(others) = &mut self.others {
            others.retain(|known| known != place);
        }
        if self.place.as_ref() == Some(place) {
            self.place = None;
            if let Some(others) = self.others.as_mut().filter(|others| !others.is_empty()) {
                self.place = Some(others.remove(0));
            }
        }
        if self.others.as_ref().is_some_and(|others| others.is_empty()) {
            self.others = None;
        }
    }

    /// The node of an entry, if it is one.
    pub(super) fn child(&self, name: &CStr) -> Option<NodeId> {
        self.children.as_ref()?.get(name).copied()
    }

    /// Names the node of an entry.
    pub(super) fn add_child(&mut self, name: Arc<CStr>, id: NodeId) {
        self.children.get_or_insert_default().insert(name, id);
    }

    /// Takes an entry away.
    pub(super) fn remove_child(&mut self, name: &CStr) -> Option<(Arc<CStr>, NodeId)> {
        let children = self.children.as_mut()?;
        let removed = children.remove_entry(name);
        if children.is_empty() {
            self.children = None;
        }
        removed
    }
}

#[cfg(test)]
mod tests {
    use super::Node;

    #[test]
    fn a_node_is_small() {
        // docs/files.md and limits.rs say how much memory a guest can make the host keep.
        assert!(size_of::<Node>() <= 152, "{}", size_of::<Node>());
    }
}
