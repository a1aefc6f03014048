//! A folder that is exported to the guest, in a small file system of its own, beside one that the
//! guest must never reach.

use std::cell::OnceCell;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use forkvm_vmm::devices::fs::Export;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Bytes and files of the file system: what a guest can fill at most.
const SIZE: &std::ffi::CStr = c"size=4m,nr_inodes=2000,mode=755";

/// The folder outside of the export, and what no answer may ever hold.
struct Canary {
    folder: PathBuf,
    /// Random, so that no input can hold it by chance. It is the content of the file `known`, to
    /// which a link of the export leads, and the name of another file.
    secret: String,
    /// Change time, size and links of the folder and the file.
    seen: [(i64, i64, u64, u64); 2],
}

/// The place of one thread.
pub struct Place {
    root: PathBuf,
    canary: Canary,
}

thread_local! {
    static PLACE: OnceCell<Place> = const { OnceCell::new() };
}

/// Calls `work` with a fresh export, and asserts afterwards that nothing outside of it was touched.
/// It needs root, as the file server does.
pub fn with<T>(work: impl FnOnce(&Place) -> T) -> T {
    PLACE.with(|place| {
        let place = place.get_or_init(Place::new);
        place.fill();
        let result = work(place);
        place.canary.check();
        result
    })
}

impl Place {
    fn new() -> Self {
        // SAFETY: only this thread's mounts, working directory and mask become its own.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
            .expect("a mount namespace: run this as root");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).expect("private mounts");
        // It stays, and is empty for everybody else: what is in it is in this thread's mounts alone.
        let base = std::env::temp_dir().join("forkvm-fuzz");
        fs::create_dir_all(&base).expect("a folder");
        let flags = MountFlags::NODEV | MountFlags::NOSUID;
        mount("tmpfs", &base, "tmpfs", flags, Some(SIZE)).expect("a tmpfs");
        let mut random = [0; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .expect("random bytes");
        let secret: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
        let folder = base.join("outside");
        fs::create_dir(&folder).expect("a folder");
        fs::write(folder.join("known"), &secret).expect("a file");
        fs::write(folder.join(&secret), "").expect("a file");
        let mut canary = Canary {
            folder,
            secret,
            seen: Default::default(),
        };
        canary.seen = canary.look();
        Self {
            root: base.join("root"),
            canary,
        }
    }

    /// Puts the tree into the export, as every input finds it.
    fn fill(&self) {
        // The file server has left its own in this thread, and takes it to be there.
        let mask = rustix::process::umask(Mode::from_raw_mode(0o022));
        let root = &self.root;
        if root.exists() {
            fs::remove_dir_all(root).expect("what the last guest left can be removed");
        }
        fs::create_dir_all(root.join("d/e")).expect("folders");
        fs::write(root.join("f"), "content of the file").expect("a file");
        fs::write(root.join("d/g"), "another").expect("a file");
        let outside = &self.canary.folder;
        symlink("../outside", root.join("up")).expect("a link");
        symlink(outside, root.join("out")).expect("a link");
        symlink(outside.join("known"), root.join("file")).expect("a link");
        rustix::process::umask(mask);
    }

    /// The export, as the launcher hands it over.
    pub fn exports(&self) -> Vec<Export> {
        let open = |path: &Path| -> OwnedFd {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty()).expect("the export")
        };
        let export = |name: &str, path: &Path, read_only| Export {
            name: name.to_owned(),
            file: open(path),
            read_only,
            shared: read_only,
        };
        vec![
            export("rootfs", &self.root, false),
            export("vol-0", &self.root.join("d"), true),
        ]
    }

    /// An empty folder beside the export, for what is no guest's.
    pub fn scratch(&self) -> PathBuf {
        let path = self.root.with_file_name("scratch");
        if path.exists() {
            fs::remove_dir_all(&path).expect("what the last input left can be removed");
        }
        fs::create_dir(&path).expect("a folder");
        path
    }

    /// What the guest must never see.
    pub fn secret(&self) -> &[u8] {
        self.canary.secret.as_bytes()
    }
}

impl Canary {
    fn look(&self) -> [(i64, i64, u64, u64); 2] {
        [self.folder.clone(), self.folder.join("known")].map(|path| {
            let found = fs::symlink_metadata(path).expect("what is outside is still there");
            (
                found.ctime(),
                found.ctime_nsec(),
                found.size(),
                found.nlink(),
            )
        })
    }

    fn check(&self) {
        // Whatever changes a file, its owner, mode, name or links changes the time of change.
        assert_eq!(self.look(), self.seen, "the guest has left its export");
    }
}
