//! What no virtual machine can do for a container, or not this one: refused by name. docs/config.md has the list.

use std::path::Path;

use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceType, LinuxSeccomp, LinuxSeccompAction, Mount, Process, Spec,
};

use super::{Error, unsupported};

/// Refuses a configuration for what it asks beside its namespaces, hooks and volumes.
pub(super) fn check(spec: &Spec) -> Result<(), Error> {
    if spec.vm().is_some()
        || spec.windows().is_some()
        || spec.solaris().is_some()
        || spec.zos().is_some()
    {
        return unsupported("configurations of other platforms (vm, windows, solaris, zos)");
    }
    if let Some(process) = spec.process() {
        check_process(process)?;
    }
    spec.mounts().iter().flatten().try_for_each(check_mount)?;
    spec.linux().as_ref().map_or(Ok(()), check_linux)
}

/// The same for the process of a container or of an exec.
pub(super) fn check_process(process: &Process) -> Result<(), Error> {
    if !process.cwd().is_absolute() {
        return Err(Error::Invalid(format!(
            "its working directory {:?} is not an absolute path",
            process.cwd().display().to_string()
        )));
    }
    if process.exec_cpu_affinity().is_some() {
        return unsupported(
            "execCPUAffinity: the processors that it names are the host's, a container has its own",
        );
    }
    Ok(())
}

fn check_mount(mount: &Mount) -> Result<(), Error> {
    let mapped = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
    let options = mount.options().as_deref().unwrap_or_default();
    if mapped(mount.uid_mappings())
        || mapped(mount.gid_mappings())
        || options
            .iter()
            .any(|option| option == "idmap" || option == "ridmap")
    {
        return unsupported(format!(
            "mounts with ids of their own (uidMappings, gidMappings, idmap; at {})",
            mount.destination().display()
        ));
    }
    Ok(())
}

fn check_linux(linux: &Linux) -> Result<(), Error> {
    if linux.intel_rdt().is_some() {
        return unsupported("linux.intelRdt: its classes are the host's");
    }
    if linux.memory_policy().is_some() {
        return unsupported("linux.memoryPolicy: its nodes are the host's");
    }
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        return unsupported(
            "linux.netDevices: interfaces of the host cannot move into a virtual machine",
        );
    }
    if let Some(personality) = linux.personality()
        && personality
            .flags()
            .as_ref()
            .is_some_and(|flags| !flags.is_empty())
    {
        return unsupported("flags in linux.personality");
    }
    if let Some(propagation) = linux.rootfs_propagation().as_deref()
        && matches!(propagation, "shared" | "rshared" | "slave" | "rslave")
    {
        return unsupported(format!(
            "linux.rootfsPropagation {propagation}: mounts do not travel between the host and a virtual machine"
        ));
    }
    let resources = linux.resources().as_ref();
    if resources.is_some_and(|resources| {
        resources
            .rdma()
            .as_ref()
            .is_some_and(|rdma| !rdma.is_empty())
    }) {
        return unsupported("linux.resources.rdma: a virtual machine has no such devices");
    }
    if let Some(seccomp) = linux.seccomp() {
        check_seccomp(seccomp)?;
    }
    linux.devices().iter().flatten().try_for_each(check_device)
}

fn check_seccomp(seccomp: &LinuxSeccomp) -> Result<(), Error> {
    let notify = LinuxSeccompAction::ScmpActNotify;
    let calls = seccomp.syscalls().iter().flatten();
    if seccomp.listener_path().is_some()
        || seccomp.default_action() == notify
        || calls.into_iter().any(|call| call.action() == notify)
    {
        return unsupported(
            "SCMP_ACT_NOTIFY and listenerPath in a seccomp profile: who listens is on the host, the process is not",
        );
    }
    Ok(())
}

/// Character devices that every container may use (OCI runtime specification, "Default Devices"), as Linux numbers them
/// (Documentation/admin-guide/devices.txt): null, zero, full, random, urandom, tty, ptmx.
const STANDARD: [(i64, i64); 7] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];

const CONSOLE: (i64, i64) = (5, 1);

/// Nodes of these devices may have any name; so may FIFOs. All others are the host's.
fn check_device(device: &LinuxDevice) -> Result<(), Error> {
    let kind = device.typ();
    let character = matches!(kind, LinuxDeviceType::C | LinuxDeviceType::U);
    let standard = character && STANDARD.contains(&(device.major(), device.minor()));
    // The terminal of a container that has one lies over it.
    let console = character
        && device.path() == Path::new("/dev/console")
        && (device.major(), device.minor()) == CONSOLE;
    if standard || console || kind == LinuxDeviceType::P {
        return Ok(());
    }
    unsupported(format!(
        "devices of the host ({}; --device, --privileged)",
        device.path().display()
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn refusal(pointer: &str, value: Value) -> Option<String> {
        let mut spec = json!({
            "ociVersion": "1.2.0", "root": {"path": "rootfs"},
            "process": {"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["true"]},
            "linux": {},
        });
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[name] = value;
        let spec = serde_json::from_value(spec).unwrap();
        check(&spec).err().map(|error| error.to_string())
    }

    #[test]
    fn each_refusal_names_what_it_is_about() {
        for (pointer, value, named) in [
            ("/process/cwd", json!("tmp"), "working directory"),
            (
                "/process/execCPUAffinity",
                json!({"initial": "0"}),
                "execCPUAffinity",
            ),
            (
                "/mounts",
                json!([{"destination": "/a", "type": "bind", "source": "/b",
                "uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}]}]),
                "uidMappings",
            ),
            (
                "/mounts",
                json!([{"destination": "/a", "options": ["ridmap"]}]),
                "idmap",
            ),
            ("/linux/intelRdt", json!({"closID": "a"}), "intelRdt"),
            (
                "/linux/memoryPolicy",
                json!({"mode": "MPOL_BIND", "nodes": "0"}),
                "memoryPolicy",
            ),
            ("/linux/netDevices", json!({"eth0": {}}), "netDevices"),
            (
                "/linux/personality",
                json!({"domain": "LINUX", "flags": ["ADDR_NO_RANDOMIZE"]}),
                "personality",
            ),
            (
                "/linux/rootfsPropagation",
                json!("rshared"),
                "rootfsPropagation rshared",
            ),
            (
                "/linux/resources",
                json!({"rdma": {"mlx5_0": {"hcaHandles": 1}}}),
                "rdma",
            ),
            (
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
                "SCMP_ACT_NOTIFY",
            ),
            (
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}),
                "SCMP_ACT_NOTIFY",
            ),
            (
                "/linux/seccomp",
                json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x"}),
                "listenerPath",
            ),
            (
                "/linux/devices",
                json!([{"path": "/dev/null", "type": "b", "major": 8, "minor": 0}]),
                "/dev/null",
            ),
            (
                "/linux/devices",
                json!([{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]),
                "/dev/kvm",
            ),
            ("/vm", json!({"kernel": {"path": "/k"}}), "vm"),
        ] {
            let message = refusal(pointer, value.clone()).unwrap_or_default();
            assert!(message.contains(named), "{pointer} {value}: {message:?}");
        }
    }

    #[test]
    fn what_every_container_has_is_not_refused() {
        for (pointer, value) in [
            (
                "/linux/devices",
                json!([
                    {"path": "/dev/other/name", "type": "c", "major": 1, "minor": 3},
                    {"path": "/dev/queue", "type": "p"},
                    {"path": "/dev/console", "type": "c", "major": 5, "minor": 1},
                ]),
            ),
            ("/linux/personality", json!({"domain": "LINUX32"})),
            ("/linux/rootfsPropagation", json!("rprivate")),
            ("/linux/netDevices", json!({})),
            ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_ALLOW"})),
        ] {
            assert_eq!(refusal(pointer, value), None, "{pointer}");
        }
    }
}
