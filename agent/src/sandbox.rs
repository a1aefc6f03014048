//! The guest as the API sees it: whether it has an identity, and its containers.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use forkvm_api::agent::{CreateRequest, ExecRequest, Identity, StatsResponse};

use crate::{
    container::{self, Container},
    identity::{self, Clock},
    launch::Launcher,
    process::{self, Process},
    reaper::Exit,
    streams::Streams,
};

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("no identity has been applied to this guest yet")]
    NoIdentity,
    #[error("an identity has been applied to this guest already")]
    SecondIdentity,
    #[error(transparent)]
    Identity(#[from] identity::Error),
    #[error("container {0} exists already")]
    Exists(String),
    #[error("there is no container {0}")]
    NoContainer(String),
    #[error("the agent is going down")]
    Down,
    #[error(transparent)]
    Container(#[from] container::Error),
}

impl From<process::Error> for Error {
    fn from(error: process::Error) -> Self {
        Error::Container(error.into())
    }
}

/// A container, or its name while it is being made or removed.
type Slot = Option<Arc<Container>>;

/// The guest. There is one.
#[derive(Debug)]
pub(crate) struct Sandbox {
    clock: Clock,
    launcher: Launcher,
    streams: Streams,
    identified: Mutex<bool>,
    containers: Mutex<BTreeMap<String, Slot>>,
}

/// What Create answers.
#[derive(Debug)]
pub(crate) struct Created {
    pub(crate) pid: u32,
    pub(crate) identity: Duration,
    pub(crate) create: Duration,
}

impl Sandbox {
    pub(crate) fn new(clock: Clock, launcher: Launcher, streams: Streams) -> Self {
        Self {
            clock,
            launcher,
            streams,
            identified: Mutex::new(false),
            containers: Mutex::new(BTreeMap::new()),
        }
    }

    fn containers(&self) -> MutexGuard<'_, BTreeMap<String, Slot>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies an identity; answers how long it took.
    pub(crate) fn identify(&self, identity: &Identity) -> Result<Duration, Error> {
        // Held throughout: a second request must not find half an identity.
        let mut identified = self
            .identified
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if *identified {
            return Err(Error::SecondIdentity);
        }
        let start = Instant::now();
        identity::apply(identity, self.clock)?;
        *identified = true;
        Ok(start.elapsed())
    }

    fn require_identity(&self) -> Result<(), Error> {
        let identified = *self
            .identified
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if identified {
            Ok(())
        } else {
            Err(Error::NoIdentity)
        }
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        self.require_identity()?;
        let containers = self.containers();
        containers
            .get(id)
            .cloned()
            .flatten()
            .ok_or_else(|| Error::NoContainer(id.to_owned()))
    }

    pub(crate) async fn create(&self, request: &CreateRequest) -> Result<Created, Error> {
        let identity = match request.identity.as_ref() {
            Some(identity) => self.identify(identity)?,
            None => Duration::ZERO,
        };
        self.require_identity()?;
        let start = Instant::now();
        let id = &request.container_id;
        {
            let mut containers = self.containers();
            if containers.contains_key(id) {
                return Err(Error::Exists(id.clone()));
            }
            containers.insert(id.clone(), None);
        }
        match Container::create(request, &self.launcher, &self.streams).await {
            Ok(container) => {
                let pid = container.init_pid();
                self.containers()
                    .insert(id.clone(), Some(Arc::new(container)));
                Ok(Created {
                    pid,
                    identity,
                    create: start.elapsed(),
                })
            }
            Err(error) => {
                self.containers().remove(id);
                Err(error.into())
            }
        }
    }

    pub(crate) async fn start(&self, id: &str) -> Result<(), Error> {
        Ok(self.container(id)?.start().await?)
    }

    pub(crate) async fn exec(&self, request: &ExecRequest) -> Result<u32, Error> {
        let container = self.container(&request.container_id)?;
        Ok(container
            .exec(request, &self.launcher, &self.streams)
            .await?)
    }

    fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>, Error> {
        Ok(self.container(id)?.process(exec_id)?)
    }

    /// The end of a process. An exec is forgotten with it: nobody asks for one whose end is known.
    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let end = process::end_of(process.finished()).await;
        if !exec_id.is_empty() {
            container.forget_exec(exec_id, &process);
            self.launcher.prepare();
        }
        end.ok_or(Error::Down)
    }

    pub(crate) fn signal(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        if all {
            return Ok(self.container(id)?.signal_all(signal)?);
        }
        Ok(self.process(id, exec_id)?.signal(signal)?)
    }

    pub(crate) fn resize(
        &self,
        id: &str,
        exec_id: &str,
        rows: u16,
        columns: u16,
    ) -> Result<(), Error> {
        Ok(self.process(id, exec_id)?.resize(rows, columns)?)
    }

    pub(crate) fn processes(&self, id: &str) -> Result<Vec<(u32, String)>, Error> {
        Ok(self.container(id)?.processes()?)
    }

    /// See [`Container::oom_kills`].
    pub(crate) fn oom_kills(&self, id: &str) -> Result<u64, Error> {
        Ok(self.container(id)?.oom_kills())
    }

    /// See [`Container::more_oom_kills`].
    pub(crate) async fn more_oom_kills(&self, id: &str, seen: u64) -> Result<u64, Error> {
        Ok(self.container(id)?.more_oom_kills(seen).await?)
    }

    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<(), Error> {
        Ok(self.container(id)?.update(resources).await?)
    }

    pub(crate) fn stats(&self, id: &str) -> Result<StatsResponse, Error> {
        Ok(self.container(id)?.stats()?)
    }

    pub(crate) async fn delete(&self, id: &str) -> Result<(), Error> {
        self.container(id)?.delete().await?;
        self.containers().remove(id);
        Ok(())
    }
}
