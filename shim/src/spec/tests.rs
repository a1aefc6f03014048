use oci_spec::runtime::LinuxNamespaceType;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn config(more: &str) -> Config {
    let sizes = "[vm]\nvcpus = 2\nmax_vcpus = 4\nmemory_mib = 512\nmax_memory_mib = 1024\n";
    Config::parse(&format!("{sizes}{more}"), Path::new("config.toml")).unwrap()
}

/// A spec such as `ctr run` makes.
fn base() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/",
            "apparmorProfile": "docker-default", "selinuxLabel": "system_u:x", "oomScoreAdj": 100
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "size=64m"]}
        ],
        "linux": {
            "cgroupsPath": "/default/c1",
            "mountLabel": "system_u:y",
            "rootfsPropagation": "rprivate",
            "resources": {
                "memory": {"limit": 1_000_000},
                "cpu": {"shares": 512, "quota": 50000, "period": 100_000, "cpus": "0"},
                "pids": {"limit": 10}
            },
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}
            ]
        }
    })
}

fn take(spec: Value) -> Result<Plan, Error> {
    take_with(spec, &config(""))
}

fn take_with(spec: Value, config: &Config) -> Result<Plan, Error> {
    let spec = serde_json::from_value(spec).unwrap();
    plan(spec, Path::new("/bundle"), "default", "c1", config)
}

fn refusal(spec: Value) -> String {
    match take(spec) {
        Err(error @ Error::Unsupported(_)) => error.to_string(),
        other => panic!("not refused: {other:?}"),
    }
}

fn with(change: impl FnOnce(&mut Value)) -> Value {
    let mut spec = base();
    change(&mut spec);
    spec
}

fn bind(source: &Path, options: &[&str]) -> Value {
    with(|spec| {
        let mount =
            json!({"destination": "/v", "type": "bind", "source": source, "options": options});
        spec["mounts"].as_array_mut().unwrap().push(mount);
    })
}

#[test]
fn what_the_guest_gets() {
    let plan = take(base()).unwrap();
    let guest = serde_json::to_value(&plan.guest).unwrap();
    assert_eq!(guest["root"]["path"], "/run/forkvm/host/rootfs");
    assert_eq!(guest["root"]["readonly"], true);
    assert_eq!(guest["linux"]["cgroupsPath"], "/forkvm/c1");
    for (section, label) in [
        ("process", "apparmorProfile"),
        ("process", "selinuxLabel"),
        ("linux", "mountLabel"),
        ("linux", "rootfsPropagation"),
    ] {
        assert!(guest[section].get(label).is_none(), "{label}");
    }
    let resources = &guest["linux"]["resources"];
    assert_eq!(resources["memory"]["limit"], 1_000_000);
    assert_eq!(resources["pids"]["limit"], 10);
    assert_eq!(resources["cpu"], json!({"shares": 512}));
    assert_eq!(guest["mounts"].as_array().unwrap().len(), 2);
}

#[test]
fn what_stays_on_the_host() {
    let plan = take(base()).unwrap();
    assert_eq!(plan.root, Path::new("/bundle/rootfs"));
    assert_eq!(plan.cgroup, "/default/c1");
    assert_eq!(plan.hostname, "box");
    assert_eq!(plan.oom_score_adj, Some(100));
    assert_eq!(plan.network, Network::New);
    assert_eq!(plan.resources.cpu().as_ref().unwrap().quota(), Some(50000));
}

#[test]
fn defaults_stand_in_for_what_is_missing() {
    let plan = take(with(|spec| {
        spec.as_object_mut().unwrap().remove("hostname");
        spec["linux"].as_object_mut().unwrap().remove("cgroupsPath");
        spec["linux"].as_object_mut().unwrap().remove("resources");
        spec["root"]["path"] = "/var/lib/docker/merged".into();
    }))
    .unwrap();
    assert_eq!(plan.hostname, "c1");
    assert_eq!(plan.cgroup, "/forkvm@default@c1");
    assert_eq!(plan.root, Path::new("/var/lib/docker/merged"));
}

#[test]
fn who_names_no_user_is_root() {
    let user_of = |process: Value| {
        let spec = with(|spec| spec["process"] = process.clone());
        let loaded: Spec = parse(spec.to_string().as_bytes(), "/process").unwrap();
        let (json, _) = exec_process(process.to_string().as_bytes()).unwrap();
        let exec: Process = serde_json::from_slice(&json).unwrap();
        let users = [loaded.process().as_ref().unwrap(), &exec].map(|process| {
            let user = process.user();
            (user.uid(), user.gid())
        });
        assert_eq!(users[0], users[1]);
        users[0]
    };
    assert_eq!(user_of(json!({"args": ["sh"], "cwd": "/"})), (0, 0));
    assert_eq!(user_of(json!({"cwd": "/", "user": {"uid": 7}})), (7, 0));
    let both = json!({"cwd": "/", "user": {"uid": 7, "gid": 8}});
    assert_eq!(user_of(both), (7, 8));
    let error = parse::<Spec>(b"{\n \"process\": {\"cwd\": 1}}", "/process").unwrap_err();
    assert_eq!(error.line(), 2, "{error}");
}

#[test]
fn namespaces_of_the_host_are_refused_by_name() {
    for (kind, named) in [
        ("pid", "PID namespace (--pid=host)"),
        ("ipc", "IPC namespace (--ipc=host)"),
        ("uts", "UTS namespace (--uts=host)"),
        ("network", "network namespace (--network=host)"),
        ("mount", "mount namespace"),
    ] {
        let message = refusal(with(|spec| {
            spec["linux"]["namespaces"]
                .as_array_mut()
                .unwrap()
                .retain(|ns| ns["type"] != kind);
        }));
        assert!(message.contains(named), "{kind}: {message}");
    }
}

#[test]
fn namespaces_of_the_host_become_own_ones_where_that_is_configured() {
    let config = config("[containers]\nhost_namespaces = \"own\"\n");
    let asked = |namespaces: Value| with(|spec| spec["linux"]["namespaces"] = namespaces);
    for namespaces in [
        json!([]),
        json!([{"type": "mount"}]),
        json!([{"type": "network", "path": "/proc/self/ns/net"}]),
    ] {
        let plan = take_with(asked(namespaces), &config).unwrap();
        assert_eq!(plan.network, Network::New);
        let guest = serde_json::to_value(&plan.guest).unwrap();
        let list = guest["linux"]["namespaces"].as_array().unwrap();
        let mut kinds: Vec<&str> = list.iter().map(|ns| ns["type"].as_str().unwrap()).collect();
        kinds.sort_unstable();
        assert_eq!(kinds, ["cgroup", "ipc", "mount", "network", "pid", "uts"]);
        assert!(list.iter().all(|ns| ns.get("path").is_none()), "{list:?}");
    }
    let other = asked(json!([{"type": "pid", "path": "/proc/1/ns/pid"}]));
    let message = take_with(other, &config).unwrap_err().to_string();
    assert!(message.contains("joining another PID"), "{message}");
}

#[test]
fn joining_namespaces_is_refused_but_for_the_network() {
    for kind in ["pid", "ipc", "uts", "mount", "user", "cgroup"] {
        let message = refusal(with(|spec| {
            let list = spec["linux"]["namespaces"].as_array_mut().unwrap();
            list.retain(|ns| ns["type"] != kind);
            list.push(json!({"type": kind, "path": "/proc/1/ns/x"}));
        }));
        assert!(
            message.contains("joining") && message.contains("/proc/1/ns/x"),
            "{message}"
        );
    }
}

#[test]
fn a_network_namespace_is_joined_unless_it_is_the_hosts() {
    let join = |path: &str| {
        with(|spec| spec["linux"]["namespaces"][4] = json!({"type": "network", "path": path}))
    };
    let file = tempfile::NamedTempFile::new().unwrap();
    let plan = take(join(file.path().to_str().unwrap())).unwrap();
    assert_eq!(plan.network, Network::Join(file.path().to_owned()));
    let guest = serde_json::to_value(&plan.guest).unwrap();
    for namespace in guest["linux"]["namespaces"].as_array().unwrap() {
        assert!(namespace.get("path").is_none(), "{namespace}");
    }
    assert!(refusal(join("/proc/self/ns/net")).contains("--network=host"));
    let missing = take(join("/nonexistent/ns")).unwrap_err().to_string();
    assert!(missing.contains("/nonexistent/ns"), "{missing}");
}

#[test]
fn a_container_never_sees_the_guests_own_cgroups() {
    let plan = take(base()).unwrap();
    let namespaces = plan
        .guest
        .linux()
        .as_ref()
        .unwrap()
        .namespaces()
        .clone()
        .unwrap();
    let cgroup = namespaces
        .iter()
        .filter(|ns| ns.typ() == LinuxNamespaceType::Cgroup);
    assert_eq!(cgroup.count(), 1);
}

#[test]
fn bind_mounts_become_exports() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hosts");
    fs::write(&file, "").unwrap();
    let mut spec = bind(folder.path(), &["rbind", "rprivate", "ro"]);
    let second = json!({"destination": "/etc/hosts", "source": file, "options": ["bind"]});
    spec["mounts"].as_array_mut().unwrap().push(second);
    let plan = take(spec).unwrap();
    assert_eq!(
        plan.volumes,
        [
            Volume {
                name: "vol-0".into(),
                source: folder.path().to_owned(),
                read_only: true,
                recursive: true
            },
            Volume {
                name: "vol-1".into(),
                source: file,
                read_only: false,
                recursive: false
            },
        ]
    );
    let guest = serde_json::to_value(&plan.guest).unwrap();
    assert_eq!(guest["mounts"][2]["source"], "/run/forkvm/host/vol-0");
    assert_eq!(guest["mounts"][3]["source"], "/run/forkvm/host/vol-1");
}

#[test]
fn what_is_told_of_mount_options_is_so() {
    let folder = tempfile::tempdir().unwrap();
    for option in crate::info::MOUNT_OPTIONS {
        let plan = take(bind(folder.path(), &["rbind", option])).unwrap();
        let read_only = ["ro", "rro"].contains(option);
        assert_eq!(plan.volumes[0].read_only, read_only, "{option}");
    }
}

#[test]
fn volumes_that_cannot_work_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for option in ["shared", "rshared", "slave", "rslave"] {
        let message = refusal(bind(folder.path(), &["rbind", option]));
        assert!(
            message.contains(option) && message.contains("/v"),
            "{message}"
        );
    }
    let socket = folder.path().join("docker.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(refusal(bind(&socket, &["bind"])).contains("Unix sockets"));
    assert!(refusal(bind(Path::new("/dev/null"), &["bind"])).contains("devices of the host"));
    let missing = take(bind(Path::new("/nonexistent/data"), &["bind"]))
        .unwrap_err()
        .to_string();
    assert!(
        missing.contains("volume source /nonexistent/data"),
        "{missing}"
    );
}

#[test]
fn devices_of_the_host_are_refused_and_default_ones_are_not() {
    let device = |path: &str, kind: &str, major: i64, minor: i64| {
        with(|spec| {
            spec["linux"]["devices"] = json!([{"path": path, "type": kind, "major": major, "minor": minor, "fileMode": 438}]);
        })
    };
    assert!(refusal(device("/dev/kvm", "c", 10, 232)).contains("/dev/kvm"));
    take(device("/dev/null", "c", 1, 3)).unwrap();
    // The same device under another name; a block device of these numbers is a RAM disk.
    take(device("/dev/zeros", "c", 1, 5)).unwrap();
    assert!(refusal(device("/dev/ram5", "b", 1, 5)).contains("/dev/ram5"));
}

#[test]
fn hooks_run_on_the_host_or_are_refused_by_name() {
    let hook = |kind: &str| with(|spec| spec["hooks"] = json!({kind: [{"path": "/bin/hook"}]}));
    for kind in ["createContainer", "startContainer"] {
        let message = refusal(hook(kind));
        assert!(
            message.contains(kind) && message.contains("/bin/hook"),
            "{message}"
        );
    }
    let plan = take(hook("poststop")).unwrap();
    assert_eq!(plan.hooks.poststop().as_ref().unwrap().len(), 1);
    assert!(plan.guest.hooks().is_none());
}

#[test]
fn limits_choose_the_size_of_the_machine() {
    let class = |resources: Value| {
        let plan = take(with(|spec| spec["linux"]["resources"] = resources)).unwrap();
        (plan.class.vcpus, plan.class.memory_mib)
    };
    assert_eq!(class(json!({})), (2, 512));
    assert_eq!(class(json!({"memory": {"limit": 600 << 20}})), (2, 1024));
    assert_eq!(
        class(json!({"cpu": {"quota": 300_000, "period": 100_000}})),
        (4, 512)
    );
    assert_eq!(class(json!({"cpu": {"cpus": "3"}})), (1, 512));
}

#[test]
fn limits_above_the_largest_machine_are_refused_by_name() {
    let message = refusal(with(|spec| {
        spec["linux"]["resources"]["memory"]["limit"] = (1_i64 << 30).into();
    }));
    assert!(
        message.contains("a memory limit of 1024 MiB") && message.contains("vm.max_memory_mib"),
        "{message}"
    );
    let message = refusal(with(|spec| {
        spec["linux"]["resources"]["cpu"]["quota"] = 500_000.into();
    }));
    assert!(
        message.contains("5 CPUs") && message.contains("vm.max_vcpus"),
        "{message}"
    );
}

#[test]
fn what_must_be_there_is_named() {
    for section in ["root", "process", "linux"] {
        let error = take(with(|spec| {
            drop(spec.as_object_mut().unwrap().remove(section))
        }))
        .unwrap_err();
        assert!(error.to_string().contains(section), "{error}");
    }
}

#[test]
fn an_execs_process_loses_its_labels_too() {
    let (process, _) = exec_process(base()["process"].to_string().as_bytes()).unwrap();
    let process: Value = serde_json::from_slice(&process).unwrap();
    assert!(process.get("apparmorProfile").is_none());
    assert!(process.get("selinuxLabel").is_none());
    assert_eq!(process["args"], json!(["sh"]));
    assert!(matches!(exec_process(b"{"), Err(Error::Invalid(_))));
}

proptest! {
    /// No text makes the reader panic.
    #[test]
    fn any_text_is_survived(text in "\\PC{0,200}") {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), text).unwrap();
        prop_assert!(load(folder.path(), "default", "c1", &config("")).is_err());
    }

    /// No bind source of the host reaches the guest, whatever the options.
    #[test]
    fn no_source_of_the_host_reaches_the_guest(options in prop::collection::vec("(bind|rbind|ro|rw|nosuid|rprivate)", 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        let plan = take(bind(folder.path(), &options)).unwrap();
        let text = serde_json::to_string(&plan.guest).unwrap();
        prop_assert!(!text.contains(folder.path().to_str().unwrap()), "{}", text);
    }
}
