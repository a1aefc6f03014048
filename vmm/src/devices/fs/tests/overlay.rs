//! On an overlay: a copy-up must not change a number, whether what is written lies in the file
//! system of what is read (its inode numbers stay) or in another (they change).

use std::fs;

use fuse_backend_rs::abi::fuse_abi::SetattrValid;

use super::guest::{Guest, LIMITS, export};
use super::place::Place;
use crate::devices::fs::Limits;

/// Runs a test on both kinds of overlay of a tree.
fn on_overlays(files: &[(&str, &str)], test: impl Fn(&Place, &Guest)) {
    for separate in [false, true] {
        let place = Place::new();
        for (name, contents) in files {
            place.file(&format!("lower/{name}"), contents);
        }
        let merged = place.mount_overlay("merged", &place.path("lower"), separate);
        let guest = Guest::of(&merged);
        test(&place, &guest);
    }
}

#[test]
fn a_first_write_keeps_the_number() {
    on_overlays(&[("a", "from the image")], |place, guest| {
        let root = guest.id("rootfs");
        let id = guest.id("rootfs/a");
        let reader = guest.open(id, libc::O_RDONLY).unwrap();
        let writer = guest.open(id, libc::O_RDWR).unwrap();
        assert_eq!(guest.write(id, writer, 0, b"by this one").unwrap(), 11);
        assert_eq!(guest.id("rootfs/a"), id, "while it is open");
        let seen = guest.read(id, reader, 0, 100).unwrap();
        assert_eq!(
            seen, b"by this oneage",
            "what was open before sees the write"
        );
        guest.close(id, writer);
        guest.close(id, reader);
        assert_eq!(guest.id("rootfs/a"), id, "after it was closed");
        assert_eq!(guest.look(root, "a").unwrap().inode, id);
        let host = fs::read_to_string(place.path("merged/a")).unwrap();
        assert_eq!(host, "by this oneage", "the host sees it");
        let image = fs::read_to_string(place.path("lower/a")).unwrap();
        assert_eq!(image, "from the image", "the image is as it was");
    });
}

#[test]
fn a_changed_mode_keeps_the_number() {
    on_overlays(&[("a", "x"), ("d/f", "y")], |_, guest| {
        for path in ["rootfs/a", "rootfs/d", "rootfs/d/f"] {
            let id = guest.id(path);
            guest
                .setattr(id, SetattrValid::MODE, |stat| stat.st_mode = 0o700)
                .unwrap();
            assert_eq!(guest.id(path), id, "{path}");
            assert_eq!(guest.stat(id).st_mode & 0o777, 0o700, "{path}");
        }
    });
}

#[test]
fn a_directory_keeps_its_number_when_something_is_made_in_it() {
    on_overlays(&[("d/e/f", "y")], |_, guest| {
        let ids = ["rootfs", "rootfs/d", "rootfs/d/e", "rootfs/d/e/f"].map(|path| guest.id(path));
        guest.create(ids[2], "new", libc::O_RDWR).unwrap();
        let now = ["rootfs", "rootfs/d", "rootfs/d/e", "rootfs/d/e/f"].map(|path| guest.id(path));
        assert_eq!(now, ids);
    });
}

#[test]
fn a_copy_up_by_the_host_keeps_the_number() {
    on_overlays(&[("a", "x")], |place, guest| {
        let id = guest.id("rootfs/a");
        fs::write(place.path("merged/a"), "by docker cp").unwrap();
        assert_eq!(guest.id("rootfs/a"), id);
        assert_eq!(guest.contents(id).unwrap(), "by docker cp");
    });
}

#[test]
fn a_rename_of_an_image_file_keeps_the_number() {
    on_overlays(&[("a", "x")], |_, guest| {
        let root = guest.id("rootfs");
        let id = guest.id("rootfs/a");
        guest.rename((root, "a"), (root, "b"), 0).unwrap();
        assert_eq!(guest.id("rootfs/b"), id);
        assert_eq!(guest.names(root), ["b"]);
    });
}

#[test]
fn a_written_file_is_found_again_after_its_descriptor_was_closed() {
    for separate in [false, true] {
        let place = Place::new();
        place.file("lower/a", "x");
        for index in 0..40 {
            place.file(&format!("lower/other-{index}"), "");
        }
        let merged = place.mount_overlay("merged", &place.path("lower"), separate);
        let limits = Limits {
            open_nodes: 8,
            ..LIMITS
        };
        let guest = Guest::with_limits(vec![export("rootfs", &merged)], limits);
        let id = guest.id("rootfs/a");
        let writer = guest.open(id, libc::O_RDWR).unwrap();
        guest.write(id, writer, 0, b"written").unwrap();
        guest.close(id, writer);
        for index in 0..40 {
            guest.id(&format!("rootfs/other-{index}"));
        }
        assert!(
            guest.server.nodes().get(id).unwrap().file.is_none(),
            "closed by now"
        );
        assert_eq!(guest.contents(id).unwrap(), "written");
        assert_eq!(guest.id("rootfs/a"), id);
    }
}

#[test]
fn hard_links_of_the_image_behave_as_the_host_shows_them() {
    for separate in [false, true] {
        let place = Place::new();
        place.file("lower/a", "image");
        fs::hard_link(place.path("lower/a"), place.path("lower/b")).unwrap();
        let merged = place.mount_overlay("merged", &place.path("lower"), separate);
        let guest = Guest::of(&merged);
        let (a, b) = (guest.id("rootfs/a"), guest.id("rootfs/b"));
        let writer = guest.open(a, libc::O_RDWR).unwrap();
        guest.write(a, writer, 0, b"WRITE").unwrap();
        guest.close(a, writer);
        assert_eq!(guest.id("rootfs/a"), a);
        assert_eq!(guest.contents(a).unwrap(), "WRITE");
        // Without its index an overlay breaks links as it copies up; the guest sees what the host
        // sees, whichever it is.
        let host = fs::read_to_string(merged.join("b")).unwrap();
        let b_now = guest.id("rootfs/b");
        assert_eq!(guest.contents(b_now).unwrap(), host);
        assert_eq!(
            host == "WRITE",
            b_now == a,
            "one number for one file: {a} {b} {b_now}"
        );
    }
}

#[test]
fn removed_and_made_again() {
    on_overlays(&[("a", "image"), ("d/f", "y")], |_, guest| {
        let (root, id) = (guest.id("rootfs"), guest.id("rootfs/a"));
        guest.unlink(root, "a").unwrap();
        let (made, handle) = guest.create(root, "a", libc::O_RDWR).unwrap();
        assert_ne!(made.inode, id);
        guest.write(made.inode, handle, 0, b"new").unwrap();
        assert_eq!(guest.contents(guest.id("rootfs/a")).unwrap(), "new");
        assert_eq!(guest.contents(id).unwrap(), "image");
        let directory = guest.id("rootfs/d");
        guest.unlink(directory, "f").unwrap();
        guest.rmdir(root, "d").unwrap();
        guest.mkdir(root, "d", 0o755).unwrap();
        assert!(
            guest.names(guest.id("rootfs/d")).is_empty(),
            "the new one is opaque"
        );
    });
}
