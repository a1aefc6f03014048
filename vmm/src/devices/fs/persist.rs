//! Saving and restoring: how the guest's numbers of files get from a template into a fork.

use std::collections::BTreeMap;
use std::ffi::CString;

use fuse_backend_rs::abi::fuse_abi::FsOptions;
use serde::{Deserialize, Serialize};

use super::device::Fs;
use super::node::{Identity, Node, NodeId, ROOT};
use super::server::FileServer;
use super::table::Released;
use super::{Error, Export, Limits};
use crate::devices::virtio::Persist;

/// A node of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeState {
    /// Its number.
    pub id: u64,
    /// The name of its export.
    pub export: String,
    /// File type bits of its mode (`S_IFMT`).
    pub kind: u32,
    /// Where it is found: a directory's number and the name there, the latest first.
    pub places: Vec<(u64, CString)>,
    /// How often the guest was told of it, less what it has forgotten.
    pub lookups: u64,
}

/// What is saved of the file server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// The options agreed on in the session (bits of FUSE_INIT's flags). The guest sends no INIT
    /// after a fork.
    pub session: u64,
    /// Numbers below this have been given out.
    pub next: u64,
    /// The nodes, in the order of their numbers.
    pub nodes: Vec<NodeState>,
}

impl FileServer {
    /// How many files and directories the guest has open.
    pub(super) fn open_files(&self) -> usize {
        self.handles().len()
    }

    /// The path of one of them, for a message.
    pub(super) fn an_open_file(&self) -> String {
        let id = self.handles().any_node();
        id.map_or_else(String::new, |id| self.nodes().path(id))
    }

    /// The state; open files are not part of it.
    pub(super) fn save_state(&self) -> FsState {
        let nodes = self.nodes();
        let saved: BTreeMap<NodeId, NodeState> = nodes
            .iter()
            .filter_map(|(id, node)| {
                let export = self.exports.get(node.export()?)?;
                let places = node.places();
                let state = NodeState {
                    id,
                    export: export.name.clone(),
                    kind: node.kind,
                    places: places
                        .map(|place| (place.parent, (*place.name).to_owned()))
                        .collect(),
                    lookups: node.lookups,
                };
                Some((id, state))
            })
            .collect();
        FsState {
            session: self.session().bits(),
            next: nodes.next_id(),
            nodes: saved.into_values().collect(),
        }
    }

    /// A server with a saved table, on the exports of this child. Nodes are found again by path
    /// when the guest uses them; those of an export that is not there any more are stale.
    pub(super) fn restored(
        exports: Vec<Export>,
        limits: Limits,
        state: &FsState,
    ) -> Result<Self, Error> {
        let server = FileServer::new(exports, limits)?;
        server.set_session(FsOptions::from_bits_truncate(state.session));
        let mut nodes = server.nodes();
        nodes.raise_next(state.next);
        for saved in &state.nodes {
            let damaged = |what: &str| Error::State {
                what: format!("node {} {what}", saved.id),
            };
            if saved.id <= ROOT || saved.id >= state.next {
                return Err(damaged("has a number that was never given out"));
            }
            if nodes.get(saved.id).is_some() {
                return Err(damaged("is there twice"));
            }
            let export = server
                .exports
                .iter()
                .position(|export| export.name == saved.export);
            if let Some(index) = export {
                let mut node = Node::new(Some(index), saved.kind);
                node.lookups = saved.lookups;
                nodes.restore(saved.id, node);
            }
        }
        let mut released = Released::default();
        for saved in &state.nodes {
            for (parent, name) in saved.places.iter().rev() {
                // A node whose directory is not there is stale, as it would be without a name.
                let _ = nodes.add_place(saved.id, *parent, name, &mut released);
            }
        }
        for export in &server.exports {
            let Ok(name) = CString::new(export.name.as_str()) else {
                continue;
            };
            let Some(id) = nodes.child(ROOT, &name) else {
                continue;
            };
            let identity = Identity::from(&export.stat);
            if nodes
                .get(id)
                .is_some_and(|node| node.kind == export.stat.kind())
            {
                let bound = nodes.bind(id, export.file.clone(), identity, &mut released);
                bound.map_err(|_| Error::State {
                    what: "it has more exports than may be open".to_owned(),
                })?;
            } else {
                nodes.remove_place(ROOT, &name, &mut released);
            }
        }
        drop(nodes);
        drop(released);
        Ok(server)
    }
}

impl Persist for Fs {
    type State = FsState;
    type Args = Vec<Export>;
    type Error = Error;

    fn save(&self) -> FsState {
        self.answerer.files().save_state()
    }

    fn restore(exports: Vec<Export>, state: &FsState) -> Result<Self, Error> {
        let server = FileServer::restored(exports, Limits::for_this_process(), state)?;
        Ok(Fs::serving(server))
    }
}
