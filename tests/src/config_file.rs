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

    /// Lays `text` over the installed configuration.
    ///
    /// # Errors
    /// When one of them is not valid TOML, or the files cannot be written.
    pub fn changed(text: &str) -> Result<Self, Failure> {
        let path = Path::new(forkvm_config::PATH);
        let installed = match fs::read_to_string(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            read => read.map_err(Failure::io(path.display()))?,
        };
        Self::at(path, &overlaid(&installed, text)?)
    }

    /// Gives machines this many vCPUs.
    ///
    /// # Errors
    /// See [`ConfigFile::changed`].
    pub fn with_vcpus(vcpus: u8) -> Result<Self, Failure> {
        Self::changed(&format!("[vm]\nvcpus = {vcpus}\n"))
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

/// `installed` with the options of `text` in place of its own.
fn overlaid(installed: &str, text: &str) -> Result<String, Failure> {
    let parse = |text: &str| {
        let parsed = text.parse::<toml::Table>();
        parsed.map_err(|error| Failure::new(format!("a configuration that is no TOML: {error}")))
    };
    let mut tables = parse(installed)?;
    for (name, options) in parse(text)? {
        match (tables.get_mut(&name), options) {
            (Some(toml::Value::Table(known)), toml::Value::Table(options)) => known.extend(options),
            (_, options) => drop(tables.insert(name, options)),
        }
    }
    Ok(tables.to_string())
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
    fn what_is_laid_over_replaces_its_options_alone() {
        let installed = "[vm]\nvcpus = 1\nmemory_mib = 256\n[log]\nlevel = \"debug\"\n";
        let text = overlaid(installed, "[vm]\nvcpus = 4\n[test]\nkill = \"\"\n").unwrap();
        let config = forkvm_config::Config::parse(&text, Path::new("x")).unwrap();
        assert_eq!((config.vm.vcpus, config.vm.memory_mib), (4, 256));
        assert_eq!(config.log.level.as_str(), "debug");
        assert!(overlaid(installed, "[vm").is_err());
    }

    #[test]
    fn no_file_stays_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("etc/config.toml");
        drop(ConfigFile::at(&path, "[log]\n").unwrap());
        assert!(!path.exists());
    }
}
