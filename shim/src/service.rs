//! containerd's Task API: thin handlers over [`Container`].

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use containerd_shim::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
    StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::{
    api::ProcessInfo,
    shim::oci::ProcessDetails,
    shim_async::{Task, create_task},
};
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::watch;
use ttrpc::r#async::{Service as Methods, TtrpcContext};

use crate::{
    any::packed,
    container::{Container, Error as ContainerError, pause::Motion, phase::Phase},
    error::Error,
    events::Events,
    machine::{Backend, Exit, Request},
    reaper::Reaper,
    spec, stats,
    streams::{LogPrograms, Stdio},
};

/// The name under which containerd-shim-protos registers the service.
const V3: &str = "containerd.task.v3.Task";

/// The same service for containerd 1.x and Docker.
const V2: &str = "containerd.task.v2.Task";

/// The package of [`ProcessDetails`].
pub(crate) const DETAILS: &str = "containerd.runc.v1";

/// The one container that a shim holds.
enum Slot {
    Empty,
    Creating(String),
    Holds(Arc<Container>),
}

/// The Task service of one shim.
pub(crate) struct Service {
    namespace: String,
    backend: Arc<dyn Backend>,
    events: Events,
    reaper: Reaper,
    slot: Mutex<Slot>,
    /// Becomes true when the shim is to end.
    ended: watch::Sender<bool>,
}

impl Service {
    pub(crate) fn new(
        namespace: &str,
        backend: Arc<dyn Backend>,
        events: Events,
        reaper: Reaper,
    ) -> Self {
        Self {
            namespace: namespace.to_owned(),
            backend,
            events,
            reaper,
            slot: Mutex::new(Slot::Empty),
            ended: watch::Sender::new(false),
        }
    }

    /// The service under both of its names.
    pub(crate) fn methods(self: &Arc<Self>) -> std::collections::HashMap<String, Methods> {
        let mut methods = create_task(Arc::clone(self) as Arc<_>);
        let again = create_task(Arc::clone(self) as Arc<_>).remove(V3);
        methods.extend(again.map(|service| (V2.to_owned(), service)));
        methods
    }

    /// Resolves when `Shutdown` was called and nothing is left.
    pub(crate) async fn ended(&self) {
        let mut ended = self.ended.subscribe();
        // The sender lives as long as `self`.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match &*self.slot() {
            Slot::Holds(container) if container.id == id => Ok(Arc::clone(container)),
            _ => Err(ContainerError::NoContainer(id.to_owned()).into()),
        }
    }

    /// Takes the slot for a new container.
    fn reserve(&self, id: &str) -> Result<(), ContainerError> {
        let mut slot = self.slot();
        let held = match &*slot {
            Slot::Empty => {
                *slot = Slot::Creating(id.to_owned());
                return Ok(());
            }
            Slot::Creating(held) => held,
            Slot::Holds(container) => &container.id,
        };
        if held == id {
            Err(ContainerError::ContainerExists(id.to_owned()))
        } else {
            Err(ContainerError::OneContainer {
                held: held.clone(),
                asked: id.to_owned(),
            })
        }
    }

    async fn make(&self, request: &Request, stdio: Stdio) -> Result<Arc<Container>, Error> {
        let machine = self.backend.launch(request).await?;
        let programs = LogPrograms {
            reaper: self.reaper.clone(),
            namespace: self.namespace.clone(),
            container: request.id.clone(),
        };
        let events = self.events.clone();
        match Container::create(request, stdio, Arc::clone(&machine), events, programs).await {
            Ok(container) => Ok(container),
            Err(error) => {
                if let Err(left) = machine.destroy().await {
                    log::error!("after a failed create of {}: {left}", request.id);
                }
                Err(error)
            }
        }
    }

    async fn create_container(&self, request: CreateTaskRequest) -> Result<u32, Error> {
        let stdio = Stdio {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        if !request.checkpoint.is_empty() {
            return Err(ContainerError::Unimplemented("restoring from a checkpoint").into());
        }
        stdio.check()?;
        self.reserve(&request.id)?;
        let request = Request {
            id: request.id,
            bundle: PathBuf::from(request.bundle),
            rootfs: request.rootfs,
        };
        let made = self.make(&request, stdio).await;
        let mut slot = self.slot();
        match made {
            Ok(container) => {
                let pid = container.pid();
                *slot = Slot::Holds(container);
                Ok(pid)
            }
            Err(error) => {
                *slot = Slot::Empty;
                log::error!("create {}: {error}", request.id);
                Err(error)
            }
        }
    }

    async fn delete_process(&self, request: &DeleteRequest) -> Result<DeleteResponse, Error> {
        let deleted = self
            .container(&request.id)?
            .delete(&request.exec_id)
            .await?;
        if request.exec_id.is_empty() {
            *self.slot() = Slot::Empty;
        }
        Ok(DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.status,
            exited_at: at(deleted.exit),
            ..Default::default()
        })
    }

    async fn list(&self, request: &PidsRequest) -> Result<PidsResponse, Error> {
        let mut response = PidsResponse::new();
        for process in self.container(&request.id)?.pids().await? {
            let mut info = ProcessInfo::new();
            info.pid = process.pid;
            if !process.exec_id.is_empty() {
                let details = ProcessDetails {
                    exec_id: process.exec_id,
                    ..Default::default()
                };
                info.info = packed(DETAILS, &details).ok().into();
            }
            response.processes.push(info);
        }
        Ok(response)
    }

    fn describe(&self, request: &StateRequest) -> Result<StateResponse, Error> {
        let container = self.container(&request.id)?;
        let status = container.state(&request.exec_id)?;
        let mut response = StateResponse {
            id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            bundle: container.bundle.clone(),
            pid: status.pid,
            stdin: status.stdio.stdin,
            stdout: status.stdio.stdout,
            stderr: status.stdio.stderr,
            terminal: status.stdio.terminal,
            status: match status.phase {
                Phase::Created | Phase::Starting(_) => Status::CREATED,
                Phase::Running => match status.motion {
                    Motion::Running => Status::RUNNING,
                    Motion::Pausing => Status::PAUSING,
                    Motion::Paused | Motion::Resuming => Status::PAUSED,
                },
                Phase::Stopped(_) | Phase::Deleting(_) => Status::STOPPED,
            }
            .into(),
            ..Default::default()
        };
        if let Some(exit) = status.phase.exit() {
            response.exit_status = exit.status;
            response.exited_at = at(exit);
        }
        Ok(response)
    }

    /// What is not built says so, for a container that is there and for one that is not.
    fn unimplemented<T>(&self, id: &str, call: &'static str) -> ttrpc::Result<T> {
        self.container(id)?;
        Err(Error::from(ContainerError::Unimplemented(call)).into())
    }
}

fn at(exit: Exit) -> protobuf::MessageField<Timestamp> {
    Some(Timestamp::from(exit.at)).into()
}

#[async_trait]
impl Task for Service {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        Ok(self.describe(&request)?)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pid = self.create_container(request).await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = self.container(&request.id)?.start(&request.exec_id).await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        log::debug!("delete {}/{}", request.id, request.exec_id);
        let response = self.delete_process(&request).await?;
        log::debug!("deleted {}/{}", request.id, request.exec_id);
        Ok(response)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        Ok(self.list(&request).await?)
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.pause().await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.resume().await?;
        Ok(Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        self.unimplemented(&request.id, "checkpoint")
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        container
            .kill(&request.exec_id, request.signal, request.all)
            .await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let stdio = Stdio {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let spec = request.spec.into_option().unwrap_or_default().value;
        let container = self.container(&request.id)?;
        container
            .exec(&request.exec_id, stdio, spec)
            .map_err(Error::from)?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        container
            .resize(&request.exec_id, request.height, request.width)
            .await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        if request.stdin {
            container
                .close_stdin(&request.exec_id)
                .map_err(Error::from)?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        let change = spec::update::resources(&request.resources.value).map_err(Error::from)?;
        container.update(&change).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let container = self.container(&request.id)?;
        let exit = container
            .wait(&request.exec_id)
            .await
            .map_err(Error::from)?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: at(exit),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let used = self.container(&request.id)?.stats().await?;
        Ok(StatsResponse {
            stats: packed(stats::PACKAGE, &stats::metrics(&used)).ok().into(),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let container = self.container(&request.id)?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: container.pid(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        log::debug!("shutdown");
        if matches!(*self.slot(), Slot::Empty) {
            self.ended.send_replace(true);
        }
        Ok(Empty::new())
    }
}

#[cfg(test)]
mod tests;
