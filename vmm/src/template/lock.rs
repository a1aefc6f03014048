//! A lock that is a file's name: held by one, waited for in the kernel.
//!
//! flock(2) locks an inode, and the name may have been given to another since: then the lock is nobody's and is taken
//! again. So whoever holds a lock may remove its file, or rename another over it, and nothing is left behind.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

/// A held lock; freed when dropped, and by the kernel when its process ends.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock `path`, making the file if need be. `waiting` is called once if another holds it.
    pub(super) fn wait(path: &Path, mut waiting: impl FnMut()) -> io::Result<Self> {
        loop {
            let file = open(path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => {
                    waiting();
                    uninterrupted(|| flock(&file, FlockOperation::LockExclusive))?;
                }
                other => other?,
            }
            if names(path, &file)? {
                return Ok(Self {
                    file,
                    path: path.to_owned(),
                });
            }
        }
    }

    /// Takes it if nobody holds it.
    pub(super) fn attempt(path: &Path) -> io::Result<Option<Self>> {
        let file = open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(None),
            other => other?,
        }
        Ok(names(path, &file)?.then(|| Self {
            file,
            path: path.to_owned(),
        }))
    }

    /// The locked file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Frees it and removes the file.
    pub(super) fn remove(self) {
        // A file that stays is only in the way of people.
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .mode(0o600)
        .open(path)
}

/// Whether `path` is the name of `file`.
fn names(path: &Path, file: &File) -> io::Result<bool> {
    let held = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (held.dev(), held.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Repeats a call that a signal has interrupted.
pub(super) fn uninterrupted(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{
            atomic::{AtomicUsize, Ordering},
            mpsc,
        },
        thread,
    };

    use super::*;

    #[test]
    fn one_holds_it_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".lock");
        let held = Lock::wait(&path, || panic!("nobody else is there")).unwrap();
        assert!(Lock::attempt(&path).unwrap().is_none());
        held.remove();
        assert!(!path.exists());
        assert!(Lock::attempt(&path).unwrap().is_some());
    }

    #[test]
    fn whoever_waited_for_a_removed_lock_does_not_hold_an_old_one() {
        const WAITERS: usize = 8;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".lock");
        let held = Lock::wait(&path, || {}).unwrap();
        let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let (sender, waits) = mpsc::channel();
        thread::scope(|scope| {
            for _ in 0..WAITERS {
                let (sender, path, inside, most) = (sender.clone(), &path, &inside, &most);
                scope.spawn(move || {
                    let lock = Lock::wait(path, || sender.send(()).unwrap()).unwrap();
                    most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                    lock.remove();
                });
            }
            for _ in 0..WAITERS {
                waits.recv().unwrap();
            }
            held.remove();
        });
        assert_eq!(most.into_inner(), 1);
        assert!(!path.exists());
    }
}
