//! The real machine: a monitor's process, the agent in its guest, and what belongs to the
//! container on the host.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use async_trait::async_trait;
use forkvm_api::{STREAM_PORT, agent, agent_ttrpc::AgentClient, points, stream};
use forkvm_vmm::{control::FailureKind, template::Template};
use oci_spec::runtime::{ContainerState, LinuxResources};
use tokio::{
    net::UnixStream,
    sync::{OnceCell, watch},
    task::spawn_blocking,
    time::timeout,
};
use ttrpc::Code;

use crate::{
    error::Error as AnyError,
    hooks::{self, HookRunner},
    machine::{Error as MachineError, Exit, GuestProcess, Machine},
    spec::{self, Plan},
    timings::{self, Points},
};

pub(crate) mod builder;
mod footprint;
mod guest;
mod identity;
mod launch;
mod monitor;
mod origin;
mod spawn;

use footprint::Footprint;
use guest::{guest_error, no_limit, sized, within};
pub(crate) use launch::Launcher;
use monitor::Monitor;

/// How long the guest may take to change limits: lowering that of memory takes as long as giving memory back does.
const UPDATE: Duration = Duration::from_secs(10);

/// How long the guest may take to list its processes, or to count what they use.
const LIST: Duration = Duration::from_secs(2);

/// How long the guest may take to remove the container before its machine is killed.
const REMOVE: Duration = Duration::from_secs(2);

/// How long a machine whose connections have ended may take to end itself, and to say why.
const END: Duration = Duration::from_secs(2);

/// Why a machine does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot start the monitor {0}: {1}")]
    Spawn(PathBuf, std::io::Error),
    #[error("{0}")]
    NoTemplate(String),
    #[error("{0}")]
    Failed(String, FailureKind),
    #[error("the virtual machine ended before its agent answered: {0}")]
    Ended(String),
    #[error("the virtual machine does not run after {0} s, see the shim's log")]
    Late(u64),
    #[error("cannot open {0}: {1}")]
    Open(PathBuf, std::io::Error),
    #[error("control socket of the monitor: {0}")]
    Control(#[from] forkvm_vmm::control::socket::Error),
    #[error("the host has no randomness to give: {0}")]
    Entropy(std::io::Error),
    #[error("cannot set the monitor's oom_score_adj: {0}")]
    OomScore(std::io::Error),
}

impl Error {
    /// See [`crate::error::Error::code`].
    pub(crate) fn code(&self) -> Code {
        match self {
            Error::NoTemplate(_) => Code::FAILED_PRECONDITION,
            Error::Failed(_, kind) => match kind {
                FailureKind::NoKvm | FailureKind::Template => Code::FAILED_PRECONDITION,
                FailureKind::Invalid => Code::INVALID_ARGUMENT,
                FailureKind::Internal => Code::INTERNAL,
            },
            Error::Ended(_) => Code::UNAVAILABLE,
            Error::Late(_) => Code::DEADLINE_EXCEEDED,
            Error::Open(..) => Code::FAILED_PRECONDITION,
            Error::Spawn(..) | Error::Control(_) | Error::Entropy(_) | Error::OomScore(_) => {
                Code::INTERNAL
            }
        }
    }
}

/// A running machine with its container's belongings.
struct Vm {
    id: String,
    namespace: String,
    bundle: PathBuf,
    monitor: Arc<Monitor>,
    agent: AgentClient,
    plan: Plan,
    mode: String,
    /// File to which the time points are appended; empty for none.
    timings: PathBuf,
    hooks: HookRunner,
    points: Mutex<Points>,
    /// The guest's PID of the init process; 0 before it is made.
    init_pid: AtomicU32,
    /// Whether its end was brought about.
    retired: OnceCell<()>,
    /// The template, if what this start writes to is to be kept for later ones.
    recording: Mutex<Option<Box<Template>>>,
    /// What the container may use now.
    resources: tokio::sync::Mutex<LinuxResources>,
    /// Held across the removal on purpose: a second one waits for the first.
    footprint: tokio::sync::Mutex<Footprint>,
}

impl Vm {
    fn points(&self) -> MutexGuard<'_, Points> {
        self.points.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs hooks of one kind with the state as it is.
    async fn run_hooks(
        &self,
        kind: &'static str,
        hooks: Option<&[oci_spec::runtime::Hook]>,
        status: ContainerState,
    ) -> Result<(), AnyError> {
        let Some(hooks) = hooks.filter(|hooks| !hooks.is_empty()) else {
            return Ok(());
        };
        let annotations = self.plan.annotations.as_ref();
        let state = hooks::state(
            &self.id,
            &self.bundle,
            self.monitor.pid(),
            status,
            annotations,
        )?;
        Ok(self.hooks.run(kind, hooks, &state).await?)
    }

    /// An answer of the agent, or the end of the machine, whichever comes first.
    async fn call<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, MachineError> {
        let error = tokio::select! {
            answer = answer => match answer {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            },
            reason = self.monitor.wait_ended() => return Err(MachineError::Ended(reason)),
        };
        if !matches!(error, ttrpc::Error::RpcStatus(_))
            && let Ok(reason) = timeout(END, self.monitor.wait_ended()).await
        {
            return Err(MachineError::Ended(reason));
        }
        Err(guest_error(call, error))
    }

    /// Lets the guest flush what it holds for the container's files, and kills the machine.
    async fn end_guest(&self) {
        let request = agent::DeleteRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        let removed = timeout(
            REMOVE,
            self.call("delete", self.agent.delete(no_limit(), &request)),
        );
        match removed.await {
            Ok(Ok(_) | Err(MachineError::Ended(_))) => {}
            // It never was made: its creation failed.
            Ok(Err(MachineError::Guest {
                code: Code::NOT_FOUND,
                ..
            })) => {}
            Ok(Err(error)) => log::warn!("container {}: {error}", self.id),
            Err(_) => log::warn!("container {}: the guest does not answer delete", self.id),
        }
        self.monitor.kill();
    }

    /// Keeps what the start has written to, if it was recorded, while the container goes on.
    fn keep_writes(&self) {
        let recording = self
            .recording
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(template) = recording else { return };
        let monitor = Arc::clone(&self.monitor);
        tokio::spawn(async move {
            let Some(written) = monitor.written().await else {
                return;
            };
            let kept = spawn_blocking(move || template.keep_written(&written)).await;
            if let Ok(Err(error)) = kept {
                log::warn!("later starts take longer: {error}");
            }
        });
    }

    async fn keep_timings(&self) {
        let points = self.points().clone();
        if let Err(error) = self
            .footprint
            .lock()
            .await
            .run_folder
            .write_timings(&points)
        {
            log::warn!("{error}");
        }
    }
}

#[async_trait]
impl Machine for Vm {
    fn pid(&self) -> u32 {
        self.monitor.pid()
    }

    async fn streams(&self, ids: [u64; 3]) -> Result<[Option<UnixStream>; 3], MachineError> {
        let wanted = ids.iter().filter(|id| **id != 0);
        let headers: Vec<_> = wanted.map(|id| stream::header(*id)).collect();
        let connected = self.monitor.connect_each(STREAM_PORT, &headers).await;
        let connected = connected.map_err(|error| std::io::Error::other(error.to_string()))?;
        let mut connected = connected.into_iter();
        Ok(ids.map(|id| if id == 0 { None } else { connected.next() }))
    }

    async fn create(&self, streams: agent::Streams) -> Result<(), AnyError> {
        let streams = sized(streams, self.plan.console_size);
        let spec = serde_json::to_vec(&self.plan.guest).map_err(spec::Error::Encode)?;
        let mut request = agent::CreateRequest {
            container_id: self.id.clone(),
            spec,
            streams: Some(streams).into(),
            ..Default::default()
        };
        request.identity = Some(identity::fresh(
            &self.namespace,
            &self.id,
            &self.plan.hostname,
        )?)
        .into();
        let answer = self
            .call("create", self.agent.create(no_limit(), &request))
            .await?;
        self.init_pid.store(answer.pid, Ordering::Relaxed);
        let answered = timings::now();
        self.points().take_at(
            points::IDENTITY_APPLIED,
            answered.saturating_sub(answer.create_ns),
        );
        self.points().take_at(points::AGENT_ANSWERED, answered);
        self.keep_writes();
        self.footprint.lock().await.set_quota(&self.plan)?;
        let hooks = &self.plan.hooks;
        #[allow(deprecated)] // Docker still uses it, and runc still runs it.
        let prestart = hooks.prestart().as_deref();
        self.run_hooks("prestart", prestart, ContainerState::Creating)
            .await?;
        let create_runtime = hooks.create_runtime().as_deref();
        self.run_hooks("createRuntime", create_runtime, ContainerState::Creating)
            .await?;
        self.points().take(points::CREATE_DONE);
        Ok(())
    }

    async fn start(&self) -> Result<(), AnyError> {
        self.points().take(points::START_RECEIVED);
        let request = agent::StartRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        self.call("start", self.agent.start(no_limit(), &request))
            .await?;
        self.points().take(points::PROCESS_STARTED);
        self.keep_timings().await;
        if !self.timings.as_os_str().is_empty() {
            self.points()
                .append(&self.timings, &self.namespace, &self.id, &self.mode);
        }
        let poststart = self.plan.hooks.poststart().as_deref();
        if let Err(error) = self
            .run_hooks("poststart", poststart, ContainerState::Running)
            .await
        {
            // As with runc: it is no container that its hook has not agreed to.
            self.kill();
            return Err(error);
        }
        Ok(())
    }

    async fn exec(
        &self,
        exec_id: &str,
        process: &[u8],
        streams: agent::Streams,
    ) -> Result<u32, AnyError> {
        let (process, size) = spec::exec_process(process)?;
        let request = agent::ExecRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            process,
            streams: Some(sized(streams, size)).into(),
            ..Default::default()
        };
        Ok(self
            .call("exec", self.agent.exec(no_limit(), &request))
            .await?
            .pid)
    }

    async fn wait(&self, exec_id: &str) -> Result<Exit, MachineError> {
        let request = agent::WaitRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        let answer = self
            .call("wait", self.agent.wait(no_limit(), &request))
            .await?;
        let since = Duration::from_nanos(answer.exited_at_ns.unsigned_abs());
        let at = if answer.exited_at_ns > 0 {
            UNIX_EPOCH + since
        } else {
            SystemTime::now()
        };
        Ok(Exit {
            status: answer.exit_status,
            at,
            oom_kills: answer.oom_kills,
        })
    }

    async fn signal(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), MachineError> {
        let request = agent::SignalRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.call("signal", self.agent.signal(no_limit(), &request))
            .await
            .map(drop)
    }

    async fn processes(&self) -> Result<Vec<GuestProcess>, MachineError> {
        let request = agent::PidsRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        let asked = self.call("pids", self.agent.pids(no_limit(), &request));
        let answer = within(LIST, "pids", asked).await?;
        let init = self.init_pid.load(Ordering::Relaxed);
        let others = answer.processes.into_iter().filter(|p| p.pid != init);
        Ok(others
            .map(|p| GuestProcess {
                pid: p.pid,
                exec_id: p.exec_id,
            })
            .collect())
    }

    async fn stats(&self) -> Result<agent::StatsResponse, MachineError> {
        let request = agent::StatsRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        let asked = self.call("stats", self.agent.stats(no_limit(), &request));
        within(LIST, "stats", asked).await
    }

    async fn out_of_memory(&self, seen: u64) -> Result<u64, MachineError> {
        let request = agent::OutOfMemoryRequest {
            container_id: self.id.clone(),
            seen,
            ..Default::default()
        };
        let asked = self.agent.out_of_memory(no_limit(), &request);
        Ok(self.call("out_of_memory", asked).await?.kills)
    }

    async fn update(&self, change: &LinuxResources) -> Result<(), AnyError> {
        // Held across on purpose: a second update waits for the first, and both are bounded.
        let mut resources = self.resources.lock().await;
        let wanted = spec::update::merged(&resources, change);
        spec::update::fits(&wanted, self.plan.class)?;
        let host_first = spec::update::raises_memory(&resources, &wanted);
        if host_first {
            self.footprint.lock().await.update(&wanted)?;
        }
        let in_guest = spec::guest_resources(&wanted);
        let request = agent::UpdateRequest {
            container_id: self.id.clone(),
            resources: serde_json::to_vec(&in_guest).map_err(spec::Error::Encode)?,
            ..Default::default()
        };
        let asked = self.call("update", self.agent.update(no_limit(), &request));
        within(UPDATE, "update", asked).await?;
        if !host_first {
            self.footprint.lock().await.update(&wanted)?;
        }
        *resources = wanted;
        Ok(())
    }

    async fn resize(&self, exec_id: &str, rows: u32, columns: u32) -> Result<(), MachineError> {
        let request = agent::ResizePtyRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            rows,
            columns,
            ..Default::default()
        };
        self.call("resize", self.agent.resize_pty(no_limit(), &request))
            .await
            .map(drop)
    }

    async fn pause(&self) -> Result<(), MachineError> {
        self.monitor.pause().await
    }

    async fn resume(&self) -> Result<(), MachineError> {
        self.monitor.resume().await
    }

    fn kill(&self) {
        self.monitor.kill();
    }

    fn ended(&self) -> watch::Receiver<Option<String>> {
        self.monitor.ended()
    }

    async fn retire(&self) {
        // A second caller waits for the first.
        self.retired.get_or_init(|| self.end_guest()).await;
    }

    async fn destroy(&self) -> Result<(), AnyError> {
        self.retire().await;
        self.footprint.lock().await.remove().await?;
        let poststop = self.plan.hooks.poststop().as_deref();
        if let Err(error) = self
            .run_hooks("poststop", poststop, ContainerState::Stopped)
            .await
        {
            // The container is gone: the OCI runtime specification asks for a warning.
            log::warn!("{error}");
        }
        Ok(())
    }
}
