//! The namespaces that a configuration asks for. Those of the guest's processes are always fresh ones; of the host's, a
//! container can have the network alone.

use std::{fs, os::unix::fs::MetadataExt as _, path::PathBuf};

use forkvm_config::HostNamespaces;
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType};

use super::{Error, Network, unsupported};

/// Checks the namespaces, and replaces them by fresh ones of the guest. A kind that is not listed means the host's (OCI
/// runtime specification, config-linux, "Namespaces"), of which `host` says what becomes.
pub(super) fn fresh(linux: &mut Linux, host: HostNamespaces) -> Result<Network, Error> {
    let mut asked = linux.namespaces().clone().unwrap_or_default();
    for (kind, name, flag) in [
        (LinuxNamespaceType::Pid, "PID", " (--pid=host)"),
        (LinuxNamespaceType::Ipc, "IPC", " (--ipc=host)"),
        (LinuxNamespaceType::Uts, "UTS", " (--uts=host)"),
        (LinuxNamespaceType::Mount, "mount", ""),
    ] {
        match (find(&asked, kind), host) {
            (None, HostNamespaces::Refuse) => {
                return unsupported(format!(
                    "the host's {name} namespace{flag}: a container has a kernel of its own"
                ));
            }
            (None, HostNamespaces::Own) => asked.push(of(kind)),
            (Some(namespace), _) => {
                if let Some(path) = joined(namespace) {
                    return unsupported(format!(
                        "joining another {name} namespace ({}): a container has a kernel of its own",
                        path.display()
                    ));
                }
            }
        }
    }
    for kind in [
        LinuxNamespaceType::User,
        LinuxNamespaceType::Cgroup,
        LinuxNamespaceType::Time,
    ] {
        if let Some(path) = find(&asked, kind).and_then(joined) {
            return unsupported(format!(
                "joining another {kind} namespace ({}): a container has a kernel of its own",
                path.display()
            ));
        }
    }
    let network = network(&asked, host)?;
    for namespace in &mut asked {
        namespace.set_path(None);
    }
    // Without one of these a container would see the guest's own network or cgroups.
    for kind in [LinuxNamespaceType::Network, LinuxNamespaceType::Cgroup] {
        if find(&asked, kind).is_none() {
            asked.push(of(kind));
        }
    }
    linux.set_namespaces(Some(asked));
    Ok(network)
}

/// Where the container's network is.
fn network(asked: &[LinuxNamespace], host: HostNamespaces) -> Result<Network, Error> {
    let the_hosts = || match host {
        HostNamespaces::Refuse => {
            unsupported("the host's network namespace (--network=host): use a network of its own")
        }
        HostNamespaces::Own => Ok(Network::New),
    };
    let Some(namespace) = find(asked, LinuxNamespaceType::Network) else {
        return the_hosts();
    };
    let Some(path) = joined(namespace) else {
        return Ok(Network::New);
    };
    let there = fs::metadata(path).map_err(|error| {
        Error::Invalid(format!("network namespace {}: {error}", path.display()))
    })?;
    let own = fs::metadata("/proc/self/ns/net")
        .map_err(|error| Error::Invalid(format!("/proc/self/ns/net: {error}")))?;
    if (there.dev(), there.ino()) == (own.dev(), own.ino()) {
        return the_hosts();
    }
    Ok(Network::Join(path.clone()))
}

fn find(asked: &[LinuxNamespace], kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
    asked.iter().find(|namespace| namespace.typ() == kind)
}

/// A new one of this kind.
fn of(kind: LinuxNamespaceType) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind);
    namespace
}

fn joined(namespace: &LinuxNamespace) -> Option<&PathBuf> {
    namespace
        .path()
        .as_ref()
        .filter(|path| !path.as_os_str().is_empty())
}
