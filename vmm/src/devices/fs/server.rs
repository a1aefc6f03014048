//! The file server: answers the guest's FUSE requests from the exports.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fs, io};

use fuse_backend_rs::abi::fuse_abi::FsOptions;
use rustix::fs::OFlags;

use super::Error;
use super::export::{Export, Root};
use super::handles::{Handle, HandleTable};
use super::host::{self, Descriptors, errno};
use super::limits::Limits;
use super::node::{Identity, NodeId};
use super::table::{NodeTable, Reach, Released};

/// What the server wants of a FUSE session; it has what the guest's kernel offers of it.
///
/// Not asked for: locks of either kind (they stay the guest's own), a write-back cache (the host
/// sees every write at once), exporting over NFS.
const WANTED: FsOptions = FsOptions::from_bits_truncate(
    FsOptions::ASYNC_READ.bits()
        | FsOptions::ATOMIC_O_TRUNC.bits()
        | FsOptions::BIG_WRITES.bits()
        | FsOptions::DONT_MASK.bits()
        | FsOptions::AUTO_INVAL_DATA.bits()
        | FsOptions::DO_READDIRPLUS.bits()
        | FsOptions::READDIRPLUS_AUTO.bits()
        | FsOptions::ASYNC_DIO.bits()
        | FsOptions::PARALLEL_DIROPS.bits()
        | FsOptions::POSIX_ACL.bits()
        | FsOptions::MAX_PAGES.bits()
        | FsOptions::CACHE_SYMLINKS.bits()
        | FsOptions::SUBMOUNTS.bits()
        | FsOptions::HANDLE_KILLPRIV_V2.bits()
        | FsOptions::INIT_EXT.bits(),
);

/// The file server of one virtual machine.
#[derive(Debug)]
pub struct FileServer {
    pub(super) exports: Vec<Root>,
    pub(super) descriptors: Descriptors,
    pub(super) limits: Limits,
    nodes: Mutex<NodeTable>,
    handles: Mutex<HandleTable>,
    /// The session's options ([`FsOptions`]); zero before the guest's INIT.
    session: AtomicU64,
}

/// A poisoned lock means that a thread panicked with it; the tables are left consistent by each of
/// their methods, so what is in it is still right.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FileServer {
    /// A server of these exports. Opens `/proc/self/fd`, so `/proc` must be there.
    ///
    /// A thread that serves requests gets a working directory and a file creation mask of its own
    /// when it first needs them, or by [`prepare_thread`](Self::prepare_thread), so it should do
    /// nothing else.
    pub fn new(exports: Vec<Export>, limits: Limits) -> Result<Self, Error> {
        if !exports.is_empty() {
            super::credentials::check_capabilities()?;
        }
        let descriptors = Descriptors::open().map_err(Error::OpenProc)?;
        let mut roots: Vec<Root> = Vec::with_capacity(exports.len());
        for export in exports {
            let root = Root::new(export)?;
            if roots.iter().any(|known| known.name == root.name) {
                return Err(Error::ExportTwice { name: root.name });
            }
            roots.push(root);
        }
        Ok(FileServer {
            exports: roots,
            descriptors,
            limits,
            nodes: Mutex::new(NodeTable::new(limits)),
            handles: Mutex::new(HandleTable::new(limits)),
            session: AtomicU64::new(0),
        })
    }

    /// Makes the calling thread fit to serve requests, once.
    pub(super) fn prepare_thread(&self) -> io::Result<()> {
        super::credentials::prepare_thread(&self.descriptors)
    }

    pub(super) fn nodes(&self) -> MutexGuard<'_, NodeTable> {
        lock(&self.nodes)
    }

    pub(super) fn handles(&self) -> MutexGuard<'_, HandleTable> {
        lock(&self.handles)
    }

    pub(super) fn session(&self) -> FsOptions {
        FsOptions::from_bits_truncate(self.session.load(Ordering::Relaxed))
    }

    pub(super) fn set_session(&self, options: FsOptions) {
        self.session.store(options.bits(), Ordering::Relaxed);
    }

    /// Begins a session with a guest that offers `capable`: what an earlier one left is dropped.
    pub(super) fn begin(&self, capable: FsOptions) -> FsOptions {
        self.end();
        let options = capable & WANTED;
        self.set_session(options);
        options
    }

    /// Ends the session: every node and handle is gone.
    pub(super) fn end(&self) {
        let handles = std::mem::replace(&mut *self.handles(), HandleTable::new(self.limits));
        let nodes = std::mem::replace(&mut *self.nodes(), NodeTable::new(self.limits));
        self.set_session(FsOptions::empty());
        drop((handles, nodes));
    }

    /// A node's descriptor; opens it by path if none is held.
    ///
    /// # Errors
    /// `ESTALE` for an unknown number, the root, or a file that is no longer where it was.
    pub(super) fn file(&self, id: NodeId) -> io::Result<Arc<OwnedFd>> {
        let reach = self.nodes().reach(id)?;
        let (mut file, steps) = match reach {
            Reach::Open(file) => return Ok(file),
            Reach::Below(file, steps) => (file, steps),
        };
        for step in steps {
            let opened = host::open_child(&file, &step.name).map_err(|error| {
                match error.raw_os_error() {
                    Some(libc::ENOENT | libc::ENOTDIR) => errno(libc::ESTALE),
                    _ => error,
                }
            })?;
            let stat = host::stat(&opened)?;
            let found = Identity::from(&stat);
            let same = match step.identity {
                Some(known) => known == found,
                // Restored: whatever is at its path in this child, if it is of the same kind.
                None => true,
            };
            if !same || stat.kind() != step.kind {
                return Err(errno(libc::ESTALE));
            }
            file = Arc::new(opened);
            let mut released = Released::default();
            let bound = self
                .nodes()
                .bind(step.id, file.clone(), found, &mut released);
            drop(released);
            bound?;
        }
        Ok(file)
    }

    /// The export that a node belongs to.
    ///
    /// # Errors
    /// `ESTALE` for an unknown number; `EROFS` for the root, which has nothing that could be
    /// changed or opened.
    pub(super) fn export_of(&self, id: NodeId) -> io::Result<&Root> {
        let nodes = self.nodes();
        let node = nodes.get(id).ok_or_else(|| errno(libc::ESTALE))?;
        let index = node.export().ok_or_else(|| errno(libc::EROFS))?;
        self.exports.get(index).ok_or_else(|| errno(libc::ESTALE))
    }

    /// A node's descriptor, if its export may be changed; otherwise `EROFS`.
    pub(super) fn writable(&self, id: NodeId) -> io::Result<Arc<OwnedFd>> {
        if self.export_of(id)?.read_only {
            return Err(errno(libc::EROFS));
        }
        self.file(id)
    }

    /// A node's file type bits.
    pub(super) fn kind(&self, id: NodeId) -> io::Result<u32> {
        let nodes = self.nodes();
        let node = nodes.get(id).ok_or_else(|| errno(libc::ESTALE))?;
        Ok(node.kind)
    }

    /// Opens a node's file for reading or writing. Only regular files and directories.
    pub(super) fn reopen(&self, id: NodeId, flags: OFlags) -> io::Result<fs::File> {
        match self.kind(id)? {
            libc::S_IFREG => {}
            libc::S_IFDIR if flags.contains(OFlags::DIRECTORY) => {}
            libc::S_IFDIR => return Err(errno(libc::EISDIR)),
            libc::S_IFLNK => return Err(errno(libc::ELOOP)),
            _ => return Err(errno(libc::ENXIO)),
        }
        let file = self.file(id)?;
        self.descriptors.reopen(&file, flags)
    }

    /// The handle of a number, if it belongs to the node.
    pub(super) fn handle(&self, id: NodeId, handle: u64) -> io::Result<Arc<Handle>> {
        let handle = self
            .handles()
            .get(handle)
            .ok_or_else(|| errno(libc::EBADF))?;
        if handle.node != id {
            return Err(errno(libc::EBADF));
        }
        Ok(handle)
    }

    /// Clears set-user-ID, and set-group-ID of a program, of a file that is about to change: the
    /// guest asks for it where its caller lacks `CAP_FSETID`, which this thread has.
    pub(super) fn clear_privileges(&self, file: impl AsFd) -> io::Result<()> {
        let stat = host::stat(&file)?;
        let mode = stat.mode();
        let mut clear = mode & libc::S_ISUID;
        if mode & libc::S_IXGRP != 0 {
            clear |= mode & libc::S_ISGID;
        }
        if clear == 0 || stat.is_dir() {
            return Ok(());
        }
        self.descriptors.chmod(file, mode & !clear)
    }
}
