//! A container: its processes, what may be done to them when, and the events that tell of it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskExecAdded, TaskIO};
use forkvm_api::agent::StatsResponse;
use protobuf::well_known_types::timestamp::Timestamp;

use crate::{
    error::Error as AnyError,
    events::Events,
    machine::{self, Exit, Machine, Request},
    streams::{self, LogPrograms, Stdio},
};

mod ends;
mod memory;
pub(crate) mod pause;
pub(crate) mod phase;
mod process;
mod signals;
#[cfg(test)]
mod tests;
mod usage;

use pause::Motion;
use phase::Phase;
pub(crate) use process::Process;

/// Added to the guest's PIDs, so that none is mistaken for a process of the host: Linux gives out
/// PIDs below 2^22 (`PID_MAX_LIMIT`, proc(5)).
pub(crate) const GUEST_PID_BASE: u32 = 1 << 22;

/// Status of a process that could not be started, as runc's shim reports it.
const NOT_STARTED: u32 = 255;

/// Why something cannot be done to a container. What is not found says so at its end, as containerd's own errors do: clients
/// before 2.3 put these words there for the code, newer ones show what the shim says.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("container {0} is not there: not found")]
    NoContainer(String),
    #[error("container {container} has no process {exec}: not found")]
    NoProcess { container: String, exec: String },
    #[error("process {0} has ended already: not found")]
    Finished(String),
    #[error("container {0} is there already")]
    ContainerExists(String),
    #[error("process {0} is there already")]
    ProcessExists(String),
    #[error(
        "this shim holds container {held}; it cannot hold {asked} as well: pods are not supported yet"
    )]
    OneContainer { held: String, asked: String },
    #[error("cannot {action} process {process}: it is {state}")]
    State {
        action: &'static str,
        process: String,
        state: &'static str,
    },
    #[error("process {0} has no terminal")]
    NoTerminal(String),
    #[error("{0}")]
    Invalid(String),
    #[error("{0} is not implemented by forkvm yet")]
    Unimplemented(&'static str),
}

/// What `State` answers.
#[derive(Clone, Debug)]
pub(crate) struct Status {
    pub(crate) pid: u32,
    pub(crate) phase: Phase,
    pub(crate) motion: Motion,
    pub(crate) stdio: Stdio,
}

/// What `Delete` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deleted {
    pub(crate) pid: u32,
    pub(crate) exit: Exit,
}

/// One container in its machine.
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: String,
    machine: Arc<dyn Machine>,
    events: Events,
    programs: LogPrograms,
    init: Arc<Process>,
    execs: Mutex<BTreeMap<String, Arc<Process>>>,
    /// Ids of stream connections, unique in the machine; 0 means no stream.
    next_stream: AtomicU64,
    motion: Mutex<Motion>,
    /// Of how many processes killed for want of memory there was an event.
    oom_kills: AtomicU64,
    /// What the container had used when it was paused.
    at_pause: Mutex<Option<StatsResponse>>,
}

impl Container {
    /// Makes the container in `machine`. On an error the machine is for the caller to destroy.
    pub(crate) async fn create(
        request: &Request,
        stdio: Stdio,
        machine: Arc<dyn Machine>,
        events: Events,
        programs: LogPrograms,
    ) -> Result<Arc<Self>, AnyError> {
        let container = Arc::new(Self {
            id: request.id.clone(),
            bundle: request.bundle.display().to_string(),
            init: Arc::new(Process::new("", machine.pid(), stdio, Vec::new())),
            machine,
            events,
            programs,
            execs: Mutex::default(),
            next_stream: AtomicU64::new(1),
            motion: Mutex::default(),
            oom_kills: AtomicU64::new(0),
            at_pause: Mutex::default(),
        });
        let names = container.open_streams(&container.init).await?;
        container.machine.create(names).await?;
        let stdio = &container.init.stdio;
        container.events.publish(TaskCreate {
            container_id: request.id.clone(),
            bundle: container.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: Some(TaskIO {
                stdin: stdio.stdin.clone(),
                stdout: stdio.stdout.clone(),
                stderr: stdio.stderr.clone(),
                terminal: stdio.terminal,
                ..Default::default()
            })
            .into(),
            pid: container.pid(),
            ..Default::default()
        });
        tokio::spawn(Arc::clone(&container).watch(Arc::clone(&container.init)));
        Ok(container)
    }

    /// The task's PID on the host.
    pub(crate) fn pid(&self) -> u32 {
        self.machine.pid()
    }

    fn execs(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process of an exec id; the init process of an empty one.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.execs()
            .get(exec_id)
            .cloned()
            .ok_or_else(|| Error::NoProcess {
                container: self.id.clone(),
                exec: exec_id.to_owned(),
            })
    }

    /// What a process is called in messages.
    fn name(&self, process: &Process) -> String {
        let id = if process.exec_id.is_empty() {
            &self.id
        } else {
            &process.exec_id
        };
        id.clone()
    }

    fn wrong_state(&self, action: &'static str, process: &Process, phase: Phase) -> Error {
        Error::State {
            action,
            process: self.name(process),
            state: phase.name(),
        }
    }

    /// Never asks the guest.
    pub(crate) fn state(&self, exec_id: &str) -> Result<Status, Error> {
        let process = self.process(exec_id)?;
        let state = process.state();
        Ok(Status {
            pid: state.pid,
            phase: state.phase,
            motion: self.motion(),
            stdio: process.stdio.clone(),
        })
    }

    async fn open_streams(
        &self,
        process: &Process,
    ) -> Result<forkvm_api::agent::Streams, AnyError> {
        let next = || self.next_stream.fetch_add(1, Ordering::Relaxed);
        let (mut names, open) =
            streams::open(&process.stdio, &self.programs, &*self.machine, next).await?;
        let mut state = process.state();
        (names.rows, names.columns) = state.size;
        if state.stdin_closed {
            open.close_stdin();
        }
        state.streams = Some(open);
        Ok(names)
    }

    /// Starts the init process or an exec; answers its PID.
    pub(crate) async fn start(self: &Arc<Self>, exec_id: &str) -> Result<u32, AnyError> {
        let process = self.process(exec_id)?;
        self.moves("start", &self.name(&process))?;
        if !exec_id.is_empty() {
            // In one that was made and not started too, as with runc: its namespaces are there.
            let phase = self.init.state().phase;
            if phase.exit().is_some() {
                return Err(self.wrong_state("exec in", &self.init, phase).into());
            }
        }
        {
            let mut state = process.state();
            if !state.phase.start() {
                return Err(self.wrong_state("start", &process, state.phase).into());
            }
        }
        let result = if exec_id.is_empty() {
            self.machine.start().await.map(|()| self.pid())
        } else {
            self.start_exec(&process).await
        };
        match result {
            Ok(pid) => {
                let early = {
                    let mut state = process.state();
                    state.pid = pid;
                    state.phase.started()
                };
                self.announce_start(&process, pid);
                if let Some(exit) = early {
                    self.conclude(&process, exit).await;
                }
                if exec_id.is_empty() {
                    tokio::spawn(Arc::clone(self).watch_memory());
                } else {
                    tokio::spawn(Arc::clone(self).watch(process));
                }
                Ok(pid)
            }
            Err(error) => {
                let exit = match &error {
                    // As every process of a machine that ends.
                    AnyError::Machine(machine::Error::Ended(_)) => Exit::killed(),
                    _ => Exit::new(NOT_STARTED, SystemTime::now()),
                };
                let exit = process.state().phase.start_failed(exit);
                if exec_id.is_empty() {
                    self.end_execs(exit).await;
                    self.announce_exit(&process, exit);
                } else {
                    // It never was, so there is no event; who waits for it must not wait forever.
                    process.announce(exit);
                }
                Err(error)
            }
        }
    }

    async fn start_exec(&self, process: &Process) -> Result<u32, AnyError> {
        let names = self.open_streams(process).await?;
        let asked = self.machine.exec(&process.exec_id, &process.spec, names);
        let pid = tokio::select! {
            answer = asked => answer?,
            reason = machine::ended(&*self.machine) => return Err(machine::Error::Ended(reason).into()),
        };
        Ok(pid.saturating_add(GUEST_PID_BASE))
    }

    /// Adds an exec process; `start` executes it.
    pub(crate) fn exec(&self, exec_id: &str, stdio: Stdio, spec: Vec<u8>) -> Result<(), Error> {
        let phase = self.init.state().phase;
        if phase.exit().is_some() {
            return Err(self.wrong_state("exec in", &self.init, phase));
        }
        self.moves("exec in", &self.id)?;
        if exec_id.is_empty() {
            return Err(Error::Invalid("exec needs an id".to_owned()));
        }
        stdio
            .check()
            .map_err(|error| Error::Invalid(error.to_string()))?;
        {
            let mut execs = self.execs();
            if execs.contains_key(exec_id) {
                return Err(Error::ProcessExists(exec_id.to_owned()));
            }
            let process = Arc::new(Process::new(exec_id, 0, stdio, spec));
            execs.insert(exec_id.to_owned(), process);
        }
        self.events.publish(TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        });
        Ok(())
    }

    /// Waits until the end of a process has been announced.
    pub(crate) async fn wait(&self, exec_id: &str) -> Result<Exit, Error> {
        let process = self.process(exec_id)?;
        process
            .exited()
            .await
            .ok_or_else(|| Error::NoContainer(self.id.clone()))
    }

    /// Ends a process's stdin behind what its client has written.
    pub(crate) fn close_stdin(&self, exec_id: &str) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        let mut state = process.state();
        state.stdin_closed = true;
        if let Some(streams) = &state.streams {
            streams.close_stdin();
        }
        Ok(())
    }

    /// Sets the size of a process's terminal, at once or when it is started.
    pub(crate) async fn resize(
        &self,
        exec_id: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), AnyError> {
        let process = self.process(exec_id)?;
        if !process.stdio.terminal {
            return Err(Error::NoTerminal(self.name(&process)).into());
        }
        let phase = {
            let mut state = process.state();
            state.size = (rows, columns);
            state.phase
        };
        match phase {
            Phase::Created if !exec_id.is_empty() => Ok(()),
            Phase::Created | Phase::Starting(_) | Phase::Running => {
                let machine = Arc::clone(&self.machine);
                let exec_id = exec_id.to_owned();
                let resized = async move { machine.resize(&exec_id, rows, columns).await };
                if self.motion() == Motion::Running {
                    return Ok(resized.await?);
                }
                Self::later(
                    format!("terminal of process {}", self.name(&process)),
                    resized,
                );
                Ok(())
            }
            Phase::Stopped(_) | Phase::Deleting(_) => {
                Err(Error::Finished(self.name(&process)).into())
            }
        }
    }

    /// Removes an ended exec, or the ended container with its machine.
    pub(crate) async fn delete(&self, exec_id: &str) -> Result<Deleted, AnyError> {
        let process = self.process(exec_id)?;
        // What the end of one that was never started is: nothing ran, and nothing failed; but the container's own process waits
        // in the guest and is killed. As under runc.
        let never_started = if exec_id.is_empty() {
            Exit::killed()
        } else {
            Exit::new(0, SystemTime::now())
        };
        let (exit, pid, unstarted) = {
            let mut state = process.state();
            let before = state.phase;
            let Some(exit) = state.phase.delete(never_started) else {
                return Err(self.wrong_state("delete", &process, before).into());
            };
            (exit, state.pid, before == Phase::Created)
        };
        // The guest has forgotten an exec that has ended, and never heard of one that was not started.
        if exec_id.is_empty()
            && let Err(error) = self.machine.destroy().await
        {
            process.state().phase.delete_failed();
            return Err(error);
        }
        if unstarted {
            if exec_id.is_empty() {
                self.end_execs(exit).await;
                self.announce_exit(&process, exit);
            } else {
                process.announce(exit);
            }
        }
        process.state().streams = None;
        if exec_id.is_empty() {
            self.events.publish(TaskDelete {
                container_id: self.id.clone(),
                pid,
                exit_status: exit.status,
                exited_at: Some(Timestamp::from(exit.at)).into(),
                ..Default::default()
            });
        } else {
            self.execs().remove(exec_id);
        }
        Ok(Deleted { pid, exit })
    }
}
