//! forkvm's configuration file while a case or a measurement needs another one.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::failure::Failure;

/// Puts a configuration in place; what was there before comes back when this is dropped.
///
/// A run that was killed leaves the user's file beside it; the next one puts it back first.
#[derive(Debug)]
pub struct ConfigFile {
    path: PathBuf,
}

impl ConfigFile {
    /// Puts `text` in place of the installed configuration.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn with(text: &str) -> Result<Self, Failure> {
        Self::at(Path::new(forkvm_config::PATH), text)
    }

    fn at(path: &Path, text: &str) -> Result<Self, Failure> {
        let this = ConfigFile {
            path: path.to_owned(),
        };
        let kept = this.kept();
        let folder = path.parent().unwrap_or(Path::new("/"));
        let write = || {
            fs::create_dir_all(folder)?;
            // Else it is the user's file of a run that was killed: that one is to come back.
            if !kept.exists() {
                match fs::copy(path, &kept) {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                        fs::write(&kept, "")?;
                    }
                    copied => drop(copied?),
                }
            }
            fs::write(path, text)
        };
        write().map_err(Failure::io(path.display()))?;
        Ok(this)
    }

    fn kept(&self) -> PathBuf {
        self.path.with_extension("toml.before-tests")
    }
}

impl Drop for ConfigFile {
    fn drop(&mut self) {
        let restored = fs::rename(self.kept(), &self.path);
        // An empty file is the same as none.
        let empty = fs::metadata(&self.path).is_ok_and(|status| status.len() == 0);
        let result = restored.and_then(|()| {
            if empty {
                fs::remove_file(&self.path)
            } else {
                Ok(())
            }
        });
        if let Err(error) = result {
            eprintln!("cannot put {} back: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_users_file_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        fs::write(&path, "[vm]\n").unwrap();
        let changed = ConfigFile::at(&path, "[log]\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "[log]\n");
        // As after a kill: dropped without its destructor.
        std::mem::forget(changed);
        drop(ConfigFile::at(&path, "[paths]\n").unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "[vm]\n");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn no_file_stays_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("etc/config.toml");
        drop(ConfigFile::at(&path, "[log]\n").unwrap());
        assert!(!path.exists());
    }
}
