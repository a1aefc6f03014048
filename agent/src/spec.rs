//! Makes an OCI spec fit for the guest: says what cannot be, and settles what libcontainer would do
//! otherwise than runc.

use std::{
    fs,
    io::{self, Read},
    path::{Component, Path, PathBuf},
};

use oci_spec::runtime::{
    Capabilities, Capability, LinuxCapabilities, LinuxIdMapping, LinuxNamespaceType, Mount,
    Process, Spec,
};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, open, openat2};

use crate::{cgroup::Cgroup, stdio::Owner};

/// A passwd file is read up to here; longer ones are no passwd files.
const PASSWD_LIMIT: u64 = 1 << 20;

/// What is wrong with a spec.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the spec is not valid: {0}")]
    Parse(serde_json::Error),
    #[error("the process is not valid: {0}")]
    ParseProcess(serde_json::Error),
    #[error("the spec has no `{0}`")]
    Missing(&'static str),
    #[error("cannot make the working directory {path}: {source}")]
    WorkingDirectory {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("root file system {0} is not there")]
    NoRoot(PathBuf),
    #[error("the source {source_path} of the mount on {destination} is not there")]
    NoSource {
        source_path: PathBuf,
        destination: PathBuf,
    },
    #[error("{0} hooks cannot run in the guest")]
    Hooks(&'static str),
    #[error("the {kind} namespace {path} is not one of this guest")]
    Namespace {
        kind: LinuxNamespaceType,
        path: PathBuf,
    },
    #[error("the spec and the streams do not agree about a terminal")]
    Terminal,
    #[error("{0:?} is not a container id")]
    ContainerId(String),
    #[error("cannot set the sysctl {key}: {source}")]
    Sysctl { key: String, source: io::Error },
}

/// A spec that is ready for libcontainer.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) spec: Spec,
    /// The user that owns the process's streams.
    pub(crate) owner: Owner,
    pub(crate) user_namespace: bool,
    /// What [`take_groups`] took.
    pub(crate) groups: Vec<u32>,
    /// `net.*` settings for a container that has the guest's network namespace.
    pub(crate) guest_sysctls: Vec<(String, String)>,
}

/// What an exec needs to know of its container's spec.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    pub(crate) root: PathBuf,
    pub(crate) capabilities: Option<LinuxCapabilities>,
    pub(crate) uid_mappings: Vec<LinuxIdMapping>,
    pub(crate) gid_mappings: Vec<LinuxIdMapping>,
    /// Whether there is a seccomp filter.
    pub(crate) filtered: bool,
}

/// A container's id becomes a folder and a cgroup: what containerd allows, which is a plain name.
pub(crate) fn check_id(id: &str) -> Result<(), Error> {
    let plain = !id.is_empty()
        && id.len() <= 128
        && id != "."
        && id != ".."
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_+-.".contains(&byte));
    if plain {
        Ok(())
    } else {
        Err(Error::ContainerId(id.to_owned()))
    }
}

/// Prepares a container's spec.
pub(crate) fn prepare(json: &[u8], id: &str, terminal: bool) -> Result<Prepared, Error> {
    check_id(id)?;
    let mut spec: Spec = serde_json::from_slice(json).map_err(Error::Parse)?;
    let root = spec
        .root()
        .as_ref()
        .ok_or(Error::Missing("root"))?
        .path()
        .clone();
    if !root.is_dir() {
        return Err(Error::NoRoot(root));
    }
    for mount in spec.mounts().iter().flatten() {
        check_source(mount)?;
    }
    refuse_hooks(&mut spec)?;
    let template = Template::of(&spec)?;

    let linux = spec.linux_mut().as_mut().ok_or(Error::Missing("linux"))?;
    linux.set_cgroups_path(Some(Cgroup::path_in_tree(id)));
    // Labels name policies of the host; the guest has none.
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    for namespace in linux.namespaces().iter().flatten() {
        if let Some(path) = namespace.path() {
            return Err(Error::Namespace {
                kind: namespace.typ(),
                path: path.clone(),
            });
        }
    }
    let has = |kind: LinuxNamespaceType| {
        linux
            .namespaces()
            .iter()
            .flatten()
            .any(|namespace| namespace.typ() == kind)
    };
    let user_namespace = has(LinuxNamespaceType::User);
    // libcontainer refuses them with the machine's own network namespace. Here that is the
    // container's own as well: nobody else is in the guest.
    let mut guest_sysctls = Vec::new();
    if !has(LinuxNamespaceType::Network)
        && let Some(sysctls) = linux.sysctl_mut()
    {
        sysctls.retain(|key, value| {
            let of_network = key.starts_with("net.");
            if of_network {
                guest_sysctls.push((key.clone(), value.clone()));
            }
            !of_network
        });
    }

    let process = spec
        .process_mut()
        .as_mut()
        .ok_or(Error::Missing("process"))?;
    let owner = prepare_process(process, &template, terminal)?;
    make_working_directory(&root, process.cwd())?;
    let groups = if user_namespace {
        Vec::new()
    } else {
        take_groups(process)
    };
    Ok(Prepared {
        spec,
        owner,
        user_namespace,
        groups,
        guest_sysctls,
    })
}

/// Makes the working directory if the root file system lacks it, as runc does. Each component is opened without
/// following links out of the root, which is the image's and so not to be trusted.
fn make_working_directory(root: &Path, cwd: &Path) -> Result<(), Error> {
    let failed = |source: rustix::io::Errno| Error::WorkingDirectory {
        path: cwd.to_owned(),
        source: source.into(),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(root, flags, Mode::empty()).map_err(failed)?;
    let inside = |path: &Path| {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&root, path, flags, Mode::empty(), resolve)
    };
    let mut made = PathBuf::from("/");
    for component in cwd.components() {
        let Component::Normal(name) = component else {
            continue;
        };
        let parent = inside(&made).map_err(failed)?;
        made.push(name);
        // Whatever else is wrong with it, executing the process tells.
        if let Err(rustix::io::Errno::NOENT) = inside(&made) {
            mkdirat(&parent, name, Mode::from_raw_mode(0o755)).map_err(failed)?;
        }
    }
    Ok(())
}

/// Prepares the process of an exec.
pub(crate) fn prepare_exec(
    json: &[u8],
    template: &Template,
    terminal: bool,
) -> Result<(Process, Owner), Error> {
    let mut process: Process = serde_json::from_slice(json).map_err(Error::ParseProcess)?;
    if process.capabilities().is_none() {
        process.set_capabilities(template.capabilities.clone());
    }
    let owner = prepare_process(&mut process, template, terminal)?;
    Ok((process, owner))
}

/// Adds capabilities to what libcontainer leaves the process of an exec with; answers those that
/// were not there, which the executor takes away again.
pub(crate) fn lend(process: &mut Process, wanted: &[(Capability, &str)]) -> Vec<String> {
    let Some(mut capabilities) = process.capabilities().clone() else {
        return Vec::new();
    };
    let mut permitted = capabilities.permitted().clone().unwrap_or_default();
    let mut effective = capabilities.effective().clone().unwrap_or_default();
    let mut lent = Vec::new();
    for (capability, name) in wanted {
        let new_in_permitted = permitted.insert(*capability);
        let new_in_effective = effective.insert(*capability);
        if new_in_permitted || new_in_effective {
            lent.push((*name).to_owned());
        }
    }
    capabilities
        .set_permitted(Some(permitted))
        .set_effective(Some(effective));
    process.set_capabilities(Some(capabilities));
    lent
}

/// So many additional groups go into a worker's request.
const GROUPS: usize = 1024;

/// Takes the additional groups out of a process, for the worker to have them when it makes the process: libcontainer would
/// mount a procfs of its own only to ask whether they may be set. Not to be called where that is a question, in a user
/// namespace of the container's own. More than [`GROUPS`] stay.
pub(crate) fn take_groups(process: &mut Process) -> Vec<u32> {
    let mut user = process.user().clone();
    let groups = user.additional_gids().clone().unwrap_or_default();
    if groups.len() > GROUPS {
        return Vec::new();
    }
    user.set_additional_gids(None);
    process.set_user(user);
    groups
}

impl Template {
    /// Keeps what execs need.
    pub(crate) fn of(spec: &Spec) -> Result<Self, Error> {
        let linux = spec.linux().as_ref().ok_or(Error::Missing("linux"))?;
        let process = spec.process().as_ref().ok_or(Error::Missing("process"))?;
        let root = spec.root().as_ref().ok_or(Error::Missing("root"))?;
        Ok(Self {
            root: root.path().clone(),
            capabilities: process.capabilities().clone(),
            uid_mappings: linux.uid_mappings().clone().unwrap_or_default(),
            gid_mappings: linux.gid_mappings().clone().unwrap_or_default(),
            filtered: linux.seccomp().is_some(),
        })
    }
}

fn prepare_process(
    process: &mut Process,
    template: &Template,
    terminal: bool,
) -> Result<Owner, Error> {
    if process.terminal().unwrap_or(false) != terminal {
        return Err(Error::Terminal);
    }
    // They name profiles of the host.
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    // libcontainer takes `false` for `true` when it chooses the moment to load the seccomp filter,
    // and has not the privilege any more then.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    process.set_capabilities(Some(complete(process.capabilities().as_ref())));
    let (uid, gid) = (process.user().uid(), process.user().gid());
    let mut env = process.env().clone().unwrap_or_default();
    // libcontainer would ask the C library, which in a static program loads modules from the
    // container's root file system for the answer.
    if !env.iter().any(|entry| {
        entry
            .strip_prefix("HOME=")
            .is_some_and(|home| !home.is_empty())
    }) {
        env.retain(|entry| !entry.starts_with("HOME="));
        env.push(format!("HOME={}", home_of(uid, &template.root)));
        process.set_env(Some(env));
    }
    Ok(Owner {
        uid: in_guest(uid, &template.uid_mappings),
        gid: in_guest(gid, &template.gid_mappings),
    })
}

/// All five sets: libcontainer leaves a set that is not named as full as it is, runc empties it.
fn complete(given: Option<&LinuxCapabilities>) -> LinuxCapabilities {
    let mut complete = given.cloned().unwrap_or_default();
    let empty = Some(Capabilities::new());
    let set = |get: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
        given
            .and_then(|given| get(given).clone())
            .or_else(|| empty.clone())
    };
    complete.set_bounding(set(LinuxCapabilities::bounding));
    complete.set_effective(set(LinuxCapabilities::effective));
    complete.set_permitted(set(LinuxCapabilities::permitted));
    complete.set_inheritable(set(LinuxCapabilities::inheritable));
    complete.set_ambient(set(LinuxCapabilities::ambient));
    complete
}

fn check_source(mount: &Mount) -> Result<(), Error> {
    let options = mount.options().as_deref().unwrap_or_default();
    let bind = mount.typ().as_deref() == Some("bind")
        || options
            .iter()
            .any(|option| option == "bind" || option == "rbind");
    match mount.source() {
        Some(source) if bind && fs::metadata(source).is_err() => Err(Error::NoSource {
            source_path: source.clone(),
            destination: mount.destination().clone(),
        }),
        _ => Ok(()),
    }
}

/// Hooks name programs of the host; the shim runs those that belong there and removes them.
fn refuse_hooks(spec: &mut Spec) -> Result<(), Error> {
    if let Some(hooks) = spec.hooks() {
        let kinds = [
            ("createRuntime", hooks.create_runtime()),
            ("createContainer", hooks.create_container()),
            ("startContainer", hooks.start_container()),
            ("poststart", hooks.poststart()),
            ("poststop", hooks.poststop()),
        ];
        for (kind, hooks) in kinds {
            if hooks.as_ref().is_some_and(|hooks| !hooks.is_empty()) {
                return Err(Error::Hooks(kind));
            }
        }
    }
    spec.set_hooks(None);
    Ok(())
}

/// The number by which the guest knows a container's user or group.
fn in_guest(id: u32, mappings: &[LinuxIdMapping]) -> u32 {
    if mappings.is_empty() {
        return id;
    }
    mappings
        .iter()
        .find_map(|mapping| {
            let offset = id.checked_sub(mapping.container_id())?;
            (offset < mapping.size()).then(|| mapping.host_id().checked_add(offset))?
        })
        .unwrap_or(id)
}

/// The home folder that the container's own /etc/passwd names, or `/`.
fn home_of(uid: u32, root: &Path) -> String {
    let read = || -> io::Result<String> {
        let root = openat2(
            CWD,
            root,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::empty(),
        )?;
        // Links in the image lead nowhere but into the image.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = openat2(
            &root,
            "etc/passwd",
            flags,
            Mode::empty(),
            ResolveFlags::IN_ROOT,
        )?;
        let mut text = Vec::new();
        fs::File::from(file)
            .take(PASSWD_LIMIT)
            .read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    // An image without the file has no homes.
    let passwd = read().unwrap_or_default();
    home_in(&passwd, uid).unwrap_or("/").to_owned()
}

/// passwd(5): name, password, uid, gid, comment, home, shell.
fn home_in(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let found: u32 = fields.next()?.parse().ok()?;
        let home = fields.nth(2)?;
        (found == uid && !home.is_empty()).then_some(home)
    })
}

/// Sets a sysctl of the guest's network namespace, by either of its spellings.
pub(crate) fn set_sysctl(key: &str, value: &str) -> Result<(), Error> {
    let failed = |source| Error::Sysctl {
        key: key.to_owned(),
        source,
    };
    let parts: Vec<&str> = if key.contains('/') {
        key.split('/').collect()
    } else {
        key.split('.').collect()
    };
    if parts.iter().any(|part| part.is_empty() || *part == "..") {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    let path = Path::new("/proc/sys").join(parts.join("/"));
    fs::write(path, value).map_err(failed)
}

#[cfg(test)]
mod tests;
