//! What processes that were killed have left in a store, and how templates go: renamed first, so that nobody finds
//! half of one.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use super::{Error, Store, identity::check_id, lock::Lock};

const BUILDING: &str = ".building-";
const REMOVING: &str = ".removing-";
const LOCK: &str = ".lock-";

impl Store {
    /// Where this process makes a template.
    pub(super) fn building(&self, id: &str) -> PathBuf {
        let process = std::process::id();
        self.root().join(format!("{BUILDING}{id}-{process}"))
    }

    /// The lock of an id's builder.
    pub(super) fn builder_lock(&self, id: &str) -> PathBuf {
        self.root().join(format!("{LOCK}{id}"))
    }

    /// Takes a template out of the store; what this returns is to be [erased](erase). Children go on: their files stay
    /// until they end. The store is locked.
    pub(super) fn bury(&self, id: &str) -> Result<PathBuf, Error> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let grave = self
            .root()
            .join(format!("{REMOVING}{id}-{process}-{count}"));
        let folder = self.folder(id);
        fs::rename(&folder, &grave).map_err(Error::file("remove", &folder))?;
        Ok(grave)
    }

    /// Removes what killed processes have left: templates half made or half removed, and locks. `own` is the id whose
    /// builder the caller is. Answers how many things were removed.
    ///
    /// # Errors
    /// A store that cannot be read or changed.
    pub fn sweep(&self, own: Option<&str>) -> Result<usize, Error> {
        let mut removed = 0;
        for name in self.names()? {
            let path = self.root().join(&name);
            if name.starts_with(REMOVING) {
                // Whoever began it has lost all claims; both may do it at once.
                erase(&path)?;
                removed += 1;
            } else if let Some(rest) = name.strip_prefix(BUILDING) {
                let id = rest.split('-').next().unwrap_or_default();
                removed += usize::from(self.sweep_one(id, own, || erase(&path))?);
            } else if let Some(id) = name.strip_prefix(LOCK)
                && own != Some(id)
            {
                removed += usize::from(self.sweep_one(id, own, || Ok(()))?);
            }
        }
        Ok(removed)
    }

    /// Does `clear` if no builder of the id lives.
    fn sweep_one(
        &self,
        id: &str,
        own: Option<&str>,
        clear: impl FnOnce() -> Result<(), Error>,
    ) -> Result<bool, Error> {
        if check_id(id).is_err() {
            return Ok(false);
        }
        if own == Some(id) {
            return clear().map(|()| true);
        }
        let path = self.builder_lock(id);
        match Lock::attempt(&path).map_err(Error::file("lock", &path))? {
            Some(lock) => {
                let cleared = clear();
                lock.remove();
                cleared.map(|()| true)
            }
            None => Ok(false),
        }
    }
}

/// Removes a folder that nobody uses by its name any more.
pub(super) fn erase(folder: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::file("remove", folder)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEAD: &str = "00000000000000aa";
    const LIVES: &str = "00000000000000bb";

    #[test]
    fn what_the_dead_left_goes_and_what_lives_stays() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::new(root.path());
        for name in [
            format!(".building-{DEAD}-1"),
            format!(".building-{LIVES}-2"),
            format!(".removing-{LIVES}-3-0"),
            ".building-else".to_owned(),
            DEAD.to_owned(),
        ] {
            fs::create_dir(root.path().join(&name)).unwrap();
            fs::write(root.path().join(&name).join("memory"), "half").unwrap();
        }
        fs::write(store.builder_lock(DEAD), "").unwrap();
        let builder = Lock::wait(&store.builder_lock(LIVES), || {}).unwrap();
        store.sweep(None).unwrap();
        let mut left = store.names().unwrap();
        left.sort();
        let building = format!(".building-{LIVES}-2");
        let lock = format!(".lock-{LIVES}");
        assert_eq!(left, [&building, ".building-else", &lock, DEAD]);
        // The builder itself clears what one before it left.
        store.sweep(Some(LIVES)).unwrap();
        assert!(!root.path().join(building).exists());
        builder.remove();
        assert_eq!(store.sweep(None).unwrap(), 0);
    }

    #[test]
    fn a_store_that_does_not_exist_has_no_leftovers() {
        assert_eq!(Store::new("/nonexistent/forkvm").sweep(None).unwrap(), 0);
    }
}
