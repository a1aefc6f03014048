//! Signals.

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

use super::{Container, Error, pause::Motion, phase::Phase};
use crate::{error::Error as AnyError, machine};

/// How long the guest may take to act on SIGKILL of the init process before its machine is killed.
/// Docker itself waits ten seconds, containerd's clients have no limit of their own.
pub(super) const KILL_GRACE: Duration = Duration::from_secs(3);

/// Largest signal (`SIGRTMAX`, signal(7)).
const SIGNAL_MAX: u32 = 64;

const SIGKILL: u32 = 9;

impl Container {
    /// Sends a signal. SIGKILL of the init process works even when the guest hangs.
    pub(crate) async fn kill(
        self: &Arc<Self>,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), AnyError> {
        if signal > SIGNAL_MAX {
            return Err(Error::Invalid(format!("there is no signal {signal}")).into());
        }
        let process = self.process(exec_id)?;
        let phase = process.state().phase;
        match phase {
            Phase::Stopped(_) | Phase::Deleting(_) => {
                return Err(Error::Finished(self.name(&process)).into());
            }
            Phase::Created if !exec_id.is_empty() => {
                return Err(self.wrong_state("kill", &process, phase).into());
            }
            Phase::Created | Phase::Starting(_) | Phase::Running => {}
        }
        let paused = self.motion() != Motion::Running;
        if exec_id.is_empty() && signal == SIGKILL {
            if paused {
                // A guest that stands still takes no signal, and this one must not wait.
                self.machine.kill();
                return Ok(());
            }
            return Ok(self.kill_init(all).await?);
        }
        if paused {
            let machine = Arc::clone(&self.machine);
            let exec_id = exec_id.to_owned();
            Self::later(
                format!("signal {signal} to process {}", self.name(&process)),
                async move { machine.signal(&exec_id, signal, all).await },
            );
            return Ok(());
        }
        tokio::select! {
            answer = self.machine.signal(exec_id, signal, all) => Ok(answer?),
            _ = machine::ended(&*self.machine) => Err(Error::Finished(self.name(&process)).into()),
        }
    }

    async fn kill_init(self: &Arc<Self>, all: bool) -> Result<(), machine::Error> {
        match timeout(KILL_GRACE, self.machine.signal("", SIGKILL, all)).await {
            Ok(Ok(())) => {
                // The signal is sent; a process that cannot die of it (stuck in the kernel) goes
                // with its machine.
                let container = Arc::clone(self);
                tokio::spawn(async move {
                    if timeout(KILL_GRACE, container.init.exited()).await.is_err() {
                        log::warn!(
                            "container {} does not die of SIGKILL: killing its machine",
                            container.id
                        );
                        container.machine.kill();
                    }
                });
            }
            Ok(Err(error)) => {
                log::warn!(
                    "SIGKILL to container {}: {error}: killing its machine",
                    self.id
                );
                self.machine.kill();
            }
            Err(_) => {
                log::warn!(
                    "the guest of container {} hangs: killing its machine",
                    self.id
                );
                self.machine.kill();
            }
        }
        Ok(())
    }
}
