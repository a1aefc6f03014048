//! containerd's own tests of its client (`integration/client`): they start a containerd and run containers through its API.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use super::{
    clean::clean,
    expected::Suite,
    go_test::{self, End},
    report::Entry,
};
use crate::{
    failure::Failure,
    machine::Runtime,
    process::{Running, Streams},
    runner::may_hang,
};

/// Where the tests' images are served from: the names of them in the program say so (tests/conformance).
const REGISTRY: &str = "127.0.0.1:5000";

/// What is run, and through which containerd.
#[derive(Debug)]
pub struct Client {
    /// The test program, built by `go test -c`.
    pub binary: PathBuf,
    /// The version of containerd's source that it was built from.
    pub version: String,
    /// Folder with the containerd to run it with; None for the machine's own.
    pub containerd: Option<PathBuf>,
    /// The registry (tests/conformance.d/registry).
    pub registry: PathBuf,
    /// The OCI layout that the registry serves.
    pub layout: PathBuf,
    /// Folder for everything that the programs write.
    pub logs: PathBuf,
    /// Only tests whose names contain one of these; all if it is empty.
    pub names: Vec<String>,
}

impl Client {
    /// Runs the tests on runc, and then on forkvm those that passed.
    ///
    /// # Errors
    /// When they cannot be run; tests that fail are in the result.
    pub fn run(&self, known: &Suite) -> Result<Entry, Failure> {
        let mut entry = Entry {
            suite: "containerd client".into(),
            suite_version: self.version.clone(),
            containerd: self.containerd_version()?,
            ..Entry::default()
        };
        let mut tests = Vec::new();
        for test in go_test::names(&self.binary)? {
            let chosen = self.names.is_empty() || self.names.iter().any(|name| test.contains(name));
            match known.why_not_run(&test) {
                _ if !chosen => {}
                Some(reason) => drop(entry.not_run.insert(test, reason.into())),
                None => tests.push(test),
            }
        }
        fs::create_dir_all(&self.logs).map_err(Failure::io(self.logs.display()))?;
        let _registry = self.serve()?;
        let runc = self.run_on(Runtime::Runc, &tests, &entry.containerd)?;
        tests.retain(|test| runc.get(test) == Some(&End::Passed));
        let mut forkvm = self.run_on(Runtime::Forkvm, &tests, &entry.containerd)?;
        if may_hang(Runtime::Forkvm) {
            tests.retain(|test| {
                forkvm.get(test) != Some(&End::Passed) && known.why_forkvm_fails(test).is_none()
            });
            forkvm.extend(self.run_on(Runtime::Forkvm, &tests, &entry.containerd)?);
        }
        Ok(entry.count(known, &runc, &forkvm))
    }

    fn run_on(
        &self,
        runtime: Runtime,
        tests: &[String],
        containerd: &str,
    ) -> Result<BTreeMap<String, End>, Failure> {
        println!(
            "  {} client tests through containerd {containerd}, on {}",
            tests.len(),
            runtime.name()
        );
        let path = self
            .logs
            .join(format!("client-{containerd}-{}.log", runtime.name()));
        let mut log = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(Failure::io(path.display()))?;
        let command = || {
            let mut command = Command::new(&self.binary);
            command
                .args(["-test.root", "-no-criu"])
                .env("TEST_RUNTIME", runtime.for_ctr())
                .env("PATH", self.path());
            command
        };
        go_test::run(&command, tests, &mut log, &clean)
    }

    /// The programs' PATH: what lies beside this containerd first.
    fn path(&self) -> String {
        let rest = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        match &self.containerd {
            Some(folder) => format!("{}:{rest}", folder.display()),
            None => rest.into(),
        }
    }

    /// Of `containerd github.com/containerd/containerd/v2 2.4.2+unknown` the number.
    fn containerd_version(&self) -> Result<String, Failure> {
        let mut program = PathBuf::from("containerd");
        if let Some(folder) = &self.containerd {
            program = folder.join(program);
        }
        let output = Command::new(&program)
            .arg("--version")
            .output()
            .map_err(Failure::io(program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        version_of(&text)
            .ok_or_else(|| Failure::new(format!("{} says {text:?}", program.display())))
    }

    fn serve(&self) -> Result<Running, Failure> {
        let shown = |path: &Path| path.display().to_string();
        let command = [shown(&self.registry), REGISTRY.into(), shown(&self.layout)];
        let registry = Running::spawn(&command, Streams::Pipes)?;
        registry.line("ready", Instant::now() + Duration::from_secs(60))?;
        Ok(registry)
    }
}

fn version_of(text: &str) -> Option<String> {
    let word = text.split_whitespace().nth(2)?.trim_start_matches('v');
    let end = word.find(|letter: char| letter != '.' && !letter.is_ascii_digit());
    let version = &word[..end.unwrap_or(word.len())];
    (!version.is_empty()).then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_taken_without_additions() {
        let of = |text| version_of(text);
        let text = "containerd github.com/containerd/containerd/v2 2.4.2+unknown \n";
        assert_eq!(of(text).as_deref(), Some("2.4.2"));
        let text = "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6\n";
        assert_eq!(of(text).as_deref(), Some("1.7.24"));
        assert_eq!(of("containerd"), None);
    }
}
