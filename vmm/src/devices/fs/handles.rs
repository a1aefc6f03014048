//! Open files and directories of the guest.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use super::host::errno;
use super::limits::Limits;
use super::node::NodeId;

/// An open file or directory.
#[derive(Debug)]
pub(super) struct Handle {
    /// The node that was opened.
    pub(super) node: NodeId,
    /// The host's open file.
    pub(super) file: File,
    /// For a directory: the position (the host's cookie) at which the next read starts by itself.
    pub(super) position: Mutex<u64>,
}

/// The handles, by the numbers that the guest knows them by.
#[derive(Debug)]
pub(super) struct HandleTable {
    handles: HashMap<u64, Arc<Handle>>,
    next: u64,
    limits: Limits,
}

impl HandleTable {
    pub(super) fn new(limits: Limits) -> Self {
        HandleTable {
            handles: HashMap::new(),
            next: 1,
            limits,
        }
    }

    /// Adds a handle. `ENFILE` at the bound.
    pub(super) fn insert(&mut self, node: NodeId, file: File) -> io::Result<u64> {
        if self.is_full() {
            return Err(errno(libc::ENFILE));
        }
        let number = self.next;
        self.next += 1;
        let handle = Handle {
            node,
            file,
            position: Mutex::new(0),
        };
        self.handles.insert(number, Arc::new(handle));
        Ok(number)
    }

    pub(super) fn is_full(&self) -> bool {
        self.handles.len() >= self.limits.handles
    }

    pub(super) fn get(&self, number: u64) -> Option<Arc<Handle>> {
        self.handles.get(&number).cloned()
    }

    /// Takes a handle out, if it belongs to the node.
    pub(super) fn remove(&mut self, node: NodeId, number: u64) -> Option<Arc<Handle>> {
        if self.handles.get(&number)?.node != node {
            return None;
        }
        self.handles.remove(&number)
    }

    pub(super) fn len(&self) -> usize {
        self.handles.len()
    }

    /// Some open node, for a message.
    pub(super) fn any_node(&self) -> Option<NodeId> {
        self.handles.values().next().map(|handle| handle.node)
    }
}
