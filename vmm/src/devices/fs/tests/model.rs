//! Random operations, done by the server in one directory and directly in its twin: both must end
//! alike, each step must have the same result, and numbers must stay with their files.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use fuse_backend_rs::abi::fuse_abi::SetattrValid;
use proptest::prelude::*;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::guest::{Guest, LIMITS, export};
use super::place::Place;
use crate::devices::fs::Limits;

/// One step. Paths are made of few names, so that they meet.
#[derive(Clone, Debug)]
enum Step {
    Create(String),
    Mkdir(String),
    Symlink(String),
    Write(String, u16, Vec<u8>),
    Truncate(String, u16),
    Chmod(String, u32),
    Unlink(String),
    Rmdir(String),
    Rename(String, String, u32),
    Link(String, String),
    Read(String),
    List(String),
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
        .prop_map(|names| names.join("/"))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => path().prop_map(Step::Create),
        3 => path().prop_map(Step::Mkdir),
        1 => path().prop_map(Step::Symlink),
        2 => (path(), 0_u16..5000, prop::collection::vec(any::<u8>(), 1..40))
            .prop_map(|(path, offset, data)| Step::Write(path, offset, data)),
        1 => (path(), 0_u16..5000).prop_map(|(path, size)| Step::Truncate(path, size)),
        1 => (path(), 0_u32..0o1000).prop_map(|(path, mode)| Step::Chmod(path, mode)),
        2 => path().prop_map(Step::Unlink),
        1 => path().prop_map(Step::Rmdir),
        3 => (path(), path(), 0_u32..3).prop_map(|(from, to, flags)| Step::Rename(from, to, flags)),
        2 => (path(), path()).prop_map(|(from, to)| Step::Link(from, to)),
        2 => path().prop_map(Step::Read),
        1 => path().prop_map(Step::List),
    ]
}

/// An error's number, or 0, and what there was to see.
type Outcome = (i32, Vec<u8>);

fn outcome<T>(result: std::io::Result<T>, seen: impl FnOnce(T) -> Vec<u8>) -> Outcome {
    match result {
        Ok(value) => (0, seen(value)),
        Err(error) => (error.raw_os_error().unwrap(), vec![]),
    }
}

fn by_guest(guest: &Guest, step: &Step) -> Outcome {
    let split = |path: &str| {
        let path = format!("rootfs/{path}");
        let (directory, name) = path.rsplit_once('/').unwrap();
        let found = guest.walk(directory)?;
        if found.attr.st_mode & libc::S_IFMT != libc::S_IFDIR {
            return Err(std::io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        Ok((found.inode, name.to_owned()))
    };
    let find = |path: &str| {
        guest
            .walk(&format!("rootfs/{path}"))
            .map(|entry| entry.inode)
    };
    let none = |()| vec![];
    match step {
        Step::Create(path) => outcome(
            split(path).and_then(|(directory, name)| {
                let (entry, handle) =
                    guest.create_mode(directory, &name, libc::O_RDWR | libc::O_EXCL, 0o666)?;
                guest.close(entry.inode, handle);
                Ok(())
            }),
            none,
        ),
        Step::Mkdir(path) => outcome(
            split(path).and_then(|(directory, name)| guest.mkdir(directory, &name, 0o777)),
            |_| vec![],
        ),
        Step::Symlink(path) => outcome(
            split(path).and_then(|(directory, name)| guest.symlink("a", directory, &name)),
            |_| vec![],
        ),
        Step::Write(path, offset, data) => outcome(
            find(path).and_then(|id| {
                let handle = guest.open(id, libc::O_RDWR)?;
                guest.write(id, handle, u64::from(*offset), data)?;
                guest.close(id, handle);
                Ok(())
            }),
            none,
        ),
        Step::Truncate(path, size) => outcome(
            find(path).and_then(|id| {
                guest.setattr(id, SetattrValid::SIZE, |stat| {
                    stat.st_size = i64::from(*size)
                })
            }),
            |_| vec![],
        ),
        Step::Chmod(path, mode) => outcome(
            find(path)
                .and_then(|id| guest.setattr(id, SetattrValid::MODE, |stat| stat.st_mode = *mode)),
            |_| vec![],
        ),
        Step::Unlink(path) => outcome(
            split(path).and_then(|(directory, name)| guest.unlink(directory, &name)),
            none,
        ),
        Step::Rmdir(path) => outcome(
            split(path).and_then(|(directory, name)| guest.rmdir(directory, &name)),
            none,
        ),
        Step::Rename(from, to, flags) => outcome(
            split(from).and_then(|(from, name)| {
                let (to, new_name) = split(to)?;
                guest.rename((from, &name), (to, &new_name), *flags)
            }),
            none,
        ),
        Step::Link(from, to) => outcome(
            find(from).and_then(|id| {
                let (directory, name) = split(to)?;
                guest.link(id, directory, &name)
            }),
            |_| vec![],
        ),
        Step::Read(path) => outcome(
            find(path).and_then(|id| {
                let handle = guest.open(id, libc::O_RDONLY)?;
                let data = guest.read(id, handle, 0, 1 << 16);
                guest.close(id, handle);
                data
            }),
            |data| data,
        ),
        Step::List(path) => outcome(
            find(path).and_then(|id| guest.opendir(id).map(|handle| (id, handle))),
            |(id, handle)| {
                guest.closedir(id, handle);
                guest.names(id).join("\n").into_bytes()
            },
        ),
    }
}

/// The same, directly. Symbolic links in the middle of a path are not followed, as a guest's
/// kernel would follow them by itself.
fn by_host(root: &Path, step: &Step) -> Outcome {
    use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
    let place = |path: &str| -> std::io::Result<PathBuf> {
        let (directory, name) = path.rsplit_once('/').unwrap_or((".", path));
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let at = openat2(CWD, root, flags, Mode::empty(), ResolveFlags::empty())?;
        openat2(
            &at,
            directory,
            flags | OFlags::NOFOLLOW,
            Mode::empty(),
            ResolveFlags::NO_SYMLINKS,
        )
        .map_err(|error| match error {
            rustix::io::Errno::LOOP => std::io::Error::from_raw_os_error(libc::ENOTDIR),
            other => other.into(),
        })?;
        Ok(root.join(directory).join(name))
    };
    let open = |path: PathBuf| {
        fs::File::options()
            .read(true)
            .write(true)
            .custom(libc::O_NOFOLLOW)
            .open(path)
    };
    let none = |()| vec![];
    match step {
        Step::Create(path) => outcome(place(path).and_then(fs::File::create_new), |_| vec![]),
        Step::Mkdir(path) => outcome(place(path).and_then(fs::create_dir), none),
        Step::Symlink(path) => outcome(place(path).and_then(|path| symlink("a", path)), none),
        Step::Write(path, offset, data) => outcome(
            place(path)
                .and_then(open)
                .and_then(|file| file.write_all_at(data, u64::from(*offset))),
            none,
        ),
        Step::Truncate(path, size) => outcome(
            place(path)
                .and_then(open)
                .and_then(|file| file.set_len(u64::from(*size))),
            none,
        ),
        Step::Chmod(path, mode) => outcome(
            place(path).and_then(|path| {
                if fs::symlink_metadata(&path)?.is_symlink() {
                    return Err(std::io::Error::from_raw_os_error(libc::EOPNOTSUPP));
                }
                fs::set_permissions(path, fs::Permissions::from_mode(*mode))
            }),
            none,
        ),
        Step::Unlink(path) => outcome(place(path).and_then(fs::remove_file), none),
        Step::Rmdir(path) => outcome(place(path).and_then(fs::remove_dir), none),
        Step::Rename(from, to, flags) => outcome(
            place(from).and_then(|from| {
                let to = place(to)?;
                let flags = RenameFlags::from_bits_retain(*flags);
                Ok(renameat_with(CWD, from, CWD, to, flags)?)
            }),
            none,
        ),
        Step::Link(from, to) => outcome(
            place(from).and_then(|from| {
                fs::symlink_metadata(&from)?;
                fs::hard_link(from, place(to)?)
            }),
            none,
        ),
        Step::Read(path) => outcome(
            place(path).and_then(|path| {
                let file = fs::File::options()
                    .read(true)
                    .custom(libc::O_NOFOLLOW)
                    .open(&path)?;
                if file.metadata()?.is_dir() {
                    return Err(std::io::Error::from_raw_os_error(libc::EISDIR));
                }
                fs::read(path)
            }),
            |data| data,
        ),
        Step::List(path) => outcome(
            place(path).and_then(|path| {
                if fs::symlink_metadata(&path)?.is_symlink() {
                    return Err(std::io::Error::from_raw_os_error(libc::ENOTDIR));
                }
                fs::read_dir(path)
            }),
            |entries| {
                let mut names: Vec<_> = entries
                    .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                    .collect();
                names.sort();
                names.join("\n").into_bytes()
            },
        ),
    }
}

trait Custom {
    fn custom(&mut self, flags: i32) -> &mut Self;
}

impl Custom for fs::OpenOptions {
    fn custom(&mut self, flags: i32) -> &mut Self {
        std::os::unix::fs::OpenOptionsExt::custom_flags(self, flags)
    }
}

/// Everything below a directory: path, kind, mode, links, contents.
fn picture(root: &Path) -> Vec<(String, u32, u64, Vec<u8>)> {
    let mut pending = vec![root.to_owned()];
    let mut all = Vec::new();
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let found = fs::symlink_metadata(&path).unwrap();
            let contents = if found.is_file() {
                fs::read(&path).unwrap()
            } else {
                vec![]
            };
            let name = path
                .strip_prefix(root)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned();
            all.push((name, found.mode(), found.nlink(), contents));
            if found.is_dir() {
                pending.push(path);
            }
        }
    }
    all.sort();
    all
}

/// Numbers and the host's inodes are each other's: one number, one file.
fn check_numbers(guest: &Guest, root: &Path, paths: &[String], known: &mut HashMap<u64, u64>) {
    for path in paths {
        let Ok(entry) = guest.walk(&format!("rootfs/{path}")) else {
            continue;
        };
        let host = fs::symlink_metadata(root.join(path)).unwrap();
        assert_eq!(entry.attr.st_ino, host.ino(), "{path}");
        if let Some(before) = known.insert(entry.inode, host.ino()) {
            assert_eq!(before, host.ino(), "number {} of {path} moved", entry.inode);
        }
    }
    let mut owners = HashMap::new();
    for (id, inode) in known.iter() {
        // A stale number may have been given up for another.
        if guest.stat_quietly(*id).is_some()
            && let Some(other) = owners.insert(inode, id)
        {
            panic!("inode {inode} has the numbers {other} and {id}");
        }
    }
}

impl Guest {
    fn stat_quietly(&self, id: u64) -> Option<u64> {
        use fuse_backend_rs::api::filesystem::FileSystem;
        let told = self.server.getattr(&self.context, id, None).ok()?;
        Some(told.0.st_ino)
    }
}

fn run(steps: &[Step], open_nodes: usize, overlay: bool) {
    let place = Place::new();
    let (served, twin) = if overlay {
        place.file("lower/a/b", "from the image");
        place.file("lower/b", "from the image");
        let lower = place.path("lower");
        (
            place.mount_overlay("served", &lower, false),
            place.mount_overlay("twin", &lower, false),
        )
    } else {
        (place.dir("served"), place.dir("twin"))
    };
    let limits = Limits {
        open_nodes,
        ..LIMITS
    };
    let mut guest = Guest::with_limits(vec![export("rootfs", &served)], limits);
    // The twin's operations run in the same thread, which has the mask of the server's last.
    guest.umask = 0;
    rustix::process::umask(rustix::fs::Mode::empty());
    let paths: Vec<String> = ["a", "b", "c"]
        .iter()
        .flat_map(|one| {
            let two = ["a", "b", "c"].map(|two| format!("{one}/{two}"));
            std::iter::once((*one).to_owned()).chain(two)
        })
        .collect();
    let mut known = HashMap::new();
    for (index, step) in steps.iter().enumerate() {
        let expected = by_host(&twin, step);
        let found = by_guest(&guest, step);
        assert_eq!(
            found, expected,
            "step {index}, {step:?} (left: server, right: host)"
        );
        if !overlay {
            check_numbers(&guest, &served, &paths, &mut known);
        }
    }
    assert_eq!(picture(&served), picture(&twin));
    assert_eq!(guest.server.handles().len(), 0);
}

proptest! {
    // A serving thread is in /proc/self/fd, from where no source file is found to write beside.
    #![proptest_config(ProptestConfig {
        cases: 96,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_server_does_as_the_host_does(steps in prop::collection::vec(step(), 1..60)) {
        run(&steps, 1000, false);
    }

    #[test]
    fn also_with_few_descriptors(steps in prop::collection::vec(step(), 1..60)) {
        run(&steps, 8, false);
    }

    #[test]
    fn also_on_an_overlay(steps in prop::collection::vec(step(), 1..40)) {
        run(&steps, 1000, true);
    }
}
