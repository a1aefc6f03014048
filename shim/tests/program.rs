//! The program itself, as containerd's versions call it. Needs root (a mount namespace of its own)
//! and no KVM.
#![allow(clippy::unwrap_used, clippy::panic)] // clippy.toml allows them in #[test] functions alone

use std::{
    fs,
    io::Write as _,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use containerd_shim::{
    api::{CreateTaskRequest, DeleteResponse, Options, ShutdownRequest, StateRequest},
    bootstrap::{BootstrapParams, BootstrapResult},
};
use containerd_shim_protos::{Client, TaskClient, types::introspection::RuntimeInfo};
use protobuf::{Message as _, well_known_types::any::Any};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};
use ttrpc::{Code, context};

const PROGRAM: &str = env!("CARGO_BIN_EXE_containerd-shim-forkvm-v2");

/// One container's folders, and the shim's life in them.
struct Test {
    folder: tempfile::TempDir,
    id: String,
}

impl Test {
    fn new(id: &str) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test makes mount namespaces: run it as root"
        );
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("bundle")).unwrap();
        let path = |name| folder.path().join(name);
        let (run, templates, record) = (path("run"), path("templates"), path("record.json"));
        fs::write(
            folder.path().join("config.toml"),
            format!(
                "[paths]\nrun = {run:?}\ntemplates = {templates:?}\nrecord = {record:?}\n[start]\nmode = \"boot\"\n"
            ),
        )
        .unwrap();
        let test = Self {
            id: format!("{id}-{}", std::process::id()),
            folder,
        };
        test.write_spec(|_| {});
        test
    }

    fn bundle(&self) -> PathBuf {
        self.folder.path().join("bundle")
    }

    fn write_spec(&self, change: impl FnOnce(&mut serde_json::Value)) {
        let mut spec = serde_json::json!({
            "ociVersion": "1.1.0",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
            "root": {"path": "/nonexistent/rootfs"},
            "linux": {"namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}
            ]}
        });
        change(&mut spec);
        fs::write(self.bundle().join("config.json"), spec.to_string()).unwrap();
    }

    fn call(&self, action: &str, input: &[u8]) -> Output {
        let mut child = Command::new(PROGRAM)
            .args(["-namespace", "test", "-id", &self.id])
            .args([
                "-address",
                "/run/containerd/containerd.sock",
                "-publish-binary",
                "/usr/bin/containerd",
            ])
            .args(if action == "delete" {
                vec!["-bundle".into(), self.bundle()]
            } else {
                vec![]
            })
            .arg(action)
            .current_dir(self.bundle())
            .env("FORKVM_CONFIG", self.folder.path().join("config.toml"))
            .env("TTRPC_ADDRESS", self.folder.path().join("no-containerd"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    /// A `start` that answers, as containerd reads it: stdout and stderr in one.
    fn start(&self, input: &[u8]) -> Vec<u8> {
        let output = self.call("start", input);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(
            output.stderr.is_empty(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout
    }

    fn start_plain(&self) -> String {
        String::from_utf8(self.start(&[])).unwrap()
    }

    fn delete(&self) -> DeleteResponse {
        let output = self.call("delete", &[]);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
    }

    /// The daemon, to wait for its end.
    fn daemon(&self) -> rustix::fd::OwnedFd {
        let pid = fs::read_to_string(self.bundle().join("shim.pid")).unwrap();
        let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
        pidfd_open(pid, PidfdFlags::empty()).unwrap()
    }

    fn params(&self) -> Vec<u8> {
        let params = BootstrapParams {
            instance_id: self.id.clone(),
            namespace: "test".into(),
            containerd_ttrpc_address: self
                .folder
                .path()
                .join("no-containerd")
                .display()
                .to_string(),
            socket_dir: Some(self.folder.path().join("s").display().to_string()),
            ..Default::default()
        };
        params.write_to_bytes().unwrap()
    }
}

fn ended(process: &rustix::fd::OwnedFd) -> bool {
    let limit = Timespec {
        tv_sec: 20,
        tv_nsec: 0,
    };
    poll(
        &mut [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)],
        Some(&limit),
    )
    .unwrap()
        == 1
}

fn ctx() -> context::Context {
    context::with_duration(Duration::from_secs(20))
}

fn client(address: &str) -> TaskClient {
    TaskClient::new(Client::connect(address).unwrap())
}

fn create(client: &TaskClient, test: &Test) -> (Code, String) {
    let bundle = test.bundle().display().to_string();
    let request = CreateTaskRequest {
        id: test.id.clone(),
        bundle,
        ..Default::default()
    };
    match client.create(ctx(), &request) {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        other => panic!("not refused: {other:?}"),
    }
}

fn shutdown(client: &TaskClient, test: &Test) {
    client
        .shutdown(
            ctx(),
            &ShutdownRequest {
                id: test.id.clone(),
                ..Default::default()
            },
        )
        .unwrap();
}

fn socket(address: &str) -> &Path {
    Path::new(address.strip_prefix("unix://").unwrap())
}

#[test]
fn a_life_without_a_container_leaves_nothing() {
    let test = Test::new("life");
    let address = test.start_plain();
    assert!(
        address.starts_with("unix:///run/containerd/s/") && !address.contains('\n'),
        "{address}"
    );
    assert_eq!(
        fs::read_to_string(test.bundle().join("address")).unwrap(),
        address
    );
    let daemon = test.daemon();
    let client = client(&address);
    let state = client.state(
        ctx(),
        &StateRequest {
            id: test.id.clone(),
            ..Default::default()
        },
    );
    assert!(matches!(state, Err(ttrpc::Error::RpcStatus(s)) if s.code() == Code::NOT_FOUND));
    let (code, message) = create(&client, &test);
    assert_eq!(
        (code, message.as_str()),
        (
            Code::NOT_FOUND,
            "root file system /nonexistent/rootfs is not there"
        )
    );
    shutdown(&client, &test);
    assert!(ended(&daemon));
    assert!(!socket(&address).exists());
    assert!(!test.folder.path().join("run").exists());
}

#[test]
fn a_spec_that_cannot_run_is_refused_in_one_sentence() {
    let test = Test::new("refused");
    test.write_spec(|spec| spec["linux"]["namespaces"] = serde_json::json!([{"type": "network"}]));
    let address = test.start_plain();
    let daemon = test.daemon();
    let client = client(&address);
    let (code, message) = create(&client, &test);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(
        message.contains("the host's PID namespace (--pid=host)"),
        "{message}"
    );
    shutdown(&client, &test);
    assert!(ended(&daemon));
}

#[test]
fn a_broken_configuration_is_told_to_whoever_creates() {
    let test = Test::new("config");
    fs::write(test.folder.path().join("config.toml"), "[vm]\nvcpus = 99\n").unwrap();
    let address = test.start_plain();
    let daemon = test.daemon();
    let client = client(&address);
    let (code, message) = create(&client, &test);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(message.contains("vm.vcpus is 99"), "{message}");
    shutdown(&client, &test);
    assert!(ended(&daemon));
}

#[test]
fn bootstrap_params_are_answered_in_kind() {
    let test = Test::new("bootstrap");
    let result = BootstrapResult::parse_from_bytes(&test.start(&test.params())).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    assert!(socket(&result.address).starts_with(test.folder.path().join("s")));
    let daemon = test.daemon();
    shutdown(&client(&result.address), &test);
    assert!(ended(&daemon));
}

#[test]
fn runtime_options_are_answered_with_the_plain_address() {
    let test = Test::new("options");
    let any = Any {
        type_url: "containerd.runc.v1.Options".into(),
        value: Options::new().write_to_bytes().unwrap(),
        ..Default::default()
    };
    let address = String::from_utf8(test.start(&any.write_to_bytes().unwrap())).unwrap();
    let daemon = test.daemon();
    shutdown(&client(&address), &test);
    assert!(ended(&daemon));
}

#[test]
fn a_living_shim_is_not_started_twice() {
    let test = Test::new("twice");
    let address = test.start_plain();
    let daemon = test.daemon();
    let again = test.call("start", &[]);
    assert!(!again.status.success() && again.stdout.is_empty());
    let message = String::from_utf8(again.stderr).unwrap();
    assert!(message.contains("is running already"), "{message}");
    // The first one is none the worse for it.
    shutdown(&client(&address), &test);
    assert!(ended(&daemon));
}

#[test]
fn delete_ends_a_shim_that_lives_and_what_it_left() {
    let test = Test::new("delete");
    let address = test.start_plain();
    let daemon = test.daemon();
    let response = test.delete();
    assert_eq!(response.exit_status, 137);
    assert!(response.exited_at.is_some());
    assert!(ended(&daemon));
    assert!(!socket(&address).exists());
    // Nothing is there any more, and that is no error.
    assert_eq!(test.delete().exit_status, 137);
}

#[test]
fn a_container_of_a_pod_is_refused_by_name() {
    let test = Test::new("pod");
    test.write_spec(|spec| {
        spec["annotations"] = serde_json::json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "pod7"
        });
    });
    let output = test.call("start", &[]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(
        !output.status.success() && message.contains("pod7"),
        "{message}"
    );
    assert!(!test.bundle().join("shim.pid").exists());
}

#[test]
fn a_builder_says_why_there_is_no_template_and_is_nobodys_but_its_shims() {
    let test = Test::new("builder");
    let request = |shim: u32| {
        let spec = serde_json::json!({
            "kernel": "/nonexistent/vmlinux", "initramfs": "/nonexistent/initramfs.cpio", "monitor": "/nonexistent/monitor",
            "domain": {"namespace": "test"}, "vcpus": 1, "memory_bytes": 128 << 20, "cmdline": ""
        });
        serde_json::json!({"shim": shim, "spec": spec}).to_string()
    };
    for (input, said) in [
        ("{".to_owned(), "request is not valid"),
        (request(1), "shim has ended"),
        (request(std::process::id()), "/nonexistent/vmlinux"),
    ] {
        let output = test.call("build-template", input.as_bytes());
        let message = String::from_utf8(output.stdout).unwrap();
        assert!(
            !output.status.success() && message.contains(said),
            "{message}"
        );
    }
}

#[test]
fn a_delete_clears_what_a_build_has_left() {
    let test = Test::new("swept");
    let templates = test.folder.path().join("templates");
    fs::create_dir_all(templates.join(".building-0123456789abcdef-1")).unwrap();
    fs::write(templates.join(".lock-0123456789abcdef"), "").unwrap();
    test.delete();
    assert_eq!(fs::read_dir(&templates).unwrap().count(), 0);
}

#[test]
fn what_it_tells_about_itself() {
    let run = |argument: &str| {
        let output = Command::new(PROGRAM)
            .arg(argument)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{argument}"
        );
        output.stdout
    };
    let info = RuntimeInfo::parse_from_bytes(&run("-info")).unwrap();
    assert_eq!(info.name, "io.containerd.forkvm.v2");
    assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
    let version = String::from_utf8(run("-v")).unwrap();
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
    let help = String::from_utf8(run("--help")).unwrap();
    assert!(
        help.contains("start") && help.contains("delete") && help.contains("-info"),
        "{help}"
    );
}

#[test]
fn a_call_that_makes_no_sense_says_so_on_stderr_alone() {
    for (arguments, named) in [
        (vec!["-id", "x", "-namespace", "n", "dance"], "dance"),
        (vec!["-namespace", "n", "start"], "-id"),
        (vec!["-nonsense"], "nonsense"),
        (vec![], "start or delete"),
    ] {
        let output = Command::new(PROGRAM)
            .args(&arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(
            !output.status.success() && output.stdout.is_empty(),
            "{arguments:?}"
        );
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(message.contains(named), "{message}");
    }
}
