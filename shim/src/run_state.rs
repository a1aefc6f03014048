//! What is kept about a running container under `paths.run`, for `forkvm ps` and for the `delete`
//! action, which finds there what a dead shim has left.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::timings::Points;

/// What can go wrong with it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot remove {path}: {source}")]
    Remove { path: PathBuf, source: io::Error },
}

/// `state.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    /// "fork" or "boot".
    pub(crate) mode: String,
    /// Why it was booted; empty for a fork.
    #[serde(default)]
    pub(crate) reason: String,
    /// Whether it was booted although it should have been forked.
    #[serde(default)]
    pub(crate) fall_back: bool,
    /// The template's id; empty for a cold boot.
    pub(crate) template: String,
    pub(crate) shim_pid: u32,
    /// 0 before the monitor runs.
    pub(crate) monitor_pid: u32,
    /// Field `starttime` of the monitor's `/proc/PID/stat`: tells it from a later process of the
    /// same PID.
    pub(crate) monitor_start: u64,
    /// `linux.cgroupsPath`, as the spec has it.
    pub(crate) cgroup: String,
}

/// A container's folder.
#[derive(Clone, Debug)]
pub(crate) struct RunFolder {
    path: PathBuf,
}

impl RunFolder {
    /// The folder of a container; containerd's ids and namespaces hold no `/` (its `identifiers`
    /// package), so they are names of folders.
    pub(crate) fn new(run: &Path, namespace: &str, id: &str) -> Self {
        Self {
            path: run.join(namespace).join(id),
        }
    }

    fn write(&self, name: &str, value: &impl Serialize) -> Result<(), Error> {
        let path = self.path.join(name);
        let temporary = self.path.join(format!(".{name}"));
        serde_json::to_vec(value)
            .map_err(io::Error::other)
            .and_then(|text| fs::create_dir_all(&self.path).and(fs::write(&temporary, text)))
            // Whole or not at all: others read it at any time.
            .and_then(|()| fs::rename(&temporary, &path))
            .map_err(|source| Error::Write { path, source })
    }

    pub(crate) fn write_state(&self, state: &State) -> Result<(), Error> {
        self.write("state.json", state)
    }

    pub(crate) fn write_timings(&self, points: &Points) -> Result<(), Error> {
        self.write("timings.json", points)
    }

    /// What a shim has left, if it has left anything that can be read.
    pub(crate) fn read_state(&self) -> Option<State> {
        let text = fs::read(self.path.join("state.json")).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Removes the folder, and the namespace's if it was the last.
    pub(crate) fn remove(&self) -> Result<(), Error> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::Remove {
                    path: self.path.clone(),
                    source: error,
                });
            }
            _ => {}
        }
        // Not empty is not an error: another container of the namespace lives.
        if let Some(namespace) = self.path.parent() {
            let _ = fs::remove_dir(namespace);
        }
        Ok(())
    }
}

/// `starttime` of a process (proc_pid_stat(5), field 22), in clock ticks since boot.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name, may hold spaces and parentheses: count behind its last one.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_comes_back_and_is_removed_with_its_namespace() {
        let run = tempfile::tempdir().unwrap();
        let folder = RunFolder::new(run.path(), "default", "c1");
        assert!(folder.read_state().is_none());
        let state = State {
            namespace: "default".into(),
            id: "c1".into(),
            bundle: "/b".into(),
            mode: "fork".into(),
            reason: String::new(),
            fall_back: false,
            template: "0123".into(),
            shim_pid: 1,
            monitor_pid: 2,
            monitor_start: 3,
            cgroup: "/default/c1".into(),
        };
        folder.write_state(&state).unwrap();
        assert_eq!(folder.read_state(), Some(state));
        let other = RunFolder::new(run.path(), "default", "c2");
        other.write_timings(&Points::default()).unwrap();
        folder.remove().unwrap();
        assert!(run.path().join("default/c2/timings.json").exists());
        other.remove().unwrap();
        assert!(!run.path().join("default").exists());
        other.remove().unwrap();
    }

    #[test]
    fn a_process_has_a_start_time() {
        let own = start_time(std::process::id()).unwrap();
        assert!(own > 0 && start_time(1).unwrap() <= own);
        assert_eq!(start_time(u32::MAX), None);
    }
}
