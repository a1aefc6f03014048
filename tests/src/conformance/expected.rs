//! What is known beforehand of the tests of others: which are not run, which forkvm fails, each with its reason
//! (`tests/conformance.d/expected.toml`).

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;

use crate::failure::Failure;

/// What is known of all suites.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expected {
    /// containerd's client tests.
    pub client: Suite,
    /// The OCI's runtimetest.
    pub runtimetest: Suite,
}

/// What is known of one suite: reasons by names of tests. A name with `*` at its end stands for all that begin so.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Suite {
    /// Tests that are not run.
    #[serde(default)]
    pub not_run: BTreeMap<String, String>,
    /// Tests that runc passes and forkvm does not.
    #[serde(default)]
    pub forkvm_fails: BTreeMap<String, String>,
    /// Tests that forkvm may pass or fail: by which of two things is quicker, or by the version of the suite.
    #[serde(default)]
    pub forkvm_may_fail: BTreeMap<String, String>,
}

impl Expected {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read, or a reason is missing.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let text = std::fs::read_to_string(path).map_err(Failure::io(path.display()))?;
        Self::parse(&text).map_err(|failure| Failure::new(format!("{}: {failure}", path.display())))
    }

    fn parse(text: &str) -> Result<Self, Failure> {
        let expected: Expected =
            toml::from_str(text).map_err(|error| Failure::new(error.to_string()))?;
        for suite in [&expected.client, &expected.runtimetest] {
            let mut known = suite
                .not_run
                .iter()
                .chain(&suite.forkvm_fails)
                .chain(&suite.forkvm_may_fail);
            if let Some((name, _)) = known.find(|(_, reason)| reason.trim().is_empty()) {
                return Err(Failure::new(format!("{name} has no reason")));
            }
        }
        Ok(expected)
    }
}

impl Suite {
    /// Why this test is not run.
    pub fn why_not_run(&self, test: &str) -> Option<&str> {
        find(&self.not_run, test)
    }

    /// Why forkvm fails this test.
    pub fn why_forkvm_fails(&self, test: &str) -> Option<&str> {
        find(&self.forkvm_fails, test)
    }

    /// Why forkvm may fail this test, and may pass it as well.
    pub fn why_forkvm_may_fail(&self, test: &str) -> Option<&str> {
        find(&self.forkvm_may_fail, test)
    }
}

fn find<'a>(known: &'a BTreeMap<String, String>, test: &str) -> Option<&'a str> {
    let fits = |pattern: &str| match pattern.strip_suffix('*') {
        Some(start) => test.starts_with(start),
        None => test == pattern,
    };
    let (_, reason) = known.iter().find(|(pattern, _)| fits(pattern))?;
    Some(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_every_end() {
        let text = "[client.not-run]\n'TestImage*' = 'pulls'\n[client.forkvm-fails]\nTestOne = 'why'\n[runtimetest]\n";
        let client = Expected::parse(text).unwrap().client;
        assert_eq!(client.why_not_run("TestImagePull"), Some("pulls"));
        assert_eq!(client.why_not_run("TestOne"), None);
        assert_eq!(client.why_forkvm_fails("TestOne"), Some("why"));
        assert_eq!(client.why_forkvm_fails("TestOneMore"), None);
    }

    #[test]
    fn a_reason_is_asked_for() {
        let text = "[client.not-run]\nTestOne = ' '\n[runtimetest]\n";
        let failure = Expected::parse(text).unwrap_err();
        assert!(failure.message().contains("TestOne"), "{failure}");
    }

    #[test]
    fn the_list_in_the_tree_is_valid() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance.d/expected.toml");
        Expected::read(&path).unwrap();
    }
}
