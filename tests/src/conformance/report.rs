//! What came of the suites: `target/report/conformance.json`, an array with one entry for each suite and containerd.

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{expected::Suite, go_test::End};
use crate::failure::Failure;

/// What came of one suite through one containerd.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The suite's name.
    pub suite: String,
    /// The version of the suite.
    pub suite_version: String,
    /// The version of containerd.
    pub containerd: String,
    /// How many tests runc passed: those that count.
    pub runc_passed: usize,
    /// How many of these forkvm passed.
    pub forkvm_passed: usize,
    /// Those that forkvm was expected to fail, with the reason, and did.
    pub expected_failures: BTreeMap<String, String>,
    /// Those that forkvm failed unexpectedly, and those that it passed unexpectedly.
    pub unexpected: Vec<String>,
    /// Those that runc did not pass.
    pub not_counted: Vec<String>,
    /// Those that were not run, with the reason.
    pub not_run: BTreeMap<String, String>,
}

impl Entry {
    /// Counts how tests ended on either runtime.
    pub fn count(
        mut self,
        known: &Suite,
        runc: &BTreeMap<String, End>,
        forkvm: &BTreeMap<String, End>,
    ) -> Self {
        for (test, on_runc) in runc {
            if *on_runc != End::Passed {
                self.not_counted.push(test.clone());
                continue;
            }
            self.runc_passed += 1;
            let passed = forkvm.get(test) == Some(&End::Passed);
            match (passed, known.why_forkvm_fails(test)) {
                (true, None) => self.forkvm_passed += 1,
                (false, Some(reason)) => {
                    self.expected_failures.insert(test.clone(), reason.into());
                }
                (false, None) => match known.why_forkvm_may_fail(test) {
                    Some(reason) => {
                        drop(self.expected_failures.insert(test.clone(), reason.into()))
                    }
                    None => self.unexpected.push(test.clone()),
                },
                // The list is to be true: what passes does not belong there.
                (true, Some(_)) => {
                    self.forkvm_passed += 1;
                    self.unexpected
                        .push(format!("{test} (expected to fail, but it passes)"));
                }
            }
        }
        self
    }

    /// Puts the entry into the report in `folder`, in place of an older one of the same suite and containerd.
    ///
    /// # Errors
    /// When the report cannot be read or written.
    pub fn write(&self, folder: &Path) -> Result<(), Failure> {
        let mut entries = read(folder)?;
        let same = |entry: &Entry| entry.suite == self.suite && entry.containerd == self.containerd;
        entries.retain(|entry| !same(entry));
        entries.push(self.clone());
        let path = path(folder);
        let text = serde_json::to_string_pretty(&entries)
            .map_err(|error| Failure::new(error.to_string()))?;
        fs::create_dir_all(folder)
            .and_then(|()| fs::write(&path, text + "\n"))
            .map_err(Failure::io(path.display()))
    }
}

/// The report's name among others, without its ending.
pub const NAME: &str = "conformance";

fn path(folder: &Path) -> PathBuf {
    folder.join(format!("{NAME}.json"))
}

/// Reads the report in `folder`; none is an empty one.
///
/// # Errors
/// When it is there and cannot be read.
pub fn read(folder: &Path) -> Result<Vec<Entry>, Failure> {
    let path = path(folder);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(&path).map_err(Failure::io(path.display()))?;
    serde_json::from_str(&text)
        .map_err(|error| Failure::new(format!("{} is no report: {error}", path.display())))
}

impl fmt::Display for Entry {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{} {}, containerd {}: of {} tests that runc passes, forkvm passes {}, {} expected failures, {} unexpected",
            self.suite,
            self.suite_version,
            self.containerd,
            self.runc_passed,
            self.forkvm_passed,
            self.expected_failures.len(),
            self.unexpected.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(ends: &[(&str, End)]) -> BTreeMap<String, End> {
        ends.iter()
            .map(|(name, end)| ((*name).to_owned(), *end))
            .collect()
    }

    #[test]
    fn only_what_runc_passes_counts_and_every_surprise_is_told() {
        let known = Suite {
            forkvm_fails: [("Known", "why"), ("Better", "why")]
                .map(|(name, why)| (name.into(), why.into()))
                .into(),
            forkvm_may_fail: [("Race", "why"), ("Luck", "why")]
                .map(|(name, why)| (name.into(), why.into()))
                .into(),
            ..Suite::default()
        };
        let (passed, failed) = (End::Passed, End::Failed);
        let runc = ends(&[
            ("Good", passed),
            ("Race", passed),
            ("Luck", passed),
            ("Known", passed),
            ("Better", passed),
            ("Bad", passed),
            ("NotEvenRunc", failed),
            ("Left", End::Skipped),
        ]);
        let forkvm = ends(&[
            ("Good", passed),
            ("Race", failed),
            ("Luck", passed),
            ("Known", End::Hung),
            ("Better", passed),
            ("Bad", failed),
            ("NotEvenRunc", failed),
        ]);
        let entry = Entry::default().count(&known, &runc, &forkvm);
        assert_eq!((entry.runc_passed, entry.forkvm_passed), (6, 3));
        let expected: Vec<&String> = entry.expected_failures.keys().collect();
        assert_eq!(expected, ["Known", "Race"]);
        assert_eq!(entry.unexpected.len(), 2, "{:?}", entry.unexpected);
        assert_eq!(entry.not_counted, ["Left", "NotEvenRunc"]);
    }

    #[test]
    fn an_entry_takes_the_place_of_its_older_one() {
        let folder = tempfile::tempdir().unwrap();
        let of = |containerd: &str, runc_passed| Entry {
            containerd: containerd.into(),
            runc_passed,
            ..Entry::default()
        };
        for entry in [of("1", 1), of("2", 2), of("1", 3)] {
            entry.write(folder.path()).unwrap();
        }
        assert_eq!(read(folder.path()).unwrap(), [of("2", 2), of("1", 3)]);
    }
}
