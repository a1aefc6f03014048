//! The FUSE library's trait for a file system, handed on to the parts of the server.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FsOptions, OpenOptions, SetattrValid, stat64, statvfs64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
    ZeroCopyWriter,
};
use rustix::fs::AtFlags;

use super::server::FileServer;

type Opened = (Option<u64>, OpenOptions, Option<u32>);

impl FileSystem for FileServer {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        Ok(self.begin(capable))
    }

    fn destroy(&self) {
        self.end();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.lookup_name(parent, name)
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.forget_nodes([(inode, count)]);
    }

    fn batch_forget(&self, _: &Context, requests: Vec<(u64, u64)>) {
        self.forget_nodes(requests);
    }

    fn getattr(
        &self,
        _: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        self.get_attributes(inode, handle)
    }

    fn setattr(
        &self,
        _: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.set_attributes(inode, &attr, handle, valid)
    }

    fn readlink(&self, _: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.read_symlink(inode)
    }

    fn symlink(
        &self,
        context: &Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.make_symlink(context, linkname, parent, name)
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make_node(context, parent, name, mode, rdev, umask)
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.make_directory(context, parent, name, mode, umask)
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, AtFlags::empty())
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, AtFlags::REMOVEDIR)
    }

    fn rename(
        &self,
        _: &Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.rename_entry((olddir, oldname), (newdir, newname), flags)
    }

    fn link(&self, _: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.make_link(inode, parent, name)
    }

    fn open(&self, _: &Context, inode: u64, flags: u32, fuse_flags: u32) -> io::Result<Opened> {
        let (handle, options) = self.open_file(inode, flags, fuse_flags)?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let (entry, handle, options) = self.create_file(context, parent, name, args)?;
        Ok((entry, Some(handle), options, None))
    }

    fn read(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        self.read_file(inode, handle, writer, size, offset)
    }

    fn write(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.write_file(
            inode,
            handle,
            reader,
            size,
            offset,
            delayed_write,
            flags,
            fuse_flags,
        )
    }

    fn flush(&self, _: &Context, inode: u64, handle: u64, _lock_owner: u64) -> io::Result<()> {
        self.flush_file(inode, handle)
    }

    fn fsync(&self, _: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.sync_handle(inode, handle, datasync)
    }

    fn fallocate(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.allocate(inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        _: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.close_handle(inode, handle)
    }

    fn statfs(&self, _: &Context, inode: u64) -> io::Result<statvfs64> {
        self.stat_filesystem(inode)
    }

    fn setxattr(
        &self,
        _: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.set_xattr(inode, name, value, flags)
    }

    fn getxattr(
        &self,
        _: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.get_xattr(inode, name, size)
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.list_xattrs(inode, size)
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.remove_xattr(inode, name)
    }

    fn opendir(
        &self,
        _: &Context,
        inode: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        Ok((Some(self.open_directory(inode)?), OpenOptions::empty()))
    }

    fn readdir(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.read_directory(inode, handle, size, offset, add_entry)
    }

    fn readdirplus(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.read_directory_plus(inode, handle, size, offset, add_entry)
    }

    fn fsyncdir(&self, _: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        if inode == super::node::ROOT {
            return Ok(());
        }
        self.sync_handle(inode, handle, datasync)
    }

    fn releasedir(&self, _: &Context, inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.close_directory(inode, handle)
    }

    fn access(&self, _: &Context, inode: u64, mask: u32) -> io::Result<()> {
        self.check_access(inode, mask)
    }

    fn lseek(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.seek(inode, handle, offset, whence)
    }
}
