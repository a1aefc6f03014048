//! A guest's kernel as far as the file server sees it: it looks names up one by one, and asks by
//! number.

use std::ffi::{CStr, CString};
use std::io::{self, Read, Write};
use std::path::Path;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsOptions, SetattrValid, stat64};
use fuse_backend_rs::api::filesystem::{
    Context, Entry, FileSystem, GetxattrReply, ListxattrReply, OpenOptions, ZeroCopyReader,
    ZeroCopyWriter,
};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;

use super::place::open_path;
use crate::devices::fs::node::ROOT;
use crate::devices::fs::{Export, FileServer, Limits};

pub(super) const LIMITS: Limits = Limits {
    nodes: 10_000,
    open_nodes: 1000,
    handles: 100,
};

pub(super) fn export(name: &str, path: &Path) -> Export {
    Export {
        name: name.to_owned(),
        file: open_path(path),
        read_only: false,
        shared: false,
    }
}

pub(super) fn c(text: &str) -> CString {
    CString::new(text).unwrap()
}

/// The number of an error, for comparison.
pub(super) fn number<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

pub(super) struct Guest {
    pub(super) server: FileServer,
    pub(super) context: Context,
    pub(super) umask: u32,
}

/// An entry of a directory: its name, its type (`DT_*`), and where the next one is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) kind: u32,
    pub(super) ino: u64,
    pub(super) next: u64,
}

impl Guest {
    pub(super) fn new(exports: Vec<Export>) -> Self {
        Self::with_limits(exports, LIMITS)
    }

    pub(super) fn with_limits(exports: Vec<Export>, limits: Limits) -> Self {
        let server = FileServer::new(exports, limits).unwrap();
        server.init(FsOptions::all()).unwrap();
        Self::on(server)
    }

    pub(super) fn on(server: FileServer) -> Self {
        Guest {
            server,
            context: Context::default(),
            umask: 0o022,
        }
    }

    /// One export, "rootfs".
    pub(super) fn of(path: &Path) -> Self {
        Self::new(vec![export("rootfs", path)])
    }

    pub(super) fn look(&self, parent: u64, name: &str) -> io::Result<Entry> {
        let entry = self.server.lookup(&self.context, parent, &c(name))?;
        if entry.inode == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        Ok(entry)
    }

    /// Looks a path up from the root, component by component.
    pub(super) fn walk(&self, path: &str) -> io::Result<Entry> {
        let mut entry = Entry {
            inode: ROOT,
            ..Entry::default()
        };
        for name in path.split('/').filter(|name| !name.is_empty()) {
            entry = self.look(entry.inode, name)?;
        }
        Ok(entry)
    }

    pub(super) fn id(&self, path: &str) -> u64 {
        self.walk(path)
            .unwrap_or_else(|error| panic!("{path}: {error}"))
            .inode
    }

    pub(super) fn stat(&self, id: u64) -> stat64 {
        self.server.getattr(&self.context, id, None).unwrap().0
    }

    pub(super) fn mkdir(&self, parent: u64, name: &str, mode: u32) -> io::Result<Entry> {
        let context = &self.context;
        self.server
            .mkdir(context, parent, &c(name), mode, self.umask)
    }

    pub(super) fn mknod(&self, parent: u64, name: &str, mode: u32, rdev: u32) -> io::Result<Entry> {
        let context = &self.context;
        self.server
            .mknod(context, parent, &c(name), mode, rdev, self.umask)
    }

    pub(super) fn create(&self, parent: u64, name: &str, flags: i32) -> io::Result<(Entry, u64)> {
        self.create_mode(parent, name, flags, 0o644)
    }

    pub(super) fn create_mode(
        &self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> io::Result<(Entry, u64)> {
        let args = CreateIn {
            flags: flags as u32,
            mode,
            umask: self.umask,
            fuse_flags: 0,
        };
        let made = self.server.create(&self.context, parent, &c(name), args)?;
        Ok((made.0, made.1.unwrap()))
    }

    pub(super) fn open(&self, id: u64, flags: i32) -> io::Result<u64> {
        Ok(self.open_options(id, flags)?.0)
    }

    pub(super) fn open_options(&self, id: u64, flags: i32) -> io::Result<(u64, OpenOptions)> {
        let opened = self.server.open(&self.context, id, flags as u32, 0)?;
        Ok((opened.0.unwrap(), opened.1))
    }

    pub(super) fn close(&self, id: u64, handle: u64) {
        self.server
            .release(&self.context, id, 0, handle, false, false, None)
            .unwrap();
    }

    pub(super) fn read(
        &self,
        id: u64,
        handle: u64,
        offset: u64,
        size: usize,
    ) -> io::Result<Vec<u8>> {
        let mut memory = Memory::room(size);
        let context = &self.context;
        self.server.read(
            context,
            id,
            handle,
            &mut memory,
            size as u32,
            offset,
            None,
            0,
        )?;
        memory.bytes.truncate(memory.used);
        Ok(memory.bytes)
    }

    pub(super) fn write(
        &self,
        id: u64,
        handle: u64,
        offset: u64,
        data: &[u8],
    ) -> io::Result<usize> {
        self.write_flags(id, handle, offset, data, 0, false)
    }

    pub(super) fn write_flags(
        &self,
        id: u64,
        handle: u64,
        offset: u64,
        data: &[u8],
        flags: i32,
        write_back: bool,
    ) -> io::Result<usize> {
        let mut memory = Memory::with(data);
        let (context, size, flags) = (&self.context, data.len() as u32, flags as u32);
        self.server.write(
            context,
            id,
            handle,
            &mut memory,
            size,
            offset,
            None,
            write_back,
            flags,
            0,
        )
    }

    /// The whole of a file by its number.
    pub(super) fn contents(&self, id: u64) -> io::Result<String> {
        let handle = self.open(id, libc::O_RDONLY)?;
        let data = self.read(id, handle, 0, 1 << 16);
        self.close(id, handle);
        Ok(String::from_utf8(data?).unwrap())
    }

    pub(super) fn unlink(&self, parent: u64, name: &str) -> io::Result<()> {
        self.server.unlink(&self.context, parent, &c(name))
    }

    pub(super) fn rmdir(&self, parent: u64, name: &str) -> io::Result<()> {
        self.server.rmdir(&self.context, parent, &c(name))
    }

    pub(super) fn rename(&self, from: (u64, &str), to: (u64, &str), flags: u32) -> io::Result<()> {
        let context = &self.context;
        self.server
            .rename(context, from.0, &c(from.1), to.0, &c(to.1), flags)
    }

    pub(super) fn link(&self, id: u64, parent: u64, name: &str) -> io::Result<Entry> {
        self.server.link(&self.context, id, parent, &c(name))
    }

    pub(super) fn symlink(&self, target: &str, parent: u64, name: &str) -> io::Result<Entry> {
        let context = &self.context;
        self.server.symlink(context, &c(target), parent, &c(name))
    }

    pub(super) fn setattr(
        &self,
        id: u64,
        valid: SetattrValid,
        change: impl FnOnce(&mut stat64),
    ) -> io::Result<stat64> {
        let mut attributes = Entry::default().attr;
        change(&mut attributes);
        let context = &self.context;
        let told = self.server.setattr(context, id, attributes, None, valid)?;
        Ok(told.0)
    }

    pub(super) fn forget(&self, id: u64, count: u64) {
        self.server.forget(&self.context, id, count);
    }

    pub(super) fn get_xattr(&self, id: u64, name: &CStr) -> io::Result<Vec<u8>> {
        match self.server.getxattr(&self.context, id, name, 65536)? {
            GetxattrReply::Value(value) => Ok(value),
            GetxattrReply::Count(_) => panic!("a count where a value was asked for"),
        }
    }

    pub(super) fn set_xattr(&self, id: u64, name: &CStr, value: &[u8]) -> io::Result<()> {
        self.server.setxattr(&self.context, id, name, value, 0)
    }

    pub(super) fn list_xattrs(&self, id: u64) -> io::Result<Vec<String>> {
        match self.server.listxattr(&self.context, id, 65536)? {
            ListxattrReply::Names(names) => Ok(names
                .split(|byte| *byte == 0)
                .filter(|name| !name.is_empty())
                .map(|name| String::from_utf8(name.to_vec()).unwrap())
                .collect()),
            ListxattrReply::Count(_) => panic!("a count where names were asked for"),
        }
    }

    pub(super) fn opendir(&self, id: u64) -> io::Result<u64> {
        Ok(self.server.opendir(&self.context, id, 0)?.0.unwrap())
    }

    pub(super) fn closedir(&self, id: u64, handle: u64) {
        self.server
            .releasedir(&self.context, id, 0, handle)
            .unwrap();
    }

    /// One FUSE_READDIR with room for `room` entries.
    pub(super) fn readdir(
        &self,
        id: u64,
        handle: u64,
        offset: u64,
        room: usize,
    ) -> io::Result<Vec<Listed>> {
        let mut listed = Vec::new();
        self.server
            .readdir(&self.context, id, handle, 4096, offset, &mut |entry| {
                if listed.len() == room {
                    return Ok(0);
                }
                listed.push(Listed {
                    name: String::from_utf8(entry.name.to_vec()).unwrap(),
                    kind: entry.type_,
                    ino: entry.ino,
                    next: entry.offset,
                });
                Ok(1)
            })?;
        Ok(listed)
    }

    /// One FUSE_READDIRPLUS with room for `room` entries.
    pub(super) fn readdirplus(
        &self,
        id: u64,
        handle: u64,
        offset: u64,
        room: usize,
    ) -> io::Result<Vec<(Listed, Entry)>> {
        let mut listed = Vec::new();
        self.server.readdirplus(
            &self.context,
            id,
            handle,
            4096,
            offset,
            &mut |entry, found| {
                if listed.len() == room {
                    return Ok(0);
                }
                let name = String::from_utf8(entry.name.to_vec()).unwrap();
                let (kind, ino, next) = (entry.type_, entry.ino, entry.offset);
                listed.push((
                    Listed {
                        name,
                        kind,
                        ino,
                        next,
                    },
                    found,
                ));
                Ok(1)
            },
        )?;
        Ok(listed)
    }

    /// All names of a directory but the dots, sorted.
    pub(super) fn names(&self, id: u64) -> Vec<String> {
        let handle = self.opendir(id).unwrap();
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let listed = self.readdir(id, handle, offset, 100).unwrap();
            let Some(last) = listed.last() else { break };
            offset = last.next;
            names.extend(listed.into_iter().map(|entry| entry.name));
        }
        self.closedir(id, handle);
        names.retain(|name| name != "." && name != "..");
        names.sort();
        names
    }
}

/// Guest memory, as a request's data lies in it.
pub(super) struct Memory {
    pub(super) bytes: Vec<u8>,
    pub(super) used: usize,
}

impl Memory {
    pub(super) fn room(size: usize) -> Self {
        Memory {
            bytes: vec![0; size],
            used: 0,
        }
    }

    pub(super) fn with(data: &[u8]) -> Self {
        Memory {
            bytes: data.to_vec(),
            used: 0,
        }
    }

    fn slice(&mut self, count: usize) -> FileVolatileSlice<'_> {
        let end = self.bytes.len().min(self.used + count);
        // SAFETY: nothing else uses the bytes while they are borrowed.
        unsafe { FileVolatileSlice::from_mut_slice(&mut self.bytes[self.used..end]) }
    }
}

impl Read for Memory {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = buffer.len().min(self.bytes.len() - self.used);
        buffer[..count].copy_from_slice(&self.bytes[self.used..self.used + count]);
        self.used += count;
        Ok(count)
    }
}

impl Write for Memory {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let count = data.len().min(self.bytes.len() - self.used);
        self.bytes[self.used..self.used + count].copy_from_slice(&data[..count]);
        self.used += count;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ZeroCopyReader for Memory {
    fn read_to(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        let written = file.write_vectored_at_volatile(&[self.slice(count)], offset)?;
        self.used += written;
        Ok(written)
    }
}

impl ZeroCopyWriter for Memory {
    fn write_from(
        &mut self,
        file: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        let read = file.read_vectored_at_volatile(&[self.slice(count)], offset)?;
        self.used += read;
        Ok(read)
    }

    fn available_bytes(&self) -> usize {
        self.bytes.len() - self.used
    }
}
