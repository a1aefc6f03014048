//! Bad input: one clear sentence each, and nothing left behind.

use std::fs;

use serde_json::json;

use crate::{
    case::{Case, row, scenario},
    config_file::ConfigFile,
    container::{BUSYBOX, Container, ctr, docker},
    failure::Failure,
    oci_config::{OciConfig, default_spec},
    scene::Scene,
};

const NO_NAMESPACES: &str = "runc shares the host's namespaces; a virtual machine cannot";
const NO_TEMPLATES: &str = "runc has no templates";

pub(super) fn cases() -> Vec<Case> {
    let rows = [
        row(
            "refused/unknown-image",
            ctr("forkvm.local/none:1")
                .command(["true"])
                .refused(["forkvm.local/none:1", "not found"]),
        ),
        row(
            "refused/rootfs-that-is-not-there",
            ctr("/no/such/rootfs")
                .option(&["--rootfs"])
                .command(["true"])
                .refused(["/no/such/rootfs"]),
        ),
        row(
            "refused/bind-of-nothing",
            ctr(BUSYBOX)
                .option(&[
                    "--mount",
                    "type=bind,src=/no/such/folder,dst=/data,options=rbind:ro",
                ])
                .command(["true"])
                .refused(["/no/such/folder"]),
        ),
        row(
            "refused/host-network",
            ctr(BUSYBOX)
                .option(&["--net-host"])
                .command(["true"])
                .refused(["host", "network namespace"]),
        )
        .forkvm_only(NO_NAMESPACES),
        row(
            "refused/pid-namespace-of-a-process",
            ctr(BUSYBOX)
                .option(&["--with-ns", "pid:/proc/1/ns/pid"])
                .command(["true"])
                .refused(["pid namespace"]),
        )
        .forkvm_only(NO_NAMESPACES),
        row(
            "refused/container-of-a-pod",
            ctr(BUSYBOX)
                .option(&["--annotation", "io.kubernetes.cri.container-type=container"])
                .option(&["--annotation", "io.kubernetes.cri.sandbox-id=pod"])
                .command(["true"])
                .refused(["pod"]),
        )
        .forkvm_only("runc leaves pods to its shim"),
        row(
            "refused/docker-host-pid",
            docker(BUSYBOX)
                .option(&["--pid", "host"])
                .command(["true"])
                .refused(["host", "pid namespace"]),
        )
        .forkvm_only(NO_NAMESPACES),
        row(
            "refused/docker-host-ipc",
            docker(BUSYBOX)
                .option(&["--ipc", "host"])
                .command(["true"])
                .refused(["host", "ipc namespace"]),
        )
        .forkvm_only(NO_NAMESPACES),
        row(
            "refused/docker-host-network",
            docker(BUSYBOX)
                .option(&["--network", "host"])
                .command(["true"])
                .refused(["host", "network namespace"]),
        )
        .forkvm_only(NO_NAMESPACES),
        row(
            "refused/docker-host-device",
            docker(BUSYBOX)
                .option(&["--device", "/dev/fuse"])
                .command(["true"])
                .refused(["/dev/fuse"]),
        )
        .forkvm_only("a virtual machine does not have the host's devices"),
    ];
    let scenarios = [
        scenario("refused/host-pid-namespace", host_pid).forkvm_only(NO_NAMESPACES),
        scenario("refused/fields-that-mean-the-host", fields)
            .forkvm_only("runc has what they name"),
        scenario("refused/no-template", no_template).forkvm_only(NO_TEMPLATES),
        scenario("refused/no-kvm", no_kvm).forkvm_only("runc needs no KVM"),
        scenario("refused/configuration-with-a-mistake", bad_configuration)
            .forkvm_only("the configuration is forkvm's"),
    ];
    rows.into_iter().chain(scenarios).map(Case::alone).collect()
}

fn plain() -> Container {
    ctr(BUSYBOX).command(["true"])
}

/// A spec without a PID namespace, as containerd's own default has one.
fn host_pid(scene: &Scene<'_>) -> Result<(), Failure> {
    let mut spec = default_spec(scene.deadline())?;
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != "pid");
    }
    let root = scene.path_text("root");
    fs::create_dir(&root).map_err(Failure::io(&root))?;
    spec["process"]["args"] = serde_json::json!(["true"]);
    spec["root"]["path"] = serde_json::json!(root);
    scene.write("spec.json", &spec.to_string())?;
    let container =
        Container::of_spec(&scene.path_text("spec.json")).refused(["host", "pid namespace"]);
    scene.run(&container).map(drop)
}

/// One of each kind; docs/config.md has the list, the shim's unit tests have all of it.
fn fields(scene: &Scene<'_>) -> Result<(), Failure> {
    let notify = json!({"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]});
    let device = json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]);
    let map = json!([{"containerID": 0, "hostID": 1, "size": 1}]);
    let mount = json!([{"destination": "/data", "type": "bind", "source": scene.path_text(""),
        "options": ["rbind"], "uidMappings": map, "gidMappings": map}]);
    for (pointer, value, word) in [
        ("/linux/intelRdt", json!({"closID": "group"}), "intelRdt"),
        ("/linux/seccomp", notify, "SCMP_ACT_NOTIFY"),
        ("/linux/devices", device, "/dev/kvm"),
        ("/linux/rootfsPropagation", json!("rshared"), "rshared"),
        (
            "/linux/resources/unified",
            json!({"../memory.max": "1"}),
            "unified",
        ),
        ("/mounts", mount, "uidMappings"),
    ] {
        let config = OciConfig::new(scene)?.with(pointer, value).sh("true");
        scene.run(&config.container(scene)?.refused([word]))?;
    }
    Ok(())
}

fn no_template(scene: &Scene<'_>) -> Result<(), Failure> {
    let folder = scene.path_text("templates");
    let _config = ConfigFile::with(&format!(
        "[templates]\nmissing = \"fail\"\n[paths]\ntemplates = \"{folder}\"\n"
    ))?;
    scene
        .run(&plain().refused(["there is no template", "forkvm template build"]))
        .map(drop)
}

fn no_kvm(scene: &Scene<'_>) -> Result<(), Failure> {
    /// Puts the device back whatever happens.
    struct Hidden;
    impl Drop for Hidden {
        fn drop(&mut self) {
            if let Err(error) = fs::rename("/dev/kvm.hidden", "/dev/kvm") {
                eprintln!("forkvm-e2e: /dev/kvm.hidden could not be renamed back: {error}");
            }
        }
    }
    fs::rename("/dev/kvm", "/dev/kvm.hidden").map_err(Failure::io("/dev/kvm"))?;
    let _hidden = Hidden;
    scene
        .run(&plain().refused(["/dev/kvm", "forkvm check"]))
        .map(drop)
}

fn bad_configuration(scene: &Scene<'_>) -> Result<(), Failure> {
    let _config = ConfigFile::with("[vm]\nvcpus = 99\n")?;
    scene
        .run(&plain().refused(["config.toml", "vm.vcpus is 99"]))
        .map(drop)
}
