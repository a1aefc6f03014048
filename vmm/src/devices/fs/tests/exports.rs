//! The synthetic root and its exports.

use std::fs;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{ATTR_SUBMOUNT, FsOptions, SetattrValid};
use fuse_backend_rs::api::filesystem::FileSystem;

use super::guest::{Guest, LIMITS, c, export, number};
use super::place::{Place, open_path};
use crate::devices::fs::node::ROOT;
use crate::devices::fs::{Error, Export, FileServer};

#[test]
fn the_root_has_the_exports_and_nothing_else() {
    let place = Place::new();
    let (tree, file) = (place.dir("tree"), place.file("hosts", "127.0.0.1"));
    let guest = Guest::new(vec![export("rootfs", &tree), export("vol-0", &file)]);
    assert_eq!(guest.names(ROOT), ["rootfs", "vol-0"]);
    assert_eq!(guest.stat(ROOT).st_mode, libc::S_IFDIR | 0o555);
    assert_eq!(number(guest.look(ROOT, "vol-1")), libc::ENOENT);
    let file = guest.look(ROOT, "vol-0").unwrap();
    assert_eq!(file.attr.st_mode & libc::S_IFMT, libc::S_IFREG);
    assert_eq!(guest.contents(file.inode).unwrap(), "127.0.0.1");
    let handle = guest.opendir(ROOT).unwrap();
    let first = guest.readdir(ROOT, handle, 0, 3).unwrap();
    let rest = guest.readdir(ROOT, handle, first[2].next, 10).unwrap();
    assert_eq!(rest.len(), 1, "goes on where it ended");
}

#[test]
fn the_root_cannot_be_changed() {
    let place = Place::new();
    let guest = Guest::of(&place.dir("tree"));
    let tree = guest.id("rootfs");
    guest.create(tree, "f", libc::O_RDWR).unwrap();
    let file = guest.id("rootfs/f");
    assert_eq!(number(guest.mkdir(ROOT, "x", 0o755)), libc::EROFS);
    assert_eq!(number(guest.create(ROOT, "x", libc::O_RDWR)), libc::EROFS);
    assert_eq!(number(guest.rmdir(ROOT, "rootfs")), libc::EROFS);
    assert_eq!(
        number(guest.rename((ROOT, "rootfs"), (ROOT, "x"), 0)),
        libc::EROFS
    );
    assert_eq!(
        number(guest.rename((tree, "f"), (ROOT, "f"), 0)),
        libc::EROFS
    );
    assert_eq!(number(guest.link(file, ROOT, "f")), libc::EROFS);
    let mode = guest.setattr(ROOT, SetattrValid::MODE, |stat| stat.st_mode = 0o777);
    assert_eq!(number(mode), libc::EROFS);
    assert_eq!(number(guest.set_xattr(ROOT, c"user.x", b"1")), libc::EROFS);
    assert_eq!(number(guest.open(ROOT, libc::O_RDONLY)), libc::EISDIR);
}

#[test]
fn a_single_file_is_written_in_place() {
    let place = Place::new();
    let path = place.file("hosts", "old");
    let guest = Guest::new(vec![export("vol-0", &path)]);
    let id = guest.id("vol-0");
    let handle = guest.open(id, libc::O_WRONLY | libc::O_TRUNC).unwrap();
    guest.write(id, handle, 0, b"127.0.0.1 localhost").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"127.0.0.1 localhost");
    assert_eq!(number(guest.look(id, "x")), libc::ENOTDIR);
    assert_eq!(number(guest.opendir(id)), libc::ENOTDIR);
}

#[test]
fn a_read_only_export_refuses_every_change() {
    let place = Place::new();
    let path = place.file("tree/f", "x");
    place.dir("tree/d");
    let read_only = Export {
        read_only: true,
        ..export("vol-0", &place.path("tree"))
    };
    let guest = Guest::new(vec![read_only]);
    let (tree, file) = (guest.id("vol-0"), guest.id("vol-0/f"));
    let refused = [
        number(guest.mkdir(tree, "x", 0o755)),
        number(guest.mknod(tree, "x", libc::S_IFIFO | 0o644, 0)),
        number(guest.symlink("t", tree, "x")),
        number(guest.create(tree, "x", libc::O_RDWR)),
        number(guest.create(tree, "f", libc::O_RDWR)),
        number(guest.link(file, tree, "x")),
        number(guest.unlink(tree, "f")),
        number(guest.rmdir(tree, "d")),
        number(guest.rename((tree, "f"), (tree, "g"), 0)),
        number(guest.open(file, libc::O_WRONLY)),
        number(guest.open(file, libc::O_RDWR)),
        number(guest.open(file, libc::O_RDONLY | libc::O_TRUNC)),
        number(guest.setattr(file, SetattrValid::MODE, |_| {})),
        number(guest.setattr(file, SetattrValid::UID, |_| {})),
        number(guest.setattr(file, SetattrValid::SIZE, |_| {})),
        number(guest.setattr(file, SetattrValid::MTIME, |_| {})),
        number(guest.set_xattr(file, c"user.x", b"1")),
        number(guest.server.removexattr(&guest.context, file, c"user.x")),
        number(guest.server.access(&guest.context, file, libc::W_OK as u32)),
    ];
    assert!(
        refused.iter().all(|error| *error == libc::EROFS),
        "{refused:?}"
    );
    assert_eq!(guest.contents(file).unwrap(), "x");
    assert_eq!(fs::read(&path).unwrap(), b"x");
}

#[test]
fn files_do_not_move_between_exports() {
    let place = Place::new();
    place.file("one/f", "x");
    place.dir("two");
    let guest = Guest::new(vec![
        export("rootfs", &place.path("one")),
        export("vol-0", &place.path("two")),
    ]);
    let (one, two) = (guest.id("rootfs"), guest.id("vol-0"));
    let file = guest.id("rootfs/f");
    assert_eq!(number(guest.rename((one, "f"), (two, "f"), 0)), libc::EXDEV);
    assert_eq!(number(guest.link(file, two, "f")), libc::EXDEV);
}

#[test]
fn one_tree_exported_twice_is_two_file_systems() {
    let place = Place::new();
    place.file("tree/f", "x");
    let guest = Guest::new(vec![
        export("vol-0", &place.path("tree")),
        export("vol-1", &place.path("tree")),
    ]);
    assert_ne!(guest.id("vol-0"), guest.id("vol-1"));
    assert_ne!(guest.id("vol-0/f"), guest.id("vol-1/f"));
}

#[test]
fn directories_of_other_mounts_are_submounts() {
    let place = Place::new();
    let file = place.file("hosts", "");
    place.dir("tree/plain");
    place.mount_tmpfs("tree/mounted");
    fs::create_dir(place.path("tree/mounted/inner")).unwrap();
    let exports = || {
        vec![
            export("rootfs", &place.path("tree")),
            export("vol-0", &file),
        ]
    };
    let guest = Guest::new(exports());
    let flags = |guest: &Guest, path: &str| guest.walk(path).unwrap().attr_flags;
    assert_eq!(flags(&guest, "rootfs"), ATTR_SUBMOUNT);
    assert_eq!(flags(&guest, "vol-0"), 0, "a file is none");
    assert_eq!(flags(&guest, "rootfs/plain"), 0);
    assert_eq!(flags(&guest, "rootfs/mounted"), ATTR_SUBMOUNT);
    assert_eq!(flags(&guest, "rootfs/mounted"), ATTR_SUBMOUNT, "and again");
    assert_eq!(flags(&guest, "rootfs/mounted/inner"), 0);
    let tree = guest.id("rootfs");
    let handle = guest.opendir(tree).unwrap();
    let listed = guest.readdirplus(tree, handle, 0, 10).unwrap();
    let mounted = listed
        .iter()
        .find(|(entry, _)| entry.name == "mounted")
        .unwrap();
    assert_eq!(
        mounted.1.attr_flags, ATTR_SUBMOUNT,
        "as readdirplus tells it"
    );
    // A guest that does not know them is not told.
    let server = FileServer::new(exports(), LIMITS).unwrap();
    server
        .init(FsOptions::all() - FsOptions::SUBMOUNTS)
        .unwrap();
    assert_eq!(flags(&Guest::on(server), "rootfs"), 0);
}

#[test]
fn how_long_the_guest_may_keep_what_it_is_told() {
    let place = Place::new();
    place.file("tree/f", "");
    let shared = Export {
        shared: true,
        ..export("vol-0", &place.path("tree"))
    };
    let guest = Guest::new(vec![export("rootfs", &place.path("tree")), shared]);
    let second = Duration::from_secs(1);
    let own = guest.walk("rootfs/f").unwrap();
    assert_eq!((own.entry_timeout, own.attr_timeout), (second, second));
    let others = guest.walk("vol-0/f").unwrap();
    assert_eq!(
        (others.entry_timeout, others.attr_timeout),
        (Duration::ZERO, Duration::ZERO)
    );
    let names = ["rootfs", "vol-0"].map(|name| guest.walk(name).unwrap());
    assert_eq!(
        names.map(|entry| (entry.entry_timeout, entry.attr_timeout)),
        [(second, second), (second, Duration::ZERO)],
        "an export stays where it is, its attributes are its own"
    );
    let server = &guest.server;
    let (_, root) = server.getattr(&guest.context, ROOT, None).unwrap();
    assert_eq!(root, second);
    let unknown = server.lookup(&guest.context, ROOT, &c("vol-1"));
    assert_eq!(
        number(unknown),
        libc::ENOENT,
        "not kept: a child's exports are others"
    );
    let missing = server
        .lookup(&guest.context, guest.id("rootfs"), &c("none"))
        .unwrap();
    assert_eq!(
        (missing.inode, missing.entry_timeout),
        (0, second),
        "that it is missing"
    );
    let missing = server.lookup(&guest.context, guest.id("vol-0"), &c("none"));
    assert_eq!(number(missing), libc::ENOENT, "not kept");
}

#[test]
fn exports_are_checked() {
    let place = Place::new();
    let tree = place.dir("tree");
    for name in ["", ".", "..", "a/b", "a\0b", &"n".repeat(256)] {
        let refused = FileServer::new(vec![export(name, &tree)], LIMITS);
        assert!(matches!(refused, Err(Error::ExportName { .. })), "{name:?}");
    }
    let twice = vec![export("a", &tree), export("a", &tree)];
    assert!(matches!(
        FileServer::new(twice, LIMITS),
        Err(Error::ExportTwice { .. })
    ));
    let fifo = place.path("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o644);
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, kind, mode, 0).unwrap();
    let refused = FileServer::new(vec![export("a", &fifo)], LIMITS);
    assert!(matches!(refused, Err(Error::ExportKind { .. })));
}

#[test]
fn an_export_survives_its_path() {
    let place = Place::new();
    place.file("tree/f", "x");
    let file = open_path(&place.path("tree"));
    fs::rename(place.path("tree"), place.path("moved")).unwrap();
    let guest = Guest::new(vec![Export {
        name: "rootfs".to_owned(),
        file,
        read_only: false,
        shared: false,
    }]);
    assert_eq!(guest.contents(guest.id("rootfs/f")).unwrap(), "x");
}
