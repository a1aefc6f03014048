//! `forkvm check`: whether this machine can run forkvm's containers, one line for each question.

mod host;
mod installation;
mod kvm;

use std::{fmt, process::ExitCode};

use forkvm_config::Config;
use serde::Serialize;

/// The answer to one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Status {
    /// As it should be.
    Ok,
    /// Something is to be done, but this machine can run containers.
    Warn,
    /// This machine cannot run containers as it is.
    Fail,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// The answer.
    status: Status,
    /// What was looked at.
    check: &'static str,
    /// What was found.
    found: String,
    /// What to do about it; empty if it is as it should be.
    todo: String,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            status: Status::Ok,
            check,
            found: found.into(),
            todo: String::new(),
        }
    }

    fn warn(check: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self {
            status: Status::Warn,
            check,
            found: found.into(),
            todo: todo.into(),
        }
    }

    fn fail(check: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self {
            status: Status::Fail,
            ..Self::warn(check, found, todo)
        }
    }
}

/// The report's line: `FAIL  check: what was found; what to do`.
impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = match self.status {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        };
        write!(formatter, "{status:<4}  {}: {}", self.check, self.found)?;
        if !self.todo.is_empty() {
            write!(formatter, "; {}", self.todo)?;
        }
        Ok(())
    }
}

/// Asks everything and prints the answers. Exit code 1 if containers cannot start.
pub(crate) fn run(json: bool) -> ExitCode {
    let mut findings = Vec::new();
    let mut tell = |finding: Finding| {
        if !json {
            println!("{finding}");
        }
        findings.push(finding);
    };
    kvm::check(&mut tell);
    host::check(&mut tell);
    match Config::load() {
        Ok(config) => {
            tell(Finding::ok("configuration", configuration_source()));
            installation::check(&config, &mut tell);
        }
        Err(error) => tell(Finding::fail(
            "configuration",
            // One line, as every finding; the parser's messages have several.
            error
                .to_string()
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" "),
            "correct the file",
        )),
    }
    if json {
        crate::output::print_json(&findings);
    }
    let failed = findings
        .iter()
        .filter(|finding| finding.status == Status::Fail)
        .count();
    if failed == 0 {
        return ExitCode::SUCCESS;
    }
    if !json {
        println!("{}", summary(failed));
    }
    ExitCode::FAILURE
}

fn summary(failed: usize) -> String {
    let what = match failed {
        1 => "one check failed".to_owned(),
        _ => format!("{failed} checks failed"),
    };
    format!("{what}: this machine cannot start forkvm's containers until that is put right")
}

fn configuration_source() -> String {
    match std::env::var_os(forkvm_config::PATH_VARIABLE) {
        Some(path) => path.to_string_lossy().into_owned(),
        None if std::path::Path::new(forkvm_config::PATH).exists() => forkvm_config::PATH.into(),
        None => "built-in defaults".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_was_found_and_what_to_do() {
        let line = Finding::fail("tun", "no /dev/net/tun", "run `modprobe tun`").to_string();
        assert_eq!(line, "FAIL  tun: no /dev/net/tun; run `modprobe tun`");
        assert_eq!(
            Finding::ok("tun", "/dev/net/tun").to_string(),
            "ok    tun: /dev/net/tun"
        );
        let line = Finding::warn("root", "not root", "run as root").to_string();
        assert_eq!(line, "warn  root: not root; run as root");
    }

    #[test]
    fn the_last_line_counts() {
        assert!(summary(1).starts_with("one check failed"));
        assert!(summary(3).starts_with("3 checks failed"));
    }

    #[test]
    fn json_has_stable_names() {
        let value = serde_json::to_value(Finding::fail("a", "b", "c")).unwrap();
        let expected =
            serde_json::json!({"status": "fail", "check": "a", "found": "b", "todo": "c"});
        assert_eq!(value, expected);
    }
}
