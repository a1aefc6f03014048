//! What libcontainer reads of a container when it adds a process to it: a state and a config.json of their own, made for the
//! first exec.
//!
//! In the container's own, the config.json is parsed whole for each exec, which takes longer than all else that libcontainer does
//! in its own code, and the state refuses an exec in a container that was not started, which runc does not.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use libcontainer::container::{ContainerStatus, State};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::json;

/// A container as libcontainer's tenant sees it.
#[derive(Debug)]
pub(crate) struct Tenant {
    id: String,
    /// The folder for its files.
    folder: PathBuf,
    config: Vec<u8>,
    /// Whether the files are there. Held while they are written, to a tmpfs.
    made: Mutex<bool>,
}

impl Tenant {
    /// The tenant's view of the container `id` made by `spec`; its files will lie in `folder`, which is its alone.
    pub(crate) fn of(id: &str, spec: &Spec, folder: PathBuf) -> Self {
        Self {
            id: id.to_owned(),
            folder,
            config: config(spec).to_string().into_bytes(),
            made: Mutex::new(false),
        }
    }

    /// The folder that holds the state; `own` is that of the container's own. The files are written if they are not there.
    pub(crate) fn state(&self, own: &Path) -> io::Result<PathBuf> {
        let states = self.folder.join("state");
        // Set in one assignment, when all is written.
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if !*made {
            let state = states.join(&self.id);
            fs::create_dir_all(&state)?;
            fs::write(self.folder.join("config.json"), &self.config)?;
            let shown = State {
                status: ContainerStatus::Running,
                bundle: self.folder.clone(),
                annotations: None,
                created: None,
                ..State::load(&own.join(&self.id)).map_err(io::Error::other)?
            };
            shown.save(&state).map_err(io::Error::other)?;
            *made = true;
        }
        Ok(states)
    }
}

/// Of a container's config.json what libcontainer's tenant_builder.rs reads. A process comes with each exec, and mounts, paths,
/// limits, hooks, host name and the offsets of its clocks the container has by now. A user namespace the executor enters
/// (`crate::user_namespace`): libcontainer leaves it out too, but would ask for its mappings.
fn config(spec: &Spec) -> serde_json::Value {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_ref());
    let namespaces: Vec<_> = namespaces
        .into_iter()
        .flatten()
        .filter(|namespace| namespace.typ() != LinuxNamespaceType::User)
        .collect();
    json!({
        "ociVersion": spec.version(),
        "root": spec.root(),
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": linux.and_then(|linux| linux.cgroups_path().as_ref()),
            "personality": linux.and_then(|linux| linux.personality().as_ref()),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        let json = json!({
            "ociVersion": "1.2.0",
            "root": {"path": "rootfs", "readonly": true},
            "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
            "hostname": "one",
            "mounts": [{"destination": "/proc", "type": "proc"}],
            "annotations": {"a": "b"},
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "user"}, {"type": "mount"}],
                "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
                "cgroupsPath": "/containers/one",
                "personality": {"domain": "LINUX32"},
                "maskedPaths": ["/proc/kcore"],
                "resources": {"pids": {"limit": 10}},
            },
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn an_exec_is_shown_what_it_needs_and_a_container_that_runs() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("own");
        fs::create_dir_all(own.join("one")).unwrap();
        let mut state = State::new("one", ContainerStatus::Created, Some(42), "/bundle".into());
        state.save(&own.join("one")).unwrap();

        let execs = folder.path().join("execs");
        let tenant = Tenant::of("one", &spec(), execs.clone());
        assert!(!execs.exists());
        let shown = State::load(&tenant.state(&own).unwrap().join("one")).unwrap();
        assert_eq!(shown.status, ContainerStatus::Running);
        assert_eq!((shown.pid, &shown.bundle), (Some(42), &execs));

        let config = Spec::load(shown.bundle.join("config.json")).unwrap();
        let (given, linux) = (spec(), config.linux().clone().unwrap());
        assert_eq!(config.root(), given.root());
        let given_linux = given.linux().clone().unwrap();
        let kinds = linux.namespaces().clone().unwrap_or_default();
        let kinds: Vec<_> = kinds.iter().map(|namespace| namespace.typ()).collect();
        assert_eq!(kinds, [LinuxNamespaceType::Pid, LinuxNamespaceType::Mount]);
        assert_eq!(linux.cgroups_path(), given_linux.cgroups_path());
        assert_eq!(linux.personality(), given_linux.personality());
        assert!(config.process().is_none() && config.mounts().is_none());
        assert!(config.hostname().is_none() && linux.resources().is_none());

        // Written once: what the container's own state says later does not matter.
        state.status = ContainerStatus::Stopped;
        state.save(&own.join("one")).unwrap();
        let again = State::load(&tenant.state(&own).unwrap().join("one")).unwrap();
        assert_eq!(again.status, ContainerStatus::Running);
    }

    #[test]
    fn files_that_could_not_be_written_are_written_the_next_time() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("own");
        let tenant = Tenant::of("one", &spec(), folder.path().join("execs"));
        assert!(tenant.state(&own).is_err());
        fs::create_dir_all(own.join("one")).unwrap();
        let state = State::new("one", ContainerStatus::Running, Some(42), "/bundle".into());
        state.save(&own.join("one")).unwrap();
        let states = tenant.state(&own).unwrap();
        assert_eq!(State::load(&states.join("one")).unwrap().pid, Some(42));
    }
}
