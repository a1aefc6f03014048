//! The tool as a user runs it.

// Functions that tests share are not seen as tests by this lint.
#![allow(clippy::unwrap_used)]

use std::{fs, path::Path};

use assert_cmd::Command;

/// The tool with a configuration of its own, so that no test touches the machine's templates.
fn forkvm(folder: &Path) -> Command {
    let config = folder.join("config.toml");
    fs::write(
        &config,
        format!(
            "[paths]\ntemplates = \"{0}/templates\"\nrecord = \"{0}/record.json\"\nrun = \"{0}/run\"\nkernel = \"{0}/vmlinux\"\n",
            folder.display()
        ),
    )
    .unwrap();
    let mut command = Command::cargo_bin("forkvm").unwrap();
    command.env("FORKVM_CONFIG", config);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn check_prints_a_line_for_each_answer_and_fails_if_one_does() {
    let folder = tempfile::tempdir().unwrap();
    // There is no guest kernel in this configuration, so at least that fails on every machine.
    let output = forkvm(folder.path()).arg("check").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = text(&output.stdout);
    let mut lines: Vec<_> = text.lines().collect();
    let last = lines.pop().unwrap();
    assert!(
        last.contains("failed: this machine cannot start forkvm's containers"),
        "{last}"
    );
    for line in &lines {
        let (status, rest) = line.split_at(6);
        assert!(["ok    ", "warn  ", "FAIL  "].contains(&status), "{line}");
        assert!(rest.contains(": "), "{line}");
    }
    let line = lines
        .iter()
        .find(|line| line.contains("guest kernel"))
        .unwrap();
    assert!(
        line.starts_with("FAIL") && line.contains("vmlinux"),
        "{line}"
    );
    assert!(line.ends_with("make install)"), "{line}");
}

#[test]
fn check_tells_the_same_in_json() {
    let folder = tempfile::tempdir().unwrap();
    let output = forkvm(folder.path())
        .args(["check", "--json"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let findings: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let failed = |check: &str| {
        findings
            .iter()
            .any(|finding| finding["check"] == check && finding["status"] == "fail")
    };
    assert!(failed("guest kernel"));
    assert!(!failed("kernel"));
    for finding in &findings {
        assert_eq!(
            finding["todo"] == "",
            finding["status"] == "ok",
            "{finding}"
        );
    }
}

#[test]
fn check_reports_a_configuration_that_is_not_valid_on_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = forkvm(folder.path());
    fs::write(folder.path().join("config.toml"), "[vm]\nvcpus = 99\n").unwrap();
    let output = command.arg("check").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = text(&output.stdout);
    let line = text
        .lines()
        .find(|line| line.contains("configuration"))
        .unwrap();
    assert!(
        line.starts_with("FAIL") && line.contains("vm.vcpus is 99"),
        "{line}"
    );
}

#[test]
fn an_empty_machine_has_no_templates_and_no_containers() {
    let folder = tempfile::tempdir().unwrap();
    let output = forkvm(folder.path())
        .args(["template", "ls"])
        .output()
        .unwrap();
    assert!(output.status.success());
    assert_eq!(text(&output.stdout).lines().count(), 1);
    let output = forkvm(folder.path())
        .args(["template", "ls", "--json"])
        .output()
        .unwrap();
    let all: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(all["templates"], serde_json::json!([]));
    assert_eq!(all["record"]["fall_backs"], 0);
    for action in ["prune", "verify"] {
        let output = forkvm(folder.path())
            .args(["template", action, "--json"])
            .output()
            .unwrap();
        assert!(output.status.success(), "{action}");
        assert_eq!(text(&output.stdout).trim(), "[]", "{action}");
    }
    let output = forkvm(folder.path())
        .args(["ps", "--json"])
        .output()
        .unwrap();
    assert_eq!(text(&output.stdout).trim(), "[]");
}

#[test]
fn what_is_not_there_is_one_clear_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&[&str], &str); 3] = [
        (
            &["template", "inspect", "0123456789abcdef"],
            "there is no template 0123456789abcdef",
        ),
        (&["template", "rm", "../../etc"], "is not a template id"),
        (&["man", "/nonexistent"], "/nonexistent"),
    ];
    for (args, part) in cases {
        let output = forkvm(folder.path()).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let text = text(&output.stderr);
        assert!(
            text.starts_with("forkvm: error: ") && text.contains(part),
            "{args:?}: {text}"
        );
        assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
    }
}

#[test]
fn a_build_without_a_guest_image_shows_its_step_and_names_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let output = forkvm(folder.path())
        .args(["template", "build", "base"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = text(&output.stderr);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(lines[0].ends_with("s  reading the guest image"), "{text}");
    assert!(
        lines[1].starts_with("forkvm: error: ") && lines[1].contains("vmlinux"),
        "{text}"
    );
    // Nothing is left that looks like a template.
    let output = forkvm(folder.path())
        .args(["template", "ls", "-q"])
        .output()
        .unwrap();
    assert!(output.status.success() && output.stdout.is_empty());
}

#[test]
fn completions_and_help_name_the_commands() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let output = forkvm(folder.path())
            .args(["completions", shell])
            .output()
            .unwrap();
        assert!(output.status.success());
        assert!(text(&output.stdout).contains("template"), "{shell}");
    }
    let output = forkvm(folder.path()).arg("--help").output().unwrap();
    let help = text(&output.stdout);
    for command in ["check", "template", "ps"] {
        assert!(help.contains(command));
    }
    assert!(!help.contains("completions"));
}

#[test]
fn bench_says_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = forkvm(folder.path());
    command.args(["bench", "run", "--out"]).arg(folder.path());
    // Nothing can be found here, `ctr` neither.
    let output = command.env("PATH", folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let message = text(&output.stderr);
    // Without a KVM that is the first thing that is missing.
    let expected = ["ctr is not installed", "/dev/kvm cannot be used"];
    assert!(
        expected.iter().any(|words| message.contains(words)),
        "{message}"
    );
    assert!(!folder.path().join("bench.json").exists());
}
