//! The OCI bundle folder that containerd made for a container, and what a shim keeps in it.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use serde::Deserialize;

/// The lock that a living shim holds.
const LOCK: &str = "shim.lock";

/// containerd 1.x finds a living shim by this file when it starts anew.
const ADDRESS: &str = "address";

/// What can be wrong with a bundle.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot use the bundle {path}: {source}")]
    Folder { path: PathBuf, source: io::Error },
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is not an OCI configuration: {source}")]
    Parse {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot lock {path}: {source}")]
    Lock { path: PathBuf, source: io::Error },
}

/// A bundle folder.
#[derive(Clone, Debug)]
pub(crate) struct Bundle {
    path: PathBuf,
}

impl Bundle {
    /// The bundle at `path`; containerd starts a shim in the bundle, so an empty path is the
    /// working folder.
    pub(crate) fn open(path: &str) -> Result<Self, Error> {
        let given = if path.is_empty() {
            Path::new(".")
        } else {
            Path::new(path)
        };
        let path = fs::canonicalize(given).map_err(|source| Error::Folder {
            path: given.to_owned(),
            source,
        })?;
        Ok(Self { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The annotations of `config.json`, without reading the rest of it. A bundle without a
    /// configuration has none: `Create` will say so.
    pub(crate) fn annotations(&self) -> Result<HashMap<String, String>, Error> {
        #[derive(Deserialize)]
        struct Annotated {
            #[serde(default)]
            annotations: Option<HashMap<String, String>>,
        }
        let path = self.path.join("config.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(HashMap::new()),
            Err(source) => return Err(Error::Read { path, source }),
        };
        let annotated: Annotated =
            serde_json::from_slice(&text).map_err(|source| Error::Parse { path, source })?;
        Ok(annotated.annotations.unwrap_or_default())
    }

    /// Takes the lock of the living shim; `None` when another holds it. It is freed when the last
    /// copy of the descriptor is closed.
    pub(crate) fn lock(&self) -> Result<Option<File>, Error> {
        let path = self.path.join(LOCK);
        let failed = |source| Error::Lock {
            path: path.clone(),
            source,
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                // What a dead shim left is not our number.
                file.set_len(0).map_err(failed)?;
                Ok(Some(file))
            }
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// What stands in the lock file: the PID of the shim that holds it.
    pub(crate) fn lock_holder(&self) -> String {
        fs::read_to_string(self.path.join(LOCK)).unwrap_or_default()
    }

    /// Keeps the shim's address for containerd's next start.
    pub(crate) fn write_address(&self, address: &str) -> Result<(), Error> {
        let path = self.path.join(ADDRESS);
        // Whole or not at all: containerd may read it at any time.
        let temporary = self.path.join(".address");
        fs::write(&temporary, address)
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|source| Error::Write { path, source })
    }

    /// The file of the shim's socket, if one was made.
    pub(crate) fn socket(&self) -> Option<PathBuf> {
        let address = fs::read_to_string(self.path.join(ADDRESS)).ok()?;
        address.strip_prefix("unix://").map(PathBuf::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(config: Option<&str>) -> (tempfile::TempDir, Bundle) {
        let folder = tempfile::tempdir().unwrap();
        if let Some(config) = config {
            fs::write(folder.path().join("config.json"), config).unwrap();
        }
        let bundle = Bundle::open(folder.path().to_str().unwrap()).unwrap();
        (folder, bundle)
    }

    #[test]
    fn annotations_are_read_and_may_be_missing() {
        let (_folder, with) = bundle(Some(r#"{"ociVersion":"1.1.0","annotations":{"a":"b"}}"#));
        assert_eq!(with.annotations().unwrap()["a"], "b");
        let (_folder, without) = bundle(Some(r#"{"ociVersion":"1.1.0"}"#));
        assert!(without.annotations().unwrap().is_empty());
        let (_folder, null) = bundle(Some(r#"{"annotations":null}"#));
        assert!(null.annotations().unwrap().is_empty());
        let (_folder, empty) = bundle(None);
        assert!(empty.annotations().unwrap().is_empty());
    }

    #[test]
    fn a_broken_configuration_is_named() {
        let (_folder, bundle) = bundle(Some("{"));
        assert!(
            bundle
                .annotations()
                .unwrap_err()
                .to_string()
                .contains("config.json")
        );
    }

    #[test]
    fn the_lock_is_held_once_and_freed_with_its_holder() {
        let (_folder, bundle) = bundle(None);
        let first = bundle.lock().unwrap();
        assert!(first.is_some());
        assert!(bundle.lock().unwrap().is_none());
        drop(first);
        assert!(bundle.lock().unwrap().is_some());
    }

    #[test]
    fn the_address_comes_back() {
        let (_folder, bundle) = bundle(None);
        assert_eq!(bundle.socket(), None);
        bundle
            .write_address("unix:///run/containerd/s/abc")
            .unwrap();
        assert_eq!(
            bundle.socket(),
            Some(PathBuf::from("/run/containerd/s/abc"))
        );
    }
}
