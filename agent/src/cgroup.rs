//! The cgroup tree of the guest (cgroup v2, Documentation/admin-guide/cgroup-v2.rst).
//!
//! `/agent` holds the agent and its workers, `/forkvm/<container>` one container each.

use std::{
    collections::HashMap,
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use libcgroups::common::{CgroupConfig, CgroupManager as _, ControllerOpt, create_cgroup_manager};
use oci_spec::runtime::LinuxResources;
use tokio::io::Interest;

use crate::channel;

const ROOT: &str = "/sys/fs/cgroup";
const AGENT: &str = "/sys/fs/cgroup/agent";
const CONTAINERS: &str = "/forkvm";

/// What went wrong with a cgroup.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cgroup: cannot {what} {path}: {source}")]
    File {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cgroup: {0}")]
    Limits(String),
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::File {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Moves the agent into a leaf of its own and hands every controller down to the containers: a
/// cgroup with processes in it cannot have controllers enabled for those below it.
pub(crate) fn claim_root() -> Result<(), Error> {
    let agent = Path::new(AGENT);
    fs::create_dir_all(agent).map_err(failed("make", agent))?;
    let procs = agent.join("cgroup.procs");
    fs::write(&procs, "0").map_err(failed("write", &procs))?;

    let containers = format!("{ROOT}{CONTAINERS}");
    fs::create_dir_all(&containers).map_err(failed("make", Path::new(&containers)))?;
    for folder in [ROOT, &containers] {
        let available = Path::new(folder).join("cgroup.controllers");
        let controllers = fs::read_to_string(&available).map_err(failed("read", &available))?;
        let enabled = Path::new(folder).join("cgroup.subtree_control");
        for controller in controllers.split_ascii_whitespace() {
            fs::write(&enabled, format!("+{controller}")).map_err(failed("write", &enabled))?;
        }
    }
    Ok(())
}

/// The cgroup of one container.
#[derive(Debug, Clone)]
pub(crate) struct Cgroup {
    folder: PathBuf,
}

impl Cgroup {
    /// The cgroup of the container `id`, which must be a plain file name.
    pub(crate) fn of(id: &str) -> Self {
        Self {
            folder: PathBuf::from(format!("{ROOT}{CONTAINERS}/{id}")),
        }
    }

    /// Its path from the root of the tree, as `linux.cgroupsPath` names it.
    pub(crate) fn path_in_tree(id: &str) -> PathBuf {
        PathBuf::from(format!("{CONTAINERS}/{id}"))
    }

    /// Every process in it and in the cgroups below it, in ascending order.
    pub(crate) fn processes(&self) -> Result<Vec<u32>, Error> {
        let mut found = Vec::new();
        let mut folders = vec![self.folder.clone()];
        while let Some(folder) = folders.pop() {
            let procs = folder.join("cgroup.procs");
            match fs::read_to_string(&procs) {
                Ok(text) => found.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
                // A threaded cgroup lists its processes in its parent; one that has gone has none.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP)) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV)) => continue,
                Err(error) => return Err(failed("read", &procs)(error)),
            }
            folders.extend(below(&folder));
        }
        // 0 is a process of another PID namespace, which no signal can reach from here.
        found.retain(|pid| *pid != 0);
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Sets its limits, and the rules for devices, to those of `resources`.
    ///
    /// # Errors
    /// Limits that contradict each other, or that the kernel refuses.
    pub(crate) fn limit(&self, resources: &LinuxResources) -> Result<(), Error> {
        let refused = |error: &dyn std::fmt::Display| Error::Limits(error.to_string());
        let path = Path::new("/").join(self.folder.strip_prefix(ROOT).unwrap_or(&self.folder));
        let config = CgroupConfig {
            cgroup_path: path,
            systemd_cgroup: false,
            container_name: String::new(),
        };
        let cgroup = create_cgroup_manager(config).map_err(|error| refused(&error))?;
        cgroup
            .apply(&ControllerOpt {
                resources,
                disable_oom_killer: false,
                oom_score_adj: None,
                freezer_state: None,
            })
            .map_err(|error| refused(&error))
    }

    /// Whether limits may be set that say they are not to take memory away (OCI runtime specification,
    /// `memory.checkBeforeUpdate`).
    ///
    /// # Errors
    /// A memory limit below what is used.
    pub(crate) fn check_before_update(&self, resources: &LinuxResources) -> Result<(), Error> {
        let memory = (*resources.memory()).unwrap_or_default();
        let limit = memory
            .limit()
            .and_then(|limit| u64::try_from(limit).ok())
            .filter(|limit| *limit > 0 && memory.check_before_update() == Some(true));
        let Some(limit) = limit else {
            return Ok(());
        };
        let used: u64 = self.read("memory.current")?.trim().parse().unwrap_or(0);
        if limit < used {
            return Err(Error::Limits(format!(
                "a memory limit of {limit} bytes is below the {used} that are used"
            )));
        }
        Ok(())
    }

    /// The text of one of its files; nothing if a controller does not have it.
    ///
    /// # Errors
    /// A cgroup that is gone, or a file that cannot be read.
    pub(crate) fn read(&self, file: &str) -> Result<String, Error> {
        let path = self.folder.join(file);
        match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.folder.exists() => {
                Ok(String::new())
            }
            outcome => outcome.map_err(failed("read", &path)),
        }
    }

    /// Kills every process in it, those of other PID namespaces too.
    pub(crate) fn kill(&self) -> Result<(), Error> {
        let kill = self.folder.join("cgroup.kill");
        match fs::write(&kill, "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            outcome => outcome.map_err(failed("write", &kill)),
        }
    }

    /// Kills what is left in it, waits until nothing is, and removes it.
    pub(crate) async fn remove(&self) -> Result<(), Error> {
        if !self.folder.exists() {
            return Ok(());
        }
        self.kill()?;
        self.emptied().await?;
        remove_tree(&self.folder)
    }

    /// Waits until no process is left in it.
    async fn emptied(&self) -> Result<(), Error> {
        self.watch("cgroup.events", |events| (!populated(events)).then_some(()))
            .await
    }

    /// How many processes of it the kernel has killed for want of memory; 0 without the controller.
    pub(crate) fn oom_kills(&self) -> Result<u64, Error> {
        Ok(oom_kills(&self.read("memory.events")?))
    }

    /// Waits until these are more than `seen`.
    pub(crate) async fn more_oom_kills(&self, seen: u64) -> Result<u64, Error> {
        self.watch("memory.events", |events| {
            Some(oom_kills(events)).filter(|kills| *kills > seen)
        })
        .await
    }

    /// Waits until one of its files that report their changes says what is looked for.
    async fn watch<T>(&self, file: &str, found: impl Fn(&str) -> Option<T>) -> Result<T, Error> {
        let path = self.folder.join(file);
        let events: OwnedFd = fs::File::open(&path).map_err(failed("open", &path))?.into();
        // A change of the file is reported as POLLPRI until it is read again.
        let events =
            channel::register(events, Interest::PRIORITY).map_err(failed("watch", &path))?;
        loop {
            let mut text = [0; 512];
            let length = rustix::io::pread(events.get_ref().as_fd(), &mut text, 0)
                .map_err(|error| failed("read", &path)(error.into()))?;
            if let Some(found) = found(&String::from_utf8_lossy(&text[..length])) {
                return Ok(found);
            }
            let mut change = events
                .ready(Interest::PRIORITY)
                .await
                .map_err(failed("watch", &path))?;
            change.clear_ready();
        }
    }
}

/// A flat keyed file: lines `name number`.
pub(crate) fn numbers(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        })
        .collect()
}

/// The count in memory.events.
fn oom_kills(events: &str) -> u64 {
    numbers(events).get("oom_kill").copied().unwrap_or(0)
}

fn populated(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

fn below(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Removes a cgroup and those below it, the deepest first; the files in them cannot be removed.
fn remove_tree(folder: &Path) -> Result<(), Error> {
    for child in below(folder) {
        remove_tree(&child)?;
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome.map_err(failed("remove", folder)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_keyed_files_are_read_as_linux_writes_them() {
        let stat = numbers("usage_usec 12\nuser_usec 7\nbroken\nworse x\n");
        assert_eq!(stat.len(), 2);
        assert_eq!((stat["usage_usec"], stat["user_usec"]), (12, 7));
    }

    #[test]
    fn a_limit_below_what_is_used_is_refused_if_that_is_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("memory.current"), "4096\n").unwrap();
        let cgroup = Cgroup {
            folder: folder.path().to_owned(),
        };
        let check = |memory: &str| {
            let resources = serde_json::from_str(&format!(r#"{{"memory":{memory}}}"#)).unwrap();
            cgroup.check_before_update(&resources)
        };
        let error = check(r#"{"limit":4095,"checkBeforeUpdate":true}"#).unwrap_err();
        assert!(error.to_string().contains("4096"), "{error}");
        for memory in [
            r#"{"limit":4096,"checkBeforeUpdate":true}"#,
            r#"{"limit":-1,"checkBeforeUpdate":true}"#,
            r#"{"limit":4095,"checkBeforeUpdate":false}"#,
            r#"{"limit":4095}"#,
        ] {
            check(memory).unwrap();
        }
    }

    #[test]
    fn kills_are_read_from_memory_events() {
        assert_eq!(oom_kills("low 0\noom 3\noom_kill 2\noom_group_kill 1\n"), 2);
        assert_eq!(oom_kills(""), 0);
    }

    #[test]
    fn populated_is_read_from_cgroup_events() {
        assert!(populated("populated 1\nfrozen 0\n"));
        assert!(!populated("populated 0\nfrozen 0\n"));
        assert!(!populated(""));
    }
}
