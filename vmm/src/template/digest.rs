//! Digests of the things a template is made from, remembered so that a start reads no kernel.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Error, Machine, lock::Lock};

/// Lower-case hexadecimal digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes
        .iter()
        .flat_map(|byte| [byte >> 4, byte & 15])
        .map(|digit| char::from(DIGITS[usize::from(digit)]))
        .collect()
}

/// SHA-256 of a whole file.
///
/// # Errors
/// Those of reading it.
pub fn of_file(path: &Path) -> Result<String, Error> {
    let mut file = File::open(path).map_err(Error::file("open", path))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        let length = file.read(&mut buffer).map_err(Error::file("read", path))?;
        if length == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..length]);
    }
}

/// What tells that a file is still the one that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: i128,
    changed_ns: i128,
}

impl Stamp {
    /// The stamp of a file.
    ///
    /// # Errors
    /// Those of stat(2).
    pub fn of(path: &Path) -> Result<Self, Error> {
        let metadata = fs::metadata(path).map_err(Error::file("open", path))?;
        Ok(Self::from(&metadata))
    }

    /// Length of the file in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl From<&fs::Metadata> for Stamp {
    fn from(metadata: &fs::Metadata) -> Self {
        let time = |seconds: i64, nanoseconds: i64| {
            i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds)
        };
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified_ns: time(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: time(metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// The remembered digests, `<root>/.digests.json`. Losing the file costs time only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cache {
    files: BTreeMap<PathBuf, (Stamp, String)>,
    /// The host's boot id, and what [`Machine::detect`] found since that boot.
    machine: Option<(String, Machine)>,
}

impl Cache {
    fn path(root: &Path) -> PathBuf {
        root.join(".digests.json")
    }

    /// The cache of a store; empty if there is none or it cannot be read.
    pub(super) fn load(root: &Path) -> Self {
        fs::read(Self::path(root))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }

    /// A cache with one file and a machine in it.
    #[cfg(feature = "fuzzing")]
    pub(super) fn example(file: &Path, machine: Machine) -> Result<Self, Error> {
        let mut cache = Self::default();
        cache.file(file)?;
        cache.machine = Some(("a boot".into(), machine));
        Ok(cache)
    }

    /// Writes the cache beside itself and renames it. Two writers at once: the last wins.
    pub(super) fn save(&self, root: &Path) -> io::Result<()> {
        let path = Self::path(root);
        // What is renamed over the locked file is unlocked, so the lock goes with it.
        let _lock = Lock::wait(&path, || {})?;
        let temporary = root.join(".digests.json.new");
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        fs::rename(temporary, path)
    }

    /// Digest of a file and whether it had to be read.
    pub(super) fn file(&mut self, path: &Path) -> Result<(String, bool), Error> {
        let stamp = Stamp::of(path)?;
        if let Some((known, digest)) = self.files.get(path)
            && *known == stamp
        {
            return Ok((digest.clone(), false));
        }
        let digest = of_file(path)?;
        self.files.insert(path.to_owned(), (stamp, digest.clone()));
        Ok((digest, true))
    }

    /// This machine and whether it had to be asked.
    pub(super) fn machine(&mut self) -> Result<(Machine, bool), Error> {
        const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
        let boot = fs::read_to_string(BOOT_ID).map_err(Error::file("read", BOOT_ID))?;
        if let Some((known, machine)) = &self.machine
            && *known == boot
        {
            return Ok((machine.clone(), false));
        }
        let machine = Machine::detect()?;
        self.machine = Some((boot, machine.clone()));
        Ok((machine, true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal() {
        assert_eq!(hex(&[0, 0x1f, 0xff]), "001fff");
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        fs::write(&path, "one").unwrap();
        let mut cache = Cache::default();
        let (first, read) = cache.file(&path).unwrap();
        assert!(read);
        assert_eq!(cache.file(&path).unwrap(), (first.clone(), false));
        fs::write(&path, "another").unwrap();
        let (second, read) = cache.file(&path).unwrap();
        assert!(read);
        assert_ne!(first, second);
    }

    #[test]
    fn survives_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        fs::write(&path, "one").unwrap();
        let mut cache = Cache::default();
        cache.file(&path).unwrap();
        cache.save(folder.path()).unwrap();
        assert_eq!(Cache::load(folder.path()), cache);
        fs::write(folder.path().join(".digests.json"), "{").unwrap();
        assert_eq!(Cache::load(folder.path()), Cache::default());
    }
}
