//! Pausing a container: the processors of its machine stand still. Time goes on meanwhile, as under runc.

use std::sync::{Arc, MutexGuard, PoisonError};

use containerd_shim::event::Event;
use containerd_shim_protos::events::task::{TaskPaused, TaskResumed};
use forkvm_api::agent::StatsResponse;
use protobuf::Message;

use super::{Container, Error, phase::Phase};
use crate::{error::Error as AnyError, machine};

/// Whether the machine's processors run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Motion {
    #[default]
    Running,
    Pausing,
    Paused,
    Resuming,
}

impl Motion {
    /// The name that messages use.
    fn name(self) -> &'static str {
        match self {
            Motion::Running => "running",
            Motion::Pausing => "being paused",
            Motion::Paused => "paused",
            Motion::Resuming => "being resumed",
        }
    }
}

impl Container {
    /// Whether the machine's processors run.
    pub(crate) fn motion(&self) -> Motion {
        *self.lock_motion()
    }

    fn lock_motion(&self) -> MutexGuard<'_, Motion> {
        self.motion.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_stats(&self) -> MutexGuard<'_, Option<StatsResponse>> {
        self.at_pause.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the container had used when it was paused, if it is.
    pub(super) fn stats_at_pause(&self) -> Option<StatsResponse> {
        self.lock_stats().clone()
    }

    /// Nothing new can be begun in a container that is paused, or about to be.
    pub(super) fn moves(&self, action: &'static str, process: &str) -> Result<(), Error> {
        match self.motion() {
            Motion::Running => Ok(()),
            motion => Err(Error::State {
                action,
                process: process.to_owned(),
                state: motion.name(),
            }),
        }
    }

    /// Stops the machine's processors, the guest having told what it has used. The container runs.
    pub(crate) async fn pause(self: &Arc<Self>) -> Result<(), AnyError> {
        self.step("pause", Motion::Running, Motion::Pausing)?;
        let container = Arc::clone(self);
        to_its_end(async move {
            // It cannot be asked later. A guest that does not answer is paused all the same.
            let used = container.machine.stats().await.ok();
            let paused = container.machine.pause().await;
            if paused.is_ok() {
                *container.lock_stats() = used;
            }
            container.arrive(paused, Motion::Running, Motion::Paused)?;
            let event = TaskPaused {
                container_id: container.id.clone(),
                ..Default::default()
            };
            Ok(container.tell("pause", event)?)
        })
        .await
    }

    /// Lets them go on. The container is paused.
    pub(crate) async fn resume(self: &Arc<Self>) -> Result<(), AnyError> {
        self.step("resume", Motion::Paused, Motion::Resuming)?;
        let container = Arc::clone(self);
        to_its_end(async move {
            let resumed = container.machine.resume().await;
            container.arrive(resumed, Motion::Paused, Motion::Running)?;
            *container.lock_stats() = None;
            let event = TaskResumed {
                container_id: container.id.clone(),
                ..Default::default()
            };
            Ok(container.tell("resume", event)?)
        })
        .await
    }

    /// Publishes that a step is done, unless the container has ended meanwhile: nothing may be told of it behind its end,
    /// which is told when the phase is left, and so under the same lock.
    fn tell(&self, action: &'static str, event: impl Event + Message) -> Result<(), Error> {
        let state = self.init.state();
        if state.phase != Phase::Running {
            return Err(self.wrong_state(action, &self.init, state.phase));
        }
        self.events.publish(event);
        Ok(())
    }

    /// Where a step that began at `from` has led: to `to` if it was done.
    fn arrive(
        &self,
        done: Result<(), machine::Error>,
        from: Motion,
        to: Motion,
    ) -> Result<(), machine::Error> {
        *self.lock_motion() = if done.is_ok() { to } else { from };
        done
    }

    /// Makes a call that the guest of a paused container hears when it is resumed. Nobody waits for it: as under runc, signals and
    /// terminal sizes are taken meanwhile.
    pub(super) fn later(
        what: String,
        call: impl Future<Output = Result<(), machine::Error>> + Send + 'static,
    ) {
        tokio::spawn(async move {
            if let Err(error) = call.await {
                log::warn!("{what}: {error}");
            }
        });
    }

    /// From one motion to the next: of two that ask at once, one is refused.
    fn step(&self, action: &'static str, from: Motion, to: Motion) -> Result<(), Error> {
        let phase = self.init.state().phase;
        if phase != Phase::Running {
            return Err(self.wrong_state(action, &self.init, phase));
        }
        let mut motion = self.lock_motion();
        if *motion != from {
            return Err(Error::State {
                action,
                process: self.id.clone(),
                state: motion.name(),
            });
        }
        *motion = to;
        Ok(())
    }
}

/// Runs a step in a task of its own, so that a client which gives up leaves no container half paused.
async fn to_its_end(
    step: impl Future<Output = Result<(), AnyError>> + Send + 'static,
) -> Result<(), AnyError> {
    match tokio::spawn(step).await {
        Ok(result) => result,
        Err(_) => Err(machine::Error::Ended("the shim is ending".to_owned()).into()),
    }
}
