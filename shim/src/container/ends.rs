//! What follows when a process starts and ends: the events, in their order.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::events::task::{TaskExecStarted, TaskExit, TaskStart};
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::time::timeout;

use super::{
    Container, Process,
    phase::{End, Phase},
};
use crate::{
    machine::{self, Exit},
    streams,
};

/// How long the end of the init process waits for the ends of the execs it took along.
const EXEC_GRACE: Duration = Duration::from_secs(2);

impl Container {
    pub(super) fn announce_start(&self, process: &Process, pid: u32) {
        if process.exec_id.is_empty() {
            self.events.publish(TaskStart {
                container_id: self.id.clone(),
                pid,
                ..Default::default()
            });
        } else {
            self.events.publish(TaskExecStarted {
                container_id: self.id.clone(),
                exec_id: process.exec_id.clone(),
                pid,
                ..Default::default()
            });
        }
    }

    pub(super) fn announce_exit(&self, process: &Process, exit: Exit) {
        let id = if process.exec_id.is_empty() {
            &self.id
        } else {
            &process.exec_id
        };
        let pid = process.state().pid;
        self.events.publish(TaskExit {
            container_id: self.id.clone(),
            id: id.clone(),
            pid,
            exit_status: exit.status,
            exited_at: Some(Timestamp::from(exit.at)).into(),
            ..Default::default()
        });
        process.announce(exit);
    }

    /// Waits for a process's end and announces it behind its last output.
    pub(super) async fn watch(self: Arc<Self>, process: Arc<Process>) {
        let exit = tokio::select! {
            exit = self.machine.wait(&process.exec_id) => match exit {
                Ok(exit) => exit,
                Err(error) => {
                    // Either the machine is gone, or the agent is no use any more: nobody would
                    // ever hear of this process again.
                    log::warn!("waiting for process {}: {error}", self.name(&process));
                    if process.exec_id.is_empty() {
                        self.machine.kill();
                    }
                    Exit::killed()
                }
            },
            reason = machine::ended(&*self.machine) => {
                log::info!("process {} ended with its machine: {reason}", self.name(&process));
                Exit {
                    oom_kills: u64::from(reason == machine::OUT_OF_MEMORY),
                    ..Exit::killed()
                }
            }
        };
        let drained = process.state().streams.as_ref().map(streams::Open::outputs);
        if let Some(outputs) = drained {
            outputs.drained().await;
        }
        if process.exec_id.is_empty() {
            self.end_execs(exit).await;
        }
        self.finish(&process, exit).await;
    }

    /// The init process takes the execs along; their ends are announced before its own.
    pub(super) async fn end_execs(&self, exit: Exit) {
        let execs: Vec<_> = self.execs().values().cloned().collect();
        for exec in execs {
            if matches!(exec.state().phase, Phase::Running)
                && timeout(EXEC_GRACE, exec.exited()).await.is_err()
            {
                let exit = Exit {
                    at: exit.at,
                    ..Exit::killed()
                };
                self.finish(&exec, exit).await;
            }
        }
    }

    async fn finish(&self, process: &Process, exit: Exit) {
        let end = process.state().phase.exited(exit);
        if end == End::Announce {
            self.conclude(process, exit).await;
        }
    }

    /// Announces an end. That of the init process waits for the guest: who hears of it finds in the container's files all
    /// that was written, and the machine ends while the client thinks.
    pub(super) async fn conclude(&self, process: &Process, exit: Exit) {
        if process.exec_id.is_empty() {
            self.machine.retire().await;
            self.tell_out_of_memory(exit.oom_kills);
        }
        self.announce_exit(process, exit);
    }
}
