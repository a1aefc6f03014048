//! What a container uses, and what it may use.

use forkvm_api::agent::StatsResponse;
use oci_spec::runtime::LinuxResources;

use super::{Container, Error, GUEST_PID_BASE, pause::Motion, phase::Phase};
use crate::{
    error::Error as AnyError,
    machine::{self, GuestProcess},
};

impl Container {
    /// The container's processes: the init process under the task's PID, the others raised by
    /// [`GUEST_PID_BASE`].
    pub(crate) async fn pids(&self) -> Result<Vec<GuestProcess>, machine::Error> {
        if self.init.state().phase.exit().is_some() {
            return Ok(Vec::new());
        }
        let mut processes = vec![GuestProcess {
            pid: self.pid(),
            exec_id: String::new(),
        }];
        let others = if self.motion() == Motion::Running {
            self.machine.processes().await?
        } else {
            // The guest cannot be asked. What the shim has started is there still.
            self.started_execs()
        };
        processes.extend(others.into_iter().map(|process| GuestProcess {
            pid: process.pid.saturating_add(GUEST_PID_BASE),
            ..process
        }));
        Ok(processes)
    }

    /// What the container has used.
    pub(crate) async fn stats(&self) -> Result<StatsResponse, AnyError> {
        if self.init.state().phase.exit().is_some() {
            return Err(Error::Finished(self.id.clone()).into());
        }
        match self.stats_at_pause() {
            // Nothing has been used since.
            Some(stats) => Ok(stats),
            None => Ok(self.machine.stats().await?),
        }
    }

    /// Changes what the container may use.
    pub(crate) async fn update(&self, change: &LinuxResources) -> Result<(), AnyError> {
        let phase = self.init.state().phase;
        if phase.exit().is_some() {
            return Err(self.wrong_state("update", &self.init, phase).into());
        }
        self.moves("update", &self.id)?;
        self.machine.update(change).await
    }

    /// The execs that run, by the guest's PIDs.
    fn started_execs(&self) -> Vec<GuestProcess> {
        let execs = self.execs();
        let running = execs.values().filter_map(|process| {
            let state = process.state();
            (state.phase == Phase::Running).then(|| GuestProcess {
                pid: state.pid - GUEST_PID_BASE,
                exec_id: process.exec_id.clone(),
            })
        });
        running.collect()
    }
}
