//! Extended attributes.

use std::os::unix::fs::symlink;

use fuse_backend_rs::api::filesystem::{FileSystem, GetxattrReply, ListxattrReply};

use super::guest::{Guest, number};
use super::place::Place;
use crate::devices::fs::node::ROOT;

/// A value of `security.capability`: version 2, CAP_NET_RAW effective (linux/capability.h).
const CAPABILITY: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

fn on_tree(test: impl Fn(&Place, &Guest)) {
    for overlay in [false, true] {
        let place = Place::new();
        place.file("lower/f", "");
        place.dir("lower/d");
        symlink("f", place.path("lower/l")).unwrap();
        let root = if overlay {
            place.mount_overlay("merged", &place.path("lower"), false)
        } else {
            place.path("lower")
        };
        test(&place, &Guest::of(&root));
    }
}

#[test]
fn user_attributes_are_kept() {
    on_tree(|_, guest| {
        for path in ["rootfs/f", "rootfs/d"] {
            let id = guest.id(path);
            assert_eq!(number(guest.get_xattr(id, c"user.a")), libc::ENODATA);
            guest.set_xattr(id, c"user.a", b"value").unwrap();
            guest.set_xattr(id, c"user.empty", b"").unwrap();
            assert_eq!(guest.get_xattr(id, c"user.a").unwrap(), b"value");
            assert_eq!(guest.get_xattr(id, c"user.empty").unwrap(), b"");
            let mut names = guest.list_xattrs(id).unwrap();
            names.sort();
            assert_eq!(names, ["user.a", "user.empty"]);
            guest
                .server
                .removexattr(&guest.context, id, c"user.a")
                .unwrap();
            assert_eq!(guest.list_xattrs(id).unwrap(), ["user.empty"]);
            assert_eq!(guest.id(path), id, "the same file after the first change");
        }
    });
}

#[test]
fn sizes_and_flags_are_as_the_kernel_has_them() {
    on_tree(|_, guest| {
        let id = guest.id("rootfs/f");
        let (server, context) = (&guest.server, &guest.context);
        guest.set_xattr(id, c"user.a", b"value").unwrap();
        let get = |size| server.getxattr(context, id, c"user.a", size);
        assert!(matches!(get(0), Ok(GetxattrReply::Count(5))));
        assert_eq!(number(get(4).map(|_| ())), libc::ERANGE);
        assert!(matches!(get(5), Ok(GetxattrReply::Value(_))));
        assert!(matches!(get(u32::MAX), Ok(GetxattrReply::Value(_))));
        let list = |size| server.listxattr(context, id, size);
        assert!(matches!(list(0), Ok(ListxattrReply::Count(7))));
        assert_eq!(number(list(6).map(|_| ())), libc::ERANGE);
        let set = |flags| server.setxattr(context, id, c"user.a", b"x", flags);
        assert_eq!(number(set(libc::XATTR_CREATE as u32)), libc::EEXIST);
        set(libc::XATTR_REPLACE as u32).unwrap();
    });
}

#[test]
fn file_capabilities_are_kept() {
    on_tree(|_, guest| {
        let id = guest.id("rootfs/f");
        guest
            .set_xattr(id, c"security.capability", &CAPABILITY)
            .unwrap();
        assert_eq!(
            guest.get_xattr(id, c"security.capability").unwrap(),
            CAPABILITY
        );
        let handle = guest.open(id, libc::O_WRONLY).unwrap();
        guest.write(id, handle, 0, b"changed").unwrap();
        let gone = guest.get_xattr(id, c"security.capability");
        assert_eq!(number(gone), libc::ENODATA, "a write takes them away");
    });
}

#[test]
fn what_speaks_to_the_host_is_neither_shown_nor_taken() {
    on_tree(|place, guest| {
        let host = place.path("lower/f");
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(&host, "trusted.overlay.opaque", b"y", flags).unwrap();
        rustix::fs::setxattr(&host, "trusted.other", b"y", flags).unwrap();
        let id = guest.id("rootfs/f");
        assert!(guest.list_xattrs(id).unwrap().is_empty());
        for name in [
            c"trusted.other",
            c"trusted.overlay.opaque",
            c"security.selinux",
            c"system.x",
            c"x",
        ] {
            assert_eq!(number(guest.get_xattr(id, name)), libc::ENODATA, "{name:?}");
            assert_eq!(
                number(guest.set_xattr(id, name, b"y")),
                libc::EOPNOTSUPP,
                "{name:?}"
            );
            let removed = guest.server.removexattr(&guest.context, id, name);
            assert_eq!(number(removed), libc::EOPNOTSUPP, "{name:?}");
        }
    });
}

#[test]
fn a_file_system_without_acls_has_none() {
    // Symbolic links have no ACLs anywhere; procfs stands for a file system without them.
    let place = Place::new();
    place.dir("root");
    let guest = Guest::new(vec![super::guest::export("vol-0", "/proc/sys".as_ref())]);
    let id = guest.id("vol-0/kernel/ostype");
    let acl = guest.get_xattr(id, c"system.posix_acl_access");
    assert_eq!(number(acl), libc::ENODATA);
    let guest = Guest::of(&place.path("root"));
    let link = guest.symlink("x", guest.id("rootfs"), "l").unwrap();
    let acl = guest.get_xattr(link.inode, c"system.posix_acl_access");
    assert_eq!(number(acl), libc::ENODATA);
}

#[test]
fn the_root_has_none() {
    let place = Place::new();
    let guest = Guest::of(&place.path(""));
    assert!(guest.list_xattrs(ROOT).unwrap().is_empty());
    assert_eq!(
        number(guest.get_xattr(ROOT, c"system.posix_acl_access")),
        libc::ENODATA
    );
}
