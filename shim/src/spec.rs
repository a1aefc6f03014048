//! The OCI configuration of a container: what of it acts on the host, what cannot be done and is
//! refused by name, and what the guest gets. `docs/config.md` has the list.

use std::{
    fs, io,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
};

use forkvm_api::{HOST_MOUNT, ROOTFS_EXPORT};
use forkvm_config::{Class, Config};
use oci_spec::runtime::{Hooks, LinuxResources, Mount, Process, Spec};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

mod demand;
mod namespaces;
mod refusals;
pub(crate) mod unified;
pub(crate) mod update;

#[cfg(test)]
mod tests;

/// Longest host name in bytes (`HOST_NAME_MAX`, limits.h). A container id that stands in for a missing one is ASCII and
/// may be longer.
const HOSTNAME_MAX: usize = 64;

/// What can be wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot read {path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is not an OCI configuration: {message}")]
    Parse { path: PathBuf, message: String },
    #[error("the OCI configuration is not valid: {0}")]
    Invalid(String),
    #[error("forkvm does not support {0}")]
    Unsupported(String),
    #[error("cannot encode the configuration for the guest: {0}")]
    Encode(serde_json::Error),
}

/// A file or folder of the host that the guest sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Its name among the monitor's exports.
    pub(crate) name: String,
    pub(crate) source: PathBuf,
    pub(crate) read_only: bool,
    /// With what is mounted below it.
    pub(crate) recursive: bool,
}

/// The network namespace that the spec asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    New,
    Join(PathBuf),
}

/// A configuration taken apart.
#[derive(Debug)]
pub(crate) struct Plan {
    /// What the agent applies in the guest.
    pub(crate) guest: Spec,
    /// `root.path`, absolute.
    pub(crate) root: PathBuf,
    pub(crate) volumes: Vec<Volume>,
    pub(crate) network: Network,
    pub(crate) hostname: String,
    /// `linux.cgroupsPath`; one of forkvm's own if the spec has none.
    pub(crate) cgroup: String,
    pub(crate) resources: LinuxResources,
    /// The size of its machine.
    pub(crate) class: Class,
    pub(crate) oom_score_adj: Option<i32>,
    pub(crate) console_size: Option<ConsoleSize>,
    pub(crate) hooks: Hooks,
    pub(crate) annotations: Option<std::collections::HashMap<String, String>>,
}

/// Reads `config.json` of a bundle and takes it apart, as the configuration of forkvm says.
pub(crate) fn load(
    bundle: &Path,
    namespace: &str,
    id: &str,
    config: &Config,
) -> Result<Plan, Error> {
    let path = bundle.join("config.json");
    let text = fs::read(&path).map_err(|source| Error::Read {
        path: path.clone(),
        source,
    })?;
    let spec: Spec = parse(&text, "/process").map_err(|error| Error::Parse {
        path,
        message: error.to_string(),
    })?;
    plan(spec, bundle, namespace, id, config)
}

/// Reads JSON in which a process is at the JSON pointer `process`. As with runc it need not say who its user is: that is
/// root then, although the specification (config, "User") has user and group as required.
fn parse<T: DeserializeOwned>(json: &[u8], process: &str) -> Result<T, serde_json::Error> {
    serde_json::from_slice(json).or_else(|error| {
        let mut value: Value = serde_json::from_slice(json)?;
        if let Some(Value::Object(process)) = value.pointer_mut(process)
            && let Value::Object(user) = process.entry("user").or_insert_with(|| json!({}))
        {
            for id in ["uid", "gid"] {
                user.entry(id).or_insert_with(|| json!(0));
            }
        }
        // The first error tells line and column of what the user has written.
        serde_json::from_value(value).map_err(|_| error)
    })
}

fn unsupported<T>(what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Unsupported(what.into()))
}

fn invalid(what: &str) -> Error {
    Error::Invalid(what.to_owned())
}

fn plan(
    mut spec: Spec,
    bundle: &Path,
    namespace: &str,
    id: &str,
    config: &Config,
) -> Result<Plan, Error> {
    refusals::check(&spec)?;
    let mut root = spec
        .root()
        .clone()
        .ok_or_else(|| invalid("it has no root"))?;
    let mut process = spec
        .process()
        .clone()
        .ok_or_else(|| invalid("it has no process"))?;
    let mut linux = spec
        .linux()
        .clone()
        .ok_or_else(|| invalid("it has no linux section"))?;

    let hooks = host_hooks(&mut spec)?;
    let network = namespaces::fresh(&mut linux, config.containers.host_namespaces)?;
    let volumes = volumes(&mut spec)?;

    let root_path = bundle.join(root.path());
    root.set_path(PathBuf::from(HOST_MOUNT).join(ROOTFS_EXPORT));
    spec.set_root(Some(root));

    let oom_score_adj = process.oom_score_adj();
    let console_size = console_size(&process);
    strip_labels(&mut process);
    spec.set_process(Some(process));

    let cgroup = linux
        .cgroups_path()
        .as_ref()
        .map(|path| path.display().to_string())
        .filter(|path| !path.is_empty())
        // One folder, as what is above a container's own is not removed with it. No name has an `@`.
        .unwrap_or_else(|| format!("/forkvm@{namespace}@{id}"));
    let mut resources = linux.resources().clone().unwrap_or_default();
    unified::settle(&mut resources)?;
    let class = config
        .vm
        .class(&demand::demand(&resources))
        .map_err(|error| Error::Unsupported(error.to_string()))?;
    linux.set_resources(Some(guest_resources(&resources)));
    linux.set_cgroups_path(Some(PathBuf::from("/forkvm").join(id)));
    linux.set_mount_label(None);
    // Mounts do not travel; what is left of it is whether the root can be bound elsewhere.
    linux.set_rootfs_propagation(
        linux
            .rootfs_propagation()
            .clone()
            .filter(|kind| kind.ends_with("unbindable")),
    );
    spec.set_linux(Some(linux));

    Ok(Plan {
        hostname: spec
            .hostname()
            .clone()
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| id.chars().take(HOSTNAME_MAX).collect()),
        annotations: spec.annotations().clone(),
        guest: spec,
        root: root_path,
        volumes,
        network,
        cgroup,
        resources,
        class,
        oom_score_adj,
        console_size,
        hooks,
    })
}

/// The process of an exec, as the guest is to apply it, and the size that its terminal is to have at first.
pub(crate) fn exec_process(json: &[u8]) -> Result<(Vec<u8>, Option<ConsoleSize>), Error> {
    let mut process: Process = parse(json, "")
        .map_err(|error| Error::Invalid(format!("the process of the exec: {error}")))?;
    refusals::check_process(&process)?;
    strip_labels(&mut process);
    let json = serde_json::to_vec(&process).map_err(Error::Encode)?;
    Ok((json, console_size(&process)))
}

/// AppArmor and SELinux labels name profiles of the host. The guest has neither, and the machine
/// is the boundary; they are left out, whatever they are.
fn strip_labels(process: &mut Process) {
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
}

/// Takes the hooks that run on the host out of the spec. Those that would run in the container's
/// namespaces name programs of the host that the guest does not have.
fn host_hooks(spec: &mut Spec) -> Result<Hooks, Error> {
    let hooks = spec.hooks().clone().unwrap_or_default();
    for (kind, list) in [
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
    ] {
        if let Some(hook) = list.iter().flatten().next() {
            return unsupported(format!(
                "{kind} hooks: {} would have to run inside the virtual machine",
                hook.path().display()
            ));
        }
    }
    spec.set_hooks(None);
    Ok(hooks)
}

/// Gives every bind mount a place among the exports.
fn volumes(spec: &mut Spec) -> Result<Vec<Volume>, Error> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    let mut volumes = Vec::new();
    for mount in &mut mounts {
        let options = mount.options().clone().unwrap_or_default();
        let has = |name: &str| options.iter().any(|option| option == name);
        if let Some(shared) = options
            .iter()
            .find(|o| matches!(o.as_str(), "shared" | "rshared" | "slave" | "rslave"))
        {
            return unsupported(format!(
                "mount propagation {shared} (of {}): mounts do not travel between the host and a \
                 virtual machine",
                mount.destination().display()
            ));
        }
        let recursive = has("rbind");
        if !(recursive || has("bind") || mount.typ().as_deref() == Some("bind")) {
            continue;
        }
        let source = bind_source(mount)?;
        let name = format!("vol-{}", volumes.len());
        mount.set_source(Some(PathBuf::from(HOST_MOUNT).join(&name)));
        volumes.push(Volume {
            name,
            source,
            read_only: has("ro") || has("rro"),
            recursive,
        });
    }
    spec.set_mounts(Some(mounts));
    Ok(volumes)
}

fn bind_source(mount: &Mount) -> Result<PathBuf, Error> {
    let destination = mount.destination().display();
    let source = mount
        .source()
        .clone()
        .ok_or_else(|| Error::Invalid(format!("the bind mount at {destination} has no source")))?;
    let kind = fs::metadata(&source)
        .map_err(|error| Error::Invalid(format!("volume source {}: {error}", source.display())))?
        .file_type();
    let what = if kind.is_socket() {
        "Unix sockets"
    } else if kind.is_block_device() || kind.is_char_device() {
        "devices of the host"
    } else if kind.is_fifo() {
        "FIFOs"
    } else {
        return Ok(source);
    };
    unsupported(format!(
        "{what} as volumes ({} at {destination})",
        source.display()
    ))
}

/// Memory, process and processor shares act in the guest; processor quota, cpusets and block io
/// act on the monitor (see `cgroup`).
pub(crate) fn guest_resources(resources: &LinuxResources) -> LinuxResources {
    let mut guest = resources.clone();
    if let Some(mut cpu) = guest.cpu().clone() {
        cpu.set_quota(None);
        cpu.set_period(None);
        cpu.set_burst(None);
        cpu.set_realtime_period(None);
        cpu.set_realtime_runtime(None);
        cpu.set_cpus(None);
        cpu.set_mems(None);
        guest.set_cpu(Some(cpu));
    }
    guest.set_block_io(None);
    unified::keep_of_guest(&mut guest);
    guest
}

/// Rows and columns that a process's terminal is to have at first.
pub(crate) type ConsoleSize = (u32, u32);

/// `process.consoleSize`, if the process has a terminal.
fn console_size(process: &Process) -> Option<ConsoleSize> {
    let size = process
        .console_size()
        .filter(|_| process.terminal() == Some(true))?;
    let (rows, columns) = (
        size.height().try_into().ok()?,
        size.width().try_into().ok()?,
    );
    Some((rows, columns)).filter(|(rows, columns)| *rows > 0 && *columns > 0)
}
