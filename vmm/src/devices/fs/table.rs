//! The node table: every file that the guest knows by number, kept by path. It makes no system
//! call; what it hands out to be closed is dropped by the caller, outside the table's lock.
//!
//! Rules that hold at every moment: a node's places and its parents' children mirror each other;
//! a node lives as long as the guest remembers it, has it open, or knows a node below it.

use std::collections::{HashMap, VecDeque};
use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::host::{FileKey, FileStat, errno};
use super::limits::Limits;
use super::node::{Identity, Node, NodeId, Place, ROOT, Version};

/// Descriptors taken out of the table; closed when dropped.
#[must_use = "descriptors are to be closed outside the lock"]
#[derive(Debug, Default)]
pub(super) struct Released(Vec<Arc<OwnedFd>>);

impl Released {
    fn add(&mut self, file: Option<Arc<OwnedFd>>) {
        self.0.extend(file);
    }
}

/// A step of a path that has to be opened again.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) id: NodeId,
    pub(super) name: Arc<CStr>,
    pub(super) kind: u32,
    pub(super) identity: Option<Identity>,
}

/// How a node is reached.
#[derive(Debug)]
pub(super) enum Reach {
    /// Its descriptor is held.
    Open(Arc<OwnedFd>),
    /// These names lead to it, the first below the descriptor.
    Below(Arc<OwnedFd>, Vec<Step>),
}

/// The table.
#[derive(Debug)]
pub(super) struct NodeTable {
    nodes: HashMap<NodeId, Node>,
    /// Files by identity, for hard links.
    index: HashMap<FileKey, NodeId>,
    next: NodeId,
    /// Nodes that hold a descriptor.
    open: usize,
    /// Nodes that hold a descriptor, in the order in which the clock visits them: files, and
    /// directories, which go last (things are mounted on them, and paths start from them).
    clock: [VecDeque<NodeId>; 2],
    limits: Limits,
}

impl NodeTable {
    pub(super) fn new(limits: Limits) -> Self {
        let mut root = Node::new(None, libc::S_IFDIR);
        root.lookups = 1;
        NodeTable {
            nodes: HashMap::from([(ROOT, root)]),
            index: HashMap::new(),
            next: ROOT + 1,
            open: 0,
            clock: Default::default(),
            limits,
        }
    }

    pub(super) fn get(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: NodeId) -> Option<&mut Node> {
        self.nodes.get_mut(&id)
    }

    pub(super) fn child(&self, parent: NodeId, name: &CStr) -> Option<NodeId> {
        self.nodes.get(&parent)?.child(name)
    }

    pub(super) fn by_key(&self, key: &FileKey) -> Option<NodeId> {
        self.index.get(key).copied()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.nodes.iter().map(|(id, node)| (*id, node))
    }

    pub(super) fn next_id(&self) -> NodeId {
        self.next
    }

    /// Makes the node of a file that the guest does not know yet, without a place or a descriptor.
    pub(super) fn insert(&mut self, export: usize, stat: &FileStat) -> io::Result<NodeId> {
        if self.nodes.len() >= self.limits.nodes {
            return Err(errno(libc::ENFILE));
        }
        let id = self.next;
        self.next += 1;
        let mut node = Node::new(Some(export), stat.kind());
        node.held = Some(Version::from(stat));
        self.nodes.insert(id, node);
        Ok(id)
    }

    /// Puts back a node of a saved table under its own number.
    pub(super) fn restore(&mut self, id: NodeId, node: Node) {
        self.next = self.next.max(id + 1);
        self.nodes.insert(id, node);
    }

    /// Numbers below this have been given out before the freeze.
    pub(super) fn raise_next(&mut self, next: NodeId) {
        self.next = self.next.max(next);
    }

    /// Records that a node is found at a place, which no other node has from now on.
    pub(super) fn add_place(
        &mut self,
        id: NodeId,
        parent: NodeId,
        name: &CStr,
        released: &mut Released,
    ) -> io::Result<()> {
        if !self.nodes.contains_key(&id) || !self.nodes.contains_key(&parent) {
            return Err(errno(libc::ESTALE));
        }
        if self.child(parent, name).is_some_and(|known| known != id) {
            self.remove_place(parent, name, released);
        }
        let place = Place {
            parent,
            name: Arc::from(name),
        };
        if let Some(directory) = self.nodes.get_mut(&parent) {
            directory.add_child(place.name.clone(), id);
        }
        let dropped = match self.nodes.get_mut(&id) {
            Some(node) => node.add_place(place),
            None => None,
        };
        if let Some(place) = dropped {
            self.unlink_child(&place, released);
        }
        Ok(())
    }

    /// Records that a name is gone from a directory. Returns the node it named.
    pub(super) fn remove_place(
        &mut self,
        parent: NodeId,
        name: &CStr,
        released: &mut Released,
    ) -> Option<NodeId> {
        let directory = self.nodes.get_mut(&parent)?;
        let (name, id) = directory.remove_child(name)?;
        let place = Place { parent, name };
        if let Some(node) = self.nodes.get_mut(&id) {
            node.remove_place(&place);
        }
        self.collect(id, released);
        self.collect(parent, released);
        Some(id)
    }

    /// Moves what is known of one name to another (rename(2)).
    pub(super) fn rename(
        &mut self,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        released: &mut Released,
    ) -> io::Result<()> {
        let Some(id) = self.child(from.0, from.1) else {
            // The guest never looked the file up; whatever had the new name is gone.
            self.remove_place(to.0, to.1, released);
            return Ok(());
        };
        self.add_place(id, to.0, to.1, released)?;
        if from != to {
            self.remove_place(from.0, from.1, released);
        }
        Ok(())
    }

    /// Exchanges what is known of two names (`RENAME_EXCHANGE`).
    pub(super) fn exchange(
        &mut self,
        one: (NodeId, &CStr),
        two: (NodeId, &CStr),
        released: &mut Released,
    ) -> io::Result<()> {
        let first = self.detach(one);
        let second = self.detach(two);
        if let Some(id) = first {
            self.add_place(id, two.0, two.1, released)?;
        }
        if let Some(id) = second {
            self.add_place(id, one.0, one.1, released)?;
        }
        Ok(())
    }

    /// Takes a name away without giving up what becomes unused by it.
    fn detach(&mut self, (parent, name): (NodeId, &CStr)) -> Option<NodeId> {
        let directory = self.nodes.get_mut(&parent)?;
        let (name, id) = directory.remove_child(name)?;
        let place = Place { parent, name };
        if let Some(node) = self.nodes.get_mut(&id) {
            node.remove_place(&place);
        }
        Some(id)
    }

    /// The guest was told of a node once more.
    pub(super) fn reference(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups = node.lookups.saturating_add(1);
        }
    }

    /// The guest forgets a node as often as it says. The root stays.
    pub(super) fn forget(&mut self, id: NodeId, count: u64, released: &mut Released) {
        if id == ROOT {
            return;
        }
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups = node.lookups.saturating_sub(count);
        }
        self.collect(id, released);
    }

    /// One handle of a node is closed.
    pub(super) fn drop_handle(&mut self, id: NodeId, released: &mut Released) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.handles = node.handles.saturating_sub(1);
        }
        self.collect(id, released);
    }

    /// Removes a node if nothing knows it, and then its parents for which the same holds.
    fn collect(&mut self, id: NodeId, released: &mut Released) {
        let mut candidates = vec![id];
        while let Some(id) = candidates.pop() {
            if id == ROOT || !self.nodes.get(&id).is_some_and(Node::is_garbage) {
                continue;
            }
            let Some(mut node) = self.nodes.remove(&id) else {
                continue;
            };
            if let Some(identity) = node.identity
                && self.index.get(&identity.key) == Some(&id)
            {
                self.index.remove(&identity.key);
            }
            if node.file.is_some() {
                self.open -= 1;
            }
            released.add(node.file.take());
            for place in node.places() {
                if let Some(directory) = self.nodes.get_mut(&place.parent) {
                    directory.remove_child(&place.name);
                    candidates.push(place.parent);
                }
            }
        }
        self.trim_clock();
    }

    fn unlink_child(&mut self, place: &Place, released: &mut Released) {
        if let Some(directory) = self.nodes.get_mut(&place.parent) {
            directory.remove_child(&place.name);
        }
        self.collect(place.parent, released);
    }

    /// Gives a node its descriptor and what is now known of its file.
    pub(super) fn bind(
        &mut self,
        id: NodeId,
        file: Arc<OwnedFd>,
        identity: Identity,
        released: &mut Released,
    ) -> io::Result<()> {
        if self.nodes.get(&id).is_some_and(|node| node.file.is_none()) {
            self.make_room(released)?;
        }
        self.identify(id, identity);
        let Some(node) = self.nodes.get_mut(&id) else {
            return Err(errno(libc::ESTALE));
        };
        node.used = true;
        let old = node.file.replace(file);
        if old.is_none() {
            self.open += 1;
            self.clock[usize::from(node.is_dir())].push_back(id);
        }
        released.add(old);
        Ok(())
    }

    /// Records what a node's file is now; its number may change with a copy-up.
    pub(super) fn identify(&mut self, id: NodeId, identity: Identity) {
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        if let Some(old) = node.identity.replace(identity)
            && old.key != identity.key
            && self.index.get(&old.key) == Some(&id)
        {
            self.index.remove(&old.key);
        }
        self.index.insert(identity.key, id);
    }

    /// How a node is reached. The error is `ESTALE` for a number that means nothing (any more).
    pub(super) fn reach(&mut self, id: NodeId) -> io::Result<Reach> {
        let mut steps = Vec::new();
        let mut at = id;
        loop {
            let node = self.nodes.get_mut(&at).ok_or_else(|| errno(libc::ESTALE))?;
            if let Some(file) = &node.file {
                node.used = true;
                let file = file.clone();
                if steps.is_empty() {
                    return Ok(Reach::Open(file));
                }
                steps.reverse();
                return Ok(Reach::Below(file, steps));
            }
            let place = node.place().ok_or_else(|| errno(libc::ESTALE))?;
            // Changes that the host made to the tree can bend the known paths into a circle.
            if steps.len() >= libc::PATH_MAX as usize {
                return Err(errno(libc::ESTALE));
            }
            steps.push(Step {
                id: at,
                name: place.name.clone(),
                kind: node.kind,
                identity: node.identity,
            });
            at = place.parent;
        }
    }

    /// Closes descriptors until there is room for one more.
    fn make_room(&mut self, released: &mut Released) -> io::Result<()> {
        while self.open >= self.limits.open_nodes {
            if !self.evict(0, released) && !self.evict(1, released) {
                return Err(errno(libc::ENFILE));
            }
        }
        Ok(())
    }

    /// Closes the descriptor of one node that was not used since the clock last passed it.
    fn evict(&mut self, clock: usize, released: &mut Released) -> bool {
        for _ in 0..2 * self.clock[clock].len() {
            let Some(id) = self.clock[clock].pop_front() else {
                return false;
            };
            let Some(node) = self.nodes.get_mut(&id) else {
                continue;
            };
            if node.file.is_none() {
                continue;
            }
            if std::mem::take(&mut node.used) || !node.is_evictable() {
                self.clock[clock].push_back(id);
                continue;
            }
            released.add(node.file.take());
            self.open -= 1;
            return true;
        }
        false
    }

    /// Drops what the clock holds of nodes that are gone, when it is mostly that.
    fn trim_clock(&mut self) {
        let held = self.clock[0].len() + self.clock[1].len();
        if held > 2 * self.open + 64 {
            for clock in &mut self.clock {
                clock.retain(|id| self.nodes.get(id).is_some_and(|node| node.file.is_some()));
            }
        }
    }

    /// The path of a node from the root, for messages.
    pub(super) fn path(&self, id: NodeId) -> String {
        let mut names = Vec::new();
        let mut at = id;
        while at != ROOT && names.len() < 64 {
            let Some(place) = self.nodes.get(&at).and_then(|node| node.place()) else {
                names.push("(unlinked)".to_owned());
                break;
            };
            names.push(place.name.to_string_lossy().into_owned());
            at = place.parent;
        }
        names.reverse();
        format!("/{}", names.join("/"))
    }

    /// Number of nodes, the root included, and how many of them hold a descriptor.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.nodes.len(), self.open)
    }
}
