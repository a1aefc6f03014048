//! What happened to templates, counted in a file that outlives those who count.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::{Error, lock::Lock};

/// Upper bound of the file's length in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Ids whose last build failed that are remembered: more than there are sizes and domains in use.
const MAX_FAILURES: usize = 64;

/// Characters of a reason that are kept: more than a message of one line has, less than a console.
const MAX_REASON: usize = 500;

/// Counts since the file was made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// Templates that were made.
    pub built: u64,
    /// Builds that failed.
    pub failed: u64,
    /// Containers that were booted because there was no template to fork.
    pub fall_backs: u64,
    /// Templates that were found damaged by a start and made anew.
    pub damaged: u64,
    /// Templates that were made anew because of their age.
    pub expired: u64,
    /// Templates that were removed to keep the budget.
    pub evicted: u64,
    /// The last fall-back.
    pub last_fall_back: Option<FallBack>,
    /// Ids whose last build failed.
    pub failures: BTreeMap<String, Failure>,
}

/// A container that was booted because there was no template to fork.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FallBack {
    /// When, seconds since 1970.
    pub at: u64,
    /// Its namespace and id.
    pub container: String,
    /// Why.
    pub reason: String,
}

/// A build that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// When, seconds since 1970.
    pub at: u64,
    /// Why.
    pub reason: String,
}

impl Record {
    /// Counts a container that was booted for want of a template.
    pub fn fell_back(&mut self, container: &str, reason: &str) {
        self.fall_backs = self.fall_backs.saturating_add(1);
        self.last_fall_back = Some(FallBack {
            at: now(),
            container: container.to_owned(),
            reason: shortened(reason),
        });
    }

    pub(super) fn succeeded(&mut self, id: &str) {
        self.built = self.built.saturating_add(1);
        self.failures.remove(id);
    }

    pub(super) fn failed(&mut self, id: &str, reason: &str) {
        self.failed = self.failed.saturating_add(1);
        let failure = Failure {
            at: now(),
            reason: shortened(reason),
        };
        self.failures.insert(id.to_owned(), failure);
        while self.failures.len() > MAX_FAILURES {
            let oldest = self.failures.iter().min_by_key(|(_, failure)| failure.at);
            let oldest = oldest.map(|(id, _)| id.clone());
            oldest.and_then(|id| self.failures.remove(&id));
        }
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn shortened(reason: &str) -> String {
    reason.chars().take(MAX_REASON).collect()
}

/// The file of a [`Record`], as JSON. Changes are whole or not at all, one after the other.
#[derive(Clone, Debug)]
pub struct RecordFile {
    path: PathBuf,
}

impl RecordFile {
    /// The file at `path`; it and the folders above it are made with the first count.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// What stands in it; nothing happened if there is no file.
    ///
    /// # Errors
    /// A file that cannot be read or is no record.
    pub fn read(&self) -> Result<Record, Error> {
        match fs::File::open(&self.path).and_then(parse) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Record::default()),
            other => other.map_err(Error::file("read", &self.path)),
        }
    }

    /// Changes it. A record that cannot be kept is no reason to keep a container from starting: it is logged.
    pub fn change(&self, change: impl FnOnce(&mut Record)) {
        if let Err(error) = self.try_change(change) {
            log::warn!("cannot count in {}: {error}", self.path.display());
        }
    }

    fn try_change(&self, change: impl FnOnce(&mut Record)) -> io::Result<()> {
        fs::create_dir_all(self.path.parent().unwrap_or(Path::new("/")))?;
        // The record that is renamed over the locked one is unlocked, so the lock goes with the change.
        let lock = Lock::wait(&self.path, || {})?;
        let mut record = match parse(lock.file()) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                log::warn!("{} begins anew: {error}", self.path.display());
                Record::default()
            }
            other => other?,
        };
        change(&mut record);
        let mut text = serde_json::to_vec_pretty(&record)?;
        text.push(b'\n');
        let mut temporary = self.path.clone().into_os_string();
        temporary.push(".new");
        fs::File::create(&temporary)?.write_all(&text)?;
        fs::rename(&temporary, &self.path)
    }
}

/// An empty file is one that was just made.
fn parse(file: impl Read) -> io::Result<Record> {
    let mut text = Vec::new();
    file.take(MAX_BYTES).read_to_end(&mut text)?;
    if text.is_empty() {
        return Ok(Record::default());
    }
    serde_json::from_slice(&text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_many_at_once_are_all_there() {
        let folder = tempfile::tempdir().unwrap();
        let file = RecordFile::new(folder.path().join("below/record.json"));
        assert_eq!(file.read().unwrap(), Record::default());
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..25 {
                        file.change(|record| record.fell_back("default/c", "no room"));
                    }
                });
            }
        });
        let record = file.read().unwrap();
        assert_eq!(record.fall_backs, 200);
        assert_eq!(record.last_fall_back.unwrap().reason, "no room");
        let left = fs::read_dir(folder.path().join("below")).unwrap().count();
        assert_eq!(left, 1, "the record alone");
    }

    #[test]
    fn a_record_that_is_none_begins_anew_and_is_told_to_readers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        fs::write(&path, "{").unwrap();
        let file = RecordFile::new(&path);
        let error = file.read().unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()), "{error}");
        file.change(|record| record.built += 1);
        assert_eq!(file.read().unwrap().built, 1);
        // One of an older version has fewer fields.
        fs::write(&path, r#"{"built": 7}"#).unwrap();
        assert_eq!(file.read().unwrap().built, 7);
    }

    #[test]
    fn failures_are_forgotten_by_success_and_bounded() {
        let mut record = Record::default();
        for number in 0..MAX_FAILURES + 10 {
            record.failed(&format!("{number:016x}"), &"x".repeat(9000));
        }
        assert_eq!(record.failures.len(), MAX_FAILURES);
        let (id, failure) = record.failures.pop_first().unwrap();
        assert_eq!(failure.reason.len(), MAX_REASON);
        record.failed(&id, "again");
        record.succeeded(&id);
        assert!(!record.failures.contains_key(&id));
        assert_eq!(record.built, 1);
    }
}
