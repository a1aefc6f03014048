//! Open directories.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::sync::PoisonError;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use rustix::fs::{OFlags, RawDir, SeekFrom};

use super::handles::Handle;
use super::host::errno;
use super::node::{NodeId, ROOT};
use super::server::FileServer;

/// Most bytes of one getdents64(2), and fewest: an entry is at most 280 bytes long.
const BUFFER: usize = 8 * 1024;
const BUFFER_MIN: usize = 512;

/// The handle of the synthetic root, which has no file on the host.
const ROOT_HANDLE: u64 = 0;

impl FileServer {
    /// FUSE_OPENDIR.
    pub(super) fn open_directory(&self, id: NodeId) -> io::Result<u64> {
        if id == ROOT {
            return Ok(ROOT_HANDLE);
        }
        if self.kind(id)? != libc::S_IFDIR {
            return Err(errno(libc::ENOTDIR));
        }
        let file = self.reopen(id, OFlags::RDONLY | OFlags::DIRECTORY)?;
        self.add_handle(id, file)
    }

    /// FUSE_RELEASEDIR.
    pub(super) fn close_directory(&self, id: NodeId, handle: u64) -> io::Result<()> {
        if id == ROOT {
            return Ok(());
        }
        self.close_handle(id, handle)
    }

    /// FUSE_READDIR: `add` gives 0 when the reply is full.
    pub(super) fn read_directory(
        &self,
        id: NodeId,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        if id == ROOT {
            return self.read_root(offset, add);
        }
        let handle = self.handle(id, handle)?;
        // The host's shortest entry is 24 bytes long, FUSE's then 32: what is read fits.
        let room = size as usize / 4 * 3;
        self.for_each_entry(&handle, room, offset, &mut |entry, _name| add(entry))
    }

    /// FUSE_READDIRPLUS: the same, and each entry is looked up too.
    pub(super) fn read_directory_plus(
        &self,
        id: NodeId,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        if id == ROOT {
            // Without attributes: the entries are looked up one by one.
            return self.read_root(offset, &mut |entry| add(entry, Entry::default()));
        }
        let handle = self.handle(id, handle)?;
        // As above: 24 bytes become 160 with the attributes.
        let room = size as usize / 20 * 3;
        self.for_each_entry(&handle, room, offset, &mut |entry, name| {
            if name == c"." || name == c".." {
                return add(entry, Entry::default());
            }
            // Gone meanwhile, or beyond a bound: the guest looks it up if it needs it.
            let found = self.lookup_name(id, name).unwrap_or_default();
            let added = add(entry, found);
            if found.inode != 0 && !matches!(added, Ok(1..)) {
                self.forget_nodes([(found.inode, 1)]);
            }
            added
        })
    }

    /// Goes through an open directory from a position on: about `room` bytes of it, or until it
    /// ends, or until `add` gives 0.
    fn for_each_entry(
        &self,
        handle: &Handle,
        room: usize,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, &CStr) -> io::Result<usize>,
    ) -> io::Result<()> {
        let is_root = self.is_export_root(handle.node);
        let mut position = handle
            .position
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *position != offset {
            rustix::fs::seek(&handle.file, SeekFrom::Start(offset))?;
            *position = offset;
        }
        let mut buffer = [MaybeUninit::<u8>::uninit(); BUFFER];
        let room = room.clamp(BUFFER_MIN, BUFFER);
        let mut entries = RawDir::new(handle.file.as_fd(), &mut buffer[..room]);
        let mut own_inode = None;
        let mut full = false;
        // The position of the last entry that was taken.
        let mut taken = offset;
        let mut begun = false;
        // One read of the host's directory; the guest comes back for more.
        while !(begun && entries.is_buffer_empty()) {
            let Some(entry) = entries.next() else {
                break;
            };
            begun = true;
            let entry = entry?;
            let name = entry.file_name();
            let mut inode = entry.ino();
            if name == c"." {
                own_inode = Some(inode);
            } else if name == c".." && is_root {
                // What is above an export is none of the guest's business.
                inode = own_inode.unwrap_or(ROOT);
            }
            let next = entry.next_entry_cookie();
            let told = DirEntry {
                ino: inode,
                offset: next,
                type_: u32::from(kind_of(entry.file_type())),
                name: name.to_bytes(),
            };
            match add(told, name) {
                Ok(0) => {
                    full = true;
                    break;
                }
                Ok(_) => taken = next,
                Err(error) => {
                    // Where the host's position is now is not known.
                    *position = u64::MAX;
                    return Err(error);
                }
            }
        }
        // If the reply was full before the host's buffer was used up, the host is further on.
        *position = if full { u64::MAX } else { taken };
        Ok(())
    }

    fn is_export_root(&self, id: NodeId) -> bool {
        let nodes = self.nodes();
        nodes
            .get(id)
            .and_then(|node| node.place())
            .is_some_and(|place| place.parent == ROOT)
    }

    /// The entries of the synthetic root: its exports.
    fn read_root(
        &self,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let dots: [(&[u8], u64, u8); 2] = [(b".", ROOT, libc::DT_DIR), (b"..", ROOT, libc::DT_DIR)];
        let exports = self.exports.iter().map(|export| {
            let kind = if export.stat.is_dir() {
                libc::DT_DIR
            } else {
                libc::DT_REG
            };
            (export.name.as_bytes(), export.stat.key().inode, kind)
        });
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, (name, ino, kind)) in dots.into_iter().chain(exports).enumerate().skip(skip) {
            let entry = DirEntry {
                ino,
                offset: index as u64 + 1,
                type_: u32::from(kind),
                name,
            };
            if add(entry)? == 0 {
                break;
            }
        }
        Ok(())
    }
}

/// The type of a directory's entry (`DT_*`, readdir(3)).
fn kind_of(kind: rustix::fs::FileType) -> u8 {
    use rustix::fs::FileType;
    match kind {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Unknown => libc::DT_UNKNOWN,
    }
}
