//! Listing directories.

use std::collections::BTreeSet;
use std::fs;

use fuse_backend_rs::api::filesystem::FileSystem;

use super::guest::Guest;
use super::place::Place;
use crate::devices::fs::node::ROOT;

/// A tree with a directory of many files: on tmpfs, and as an overlay of two layers.
fn trees(count: usize, test: impl Fn(&Place, &Guest, &str)) {
    for overlay in [false, true] {
        let place = Place::new();
        for index in 0..count {
            place.file(&format!("lower/d/file-with-a-name-{index}"), "");
        }
        let root = if overlay {
            place.mount_overlay("merged", &place.path("lower"), false)
        } else {
            place.path("lower")
        };
        let guest = Guest::of(&root);
        let what = if overlay { "overlay" } else { "tmpfs" };
        test(&place, &guest, what);
    }
}

#[test]
fn every_entry_is_listed_once() {
    trees(1000, |_, guest, what| {
        let id = guest.id("rootfs/d");
        let handle = guest.opendir(id).unwrap();
        // Room for 7 entries, so that each reply ends in the middle of the host's.
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let listed = guest.readdir(id, handle, offset, 7).unwrap();
            let Some(last) = listed.last() else { break };
            offset = last.next;
            names.extend(listed.into_iter().map(|entry| entry.name));
        }
        let distinct: BTreeSet<_> = names.iter().cloned().collect();
        assert_eq!((names.len(), distinct.len()), (1002, 1002), "{what}");
        assert!(distinct.contains(".") && distinct.contains(".."), "{what}");
    });
}

#[test]
fn a_listing_goes_on_from_any_place() {
    trees(300, |_, guest, what| {
        let id = guest.id("rootfs/d");
        let handle = guest.opendir(id).unwrap();
        let mut all = Vec::new();
        while let Some(last) = {
            let offset = all
                .last()
                .map_or(0, |entry: &super::guest::Listed| entry.next);
            let listed = guest.readdir(id, handle, offset, 50).unwrap();
            all.extend(listed.iter().cloned());
            listed.last().cloned()
        } {
            assert!(last.next != 0, "{what}");
        }
        assert_eq!(all.len(), 302, "{what}");
        for at in [200, 3, 100, 301, 0] {
            let listed = guest.readdir(id, handle, all[at].next, 5).unwrap();
            let expected: Vec<_> = all.iter().skip(at + 1).take(5).cloned().collect();
            let whole = listed.len().min(expected.len());
            assert_eq!(listed[..whole], expected[..whole], "{what} from {at}");
            assert_eq!(listed.is_empty(), expected.is_empty(), "{what} from {at}");
        }
    });
}

#[test]
fn what_is_not_removed_is_listed_while_others_are() {
    // rm -r of half a directory, in the order in which it is listed.
    trees(500, |_, guest, what| {
        let id = guest.id("rootfs/d");
        let handle = guest.opendir(id).unwrap();
        let (mut seen, mut offset) = (BTreeSet::new(), 0);
        loop {
            let listed = guest.readdir(id, handle, offset, 20).unwrap();
            let Some(last) = listed.last() else { break };
            offset = last.next;
            for (index, entry) in listed.iter().enumerate() {
                assert!(
                    seen.insert(entry.name.clone()),
                    "{what}: {} twice",
                    entry.name
                );
                if index % 2 == 0 && entry.name.starts_with("file") {
                    guest.unlink(id, &entry.name).unwrap();
                }
            }
        }
        assert_eq!(seen.len(), 502, "{what}");
    });
}

#[test]
fn a_tree_is_removed_as_it_is_listed() {
    trees(300, |place, guest, what| {
        let id = guest.id("rootfs/d");
        let handle = guest.opendir(id).unwrap();
        let mut offset = 0;
        loop {
            let listed = guest.readdirplus(id, handle, offset, 1000).unwrap();
            let Some((last, _)) = listed.last() else {
                break;
            };
            offset = last.next;
            for (entry, _) in &listed {
                if entry.name != "." && entry.name != ".." {
                    guest.unlink(id, &entry.name).unwrap();
                }
            }
        }
        guest.closedir(id, handle);
        guest
            .rmdir(guest.id("rootfs"), "d")
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(!place.path("merged/d").exists());
    });
}

#[test]
fn entries_with_attributes_are_looked_up() {
    let place = Place::new();
    place.file("root/f", "four");
    place.dir("root/d");
    std::os::unix::fs::symlink("f", place.path("root/l")).unwrap();
    let guest = Guest::of(&place.path("root"));
    let root = guest.id("rootfs");
    let handle = guest.opendir(root).unwrap();
    let listed = guest.readdirplus(root, handle, 0, 10).unwrap();
    assert_eq!(listed.len(), 5);
    for (entry, found) in &listed {
        if entry.name == "." || entry.name == ".." {
            assert_eq!(found.inode, 0, "the guest knows them");
            continue;
        }
        assert_eq!(guest.look(root, &entry.name).unwrap().inode, found.inode);
        assert_eq!(found.attr.st_mode >> 12, entry.kind, "{}", entry.name);
        assert_eq!(found.attr.st_ino, entry.ino, "{}", entry.name);
        let lookups = guest.server.nodes().get(found.inode).unwrap().lookups;
        assert_eq!(lookups, 2, "{}: once by the listing, once here", entry.name);
    }
}

#[test]
fn entries_for_which_there_is_no_room_are_not_referenced() {
    let place = Place::new();
    for index in 0..10 {
        place.file(&format!("root/{index}"), "");
    }
    let guest = Guest::of(&place.path("root"));
    let root = guest.id("rootfs");
    let handle = guest.opendir(root).unwrap();
    let before = guest.server.nodes().counts().0;
    let listed = guest.readdirplus(root, handle, 0, 4).unwrap();
    let told = listed.iter().filter(|(_, found)| found.inode != 0).count();
    assert_eq!(guest.server.nodes().counts().0, before + told);
    let context = &guest.context;
    let failed = guest
        .server
        .readdirplus(context, root, handle, 4096, 0, &mut |_, _| {
            Err(std::io::Error::from_raw_os_error(libc::EIO))
        });
    failed.unwrap_err();
    assert_eq!(guest.server.nodes().counts().0, before + told);
    let again = guest.readdir(root, handle, 0, 100).unwrap();
    assert_eq!(again.len(), 12, "and the handle still works");
}

#[test]
fn what_is_above_an_export_is_not_shown() {
    let place = Place::new();
    place.dir("secret/root/d");
    let guest = Guest::of(&place.path("secret/root"));
    let root = guest.id("rootfs");
    let handle = guest.opendir(root).unwrap();
    let above = std::os::unix::fs::MetadataExt::ino(&fs::metadata(place.path("secret")).unwrap());
    for entry in guest.readdir(root, handle, 0, 10).unwrap() {
        assert_ne!(entry.ino, above, "{}", entry.name);
    }
}

#[test]
fn new_names_are_seen_by_a_new_listing() {
    let place = Place::new();
    place.dir("root");
    let guest = Guest::of(&place.path("root"));
    let root = guest.id("rootfs");
    assert!(guest.names(root).is_empty());
    fs::write(place.path("root/by-host"), "").unwrap();
    guest.mkdir(root, "by-guest", 0o755).unwrap();
    assert_eq!(guest.names(root), ["by-guest", "by-host"]);
    let handle = guest.opendir(root).unwrap();
    guest
        .server
        .fsyncdir(&guest.context, root, false, handle)
        .unwrap();
    guest
        .server
        .fsyncdir(&guest.context, ROOT, false, 0)
        .unwrap();
}
