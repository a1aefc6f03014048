//! A template's table in a child.

use std::fs;

use fuse_backend_rs::abi::fuse_abi::FsOptions;
use fuse_backend_rs::api::filesystem::{FileSystem, OpenOptions};

use super::guest::{Guest, LIMITS, export, number};
use super::place::Place;
use crate::devices::fs::node::ROOT;
use crate::devices::fs::{Error, Export, FileServer, FsState};
use crate::devices::virtio::{DrainError, VirtioDevice};

/// A child of a guest, on these exports; the state goes through its format.
fn fork(guest: &Guest, exports: Vec<Export>) -> Guest {
    let bytes = postcard::to_stdvec(&guest.server.save_state()).unwrap();
    let state: FsState = postcard::from_bytes(&bytes).unwrap();
    Guest::on(FileServer::restored(exports, LIMITS, &state).unwrap())
}

#[test]
fn a_template_without_exports_has_children_with_them() {
    let template = Guest::new(vec![]);
    assert_eq!(number(template.look(ROOT, "rootfs")), libc::ENOENT);
    assert!(template.names(ROOT).is_empty());
    let place = Place::new();
    place.file("root/f", "child's");
    let child = fork(&template, vec![export("rootfs", &place.path("root"))]);
    assert_eq!(child.contents(child.id("rootfs/f")).unwrap(), "child's");
    assert_eq!(child.names(ROOT), ["rootfs"]);
    let flags = child.walk("rootfs").unwrap().attr_flags;
    assert_eq!(
        flags, 1,
        "the session's options are those agreed on in the template"
    );
}

#[test]
fn the_session_is_that_of_the_template() {
    let template = Guest::on(FileServer::new(vec![], LIMITS).unwrap());
    let offered = FsOptions::all() - FsOptions::SUBMOUNTS;
    let agreed = template.server.init(offered).unwrap();
    let place = Place::new();
    let child = fork(&template, vec![export("rootfs", &place.dir("root"))]);
    assert_eq!(child.server.session(), agreed);
    assert_eq!(child.walk("rootfs").unwrap().attr_flags, 0);
}

#[test]
fn numbers_mean_the_same_path_in_a_child() {
    let place = Place::new();
    for tree in ["template", "child"] {
        place.file(&format!("{tree}/d/e/f"), tree);
        place.file(&format!("{tree}/g"), tree);
        fs::hard_link(
            place.path(&format!("{tree}/g")),
            place.path(&format!("{tree}/d/h")),
        )
        .unwrap();
    }
    let template = Guest::of(&place.path("template"));
    let paths = [
        "rootfs",
        "rootfs/d",
        "rootfs/d/e",
        "rootfs/d/e/f",
        "rootfs/g",
    ];
    let ids = paths.map(|path| template.id(path));
    assert_eq!(template.id("rootfs/d/h"), ids[4]);
    let child = fork(&template, vec![export("rootfs", &place.path("child"))]);
    assert_eq!(
        child.contents(ids[3]).unwrap(),
        "child",
        "by number, without a lookup"
    );
    assert_eq!(paths.map(|path| child.id(path)), ids, "and by name");
    assert_eq!(child.id("rootfs/d/h"), ids[4]);
    let new = child.create(ids[0], "new", libc::O_RDWR).unwrap().0.inode;
    assert!(!ids.contains(&new), "numbers go on");
    assert!(new >= template.server.nodes().next_id());
}

#[test]
fn pages_read_in_the_template_are_not_kept_unseen() {
    let place = Place::new();
    place.file("root/f", "");
    let template = Guest::of(&place.path("root"));
    let id = template.id("rootfs/f");
    let child = fork(&template, vec![export("rootfs", &place.path("root"))]);
    assert_eq!(child.id("rootfs/f"), id);
    let keeps = || {
        let (handle, options) = child.open_options(id, libc::O_RDONLY).unwrap();
        child.close(id, handle);
        options.contains(OpenOptions::KEEP_CACHE)
    };
    assert!(!keeps(), "nobody knows what they were read from");
    assert!(keeps());
}

#[test]
fn the_guest_can_forget_in_a_child_what_it_was_told_in_the_template() {
    let place = Place::new();
    place.file("root/f", "");
    let template = Guest::of(&place.path("root"));
    let (root, file) = (template.id("rootfs"), template.id("rootfs/f"));
    let child = fork(&template, vec![export("rootfs", &place.path("root"))]);
    child.forget(file, 1);
    child.forget(root, 2);
    assert_eq!(child.server.nodes().counts(), (1, 0));
    assert_eq!(number(child.server.file(file)), libc::ESTALE);
}

#[test]
fn what_a_child_lacks_is_stale() {
    let place = Place::new();
    place.file("template/gone", "");
    place.file("template/kind", "");
    place.file("template/d/f", "");
    place.dir("child/kind");
    place.file("volume/f", "");
    let template = Guest::new(vec![
        export("rootfs", &place.path("template")),
        export("vol-0", &place.path("volume")),
    ]);
    let paths = [
        "rootfs/gone",
        "rootfs/kind",
        "rootfs/d/f",
        "vol-0",
        "vol-0/f",
    ];
    let ids = paths.map(|path| template.id(path));
    let child = fork(&template, vec![export("rootfs", &place.path("child"))]);
    for (path, id) in paths.iter().zip(ids) {
        assert_eq!(number(child.server.file(id)), libc::ESTALE, "{path}");
        child.forget(id, 1);
    }
    assert_eq!(number(child.walk("rootfs/gone")), libc::ENOENT);
    assert_ne!(child.id("rootfs/kind"), ids[1]);
}

#[test]
fn an_export_that_became_a_file_is_another() {
    let place = Place::new();
    let template = Guest::of(&place.dir("tree"));
    let id = template.id("rootfs");
    let child = fork(&template, vec![export("rootfs", &place.file("file", "x"))]);
    assert_eq!(number(child.server.file(id)), libc::ESTALE);
    let file = child.id("rootfs");
    assert_ne!(file, id);
    assert_eq!(child.contents(file).unwrap(), "x");
}

#[test]
fn a_link_in_place_of_a_directory_does_not_lead_a_child_out() {
    let place = Place::new();
    place.file("template/d/f", "template");
    place.file("outside/f", "secret");
    place.dir("child");
    std::os::unix::fs::symlink(place.path("outside"), place.path("child/d")).unwrap();
    let template = Guest::of(&place.path("template"));
    let id = template.id("rootfs/d/f");
    let child = fork(&template, vec![export("rootfs", &place.path("child"))]);
    assert_eq!(number(child.contents(id)), libc::ESTALE);
}

#[test]
fn the_freeze_is_refused_while_files_are_open() {
    let place = Place::new();
    place.file("root/d/f", "");
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/d/f");
    let handle = guest.open(id, libc::O_RDONLY).unwrap();
    let mut device = super::super::Fs::serving(guest.server);
    let error = device.drain().unwrap_err();
    assert!(matches!(error, DrainError::InFlight(_)));
    let message = error.to_string();
    assert!(
        message.contains("/rootfs/d/f") && message.contains('1'),
        "{message}"
    );
    let context = Default::default();
    let server = device.answerer.files();
    server
        .release(&context, id, 0, handle, false, false, None)
        .unwrap();
    device.drain().unwrap();
}

#[test]
fn a_damaged_state_is_refused() {
    let place = Place::new();
    place.file("root/f", "");
    let guest = Guest::of(&place.path("root"));
    guest.id("rootfs/f");
    let state = guest.server.save_state();
    let damage: [fn(&mut FsState); 3] = [
        |state| state.nodes[0].id = ROOT,
        |state| state.next = 2,
        |state| state.nodes[1].id = state.nodes[0].id,
    ];
    for change in damage {
        let mut damaged = state.clone();
        change(&mut damaged);
        let exports = vec![export("rootfs", &place.path("root"))];
        let refused = FileServer::restored(exports, LIMITS, &damaged);
        assert!(matches!(refused, Err(Error::State { .. })), "{damaged:?}");
    }
}
