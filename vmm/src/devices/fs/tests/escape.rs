//! A guest never leaves its exports.

use std::fs;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse_backend_rs::api::filesystem::FileSystem;

use super::guest::{Guest, LIMITS, export, number};
use super::place::Place;
use crate::devices::fs::Limits;

#[test]
fn names_that_lead_out_are_refused() {
    let place = Place::new();
    place.file("secret", "");
    let path = place.file("root/f", "");
    let guest = Guest::of(&place.path("root"));
    let root = guest.id("rootfs");
    let long = "n".repeat(256);
    for (name, error) in [
        ("..", libc::EINVAL),
        (".", libc::EINVAL),
        ("", libc::EINVAL),
        ("../secret", libc::EINVAL),
        ("/etc/passwd", libc::EINVAL),
        ("f/", libc::EINVAL),
        (long.as_str(), libc::ENAMETOOLONG),
    ] {
        assert_eq!(number(guest.look(root, name)), error, "{name:?}");
        assert_eq!(number(guest.mkdir(root, name, 0o755)), error, "{name:?}");
        assert_eq!(
            number(guest.mknod(root, name, libc::S_IFREG, 0)),
            error,
            "{name:?}"
        );
        assert_eq!(
            number(guest.create(root, name, libc::O_RDWR)),
            error,
            "{name:?}"
        );
        assert_eq!(number(guest.symlink("x", root, name)), error, "{name:?}");
        assert_eq!(
            number(guest.link(guest.id("rootfs/f"), root, name)),
            error,
            "{name:?}"
        );
        assert_eq!(number(guest.unlink(root, name)), error, "{name:?}");
        assert_eq!(number(guest.rmdir(root, name)), error, "{name:?}");
        assert_eq!(
            number(guest.rename((root, "f"), (root, name), 0)),
            error,
            "{name:?}"
        );
        assert_eq!(
            number(guest.rename((root, name), (root, "g"), 0)),
            error,
            "{name:?}"
        );
    }
    assert!(path.exists() && place.path("secret").exists());
}

#[test]
fn symbolic_links_are_not_followed() {
    let place = Place::new();
    place.file("outside/secret", "secret");
    place.dir("root");
    let guest = Guest::of(&place.path("root"));
    let root = guest.id("rootfs");
    guest.symlink("../outside", root, "relative").unwrap();
    let outside = place.path("outside");
    guest
        .symlink(outside.to_str().unwrap(), root, "absolute")
        .unwrap();
    guest.symlink("../outside/secret", root, "file").unwrap();
    for name in ["relative", "absolute"] {
        let id = guest.id(&format!("rootfs/{name}"));
        assert_eq!(number(guest.look(id, "secret")), libc::ENOTDIR, "{name}");
        assert_eq!(number(guest.opendir(id)), libc::ENOTDIR, "{name}");
        assert_eq!(number(guest.mkdir(id, "d", 0o755)), libc::ENOTDIR, "{name}");
    }
    let file = guest.id("rootfs/file");
    assert_eq!(
        guest.server.readlink(&guest.context, file).unwrap(),
        b"../outside/secret"
    );
    assert_eq!(number(guest.open(file, libc::O_RDWR)), libc::ELOOP);
    let made = guest.create(root, "file", libc::O_RDWR | libc::O_TRUNC);
    assert_eq!(number(made), libc::ELOOP);
    // Extended attributes: symbolic links cannot have user's; the target's are not reached.
    assert_eq!(number(guest.set_xattr(file, c"user.x", b"1")), libc::EPERM);
    assert_eq!(fs::read(place.path("outside/secret")).unwrap(), b"secret");
    let hard = guest.link(file, root, "hard").unwrap();
    assert_eq!(hard.inode, file, "a link to the link itself");
}

#[test]
fn a_directory_swapped_for_a_link_is_not_followed_when_it_is_opened_again() {
    let place = Place::new();
    place.file("outside/f", "secret");
    place.file("root/d/f", "mine");
    let guest = Guest::of(&place.path("root"));
    let (directory, file) = (guest.id("rootfs/d"), guest.id("rootfs/d/f"));
    {
        let mut nodes = guest.server.nodes();
        nodes.get_mut(directory).unwrap().file = None;
        nodes.get_mut(file).unwrap().file = None;
    }
    fs::rename(place.path("root/d"), place.path("root/moved")).unwrap();
    symlink(place.path("outside"), place.path("root/d")).unwrap();
    assert_eq!(number(guest.contents(file)), libc::ESTALE);
    assert_eq!(number(guest.look(directory, "f")), libc::ESTALE);
}

#[test]
fn no_race_leads_out() {
    let place = Place::new();
    place.file("outside/f", "secret");
    place.file("root/d/f", "mine");
    place.dir("root/link-dir");
    symlink(place.path("outside"), place.path("root/link")).unwrap();
    let limits = Limits {
        open_nodes: 8,
        ..LIMITS
    };
    let guest = Guest::with_limits(vec![export("rootfs", &place.path("root"))], limits);
    let (d, link) = (place.path("root/d"), place.path("root/link"));
    let guest_id = guest.id("rootfs/d");
    let done = AtomicBool::new(false);
    let (found, stale) = std::thread::scope(|scope| {
        scope.spawn(|| {
            let flags = rustix::fs::RenameFlags::EXCHANGE;
            while !done.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(rustix::fs::CWD, &d, rustix::fs::CWD, &link, flags)
                    .unwrap();
            }
        });
        let (mut found, mut stale) = (0, 0);
        for round in 0..20_000 {
            let result = guest.walk("rootfs/d/f").and_then(|entry| {
                if round % 2 == 0 {
                    let mut nodes = guest.server.nodes();
                    for id in [guest_id, entry.inode] {
                        if let Some(node) = nodes.get_mut(id) {
                            node.file = None;
                        }
                    }
                }
                guest.contents(entry.inode)
            });
            match result {
                Ok(contents) => {
                    assert_eq!(contents, "mine", "in round {round}");
                    found += 1;
                }
                Err(_) => stale += 1,
            }
        }
        done.store(true, Ordering::Relaxed);
        (found, stale)
    });
    assert!(
        found > 0 && stale > 0,
        "both sides of the race were seen: {found}, {stale}"
    );
}
