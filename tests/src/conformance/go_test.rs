//! Runs a test program that Go has built, and survives tests of it that hang or crash.
//!
//! The program is run with `-test.v=test2json`: in front of each line about a test it then writes the byte 0x16, also
//! where a test's output did not end its line (cmd/internal/test2json of Go).

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Serialize;

use crate::failure::Failure;

/// How one test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// It passed.
    Passed,
    /// It failed.
    Failed,
    /// It left itself out.
    Skipped,
    /// Nothing was heard for [`SILENCE`] and the program was killed.
    Hung,
    /// The program ended in the middle of it.
    Crashed,
}

/// How long a program may be silent. Its longest tests write nothing for half a minute on a software processor.
pub const SILENCE: Duration = Duration::from_secs(120);

/// How many times in a row a program may end before its first test: that of containerd gives its containerd four seconds to
/// come up, which a busy machine may not have.
const FALSE_STARTS: usize = 4;

/// In front of a line about a test.
const MARK: char = '\u{16}';

/// One run of a program: how its tests ended, and all that it wrote.
#[derive(Debug, Default)]
struct Outcome {
    ends: BTreeMap<String, End>,
    running: BTreeSet<String>,
}

impl Outcome {
    /// Takes in one line; gives the test of whose end it tells.
    fn line(&mut self, line: &str) -> Option<(String, End)> {
        let (_, about) = line.split_once(MARK)?;
        let mut words = about.split_whitespace();
        let (_, what, name) = (words.next(), words.next(), words.next());
        let (what, name) = (what?, name?);
        // Tests inside of tests have a slash in their names, and are told by the outer one's end.
        if name.contains('/') {
            return None;
        }
        let end = match what {
            "PASS:" => End::Passed,
            "FAIL:" => End::Failed,
            "SKIP:" => End::Skipped,
            "RUN" | "CONT" => {
                self.running.insert(name.to_owned());
                return None;
            }
            "PAUSE" => {
                self.running.remove(name);
                return None;
            }
            _ => return None,
        };
        self.running.remove(name);
        self.ends.insert(name.to_owned(), end);
        Some((name.to_owned(), end))
    }

    /// Those that were under way when the program ended have ended like that.
    fn rest(&mut self, end: End) {
        for name in std::mem::take(&mut self.running) {
            show(&name, end);
            self.ends.insert(name, end);
        }
    }
}

/// The names of the tests in the program `binary`.
///
/// # Errors
/// When it does not tell.
pub fn names(binary: &Path) -> Result<Vec<String>, Failure> {
    let output = Command::new(binary)
        .args(["-test.list", "^Test"])
        // What it would do first of all, also for a list: start a containerd.
        .arg("-test.short")
        .output()
        .map_err(Failure::io(binary.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let names: Vec<String> = text
        .lines()
        .filter(|line| line.starts_with("Test"))
        .map(str::to_owned)
        .collect();
    if names.is_empty() {
        return Err(Failure::new(format!(
            "{} names no tests: {}",
            binary.display(),
            String::from_utf8_lossy(&output.stderr)
        )));
    }
    Ok(names)
}

/// Runs these tests, one at a time, and writes all that the program says to `log`. After one that hangs or crashes the
/// rest is run by the program once more; `between` is called in front of each run.
///
/// # Errors
/// When the program cannot be run, or runs none of the tests.
pub fn run(
    command: &dyn Fn() -> Command,
    tests: &[String],
    log: &mut dyn std::io::Write,
    between: &dyn Fn(),
) -> Result<BTreeMap<String, End>, Failure> {
    let mut ends = BTreeMap::new();
    let mut false_starts = 0;
    loop {
        let left: Vec<&str> = tests
            .iter()
            .filter(|test| !ends.contains_key(*test))
            .map(String::as_str)
            .collect();
        if left.is_empty() {
            between();
            return Ok(ends);
        }
        between();
        let mut command = command();
        command
            .args(["-test.v=test2json", "-test.parallel=1", "-test.timeout=0"])
            .arg(format!("-test.run=^({})$", left.join("|")));
        let outcome = once(&mut command, log)?;
        false_starts = if outcome.ends.is_empty() {
            false_starts + 1
        } else {
            0
        };
        if false_starts > FALSE_STARTS {
            return Err(Failure::new(format!(
                "none of these tests was run, the log says why: {}",
                left.join(" ")
            )));
        }
        ends.extend(outcome.ends);
    }
}

impl End {
    /// As it is shown, in one width.
    pub fn shown(self) -> &'static str {
        match self {
            End::Passed => "passed ",
            End::Failed => "failed ",
            End::Skipped => "skipped",
            End::Hung => "hung   ",
            End::Crashed => "crashed",
        }
    }
}

fn show(test: &str, end: End) {
    println!("      {} {test}", end.shown());
}

fn once(command: &mut Command, log: &mut dyn std::io::Write) -> Result<Outcome, Failure> {
    let (reader, writer) = std::io::pipe().map_err(Failure::io("a pipe"))?;
    let both = writer.try_clone().map_err(Failure::io("a pipe"))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(both)
        // It and the containerd that it starts are ended together.
        .process_group(0)
        .spawn()
        .map_err(Failure::io("the tests"))?;
    // The command holds our copies of the pipe's end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let group = Pid::from_child(&child);
    let (send, lines) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while let Ok(1..) = reader.read_until(b'\n', &mut line) {
            if send
                .send(String::from_utf8_lossy(&line).into_owned())
                .is_err()
            {
                return;
            }
            line.clear();
        }
    });
    let mut outcome = Outcome::default();
    let ended = loop {
        match lines.recv_timeout(SILENCE) {
            Ok(line) => {
                log.write_all(line.as_bytes())
                    .map_err(Failure::io("the log"))?;
                if let Some((name, end)) = outcome.line(&line) {
                    show(&name, end);
                }
            }
            Err(RecvTimeoutError::Disconnected) => break End::Crashed,
            Err(RecvTimeoutError::Timeout) => break End::Hung,
        }
    };
    // Whatever is left of it: its containerd, if it has crashed.
    let _ = kill_process_group(group, Signal::KILL);
    child.wait().map_err(Failure::io("the tests"))?;
    outcome.rest(ended);
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(lines: &[&str]) -> Outcome {
        let mut outcome = Outcome::default();
        for line in lines {
            outcome.line(line);
        }
        outcome
    }

    #[test]
    fn ends_are_read_wherever_they_stand_in_a_line() {
        let outcome = after(&[
            "\u{16}=== RUN   TestOne\n",
            "no end of line\u{16}--- PASS: TestOne (0.01s)\n",
            "\u{16}=== RUN   TestTwo\n",
            "\u{16}=== RUN   TestTwo/inner\n",
            "    \u{16}--- PASS: TestTwo/inner (0.01s)\n",
            "\u{16}--- FAIL: TestTwo (0.01s)\n",
            "--- PASS: TestTwo (a log that looks like it)\n",
        ]);
        assert_eq!(outcome.ends["TestOne"], End::Passed);
        assert_eq!(outcome.ends["TestTwo"], End::Failed);
        assert_eq!(outcome.ends.len(), 2);
        assert!(outcome.running.is_empty());
    }

    #[test]
    fn only_what_was_under_way_hangs() {
        let mut outcome = after(&[
            "\u{16}=== RUN   TestWaits\n",
            "\u{16}=== PAUSE TestWaits\n",
            "\u{16}=== RUN   TestHangs\n",
        ]);
        outcome.rest(End::Hung);
        assert_eq!(outcome.ends.len(), 1);
        assert_eq!(outcome.ends["TestHangs"], End::Hung);
    }

    #[test]
    fn the_rest_is_run_after_a_crash() {
        // A program that crashes in its first test, when that is asked for.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("program");
        let script = r#"#!/bin/sh
            case "$*" in
            *TestBad*) printf '\026=== RUN   TestBad\n'; exit 2 ;;
            *) printf '\026=== RUN   TestGood\n\026--- PASS: TestGood (0.00s)\n' ;;
            esac"#;
        std::fs::write(&path, script).unwrap();
        let tests = ["TestBad", "TestGood"].map(String::from);
        let command = || {
            let mut command = Command::new("/bin/sh");
            command.arg(&path);
            command
        };
        let ends = run(&command, &tests, &mut Vec::new(), &|| {}).unwrap();
        assert_eq!(ends["TestBad"], End::Crashed);
        assert_eq!(ends["TestGood"], End::Passed);
    }

    #[test]
    fn a_program_that_never_runs_a_test_is_given_up() {
        let tests = ["TestOne".to_owned()];
        let mut starts = Vec::new();
        let failure = run(
            &|| {
                let mut command = Command::new("/bin/echo");
                command.arg("no containerd");
                command
            },
            &tests,
            &mut starts,
            &|| {},
        )
        .unwrap_err();
        assert!(failure.message().contains("TestOne"), "{failure}");
        let starts = String::from_utf8(starts).unwrap().lines().count();
        assert_eq!(starts, FALSE_STARTS + 1);
    }
}
