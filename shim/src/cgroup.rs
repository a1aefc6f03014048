//! The monitor's cgroup on the host (OCI runtime specification, `linux.cgroupsPath`).
//!
//! Memory and process limits act in the guest; what the host sees is one monitor, so its
//! `memory.max` is the limit plus what the monitor itself needs. Processor, cpuset and io limits
//! act on the monitor; the processor quota only once the agent has answered, so that a small quota
//! does not stretch the start.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
    sync::OnceLock,
};

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager as _, ControllerOpt, CreateCgroupSetupError,
    create_cgroup_manager,
};
use nix_of_libcgroups::unistd::Pid;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use crate::spec::unified;

/// What a monitor needs beside its guest's memory, in bytes: its own heap and stacks, page tables
/// of the guest, kernel memory of KVM. Added to a container's memory limit.
pub(crate) const MEMORY_OVERHEAD: i64 = 64 << 20;

/// OCI runtime specification, "Memory": no limit, said so.
const NO_LIMIT: i64 = -1;

/// Why a cgroup cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the cgroup {path}: {message}")]
pub(crate) struct Error {
    action: &'static str,
    path: String,
    message: String,
}

/// A container's cgroup on the host.
pub(crate) struct Cgroup {
    path: String,
    /// Its folder, once it is there.
    folder: OnceLock<PathBuf>,
    inner: AnyCgroupManager,
}

/// Both forms of `cgroupsPath`: a path of cgroupfs, or systemd's `slice:prefix:name`.
fn open(path: &str, id: &str) -> Result<Cgroup, Error> {
    let systemd = is_systemd(path);
    // cgroupfs paths are taken from the root of the hierarchy.
    let inner_path = if systemd || path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    };
    let inner = manager(inner_path, systemd, id).map_err(|error| failed("use", path, &error))?;
    Ok(Cgroup {
        path: path.to_owned(),
        folder: OnceLock::new(),
        inner,
    })
}

fn manager(
    cgroup_path: impl Into<PathBuf>,
    systemd_cgroup: bool,
    id: &str,
) -> Result<AnyCgroupManager, CreateCgroupSetupError> {
    create_cgroup_manager(CgroupConfig {
        cgroup_path: cgroup_path.into(),
        systemd_cgroup,
        container_name: id.to_owned(),
    })
}

/// Where cgroup v2 is mounted.
const HIERARCHY: &str = "/sys/fs/cgroup";

/// Makes a cgroup of the cgroupfs form below `hierarchy` and opens its folder. Every controller that is there is enabled
/// on the way, as runc and libcgroups do; two shims may make the same parents at once. libcgroups makes a cgroup only by
/// moving a process into it.
fn make_folder(hierarchy: &Path, path: &str) -> io::Result<OwnedFd> {
    let relative = Path::new(path.trim_start_matches('/'));
    let plain = |part| matches!(part, Component::Normal(_));
    if relative == Path::new("") || !relative.components().all(plain) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a path below the root of the hierarchy",
        ));
    }
    let controllers = fs::read_to_string(hierarchy.join("cgroup.controllers"))?;
    let enabled = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"));
    let enabled: Vec<_> = enabled.collect();
    let mut folder = hierarchy.to_owned();
    for part in relative {
        enable(&folder.join("cgroup.subtree_control"), &enabled);
        folder.push(part);
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    fs::File::open(&folder).map(OwnedFd::from)
}

/// Enables controllers: all at once, or, if one of them cannot be, each that can. What is missing then shows when a limit
/// needs it.
fn enable(subtree_control: &Path, controllers: &[String]) {
    if fs::write(subtree_control, controllers.join(" ")).is_err() {
        for controller in controllers {
            let _ = fs::write(subtree_control, controller);
        }
    }
}

/// The folder of the cgroup that a process is in (cgroups(7), "/proc/pid/cgroup").
fn folder_of(pid: u32) -> io::Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    path.map(|path| Path::new(HIERARCHY).join(path))
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup v2"))
}

fn is_systemd(path: &str) -> bool {
    path.split(':').count() == 3 && !path.starts_with('/')
}

fn failed(action: &'static str, path: &str, error: &dyn std::fmt::Display) -> Error {
    Error {
        action,
        path: path.to_owned(),
        message: error.to_string(),
    }
}

impl Cgroup {
    /// Makes the cgroup, if it is not there, and sets its limits but for the processor quota. Answers its folder too, in
    /// which a process can be started; but none for systemd's form, where a cgroup is made by having a process
    /// [`join`](Self::join) it.
    pub(crate) fn make(
        path: &str,
        id: &str,
        limits: &LinuxResources,
    ) -> Result<(Self, Option<OwnedFd>), Error> {
        let cgroup = open(path, id)?;
        if is_systemd(path) {
            return Ok((cgroup, None));
        }
        let folder = make_folder(Path::new(HIERARCHY), path)
            .map_err(|error| failed("make", path, &error))?;
        let _ = cgroup
            .folder
            .set(Path::new(HIERARCHY).join(path.trim_start_matches('/')));
        cgroup.limit(limits)?;
        Ok((cgroup, Some(folder)))
    }

    /// Puts a process into the cgroup, which is made if it is not there, and sets its limits but for the processor quota.
    pub(crate) fn join(&self, pid: u32, limits: &LinuxResources) -> Result<(), Error> {
        self.inner
            .add_task(Pid::from_raw(pid.cast_signed()))
            .map_err(|error| failed("join", &self.path, &error))?;
        // systemd knows where its slices are.
        let folder = folder_of(pid).map_err(|error| failed("find", &self.path, &error))?;
        let _ = self.folder.set(folder);
        self.limit(limits)
    }

    /// Sets the limits but for the processor quota.
    fn limit(&self, limits: &LinuxResources) -> Result<(), Error> {
        self.apply(&before_start(limits))?;
        let Some(folder) = self.folder.get() else {
            return Ok(());
        };
        for (file, value) in unified::of_host(limits) {
            fs::write(folder.join(&file), value).map_err(|error| {
                failed("set limits in", &self.path, &format!("{file}: {error}"))
            })?;
        }
        Ok(())
    }

    /// Sets the processor quota.
    pub(crate) fn set_quota(&self, limits: &LinuxResources) -> Result<(), Error> {
        match quota(limits) {
            Some(quota) => self.apply(&quota),
            None => Ok(()),
        }
    }

    /// Sets limits that have changed.
    pub(crate) fn update(&self, limits: &LinuxResources) -> Result<(), Error> {
        self.limit(limits)?;
        self.set_quota(limits)
    }

    /// In systemd's form systemd is told, so that it knows what to keep, and the files are written then, as runc does: it
    /// has no names for some limits, and libcgroups' message about cpusets is one that it does not understand.
    fn apply(&self, resources: &LinuxResources) -> Result<(), Error> {
        let refused = |error: &dyn std::fmt::Display| failed("set limits in", &self.path, error);
        let set = |manager: &AnyCgroupManager, resources: &LinuxResources| {
            let options = ControllerOpt {
                resources,
                disable_oom_killer: false,
                oom_score_adj: None,
                freezer_state: None,
            };
            manager.apply(&options).map_err(|error| refused(&error))
        };
        if !is_systemd(&self.path) {
            return set(&self.inner, resources);
        }
        set(&self.inner, &without_cpuset(resources))?;
        let Some(path) = self
            .folder
            .get()
            .and_then(|folder| folder.strip_prefix(HIERARCHY).ok())
        else {
            return Ok(());
        };
        let files = manager(Path::new("/").join(path), false, "").map_err(|e| refused(&e))?;
        set(&files, resources)
    }
}

/// Removes a container's cgroup; one that is not there is fine. Its processes must have ended.
pub(crate) fn remove(path: &str, id: &str) -> Result<(), Error> {
    // A host without cgroup v2 never got one.
    if path.is_empty() || !Path::new(HIERARCHY).join("cgroup.controllers").exists() {
        return Ok(());
    }
    open(path, id)?
        .inner
        .remove()
        .map_err(|error| failed("remove", path, &error))
}

fn without_cpuset(resources: &LinuxResources) -> LinuxResources {
    let mut without = resources.clone();
    if let Some(mut cpu) = without.cpu().clone() {
        cpu.set_cpus(None).set_mems(None);
        without.set_cpu(Some(cpu));
    }
    without
}

/// What is set before the guest runs.
fn before_start(limits: &LinuxResources) -> LinuxResources {
    let mut before = LinuxResources::default();
    if let Some(memory) = limits.memory() {
        let mut raised = LinuxMemory::default();
        if let Some(limit) = memory.limit().filter(|limit| *limit > 0) {
            raised.set_limit(Some(limit.saturating_add(MEMORY_OVERHEAD)));
            if let Some(swap) = memory.swap().filter(|swap| *swap > 0) {
                raised.set_swap(Some(swap.saturating_add(MEMORY_OVERHEAD)));
            } else {
                raised.set_swap(memory.swap());
            }
        }
        if memory.limit() == Some(NO_LIMIT) {
            raised.set_limit(Some(NO_LIMIT));
        }
        before.set_memory(Some(raised));
    }
    if let Some(cpu) = limits.cpu() {
        let mut weights = LinuxCpu::default();
        weights.set_shares(cpu.shares());
        weights.set_idle(cpu.idle());
        weights.set_cpus(cpu.cpus().clone());
        weights.set_mems(cpu.mems().clone());
        before.set_cpu(Some(weights));
    }
    before.set_block_io(limits.block_io().clone());
    before
}

/// The processor quota alone, if there is one.
fn quota(limits: &LinuxResources) -> Option<LinuxResources> {
    let cpu = limits.cpu().as_ref()?;
    if cpu.quota().is_none() && cpu.period().is_none() {
        return None;
    }
    let mut only = LinuxCpu::default();
    only.set_quota(cpu.quota());
    only.set_period(cpu.period());
    only.set_burst(cpu.burst());
    let mut resources = LinuxResources::default();
    resources.set_cpu(Some(only));
    Some(resources)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> LinuxResources {
        serde_json::from_str(
            r#"{"memory":{"limit":1000000,"swap":2000000},
                "cpu":{"shares":512,"quota":50000,"period":100000,"cpus":"0-1"},
                "pids":{"limit":10},"devices":[{"allow":false,"access":"rwm"}]}"#,
        )
        .unwrap()
    }

    #[test]
    fn no_limit_is_passed_on() {
        let limits = serde_json::from_str(r#"{"memory":{"limit":-1}}"#).unwrap();
        let memory = before_start(&limits).memory().unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(-1), None));
    }

    #[test]
    fn the_monitor_gets_its_own_memory_on_top() {
        let before = before_start(&limits());
        let memory = (*before.memory()).unwrap();
        assert_eq!(memory.limit(), Some(1_000_000 + MEMORY_OVERHEAD));
        assert_eq!(memory.swap(), Some(2_000_000 + MEMORY_OVERHEAD));
    }

    #[test]
    fn what_acts_in_the_guest_stays_there() {
        let before = before_start(&limits());
        assert!(before.pids().is_none());
        assert!(before.devices().is_none());
    }

    #[test]
    fn the_quota_waits_for_the_agent() {
        let before = before_start(&limits());
        let cpu = before.cpu().clone().unwrap();
        assert_eq!((cpu.quota(), cpu.shares()), (None, Some(512)));
        let after = quota(&limits()).unwrap().cpu().clone().unwrap();
        assert_eq!(
            (after.quota(), after.period(), after.shares()),
            (Some(50000), Some(100_000), None)
        );
        assert!(quota(&LinuxResources::default()).is_none());
    }

    #[test]
    fn a_cgroup_is_made_with_all_controllers_enabled_above_it() {
        let hierarchy = tempfile::tempdir().unwrap();
        let root = hierarchy.path();
        fs::write(root.join("cgroup.controllers"), "cpu io memory\n").unwrap();
        for _ in 0..2 {
            make_folder(root, "/docker/b").unwrap();
        }
        assert!(root.join("docker/b").is_dir());
        for enabled in ["cgroup.subtree_control", "docker/cgroup.subtree_control"] {
            let enabled = fs::read_to_string(root.join(enabled)).unwrap();
            assert_eq!(enabled, "+cpu +io +memory");
        }
        assert!(!root.join("docker/b/cgroup.subtree_control").exists());
    }

    #[test]
    fn systemds_form_is_told_from_a_path() {
        assert!(is_systemd("system.slice:docker:a"));
        for path in ["/default/a", "docker/b/c", "/a:b:c", "a:b"] {
            assert!(!is_systemd(path), "{path}");
        }
    }

    #[test]
    fn a_cgroup_outside_the_hierarchy_is_refused() {
        let hierarchy = tempfile::tempdir().unwrap();
        fs::write(hierarchy.path().join("cgroup.controllers"), "cpu").unwrap();
        for path in ["", "/", "/../a", "/x/../../a"] {
            let error = make_folder(hierarchy.path(), path).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path:?}");
        }
    }

    #[test]
    fn systemd_is_told_all_but_the_cpuset() {
        let told = without_cpuset(&limits()).cpu().clone().unwrap();
        assert_eq!((told.cpus(), told.mems()), (&None, &None));
        assert_eq!((told.shares(), told.quota()), (Some(512), Some(50000)));
    }

    #[test]
    fn no_limit_is_none() {
        assert!(before_start(&LinuxResources::default()).memory().is_none());
    }
}
