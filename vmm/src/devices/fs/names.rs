//! What makes, removes and moves names.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID, OpenOptions};
use fuse_backend_rs::api::filesystem::{Context, Entry};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};

use super::credentials::as_caller;
use super::data::open_flags;
use super::host::{self, errno, split_rdev};
use super::lookup::check_name;
use super::node::NodeId;
use super::server::FileServer;
use super::table::Released;

/// A new file: what the guest is told, its handle, and how it may cache.
pub(super) type Created = (Entry, u64, OpenOptions);

impl FileServer {
    /// The node of a name that was just made.
    fn made(&self, parent: NodeId, directory: &OwnedFd, name: &CStr) -> io::Result<Entry> {
        let file = host::open_child(directory, name)?;
        let (id, stat) = self.adopt(parent, name, file)?;
        self.entry(id, &stat, self.is_crossing(parent, &stat))
    }

    /// The directory in which a name is to be made or removed.
    fn directory(&self, parent: NodeId, name: &CStr) -> io::Result<std::sync::Arc<OwnedFd>> {
        let directory = self.writable(parent)?;
        check_name(name)?;
        Ok(directory)
    }

    /// FUSE_MKDIR.
    pub(super) fn make_directory(
        &self,
        context: &Context,
        parent: NodeId,
        name: &CStr,
        mode: u32,
        mask: u32,
    ) -> io::Result<Entry> {
        let directory = self.directory(parent, name)?;
        as_caller(&self.descriptors, context, mask, || {
            let mode = Mode::from_raw_mode(mode & 0o7777);
            Ok(rustix::fs::mkdirat(&directory, name, mode)?)
        })?;
        self.made(parent, &directory, name)
    }

    /// FUSE_MKNOD: regular and special files. Special files are only made here, never opened.
    pub(super) fn make_node(
        &self,
        context: &Context,
        parent: NodeId,
        name: &CStr,
        mode: u32,
        rdev: u32,
        mask: u32,
    ) -> io::Result<Entry> {
        let kind = match mode & libc::S_IFMT {
            libc::S_IFREG => FileType::RegularFile,
            libc::S_IFIFO => FileType::Fifo,
            libc::S_IFSOCK => FileType::Socket,
            libc::S_IFCHR => FileType::CharacterDevice,
            libc::S_IFBLK => FileType::BlockDevice,
            _ => return Err(errno(libc::EINVAL)),
        };
        let directory = self.directory(parent, name)?;
        let (major, minor) = split_rdev(rdev);
        let device = rustix::fs::makedev(major, minor);
        as_caller(&self.descriptors, context, mask, || {
            let mode = Mode::from_raw_mode(mode & 0o7777);
            Ok(rustix::fs::mknodat(&directory, name, kind, mode, device)?)
        })?;
        self.made(parent, &directory, name)
    }

    /// FUSE_SYMLINK.
    pub(super) fn make_symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: NodeId,
        name: &CStr,
    ) -> io::Result<Entry> {
        let directory = self.directory(parent, name)?;
        as_caller(&self.descriptors, context, 0, || {
            Ok(rustix::fs::symlinkat(target, &directory, name)?)
        })?;
        self.made(parent, &directory, name)
    }

    /// FUSE_READLINK. The text is the guest's to follow.
    pub(super) fn read_symlink(&self, id: NodeId) -> io::Result<Vec<u8>> {
        if self.kind(id)? != libc::S_IFLNK {
            return Err(errno(libc::EINVAL));
        }
        let file = self.file(id)?;
        let target = rustix::fs::readlinkat(&file, c"", Vec::new())?;
        Ok(target.into_bytes())
    }

    /// FUSE_LINK.
    pub(super) fn make_link(&self, id: NodeId, parent: NodeId, name: &CStr) -> io::Result<Entry> {
        let file = self.writable(id)?;
        let directory = self.directory(parent, name)?;
        self.same_export(id, parent)?;
        self.descriptors.link(&file, &directory, name)?;
        self.refresh(id);
        self.made(parent, &directory, name)
    }

    /// FUSE_CREATE: makes a regular file if there is none, and opens it.
    pub(super) fn create_file(
        &self,
        context: &Context,
        parent: NodeId,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<Created> {
        let directory = self.directory(parent, name)?;
        if self.handles().is_full() {
            return Err(errno(libc::ENFILE));
        }
        let flags = open_flags(args.flags);
        let mode = Mode::from_raw_mode(args.mode & 0o7777);
        // O_EXCL: only a file that is made here is opened here, so nothing that a name may stand
        // for by now (a FIFO, a link) is.
        let create = (flags - OFlags::TRUNC)
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::CLOEXEC;
        let made = as_caller(&self.descriptors, context, args.umask, || {
            Ok(rustix::fs::openat(&directory, name, create, mode)?)
        });
        match made {
            Ok(file) => {
                let file = File::from(file);
                let path = self.descriptors.path_only(&file)?;
                let (id, stat) = self.adopt(parent, name, path)?;
                let entry = self.entry(id, &stat, false)?;
                self.opened(entry, file, flags)
            }
            Err(error)
                if error.raw_os_error() == Some(libc::EEXIST)
                    && args.flags & libc::O_EXCL as u32 == 0 =>
            {
                let (id, stat) = self.find(parent, name)?;
                let entry = self.entry(id, &stat, false)?;
                let kill = if args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0 {
                    FOPEN_IN_KILL_SUIDGID
                } else {
                    0
                };
                match self.open_file(id, args.flags, kill) {
                    Ok((handle, options)) => {
                        let stat = self.stat_node(id, Some(handle))?;
                        Ok((self.entry(id, &stat, false)?, handle, options))
                    }
                    Err(error) => {
                        self.forget_nodes([(entry.inode, 1)]);
                        Err(error)
                    }
                }
            }
            Err(error) => Err(error),
        }
    }

    /// FUSE_TMPFILE: a file without a name.
    pub(super) fn create_unnamed(
        &self,
        context: &Context,
        parent: NodeId,
        args: CreateIn,
    ) -> io::Result<Created> {
        let directory = self.writable(parent)?;
        if self.handles().is_full() {
            return Err(errno(libc::ENFILE));
        }
        let flags = open_flags(args.flags) - OFlags::TRUNC;
        let exclusive = OFlags::from_bits_retain(args.flags) & OFlags::EXCL;
        let mode = Mode::from_raw_mode(args.mode & 0o7777);
        let file = as_caller(&self.descriptors, context, args.umask, || {
            let create = flags | exclusive | OFlags::TMPFILE | OFlags::CLOEXEC;
            Ok(rustix::fs::openat(&directory, c".", create, mode)?)
        })?;
        let file = File::from(file);
        let path = self.descriptors.path_only(&file)?;
        let (id, stat) = self.adopt_unnamed(parent, path)?;
        let entry = self.entry(id, &stat, false)?;
        self.opened(entry, file, flags)
    }

    /// Gives a file that was made its handle; gives back the reference if that fails.
    fn opened(&self, entry: Entry, file: File, flags: OFlags) -> io::Result<Created> {
        let options = self.open_options(entry.inode, &file, flags);
        match self.add_handle(entry.inode, file) {
            Ok(handle) => Ok((entry, handle, options)),
            Err(error) => {
                self.forget_nodes([(entry.inode, 1)]);
                Err(error)
            }
        }
    }

    /// FUSE_UNLINK and FUSE_RMDIR.
    pub(super) fn remove(&self, parent: NodeId, name: &CStr, flags: AtFlags) -> io::Result<()> {
        let directory = self.directory(parent, name)?;
        self.hold(parent, name);
        rustix::fs::unlinkat(&directory, name, flags)?;
        let mut released = Released::default();
        self.nodes().remove_place(parent, name, &mut released);
        drop(released);
        Ok(())
    }

    /// FUSE_RENAME and FUSE_RENAME2.
    pub(super) fn rename_entry(
        &self,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        flags: u32,
    ) -> io::Result<()> {
        let old_directory = self.directory(from.0, from.1)?;
        let new_directory = self.directory(to.0, to.1)?;
        self.same_export(from.0, to.0)?;
        let flags = RenameFlags::from_bits_retain(flags);
        self.hold(from.0, from.1);
        self.hold(to.0, to.1);
        rustix::fs::renameat_with(&old_directory, from.1, &new_directory, to.1, flags)?;
        let mut released = Released::default();
        let moved = {
            let mut nodes = self.nodes();
            if flags.contains(RenameFlags::EXCHANGE) {
                nodes.exchange(from, to, &mut released)?;
            } else {
                nodes.rename(from, to, &mut released)?;
            }
            [nodes.child(to.0, to.1), nodes.child(from.0, from.1)]
        };
        drop(released);
        // Moving copies up in an overlay.
        for id in moved.into_iter().flatten() {
            self.refresh(id);
        }
        Ok(())
    }

    /// Opens the node of a name, if it is one, before the name goes: the guest may still have the
    /// file open, or be in the directory.
    fn hold(&self, parent: NodeId, name: &CStr) {
        let id = self.nodes().child(parent, name);
        if let Some(id) = id {
            // Without a descriptor it could not be reached either way.
            let _ = self.file(id);
        }
    }

    fn same_export(&self, one: NodeId, two: NodeId) -> io::Result<()> {
        let nodes = self.nodes();
        let export = |id| nodes.get(id).and_then(|node| node.export());
        if export(one) != export(two) {
            return Err(errno(libc::EXDEV));
        }
        Ok(())
    }
}
