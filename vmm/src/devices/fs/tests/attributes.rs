//! Owners, modes, times.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::{fs, io};

use fuse_backend_rs::abi::fuse_abi::{FOPEN_IN_KILL_SUIDGID, SetattrValid, WRITE_KILL_PRIV};
use fuse_backend_rs::api::filesystem::{Context, FileSystem};

use super::guest::{Guest, Memory, c, number};
use super::place::Place;

const USER: Context = Context {
    uid: 1000,
    gid: 2000,
    pid: 7,
};

fn guest_of(place: &Place) -> Guest {
    let mut guest = Guest::of(&place.path("root"));
    guest.context = USER;
    guest
}

#[test]
fn what_is_made_belongs_to_the_caller() {
    let place = Place::new();
    place.dir("root");
    let guest = guest_of(&place);
    let root = guest.id("rootfs");
    guest.create(root, "file", libc::O_RDWR).unwrap();
    guest.mkdir(root, "dir", 0o755).unwrap();
    guest.symlink("target", root, "link").unwrap();
    guest.mknod(root, "fifo", libc::S_IFIFO | 0o644, 0).unwrap();
    guest
        .mknod(root, "sock", libc::S_IFSOCK | 0o644, 0)
        .unwrap();
    guest
        .mknod(root, "null", libc::S_IFCHR | 0o644, 0x103)
        .unwrap();
    for name in ["file", "dir", "link", "fifo", "sock", "null"] {
        let found = fs::symlink_metadata(place.path("root").join(name)).unwrap();
        assert_eq!((found.uid(), found.gid()), (1000, 2000), "{name}");
    }
    let null = fs::metadata(place.path("root/null")).unwrap();
    assert_eq!(null.rdev(), libc::makedev(1, 3));
    assert_eq!(guest.walk("rootfs/null").unwrap().attr.st_rdev, 0x103);
    assert_eq!(
        rustix::process::getuid().as_raw(),
        0,
        "the thread is itself again"
    );
    fs::write(place.path("root/by-host"), "").unwrap();
    assert_eq!(fs::metadata(place.path("root/by-host")).unwrap().uid(), 0);
}

#[test]
fn a_caller_makes_files_where_only_its_kernel_knows_that_it_may() {
    // The directory belongs to root and to nobody else; the guest's process may have CAP_DAC_OVERRIDE
    // or a supplementary group.
    let place = Place::new();
    let root = place.dir("root");
    fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).unwrap();
    let guest = guest_of(&place);
    let root = guest.id("rootfs");
    guest.create(root, "file", libc::O_RDWR).unwrap();
    guest.mkdir(root, "dir", 0o755).unwrap();
    assert_eq!(fs::metadata(place.path("root/dir")).unwrap().uid(), 1000);
}

#[test]
fn a_directory_with_the_set_group_id_bit_hands_its_group_on() {
    let place = Place::new();
    let root = place.dir("root");
    chown(&root, Some(0), Some(3000)).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o2777)).unwrap();
    let guest = guest_of(&place);
    let root = guest.id("rootfs");
    guest.create(root, "file", libc::O_RDWR).unwrap();
    guest.mkdir(root, "dir", 0o755).unwrap();
    let file = fs::metadata(place.path("root/file")).unwrap();
    assert_eq!((file.uid(), file.gid()), (1000, 3000));
    let dir = fs::metadata(place.path("root/dir")).unwrap();
    assert_eq!((dir.uid(), dir.gid()), (1000, 3000));
    assert_eq!(dir.mode() & 0o7777, 0o2755, "handed on to directories");
}

#[test]
fn the_callers_mask_counts_and_a_default_acl_more() {
    let place = Place::new();
    place.dir("root/plain");
    place.dir("root/acl");
    let mut guest = guest_of(&place);
    guest.umask = 0o027;
    let (plain, acl) = (guest.id("rootfs/plain"), guest.id("rootfs/acl"));
    // Version 2; user::rwx, group::rwx, other::r-x (linux/posix_acl_xattr.h).
    let entry = |tag: u16, rights: u16| {
        [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &[0xff; 4]].concat()
    };
    let list = [
        2u32.to_le_bytes().to_vec(),
        entry(1, 7),
        entry(4, 7),
        entry(0x20, 5),
    ];
    guest
        .set_xattr(acl, c"system.posix_acl_default", &list.concat())
        .unwrap();
    let mode = |path: &str| fs::metadata(place.path(path)).unwrap().mode() & 0o7777;
    for (directory, name, file, dir) in [(plain, "plain", 0o640, 0o750), (acl, "acl", 0o664, 0o775)]
    {
        guest
            .create_mode(directory, "file", libc::O_RDWR, 0o666)
            .unwrap();
        guest.mkdir(directory, "dir", 0o777).unwrap();
        guest
            .mknod(directory, "fifo", libc::S_IFIFO | 0o666, 0)
            .unwrap();
        assert_eq!(mode(&format!("root/{name}/file")), file, "{name}");
        assert_eq!(mode(&format!("root/{name}/dir")), dir, "{name}");
        assert_eq!(mode(&format!("root/{name}/fifo")), file, "{name}");
    }
}

#[test]
fn a_file_is_made_with_its_special_bits() {
    let place = Place::new();
    place.dir("root");
    let guest = guest_of(&place);
    let root = guest.id("rootfs");
    guest
        .create_mode(root, "suid", libc::O_RDWR, 0o6755)
        .unwrap();
    guest.mkdir(root, "sticky", 0o1777).unwrap();
    let mode = |name: &str| fs::metadata(place.path("root").join(name)).unwrap().mode() & 0o7777;
    assert_eq!(mode("suid"), 0o6755);
    assert_eq!(mode("sticky"), 0o1755);
}

#[test]
fn ids_that_are_none_are_refused() {
    let place = Place::new();
    place.dir("root");
    let mut guest = guest_of(&place);
    let root = guest.id("rootfs");
    guest.context.uid = u32::MAX;
    assert_eq!(
        number(guest.create(root, "file", libc::O_RDWR)),
        libc::EINVAL
    );
    assert!(!place.path("root/file").exists());
}

#[test]
fn setattr_sets_what_is_asked_for() {
    let place = Place::new();
    let path = place.file("root/f", "0123456789");
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/f");
    guest
        .setattr(id, SetattrValid::MODE, |stat| stat.st_mode = 0o4711)
        .unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4711);
    guest
        .setattr(id, SetattrValid::UID, |stat| stat.st_uid = 5)
        .unwrap();
    let now = fs::metadata(&path).unwrap();
    assert_eq!((now.uid(), now.gid()), (5, 0));
    assert_eq!(now.mode() & 0o7777, 0o711, "a new owner: no set-user-ID");
    guest
        .setattr(id, SetattrValid::GID, |stat| stat.st_gid = 6)
        .unwrap();
    assert_eq!(fs::metadata(&path).unwrap().gid(), 6);
    let both = SetattrValid::UID | SetattrValid::MODE;
    guest
        .setattr(id, both, |stat| {
            stat.st_uid = 9;
            stat.st_mode = 0o4755;
        })
        .unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().mode() & 0o7777,
        0o4755,
        "asked for together"
    );
    let told = guest
        .setattr(id, SetattrValid::SIZE, |stat| stat.st_size = 4)
        .unwrap();
    assert_eq!(told.st_size, 4);
    assert_eq!(fs::read(&path).unwrap(), b"0123");
    let negative = guest.setattr(id, SetattrValid::SIZE, |stat| stat.st_size = -1);
    assert_eq!(number(negative), libc::EINVAL);
}

#[test]
fn times_are_set_left_alone_or_now() {
    let place = Place::new();
    let path = place.file("root/f", "");
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/f");
    guest
        .setattr(id, SetattrValid::ATIME | SetattrValid::MTIME, |stat| {
            (stat.st_atime, stat.st_atime_nsec) = (100, 1);
            (stat.st_mtime, stat.st_mtime_nsec) = (200, 2);
        })
        .unwrap();
    let set = fs::metadata(&path).unwrap();
    assert_eq!((set.atime(), set.atime_nsec()), (100, 1));
    assert_eq!((set.mtime(), set.mtime_nsec()), (200, 2));
    guest
        .setattr(id, SetattrValid::MTIME, |stat| stat.st_mtime = 300)
        .unwrap();
    let set = fs::metadata(&path).unwrap();
    assert_eq!((set.atime(), set.mtime()), (100, 300), "the other stays");
    guest
        .setattr(id, SetattrValid::ATIME | SetattrValid::ATIME_NOW, |_| {})
        .unwrap();
    let set = fs::metadata(&path).unwrap();
    assert!(set.atime() > 1_000_000_000, "now");
    assert_eq!(set.mtime(), 300);
}

#[test]
fn links_themselves_are_changed_not_what_they_name() {
    let place = Place::new();
    let outside = place.file("outside", "x");
    place.dir("root");
    std::os::unix::fs::symlink(&outside, place.path("root/link")).unwrap();
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/link");
    guest
        .setattr(id, SetattrValid::UID, |stat| stat.st_uid = 5)
        .unwrap();
    guest
        .setattr(id, SetattrValid::MTIME, |stat| stat.st_mtime = 5)
        .unwrap();
    let link = fs::symlink_metadata(place.path("root/link")).unwrap();
    assert_eq!((link.uid(), link.mtime()), (5, 5));
    let target = fs::metadata(&outside).unwrap();
    assert_eq!(target.uid(), 0);
    assert_ne!(target.mtime(), 5);
    for (valid, error) in [
        (SetattrValid::MODE, libc::EOPNOTSUPP),
        (SetattrValid::SIZE, libc::ELOOP),
    ] {
        assert_eq!(number(guest.setattr(id, valid, |_| {})), error);
    }
    assert_eq!(fs::read(&outside).unwrap(), b"x");
}

#[test]
fn privileges_go_where_the_guest_asks_for_it() {
    let place = Place::new();
    let path = place.file("root/f", "x");
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/f");
    let arm = || fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).unwrap();
    let mode = || fs::metadata(&path).unwrap().mode() & 0o7777;
    let context = Context::default();
    let handle = guest.open(id, libc::O_RDWR).unwrap();
    let write = |flags| {
        let mut data = Memory::with(b"y");
        let server = &guest.server;
        server
            .write(&context, id, handle, &mut data, 1, 0, None, false, 0, flags)
            .unwrap();
    };
    arm();
    write(0);
    assert_eq!(mode(), 0o6755, "by a caller with CAP_FSETID");
    write(WRITE_KILL_PRIV);
    assert_eq!(mode(), 0o755);
    arm();
    let kill = SetattrValid::SIZE | SetattrValid::KILL_SUIDGID;
    guest.setattr(id, kill, |_| {}).unwrap();
    assert_eq!(mode(), 0o755);
    arm();
    let flags = (libc::O_WRONLY | libc::O_TRUNC) as u32;
    guest
        .server
        .open(&context, id, flags, FOPEN_IN_KILL_SUIDGID)
        .unwrap();
    assert_eq!(mode(), 0o755);
    // Set-group-ID without the group's right to execute is no privilege.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o2644)).unwrap();
    write(WRITE_KILL_PRIV);
    assert_eq!(mode(), 0o2644);
}

#[test]
fn truncation_works_on_a_file_that_nobody_may_write() {
    let place = Place::new();
    let path = place.file("root/f", "0123456789");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/f");
    guest
        .setattr(id, SetattrValid::SIZE, |stat| stat.st_size = 3)
        .unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), 3);
}

#[test]
fn statfs_and_access() -> io::Result<()> {
    let place = Place::new();
    place.file("root/f", "");
    let guest = Guest::of(&place.path("root"));
    let id = guest.id("rootfs/f");
    let told = guest.server.statfs(&guest.context, id)?;
    let host = rustix::fs::statvfs(place.path("root"))?;
    assert_eq!((told.f_blocks, told.f_namemax), (host.f_blocks, 255));
    assert_eq!(guest.server.statfs(&guest.context, 1)?.f_namemax, 255);
    guest.server.access(&guest.context, id, libc::W_OK as u32)?;
    assert_eq!(
        number(guest.server.lookup(&guest.context, id, &c("x")).map(|_| ())),
        libc::ENOTDIR
    );
    Ok(())
}
