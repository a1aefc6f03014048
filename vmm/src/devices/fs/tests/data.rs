//! Contents of files.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;

use fuse_backend_rs::api::filesystem::{Context, FileSystem, OpenOptions};

use super::guest::{Guest, export, number};
use super::place::Place;
use crate::devices::fs::Export;

#[test]
fn what_is_written_is_read_on_both_sides() {
    let place = Place::new();
    place.dir("root");
    let guest = Guest::of(&place.path("root"));
    let (made, handle) = guest.create(guest.id("rootfs"), "f", libc::O_RDWR).unwrap();
    let id = made.inode;
    assert_eq!(guest.write(id, handle, 0, b"hello world").unwrap(), 11);
    assert_eq!(guest.write(id, handle, 6, b"there").unwrap(), 5);
    assert_eq!(guest.read(id, handle, 0, 100).unwrap(), b"hello there");
    assert_eq!(
        guest.read(id, handle, 100, 100).unwrap(),
        b"",
        "behind the end"
    );
    assert_eq!(
        fs::read(place.path("root/f")).unwrap(),
        b"hello there",
        "at once"
    );
    assert_eq!(guest.stat(id).st_size, 11);
    guest.server.flush(&guest.context, id, handle, 0).unwrap();
    guest
        .server
        .fsync(&guest.context, id, false, handle)
        .unwrap();
    guest
        .server
        .fsync(&guest.context, id, true, handle)
        .unwrap();
    guest.close(id, handle);
    assert_eq!(number(guest.read(id, handle, 0, 1)), libc::EBADF, "closed");
}

#[test]
fn appending_goes_to_the_end_and_pages_written_back_do_not() {
    let place = Place::new();
    let path = place.file("root/log", "one\n");
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/log");
    let flags = libc::O_RDWR | libc::O_APPEND;
    let handle = guest.open(id, flags).unwrap();
    // The host appends meanwhile, so the guest's idea of the end is old.
    fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .unwrap()
        .write_all(b"two\n")
        .unwrap();
    guest
        .write_flags(id, handle, 4, b"three\n", flags, false)
        .unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\nthree\n");
    guest
        .write_flags(id, handle, 0, b"ONE", flags, true)
        .unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "ONE\ntwo\nthree\n");
    // O_APPEND cleared by fcntl(2), which the server does not see.
    guest
        .write_flags(id, handle, 4, b"TWO", libc::O_RDWR, false)
        .unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "ONE\nTWO\nthree\n");
}

#[test]
fn creating_has_its_flags() {
    let place = Place::new();
    let path = place.file("root/f", "old");
    let guest = Guest::of(&place.path("root"));
    let root = guest.id("rootfs");
    let exclusive = guest.create(root, "f", libc::O_RDWR | libc::O_EXCL);
    assert_eq!(number(exclusive), libc::EEXIST);
    let (found, handle) = guest.create(root, "f", libc::O_RDWR).unwrap();
    assert_eq!(guest.read(found.inode, handle, 0, 10).unwrap(), b"old");
    let (found, _) = guest
        .create(root, "f", libc::O_RDWR | libc::O_TRUNC)
        .unwrap();
    assert_eq!(found.attr.st_size, 0, "told as it is after it was cut");
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    assert_eq!(found.inode, guest.id("rootfs/f"));
}

#[test]
fn nothing_but_files_and_directories_is_opened() {
    let place = Place::new();
    place.dir("root/dir");
    let guest = Guest::of(&place.path("root"));
    let root = guest.id("rootfs");
    guest.mknod(root, "fifo", libc::S_IFIFO | 0o644, 0).unwrap();
    guest
        .mknod(root, "null", libc::S_IFCHR | 0o644, 0x103)
        .unwrap();
    guest.symlink("fifo", root, "link").unwrap();
    for (name, error) in [
        ("fifo", libc::ENXIO),
        ("null", libc::ENXIO),
        ("link", libc::ELOOP),
        ("dir", libc::EISDIR),
    ] {
        let id = guest.id(&format!("rootfs/{name}"));
        assert_eq!(number(guest.open(id, libc::O_RDONLY)), error, "{name}");
        assert_eq!(
            number(guest.create(root, name, libc::O_RDWR)),
            error,
            "{name}"
        );
    }
    let fifo = guest.id("rootfs/fifo");
    let lookups = || guest.server.nodes().get(fifo).unwrap().lookups;
    let before = lookups();
    let _ = guest.create(root, "fifo", libc::O_RDWR);
    let after = lookups();
    assert_eq!(after, before, "a refused create leaves no reference");
}

#[test]
fn a_handle_is_only_good_for_its_file() {
    let place = Place::new();
    place.file("root/a", "a");
    place.file("root/b", "b");
    let guest = Guest::of(&place.path("root"));
    let (a, b) = (guest.id("rootfs/a"), guest.id("rootfs/b"));
    let handle = guest.open(a, libc::O_RDWR).unwrap();
    assert_eq!(number(guest.read(b, handle, 0, 1)), libc::EBADF);
    assert_eq!(number(guest.write(b, handle, 0, b"x")), libc::EBADF);
    assert_eq!(number(guest.read(a, handle + 1, 0, 1)), libc::EBADF);
    let stat = guest
        .server
        .getattr(&guest.context, b, Some(handle))
        .unwrap()
        .0;
    assert_eq!(
        stat.st_ino,
        guest.stat(b).st_ino,
        "of the file, not the handle"
    );
    let wrong = guest
        .server
        .release(&guest.context, b, 0, handle, false, false, None);
    assert_eq!(number(wrong), libc::EBADF);
    assert_eq!(number(guest.readdir(a, handle, 0, 1)), libc::ENOTDIR);
}

#[test]
fn holes_are_made_and_found() {
    let place = Place::new();
    let path = place.file("root/f", "");
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .write_at(&[1; 4096], 1 << 20)
        .unwrap();
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/f");
    let handle = guest.open(id, libc::O_RDWR).unwrap();
    let context = Context::default();
    let seek = |offset, whence| {
        guest
            .server
            .lseek(&context, id, handle, offset, whence as u32)
    };
    assert_eq!(seek(0, libc::SEEK_DATA).unwrap(), 1 << 20);
    assert_eq!(seek(1 << 20, libc::SEEK_HOLE).unwrap(), (1 << 20) + 4096);
    assert_eq!(number(seek(1 << 30, libc::SEEK_DATA)), libc::ENXIO);
    assert_eq!(number(seek(0, libc::SEEK_SET)), libc::EINVAL);
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
    guest
        .server
        .fallocate(&context, id, handle, punch, 1 << 20, 4096)
        .unwrap();
    assert_eq!(number(seek(0, libc::SEEK_DATA)), libc::ENXIO);
    guest
        .server
        .fallocate(&context, id, handle, 0, 0, 2 << 20)
        .unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 2 << 20);
}

#[test]
fn ranges_are_copied() {
    let place = Place::new();
    place.file("root/a", "0123456789");
    let target = place.file("root/b", "");
    let guest = Guest::of(&place.path("root"));
    let (a, b) = (guest.id("rootfs/a"), guest.id("rootfs/b"));
    let from = guest.open(a, libc::O_RDONLY).unwrap();
    let to = guest.open(b, libc::O_RDWR).unwrap();
    let copied = guest
        .server
        .copy_range((a, from, 2), (b, to, 0), u64::MAX, 0)
        .unwrap();
    assert_eq!(copied, 8);
    assert_eq!(fs::read(&target).unwrap(), b"23456789");
    let wrong = guest.server.copy_range((a, to, 0), (b, to, 0), 1, 0);
    assert_eq!(number(wrong), libc::EBADF);
}

#[test]
fn a_file_without_a_name() {
    let place = Place::new();
    place.dir("root");
    let guest = Guest::of(&place.path("root"));
    let root = guest.id("rootfs");
    let args = fuse_backend_rs::abi::fuse_abi::CreateIn {
        flags: (libc::O_RDWR | libc::O_TMPFILE) as u32,
        mode: 0o600,
        umask: 0,
        fuse_flags: 0,
    };
    let (entry, handle, _) = guest
        .server
        .create_unnamed(&guest.context, root, args)
        .unwrap();
    guest.write(entry.inode, handle, 0, b"x").unwrap();
    assert!(guest.names(root).is_empty());
    let linked = guest.link(entry.inode, root, "named").unwrap();
    assert_eq!(linked.inode, entry.inode);
    assert_eq!(fs::read(place.path("root/named")).unwrap(), b"x");
}

#[test]
fn pages_are_kept_only_if_they_are_of_this_version() {
    let place = Place::new();
    let path = place.file("root/f", "one");
    let shared = Export {
        shared: true,
        ..export("vol-0", &place.path("root"))
    };
    let guest = Guest::new(vec![export("rootfs", &place.path("root")), shared]);
    let id = guest.id("rootfs/f");
    let keeps = |id| {
        let (handle, options) = guest.open_options(id, libc::O_RDONLY).unwrap();
        guest.close(id, handle);
        options.contains(OpenOptions::KEEP_CACHE)
    };
    assert!(keeps(id), "the version that the guest was told");
    fs::write(&path, "two, another length").unwrap();
    assert!(!keeps(id), "changed by the host since");
    guest.stat(id);
    assert!(keeps(id), "told again");
    let handle = guest.open(id, libc::O_WRONLY).unwrap();
    guest
        .write(id, handle, 0, b"written by the guest, longer again")
        .unwrap();
    guest.close(id, handle);
    assert!(!keeps(id), "changed by itself, but its pages may be older");
    assert!(
        keeps(id),
        "those read since the last open are of this version"
    );
    let time = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, "WRITTEN by the guest, longer again").unwrap();
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(time)
        .unwrap();
    guest.stat(id);
    assert!(
        !keeps(id),
        "other contents of the same size and time, as docker cp -a puts there"
    );
    let volume = guest.id("vol-0/f");
    assert!(
        !keeps(volume) && !keeps(volume),
        "never where others write too"
    );
}

#[test]
fn offsets_beyond_a_file_are_errors_not_panics() {
    let place = Place::new();
    place.file("root/f", "x");
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/f");
    let handle = guest.open(id, libc::O_RDWR).unwrap();
    for offset in [u64::MAX, 1 << 63] {
        assert_eq!(number(guest.read(id, handle, offset, 1)), libc::EINVAL);
        assert_eq!(number(guest.write(id, handle, offset, b"x")), libc::EINVAL);
        let seek = guest
            .server
            .lseek(&guest.context, id, handle, offset, libc::SEEK_DATA as u32);
        seek.unwrap_err();
    }
}
