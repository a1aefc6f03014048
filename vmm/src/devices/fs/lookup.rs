//! From a name to a node, and what the guest is told of it.

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{ATTR_SUBMOUNT, FsOptions, stat64};
use fuse_backend_rs::api::filesystem::Entry;

use super::export::{ROOT_TIMEOUT, Root};
use super::host::{self, FileStat, errno};
use super::node::{Identity, NodeId, ROOT, Version};
use super::server::FileServer;
use super::table::Released;

/// Longest name in a directory in bytes (`NAME_MAX`, limits.h).
const NAME_MAX: usize = 255;

/// Checks that a name is one component of a path and no way out of its directory.
pub(super) fn check_name(name: &CStr) -> io::Result<()> {
    let bytes = name.to_bytes();
    if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(errno(libc::EINVAL));
    }
    if bytes.len() > NAME_MAX {
        return Err(errno(libc::ENAMETOOLONG));
    }
    Ok(())
}

/// An entry that says that a name does not exist, and for how long that may be believed.
fn negative(timeout: Duration) -> Entry {
    Entry {
        entry_timeout: timeout,
        ..Entry::default()
    }
}

/// Attributes of the synthetic root: an empty-looking, unchanging, read-only directory.
pub(super) fn root_attributes() -> stat64 {
    // SAFETY: stat64 is a plain C structure of integers, for which all zero bytes are valid.
    let mut attributes: stat64 = unsafe { std::mem::zeroed() };
    attributes.st_ino = ROOT;
    attributes.st_mode = libc::S_IFDIR | 0o555;
    attributes.st_nlink = 2;
    attributes.st_blksize = 4096;
    attributes
}

impl FileServer {
    /// FUSE_LOOKUP.
    pub(super) fn lookup_name(&self, parent: NodeId, name: &CStr) -> io::Result<Entry> {
        if parent == ROOT {
            return self.lookup_export(name);
        }
        check_name(name)?;
        let timeout = self.export_of(parent)?.timeout();
        match self.find(parent, name) {
            Ok((id, stat)) => self.entry(id, &stat, self.is_crossing(parent, &stat)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && !timeout.is_zero() => {
                Ok(negative(timeout))
            }
            Err(error) => Err(error),
        }
    }

    /// An entry of the synthetic root. A missing one is ENOENT, which the guest does not keep, so
    /// that a child sees exports that its template did not have.
    fn lookup_export(&self, name: &CStr) -> io::Result<Entry> {
        let index = self
            .exports
            .iter()
            .position(|export| export.name.as_bytes() == name.to_bytes())
            .ok_or_else(|| errno(libc::ENOENT))?;
        let export = &self.exports[index];
        let stat = host::stat(&export.file)?;
        let mut released = Released::default();
        let mut nodes = self.nodes();
        let known = nodes
            .child(ROOT, name)
            .filter(|id| nodes.get(*id).is_some_and(|node| node.kind == stat.kind()));
        let id = match known {
            Some(id) => id,
            None => {
                let id = nodes.insert(index, &stat)?;
                nodes.add_place(id, ROOT, name, &mut released)?;
                id
            }
        };
        if nodes.get(id).is_some_and(|node| node.file.is_none()) {
            nodes.bind(
                id,
                export.file.clone(),
                Identity::from(&stat),
                &mut released,
            )?;
        }
        nodes.reference(id);
        drop(nodes);
        drop(released);
        let mut entry = self.tell(id, &stat, stat.is_dir());
        entry.entry_timeout = ROOT_TIMEOUT;
        Ok(entry)
    }

    /// Whether a directory is the root of another mount than its parent, so that the guest must
    /// make it a file system of its own.
    pub(super) fn is_crossing(&self, parent: NodeId, stat: &FileStat) -> bool {
        if !stat.is_dir() {
            return false;
        }
        let nodes = self.nodes();
        nodes
            .get(parent)
            .and_then(|node| node.identity)
            .is_some_and(|identity| identity.key.mount != stat.key().mount)
    }

    /// Finds the node of a name, or makes it. The node is referenced once more.
    pub(super) fn find(&self, parent: NodeId, name: &CStr) -> io::Result<(NodeId, FileStat)> {
        let directory = self.file(parent)?;
        if let Some(found) = self.find_unchanged(&directory, parent, name)? {
            return Ok(found);
        }
        let file = host::open_child(&directory, name)?;
        self.adopt(parent, name, file)
    }

    /// The short way: the name is known, and what it names now is the file whose descriptor is
    /// held (so that its number cannot have been used again) and has no other name.
    fn find_unchanged(
        &self,
        directory: &OwnedFd,
        parent: NodeId,
        name: &CStr,
    ) -> io::Result<Option<(NodeId, FileStat)>> {
        if self.nodes().child(parent, name).is_none() {
            return Ok(None);
        }
        let stat = host::stat_child(directory, name)?;
        if stat.links() > 1 && !stat.is_dir() {
            return Ok(None);
        }
        let mut nodes = self.nodes();
        let Some(id) = nodes.child(parent, name) else {
            return Ok(None);
        };
        let Some(node) = nodes.get_mut(id) else {
            return Ok(None);
        };
        let same = node.file.is_some()
            && node.kind == stat.kind()
            && node
                .identity
                .is_some_and(|identity| identity.key == stat.key());
        if !same {
            return Ok(None);
        }
        node.used = true;
        nodes.reference(id);
        Ok(Some((id, stat)))
    }

    /// Finds the node of a file that was opened by name, or makes it. The node is referenced once
    /// more.
    pub(super) fn adopt(
        &self,
        parent: NodeId,
        name: &CStr,
        file: OwnedFd,
    ) -> io::Result<(NodeId, FileStat)> {
        let stat = host::stat(&file)?;
        let file = Arc::new(file);
        let known = match self.same_by_name(parent, name, &stat) {
            Some(id) => Some(id),
            None => self.same_by_identity(parent, &stat),
        };
        let mut released = Released::default();
        let id = self.place(known, parent, name, &file, &stat, &mut released);
        drop(released);
        id.map(|id| (id, stat))
    }

    /// Makes the node of a file that has no name, in the export of `parent`. It is referenced once.
    pub(super) fn adopt_unnamed(
        &self,
        parent: NodeId,
        file: OwnedFd,
    ) -> io::Result<(NodeId, FileStat)> {
        let stat = host::stat(&file)?;
        let mut released = Released::default();
        let id = {
            let mut nodes = self.nodes();
            let export = nodes
                .get(parent)
                .and_then(|node| node.export())
                .ok_or_else(|| errno(libc::ESTALE))?;
            let id = nodes.insert(export, &stat)?;
            nodes.reference(id);
            let bound = nodes.bind(id, Arc::new(file), Identity::from(&stat), &mut released);
            if bound.is_err() {
                nodes.forget(id, 1, &mut released);
            }
            bound.map(|()| id)
        };
        drop(released);
        id.map(|id| (id, stat))
    }

    /// The node that has this name, if it is this file.
    fn same_by_name(&self, parent: NodeId, name: &CStr, stat: &FileStat) -> Option<NodeId> {
        let id = self.nodes().child(parent, name)?;
        self.is_same(id, stat).then_some(id)
    }

    /// The node that is this file under another name, in the same export.
    fn same_by_identity(&self, parent: NodeId, stat: &FileStat) -> Option<NodeId> {
        let id = {
            let nodes = self.nodes();
            let id = nodes.by_key(&stat.key())?;
            if nodes.get(id)?.export() != nodes.get(parent)?.export() {
                return None;
            }
            id
        };
        self.is_same(id, stat).then_some(id)
    }

    /// Whether a node is the file with these attributes. Its descriptor, if one is held, tells
    /// what it is *now*: a copy-up in an overlay may have changed its number.
    fn is_same(&self, id: NodeId, stat: &FileStat) -> bool {
        let (file, identity, kind) = {
            let nodes = self.nodes();
            let Some(node) = nodes.get(id) else {
                return false;
            };
            (node.file.clone(), node.identity, node.kind)
        };
        if kind != stat.kind() {
            return false;
        }
        match (file, identity) {
            (Some(file), _) => {
                let Ok(now) = host::stat(&file) else {
                    return false;
                };
                self.nodes().identify(id, Identity::from(&now));
                now.key() == stat.key()
            }
            (None, Some(identity)) => identity == Identity::from(stat),
            // Restored and never seen in this child: what is at its path is it.
            (None, None) => true,
        }
    }

    /// Enters a file in the table.
    fn place(
        &self,
        known: Option<NodeId>,
        parent: NodeId,
        name: &CStr,
        file: &Arc<OwnedFd>,
        stat: &FileStat,
        released: &mut Released,
    ) -> io::Result<NodeId> {
        let mut nodes = self.nodes();
        let export = nodes
            .get(parent)
            .and_then(|node| node.export())
            .ok_or_else(|| errno(libc::ESTALE))?;
        let id = match known {
            Some(id) if nodes.get(id).is_some() => id,
            _ => nodes.insert(export, stat)?,
        };
        // Referenced first, so that nothing below takes it for unused.
        nodes.reference(id);
        let entered = nodes.add_place(id, parent, name, released).and_then(|()| {
            if nodes.get(id).is_some_and(|node| node.file.is_some()) {
                return Ok(());
            }
            nodes.bind(id, file.clone(), Identity::from(stat), released)
        });
        if let Err(error) = entered {
            nodes.forget(id, 1, released);
            return Err(error);
        }
        Ok(id)
    }

    /// The answer to a request that ends in a node. The node has been referenced for it.
    pub(super) fn entry(&self, id: NodeId, stat: &FileStat, submount: bool) -> io::Result<Entry> {
        Ok(self.tell(id, stat, submount))
    }

    /// What the guest is told of a node, and remembers.
    fn tell(&self, id: NodeId, stat: &FileStat, submount: bool) -> Entry {
        let timeout = self.remember(id, stat);
        let submount = submount && self.session().contains(FsOptions::SUBMOUNTS);
        Entry {
            inode: id,
            generation: 0,
            attr: stat.to_stat64(),
            attr_flags: if submount { ATTR_SUBMOUNT } else { 0 },
            attr_timeout: timeout,
            entry_timeout: timeout,
        }
    }

    /// Records the attributes of a node that are about to be told to the guest. Returns how long
    /// it may keep them.
    pub(super) fn remember(&self, id: NodeId, stat: &FileStat) -> Duration {
        let mut nodes = self.nodes();
        nodes.identify(id, Identity::from(stat));
        let Some(node) = nodes.get_mut(id) else {
            return Duration::ZERO;
        };
        node.tell(Version::from(stat));
        node.export()
            .and_then(|index| self.exports.get(index))
            .map_or(Duration::ZERO, Root::timeout)
    }

    /// Looks at a node's file again after it may have been copied up.
    pub(super) fn refresh(&self, id: NodeId) {
        let file = self.nodes().get(id).and_then(|node| node.file.clone());
        if let Some(stat) = file.and_then(|file| host::stat(&file).ok()) {
            self.nodes().identify(id, Identity::from(&stat));
        }
    }

    /// FUSE_FORGET and FUSE_BATCH_FORGET.
    pub(super) fn forget_nodes(&self, forgotten: impl IntoIterator<Item = (NodeId, u64)>) {
        let mut released = Released::default();
        let mut nodes = self.nodes();
        for (id, count) in forgotten {
            nodes.forget(id, count, &mut released);
        }
        drop(nodes);
        drop(released);
    }
}
