//! The OCI's runtimetest: a program that, run as a container's process, holds what it finds around it against the
//! `config.json` of its bundle, and writes the result as TAP (testanything.org).

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{expected::Suite, go_test::End, report::Entry};
use crate::{
    failure::{Failure, ensure},
    machine::{Machine, Runtime},
    oci_config::{default_spec, put},
    process::{self, Output},
};

/// How long one container may take.
const LIMIT: Duration = Duration::from_secs(120);

/// What is run.
#[derive(Debug)]
pub struct RuntimeTest {
    /// The program, linked statically.
    pub binary: PathBuf,
    /// The version of its source.
    pub version: String,
}

/// What a bundle asks for beyond what `ctr` asks for by default.
struct Bundle {
    name: &'static str,
    /// Members of the specification, by JSON pointer (RFC 6901).
    members: Vec<(&'static str, Value)>,
}

/// The bundles, each about something else: runtimetest checks only what a specification says.
fn bundles() -> Vec<Bundle> {
    let bundle = |name, members| Bundle { name, members };
    let some = json!(["CAP_CHOWN", "CAP_NET_BIND_SERVICE"]);
    vec![
        bundle("default", vec![]),
        bundle(
            "process",
            vec![
                ("/process/cwd", json!("/work")),
                ("/process/env", json!(["PATH=/bin", "GREETING=good day"])),
                ("/process/noNewPrivileges", json!(true)),
                ("/process/oomScoreAdj", json!(100)),
                ("/hostname", json!("named")),
            ],
        ),
        bundle(
            "user",
            vec![(
                "/process/user",
                json!({"uid": 1000, "gid": 2000, "additionalGids": [5, 6]}),
            )],
        ),
        bundle(
            "capabilities",
            vec![(
                "/process/capabilities",
                json!({"bounding": some, "effective": some, "permitted": some, "inheritable": some, "ambient": some}),
            )],
        ),
        bundle(
            "limits",
            vec![(
                "/process/rlimits",
                json!([
                    {"type": "RLIMIT_NOFILE", "soft": 512, "hard": 1024},
                    {"type": "RLIMIT_CORE", "soft": 0, "hard": 4096},
                    {"type": "RLIMIT_STACK", "soft": 4_194_304, "hard": 8_388_608},
                    {"type": "RLIMIT_CPU", "soft": 600, "hard": 700},
                ]),
            )],
        ),
        bundle(
            "read-only",
            vec![
                ("/root/readonly", json!(true)),
                ("/linux/maskedPaths", json!(["/masked", "/proc/kcore"])),
                ("/linux/readonlyPaths", json!(["/work", "/proc/sys"])),
            ],
        ),
        bundle(
            "mounts",
            vec![(
                "/mounts/-",
                json!({"destination": "/scratch", "type": "tmpfs", "source": "tmpfs",
                       "options": ["nosuid", "nodev", "noexec", "mode=1777", "size=1m"]}),
            )],
        ),
        bundle(
            "devices",
            vec![(
                "/linux/devices",
                json!([
                    {"path": "/dev/zeros", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 1000, "gid": 2000},
                    {"path": "/dev/pipe", "type": "p", "major": 0, "minor": 0, "fileMode": 0o600, "uid": 0, "gid": 0},
                ]),
            )],
        ),
        bundle(
            "sysctls",
            vec![(
                "/linux/sysctl",
                json!({"kernel.msgmax": "4096", "net.ipv4.ip_forward": "1", "net.core.somaxconn": "256"}),
            )],
        ),
        bundle(
            "seccomp",
            vec![(
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                       "syscalls": [{"names": ["getcwd"], "action": "SCMP_ACT_ERRNO"}]}),
            )],
        ),
    ]
}

impl RuntimeTest {
    /// Runs the program in each bundle on runc and on forkvm.
    ///
    /// # Errors
    /// When it cannot be run; checks that fail are in the result.
    pub fn run(&self, machine: &Machine, known: &Suite) -> Result<Entry, Failure> {
        let mut entry = Entry {
            suite: "OCI runtimetest".into(),
            suite_version: self.version.clone(),
            containerd: machine.containerd.version.clone(),
            not_run: known.not_run.clone(),
            ..Entry::default()
        };
        let folder =
            TempDir::with_prefix("forkvm-runtimetest-").map_err(Failure::io("a folder"))?;
        let root = self.root(folder.path())?;
        let mut ends = [BTreeMap::new(), BTreeMap::new()];
        for (runtime, ends) in [Runtime::Runc, Runtime::Forkvm].into_iter().zip(&mut ends) {
            println!("  runtimetest on {}", runtime.name());
            prove_kernel(machine, runtime, &root)?;
            for bundle in bundles() {
                if known.why_not_run(bundle.name).is_some() {
                    continue;
                }
                let output = bundle.run(runtime, &root)?;
                let checks = checks(&output.text());
                if checks.is_empty() {
                    // On runc the case is wrong then; on forkvm each check that runc passed counts as failed.
                    let failure = output.failure(format!("no check in bundle {}", bundle.name));
                    if runtime == Runtime::Runc {
                        return Err(failure);
                    }
                    println!("      {}: {failure}", End::Failed.shown());
                }
                for (check, end) in checks {
                    if end == End::Failed {
                        println!("      {} {}: {check}", end.shown(), bundle.name);
                    }
                    ends.insert(format!("{}: {check}", bundle.name), end);
                }
            }
        }
        let [runc, forkvm] = ends;
        entry = entry.count(known, &runc, &forkvm);
        Ok(entry)
    }

    /// A root file system with the program, busybox and a few folders.
    fn root(&self, folder: &Path) -> Result<PathBuf, Failure> {
        let root = folder.join("rootfs");
        for name in [
            "bin", "dev", "proc", "sys", "tmp", "work", "masked", "scratch", "run",
        ] {
            fs::create_dir_all(root.join(name)).map_err(Failure::io(root.display()))?;
        }
        for (from, to) in [
            (self.binary.as_path(), "runtimetest"),
            (Path::new("/bin/busybox"), "bin/busybox"),
        ] {
            let to = root.join(to);
            fs::copy(from, &to)
                .and_then(|_| fs::set_permissions(&to, fs::Permissions::from_mode(0o755)))
                .map_err(Failure::io(from.display()))?;
        }
        // runtimetest wants to write where it may, as any user.
        for open in [folder, &root] {
            fs::set_permissions(open, fs::Permissions::from_mode(0o755))
                .map_err(Failure::io(open.display()))?;
        }
        Ok(root)
    }
}

impl Bundle {
    fn run(&self, runtime: Runtime, root: &Path) -> Result<Output, Failure> {
        let mut members = vec![("/process/args", json!(["/runtimetest", "--path=/"]))];
        members.extend(self.members.iter().cloned());
        container(runtime, root, self.name, &members)
    }
}

/// Runs a container of the specification that `ctr` makes, with other `members`, from the root file system `root`. Its
/// specification lies in the root as `config.json`.
fn container(
    runtime: Runtime,
    root: &Path,
    name: &str,
    members: &[(&str, Value)],
) -> Result<Output, Failure> {
    let deadline = Instant::now() + LIMIT;
    let mut spec = default_spec(deadline)?;
    put(&mut spec, "/root/path", json!(root));
    put(&mut spec, "/root/readonly", json!(false));
    put(&mut spec, "/process/terminal", json!(false));
    // It names containers, of which there is another one each time.
    put(&mut spec, "/linux/cgroupsPath", Value::Null);
    for (pointer, value) in members {
        put(&mut spec, pointer, value.clone());
    }
    let config = root.join("config.json");
    fs::write(&config, spec.to_string()).map_err(Failure::io(config.display()))?;
    let id = format!(
        "runtimetest-{name}-{}-{}",
        runtime.name(),
        std::process::id()
    );
    let config = config.display().to_string();
    let words = [
        "ctr",
        "run",
        "--rm",
        "--runtime",
        runtime.for_ctr(),
        "--config",
        &config,
        &id,
    ];
    process::run(&words.map(String::from), b"", deadline)
}

/// A container of the same root has to report the runtime's own kernel: otherwise the rest proves nothing.
fn prove_kernel(machine: &Machine, runtime: Runtime, root: &Path) -> Result<(), Failure> {
    let args = json!(["/bin/busybox", "uname", "-r"]);
    let output = container(runtime, root, "kernel", &[("/process/args", args)])?.exits(0)?;
    let expected = machine.kernel_under(runtime);
    ensure(output.text().trim() == expected, || {
        format!(
            "the container ran on kernel '{}', expected '{expected}'",
            output.text().trim()
        )
    })
}

/// The checks in a TAP stream. Several of one description are told apart by a number.
fn checks(tap: &str) -> BTreeMap<String, End> {
    let mut checks = BTreeMap::new();
    for line in tap.lines() {
        let (end, rest) = match (line.strip_prefix("ok "), line.strip_prefix("not ok ")) {
            (Some(rest), _) if rest.contains("# SKIP") => (End::Skipped, rest),
            (Some(rest), _) => (End::Passed, rest),
            (_, Some(rest)) => (End::Failed, rest),
            (None, None) => continue,
        };
        let (_, description) = rest.split_once(" - ").unwrap_or(("", rest));
        let mut name = description.trim().to_owned();
        let mut number = 1;
        while checks.contains_key(&name) {
            number += 1;
            name = format!("{} ({number})", description.trim());
        }
        checks.insert(name, end);
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_read_and_told_apart() {
        let tap = "TAP version 13\nok 1 - has a\nnot ok 2 - has b\n  ---\n  {\"ok\": 1}\nok 3 # SKIP c is not set\nok 4 - has a\n1..4\n";
        let checks = checks(tap);
        assert_eq!(checks["has a"], End::Passed);
        assert_eq!(checks["has a (2)"], End::Passed);
        assert_eq!(checks["has b"], End::Failed);
        assert_eq!(checks.len(), 4);
    }
}
