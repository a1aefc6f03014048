//! Nodes: a number is one file for life.

use std::fs;
use std::os::unix::fs::symlink;

use super::guest::{Guest, LIMITS, export, number};
use super::place::Place;
use crate::devices::fs::Limits;

#[test]
fn a_file_keeps_its_number() {
    let place = Place::new();
    place.file("root/a", "one");
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/a");
    assert_eq!(guest.id("rootfs/a"), id);
    fs::write(place.path("root/a"), "two, longer").unwrap();
    assert_eq!(guest.id("rootfs/a"), id, "changed by the host");
    let root = guest.id("rootfs");
    guest.rename((root, "a"), (root, "b"), 0).unwrap();
    assert_eq!(guest.id("rootfs/b"), id, "renamed by the guest");
    assert_eq!(number(guest.walk("rootfs/a")), libc::ENOENT);
    assert_eq!(guest.contents(id).unwrap(), "two, longer");
}

#[test]
fn another_file_under_the_name_gets_another_number() {
    let place = Place::new();
    place.file("root/a", "one");
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/a");
    place.file("root/new", "two");
    fs::rename(place.path("root/new"), place.path("root/a")).unwrap();
    let other = guest.id("rootfs/a");
    assert_ne!(other, id);
    assert_eq!(guest.contents(other).unwrap(), "two");
    assert_eq!(guest.contents(id).unwrap(), "one", "the old file lives on");
}

#[test]
fn a_name_that_changes_its_kind_gets_another_number() {
    let place = Place::new();
    place.file("root/a", "");
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/a");
    fs::remove_file(place.path("root/a")).unwrap();
    fs::create_dir(place.path("root/a")).unwrap();
    let directory = guest.walk("rootfs/a").unwrap();
    assert_ne!(directory.inode, id);
    assert_eq!(directory.attr.st_mode & libc::S_IFMT, libc::S_IFDIR);
    fs::remove_dir(place.path("root/a")).unwrap();
    symlink("/etc", place.path("root/a")).unwrap();
    let link = guest.walk("rootfs/a").unwrap();
    assert_ne!(link.inode, directory.inode);
    assert_eq!(link.attr.st_mode & libc::S_IFMT, libc::S_IFLNK);
}

#[test]
fn hard_links_share_a_number() {
    let place = Place::new();
    place.file("root/a", "x");
    place.dir("root/d");
    fs::hard_link(place.path("root/a"), place.path("root/d/b")).unwrap();
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/a");
    assert_eq!(guest.id("rootfs/d/b"), id);
    let made = guest.link(id, guest.id("rootfs/d"), "c").unwrap();
    assert_eq!((made.inode, made.attr.st_nlink), (id, 3));
    guest.unlink(guest.id("rootfs"), "a").unwrap();
    assert_eq!(guest.id("rootfs/d/c"), id);
    assert_eq!(guest.stat(id).st_nlink, 2);
}

#[test]
fn an_unlinked_file_lives_on_while_it_is_known() {
    let place = Place::new();
    place.file("root/a", "still here");
    let guest = Guest::of(&place.path("root"));
    let root = guest.id("rootfs");
    let id = guest.id("rootfs/a");
    guest.unlink(root, "a").unwrap();
    assert!(!place.path("root/a").exists());
    assert_eq!(guest.contents(id).unwrap(), "still here");
    assert_eq!(guest.stat(id).st_nlink, 0);
    guest.create(root, "a", libc::O_RDWR).unwrap();
    assert_ne!(
        guest.id("rootfs/a"),
        id,
        "a new file of that name is another"
    );
    assert_eq!(guest.contents(id).unwrap(), "still here");
}

#[test]
fn an_unlinked_file_lives_on_though_its_descriptor_was_closed() {
    let place = Place::new();
    place.file("root/a", "still here");
    for index in 0..40 {
        place.file(&format!("root/other-{index}"), "");
    }
    let limits = Limits {
        open_nodes: 8,
        ..LIMITS
    };
    let guest = Guest::with_limits(vec![export("rootfs", &place.path("root"))], limits);
    let id = guest.id("rootfs/a");
    for index in 0..40 {
        guest.id(&format!("rootfs/other-{index}"));
    }
    assert!(
        guest.server.nodes().get(id).unwrap().file.is_none(),
        "closed by now"
    );
    guest.unlink(guest.id("rootfs"), "a").unwrap();
    assert_eq!(guest.contents(id).unwrap(), "still here");
}

#[test]
fn a_rename_replaces_a_file_that_is_still_open() {
    let place = Place::new();
    place.file("root/old", "old");
    place.file("root/new", "new");
    let guest = Guest::of(&place.path("root"));
    let root = guest.id("rootfs");
    let (old, new) = (guest.id("rootfs/old"), guest.id("rootfs/new"));
    let handle = guest.open(old, libc::O_RDONLY).unwrap();
    guest.rename((root, "new"), (root, "old"), 0).unwrap();
    assert_eq!(guest.id("rootfs/old"), new);
    assert_eq!(guest.read(old, handle, 0, 10).unwrap(), b"old");
    assert_eq!(guest.contents(new).unwrap(), "new");
    assert_eq!(guest.names(root), ["old"]);
}

#[test]
fn rename_has_its_flags() {
    let place = Place::new();
    place.file("root/a", "a");
    place.file("root/d/b", "b");
    let guest = Guest::of(&place.path("root"));
    let (root, directory) = (guest.id("rootfs"), guest.id("rootfs/d"));
    let (a, b) = (guest.id("rootfs/a"), guest.id("rootfs/d/b"));
    let refused = guest.rename((root, "a"), (directory, "b"), libc::RENAME_NOREPLACE);
    assert_eq!(number(refused), libc::EEXIST);
    guest
        .rename((root, "a"), (directory, "b"), libc::RENAME_EXCHANGE)
        .unwrap();
    assert_eq!((guest.id("rootfs/a"), guest.id("rootfs/d/b")), (b, a));
    assert_eq!(guest.contents(a).unwrap(), "a");
}

#[test]
fn nodes_below_a_renamed_directory_are_found() {
    let place = Place::new();
    place.file("root/d/e/f", "deep");
    let limits = Limits {
        open_nodes: 8,
        ..LIMITS
    };
    let guest = Guest::with_limits(vec![export("rootfs", &place.path("root"))], limits);
    let root = guest.id("rootfs");
    let id = guest.id("rootfs/d/e/f");
    guest.rename((root, "d"), (root, "moved"), 0).unwrap();
    for index in 0..40 {
        place.file(&format!("root/other-{index}"), "");
        guest.id(&format!("rootfs/other-{index}"));
    }
    assert_eq!(
        guest.contents(id).unwrap(),
        "deep",
        "opened again by its new path"
    );
    assert_eq!(guest.id("rootfs/moved/e/f"), id);
}

#[test]
fn forgotten_nodes_are_dropped_and_numbers_not_used_again() {
    let place = Place::new();
    place.file("root/d/f", "x");
    let guest = Guest::of(&place.path("root"));
    let before = guest.server.nodes().counts();
    let (root, directory) = (guest.id("rootfs"), guest.id("rootfs/d"));
    let file = guest.id("rootfs/d/f");
    // As often as it was looked up: "rootfs" three times, "d" twice, "f" once.
    guest.forget(directory, 2);
    guest.forget(root, 3);
    assert_eq!(
        guest.server.nodes().counts().0,
        before.0 + 3,
        "kept for the file below"
    );
    guest.forget(file, 1);
    assert_eq!(guest.server.nodes().counts(), before);
    assert_eq!(number(guest.server.file(file)), libc::ESTALE);
    assert!(guest.id("rootfs/d/f") > file);
}

#[test]
fn a_file_replaced_while_its_descriptor_was_closed_is_stale() {
    let place = Place::new();
    place.file("root/a", "one");
    let limits = Limits {
        open_nodes: 8,
        ..LIMITS
    };
    let guest = Guest::with_limits(vec![export("rootfs", &place.path("root"))], limits);
    let id = guest.id("rootfs/a");
    for index in 0..40 {
        place.file(&format!("root/other-{index}"), "");
        guest.id(&format!("rootfs/other-{index}"));
    }
    place.file("root/new", "two");
    fs::rename(place.path("root/new"), place.path("root/a")).unwrap();
    assert_eq!(number(guest.open(id, libc::O_RDONLY)), libc::ESTALE);
    let other = guest.id("rootfs/a");
    assert_ne!(
        other, id,
        "the guest looks it up again and gets the new file"
    );
    assert_eq!(guest.contents(other).unwrap(), "two");
}

#[test]
fn paths_that_the_host_bends_into_a_circle_end() {
    let place = Place::new();
    place.file("root/a/b/f", "");
    let limits = Limits {
        open_nodes: 8,
        ..LIMITS
    };
    let guest = Guest::with_limits(vec![export("rootfs", &place.path("root"))], limits);
    let (a, b) = (guest.id("rootfs/a"), guest.id("rootfs/a/b"));
    fs::rename(place.path("root/a/b"), place.path("root/b")).unwrap();
    fs::rename(place.path("root/a"), place.path("root/b/a")).unwrap();
    assert_eq!(guest.look(b, "a").unwrap().inode, a);
    {
        let mut nodes = guest.server.nodes();
        for id in [a, b] {
            nodes.get_mut(id).unwrap().file = None;
        }
    }
    assert_eq!(number(guest.server.file(a)), libc::ESTALE);
}

#[test]
fn a_number_that_was_never_given_is_stale() {
    let place = Place::new();
    let guest = Guest::of(&place.path(""));
    for id in [0, 2, 77, u64::MAX] {
        assert_eq!(number(guest.server.file(id)), libc::ESTALE, "{id}");
        assert_eq!(number(guest.open(id, libc::O_RDONLY)), libc::ESTALE, "{id}");
        assert_eq!(number(guest.mkdir(id, "x", 0o755)), libc::ESTALE, "{id}");
        guest.forget(id, u64::MAX);
    }
}
