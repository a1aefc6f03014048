//! What a container has on the host, so that all of it goes when the container goes, or when its
//! creation fails half-way.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use oci_spec::runtime::LinuxResources;

use crate::{
    cgroup::{self, Cgroup},
    error::Error,
    rootfs,
    run_state::RunFolder,
    spec::Plan,
};

use super::Monitor;

/// Everything that is to be removed.
pub(super) struct Footprint {
    pub(super) run_folder: RunFolder,
    pub(super) wrote_state: bool,
    /// Where the root file system was mounted.
    pub(super) rootfs: Option<PathBuf>,
    pub(super) monitor: Option<Arc<Monitor>>,
    /// Path and container id of the cgroup that was made.
    cgroup: Option<(String, String)>,
    limits: Option<Cgroup>,
}

impl Footprint {
    pub(super) fn new(run: &Path, namespace: &str, id: &str) -> Self {
        Self {
            run_folder: RunFolder::new(run, namespace, id),
            wrote_state: false,
            rootfs: None,
            monitor: None,
            cgroup: None,
            limits: None,
        }
    }

    /// Makes the container's cgroup with its limits. Answers its folder, for the monitor to start in, or none if systemd
    /// makes it: then the monitor is to [`join`](Self::join_cgroup) it.
    pub(super) fn make_cgroup(
        &mut self,
        plan: &Plan,
        id: &str,
    ) -> Result<Option<OwnedFd>, cgroup::Error> {
        self.cgroup = Some((plan.cgroup.clone(), id.to_owned()));
        let (cgroup, folder) = Cgroup::make(&plan.cgroup, id, &plan.resources)?;
        self.limits = Some(cgroup);
        Ok(folder)
    }

    /// Puts the monitor into the container's cgroup and sets its limits.
    pub(super) fn join_cgroup(&self, plan: &Plan, pid: u32) -> Result<(), cgroup::Error> {
        self.limits
            .as_ref()
            .map_or(Ok(()), |cgroup| cgroup.join(pid, &plan.resources))
    }

    /// Sets the processor quota, once the agent has answered.
    pub(super) fn set_quota(&self, plan: &Plan) -> Result<(), cgroup::Error> {
        self.limits
            .as_ref()
            .map_or(Ok(()), |cgroup| cgroup.set_quota(&plan.resources))
    }

    /// Sets limits that have changed.
    pub(super) fn update(&self, limits: &LinuxResources) -> Result<(), cgroup::Error> {
        self.limits
            .as_ref()
            .map_or(Ok(()), |cgroup| cgroup.update(limits))
    }

    /// Removes all of it, the monitor first: nothing else can go while it lives. What was removed
    /// is forgotten, so that a second call does the rest.
    pub(super) async fn remove(&mut self) -> Result<(), Error> {
        if let Some(monitor) = &self.monitor {
            monitor.kill();
            monitor.wait_ended().await;
            self.monitor = None;
        }
        if let Some(target) = &self.rootfs {
            rootfs::unmount(target)?;
            self.rootfs = None;
        }
        self.limits = None;
        if let Some((path, id)) = &self.cgroup {
            cgroup::remove(path, id)?;
            self.cgroup = None;
        }
        if self.wrote_state {
            self.run_folder.remove()?;
            self.wrote_state = false;
        }
        Ok(())
    }
}
