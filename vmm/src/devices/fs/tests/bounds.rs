//! What a guest can make the host keep.

use std::os::fd::AsFd;

use super::guest::{Guest, LIMITS, export, number};
use super::place::Place;
use crate::devices::fs::Limits;

fn tree(count: usize) -> Place {
    let place = Place::new();
    for index in 0..count {
        place.file(
            &format!("root/d{}/f{index}", index % 10),
            &index.to_string(),
        );
    }
    place
}

fn with(place: &Place, limits: Limits) -> Guest {
    Guest::with_limits(vec![export("rootfs", &place.path("root"))], limits)
}

#[test]
fn nodes_are_bounded() {
    let place = tree(50);
    let guest = with(
        &place,
        Limits {
            nodes: 20,
            ..LIMITS
        },
    );
    let ids: Vec<_> = (0..50)
        .map(|index| guest.walk(&format!("rootfs/d{}/f{index}", index % 10)))
        .collect();
    assert_eq!(guest.server.nodes().counts().0, 20);
    // The root, the export, and nine directories with a file each.
    assert_eq!(ids.iter().filter(|id| id.is_ok()).count(), 9);
    let refused = ids.into_iter().find_map(Result::err).unwrap();
    assert_eq!(refused.raw_os_error(), Some(libc::ENFILE));
    let root = guest.id("rootfs");
    assert_eq!(number(guest.mkdir(root, "new", 0o755)), libc::ENFILE);
    let known = guest.id("rootfs/d0/f0");
    assert_eq!(guest.contents(known).unwrap(), "0", "what is known works");
    guest.forget(known, 100);
    guest.walk("rootfs/d1/f41").unwrap();
}

#[test]
fn descriptors_are_bounded_and_their_nodes_work() {
    let place = tree(500);
    let guest = with(
        &place,
        Limits {
            open_nodes: 40,
            ..LIMITS
        },
    );
    let ids: Vec<_> = (0..500)
        .map(|index| guest.id(&format!("rootfs/d{}/f{index}", index % 10)))
        .collect();
    for round in 0..2 {
        for (index, id) in ids.iter().enumerate() {
            assert_eq!(
                guest.contents(*id).unwrap(),
                index.to_string(),
                "round {round}"
            );
            assert!(guest.server.nodes().counts().1 <= 40);
        }
    }
    for (index, id) in ids.iter().enumerate() {
        assert_eq!(guest.id(&format!("rootfs/d{}/f{index}", index % 10)), *id);
    }
    assert_eq!(guest.server.nodes().counts().0, 1 + 1 + 10 + 500);
}

#[test]
fn directories_stay_open_longer_than_files() {
    let place = tree(200);
    let guest = with(
        &place,
        Limits {
            open_nodes: 40,
            ..LIMITS
        },
    );
    let directories: Vec<_> = (0..10)
        .map(|index| guest.id(&format!("rootfs/d{index}")))
        .collect();
    for index in 0..200 {
        guest.id(&format!("rootfs/d{}/f{index}", index % 10));
    }
    let nodes = guest.server.nodes();
    for id in directories {
        assert!(nodes.get(id).unwrap().file.is_some());
    }
}

#[test]
fn files_that_cannot_be_opened_again_are_refused_at_the_bound() {
    let place = Place::new();
    place.dir("root");
    let guest = with(
        &place,
        Limits {
            open_nodes: 10,
            ..LIMITS
        },
    );
    let root = guest.id("rootfs");
    let mut kept = Vec::new();
    let refused = (0..20).find_map(|index| {
        let name = format!("f{index}");
        match guest.create(root, &name, libc::O_RDWR) {
            Ok((entry, handle)) => {
                guest.close(entry.inode, handle);
                guest.unlink(root, &name).unwrap();
                kept.push(entry.inode);
                None
            }
            Err(error) => Some(error.raw_os_error()),
        }
    });
    assert_eq!(refused, Some(Some(libc::ENFILE)));
    assert_eq!(kept.len(), 9, "beside the export's own");
    for id in &kept {
        guest.contents(*id).unwrap();
    }
    guest.forget(kept[0], 1);
    guest.mkdir(root, "again", 0o755).unwrap();
}

#[test]
fn handles_are_bounded() {
    let place = tree(1);
    let guest = with(
        &place,
        Limits {
            handles: 5,
            ..LIMITS
        },
    );
    let (file, root) = (guest.id("rootfs/d0/f0"), guest.id("rootfs"));
    let handles: Vec<_> = (0..5)
        .map(|_| guest.open(file, libc::O_RDWR).unwrap())
        .collect();
    assert_eq!(number(guest.open(file, libc::O_RDONLY)), libc::ENFILE);
    assert_eq!(number(guest.opendir(root)), libc::ENFILE);
    assert_eq!(
        number(guest.create(root, "new", libc::O_RDWR)),
        libc::ENFILE
    );
    assert!(
        !place.path("root/new").exists(),
        "refused before it was made"
    );
    let truncated = guest.open(file, libc::O_RDWR | libc::O_TRUNC);
    assert_eq!(number(truncated), libc::ENFILE);
    assert_eq!(guest.read(file, handles[0], 0, 9).unwrap(), b"0", "nor cut");
    guest.close(file, handles[0]);
    guest.opendir(root).unwrap();
}

#[test]
fn what_is_forgotten_is_closed() {
    let open = || {
        let own = format!(
            "/proc/self/task/{}/fd",
            rustix::thread::gettid().as_raw_nonzero()
        );
        std::fs::read_dir(own).unwrap().count()
    };
    let place = tree(100);
    let guest = with(&place, LIMITS);
    let looked_up: Vec<_> = (0..100)
        .map(|index| {
            guest
                .look(
                    guest.id(&format!("rootfs/d{}", index % 10)),
                    &format!("f{index}"),
                )
                .unwrap()
        })
        .collect();
    // Other tests open and close files meanwhile; this one's own descriptors are told by the table.
    let held = guest.server.nodes().counts().1;
    assert_eq!(held, 100 + 10 + 1);
    assert!(open() >= held);
    let files: Vec<_> = looked_up
        .iter()
        .map(|entry| guest.server.file(entry.inode).unwrap())
        .collect();
    for entry in &looked_up {
        guest.forget(entry.inode, 1);
    }
    assert_eq!(guest.server.nodes().counts().1, 11);
    for file in files {
        assert_eq!(
            std::sync::Arc::strong_count(&file),
            1,
            "held by the test alone"
        );
        let _ = file.as_fd();
    }
}

#[test]
fn the_same_name_again_and_again_leaves_nothing_behind() {
    let place = tree(1);
    let guest = with(&place, LIMITS);
    let root = guest.id("rootfs");
    let before = guest.server.nodes().counts();
    for _ in 0..1000 {
        let (entry, handle) = guest.create(root, "f", libc::O_RDWR).unwrap();
        guest.close(entry.inode, handle);
        guest.unlink(root, "f").unwrap();
        guest.forget(entry.inode, 1);
    }
    assert_eq!(guest.server.nodes().counts(), before);
    assert_eq!(guest.server.handles().len(), 0);
}

#[test]
fn many_links_of_one_file_are_kept_to_a_few_names() {
    let place = tree(1);
    let guest = with(&place, LIMITS);
    let root = guest.id("rootfs");
    let id = guest.id("rootfs/d0/f0");
    for index in 0..100 {
        guest.link(id, root, &format!("link-{index}")).unwrap();
    }
    assert!(guest.server.nodes().get(id).unwrap().places().count() <= 16);
    for index in 0..100 {
        assert_eq!(
            guest.id(&format!("rootfs/link-{index}")),
            id,
            "found by what it is"
        );
    }
}
