//! The `-info` action: what this runtime is, as a protobuf `containerd.types.RuntimeInfo`, with what it knows of the OCI
//! runtime specification (its features.md).
//!
//! containerd 2.0 and newer ask every runtime, and Kubernetes chooses by the answer: `rro` among the mount options lets a pod
//! ask for volumes that are read-only with all that is mounted below them. Standard input (the runtime's options) is not
//! needed for the answer.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message as _, well_known_types::any::Any};
use serde_json::{Value, json};

/// containerd's name for the features, which are JSON in its `Any` (core/runtime/typeurl.go).
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// What can be done by the mount options of a container: what libcontainer reads (MountOption and MountRecursive in its
/// syscall/linux.rs) and `spec.rs` does not refuse. Others are handed to the file system.
pub(crate) const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "strictatime",
    "suid",
    "sync",
    "unbindable",
];

/// The encoded message; not wrapped in an `Any`.
pub(crate) fn run() -> Result<Vec<u8>, protobuf::Error> {
    let info = RuntimeInfo {
        name: "io.containerd.forkvm.v2".to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
        .into(),
        features: Some(Any {
            type_url: FEATURES.to_owned(),
            value: features().to_string().into_bytes(),
            ..Any::default()
        })
        .into(),
        ..Default::default()
    };
    info.write_to_bytes()
}

/// What docs/config.md says at length. A member that is missing means "unknown": the capabilities are those of the guest's
/// kernel, and so are the flags of seccomp.
fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["prestart", "createRuntime", "poststart", "poststop"],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": true, "systemdUser": false, "rdma": false },
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"]
            },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } },
            "netDevices": { "enabled": false }
        }
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{Features, LinuxNamespaceType, LinuxSeccompAction};

    use super::*;

    fn told() -> Features {
        let info = RuntimeInfo::parse_from_bytes(&run().unwrap()).unwrap();
        assert_eq!(info.name, "io.containerd.forkvm.v2");
        let features = info.features.unwrap();
        assert_eq!(features.type_url, FEATURES);
        serde_json::from_slice(&features.value).unwrap()
    }

    #[test]
    fn the_features_are_those_of_the_specification() {
        let told = told();
        let mut known = serde_json::to_value(&told).unwrap();
        remove_nulls(&mut known);
        assert_eq!(known, features(), "a member that the specification has not");
        let linux = told.linux().as_ref().unwrap();
        let namespaces = linux.namespaces().as_ref().unwrap();
        assert!(namespaces.contains(&LinuxNamespaceType::User));
        let seccomp = linux.seccomp().as_ref().unwrap();
        let actions = seccomp.actions().as_ref().unwrap();
        assert!(!actions.contains(&LinuxSeccompAction::ScmpActNotify));
    }

    fn remove_nulls(value: &mut Value) {
        if let Value::Object(members) = value {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(remove_nulls);
        }
    }
}
