//! One container: its init, its execs and what belongs to it in the guest.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use forkvm_api::agent::{CreateRequest, ExecRequest, StatsResponse};
use libcontainer::container::Container as Runtime;
use oci_spec::runtime::{Capability, LinuxResources};

use crate::{
    cgroup::{self, Cgroup},
    console::{self, ConsoleSocket},
    launch::{self, Launcher, Reports},
    process::{self, Process},
    report::{self, Request},
    spec::{self, Template},
    stats,
    stdio::{self, Connections, Owner},
    streams::Streams,
    tenant::Tenant,
    user_namespace::Identity,
};

/// Folder with a container's config.json, its console sockets and the processes of its execs.
const BUNDLES: &str = "/run/forkvm/bundles";

/// Where libcontainer keeps its state.
const STATE: &str = "/run/forkvm/containers";

/// What the executor of an exec needs for its last steps, with the names by which it drops it again:
/// loading a seccomp filter, giving the terminal away.
const BORROWED: [(Capability, &str); 2] = [
    (Capability::SysAdmin, "CAP_SYS_ADMIN"),
    (Capability::Chown, "CAP_CHOWN"),
];

/// Why something cannot be done with a container.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Spec(#[from] spec::Error),
    #[error(transparent)]
    Streams(#[from] stdio::Error),
    #[error(transparent)]
    Launch(#[from] launch::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Process(#[from] process::Error),
    #[error("cannot keep the container's files: {0}")]
    Files(io::Error),
    #[error("cannot start the container: {0}")]
    Start(String),
    #[error("cannot take the terminal over: {0}")]
    Console(io::Error),
    #[error("container {id} {state}")]
    State { id: String, state: &'static str },
    #[error("exec {0} exists already")]
    ExecExists(String),
    #[error("there is no exec {0}")]
    NoExec(String),
    #[error("{0:?} is not an exec id")]
    ExecId(String),
    #[error("process {0} is still running")]
    StillRuns(u32),
}

/// How far a container has come.
#[derive(Debug)]
enum Stage {
    /// Init waits. Its reports end when it has executed its program.
    Created(Reports),
    Starting,
    Running,
}

/// An exec: its process, once there is one.
type Exec = Option<Arc<Process>>;

/// A container that has been created.
#[derive(Debug)]
pub(crate) struct Container {
    id: String,
    cgroup: Cgroup,
    template: Template,
    tenant: Tenant,
    user_namespace: bool,
    init: Arc<Process>,
    stage: Mutex<Stage>,
    execs: Mutex<BTreeMap<String, Exec>>,
}

fn bundle(id: &str) -> PathBuf {
    Path::new(BUNDLES).join(id)
}

/// Removes what a container has in the guest, which may be in any state.
async fn clean_up(id: &str) -> Result<(), Error> {
    Cgroup::of(id).remove().await?;
    remove_files(id)
}

/// Removes a container's bundle and state, and leaves its cgroup.
pub(crate) fn remove_files(id: &str) -> Result<(), Error> {
    for folder in [Path::new(STATE).join(id), bundle(id)] {
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::Files(error));
            }
            _ => {}
        }
    }
    Ok(())
}

impl Container {
    /// Makes a container up to the point where its init waits for [`Container::start`]. What a
    /// failed attempt made is removed.
    pub(crate) async fn create(
        request: &CreateRequest,
        launcher: &Launcher,
        streams: &Streams,
    ) -> Result<Self, Error> {
        let id = request.container_id.as_str();
        let made = Self::make(request, launcher, streams).await;
        if made.is_err()
            && spec::check_id(id).is_ok()
            && let Err(error) = clean_up(id).await
        {
            log::warn!("container {id} could not be made, nor cleaned up: {error}");
        }
        made
    }

    async fn make(
        request: &CreateRequest,
        launcher: &Launcher,
        streams: &Streams,
    ) -> Result<Self, Error> {
        let id = request.container_id.as_str();
        let wanted = &request.streams;
        let prepared = spec::prepare(&request.spec, id, wanted.terminal)?;
        for (key, value) in &prepared.guest_sysctls {
            spec::set_sysctl(key, value)?;
        }
        let connections = Connections::of(wanted, streams).await?;

        let bundle = bundle(id);
        fs::create_dir_all(&bundle).map_err(Error::Files)?;
        fs::create_dir_all(STATE).map_err(Error::Files)?;
        prepared
            .spec
            .save(bundle.join("config.json"))
            .map_err(|error| Error::Files(io::Error::other(error)))?;

        let request = Request {
            groups: prepared.groups,
            ..worker_request(id, STATE.into(), wanted, None)
        };
        let (launched, ends) = run(
            launcher,
            request,
            wanted,
            connections,
            prepared.owner,
            "init",
        )
        .await?;
        let cgroup = Cgroup::of(id);
        let at_end = {
            let cgroup = cgroup.clone();
            // Without a PID namespace of its own nothing else ends what the container started.
            move || {
                if let Err(error) = cgroup.kill() {
                    log::warn!("{error}");
                }
            }
        };
        let init = Process::watch(launched.pid, launched.ended, ends, at_end);
        Ok(Self {
            id: id.to_owned(),
            cgroup,
            template: Template::of(&prepared.spec)?,
            tenant: Tenant::of(id, &prepared.spec, bundle.join("execs")),
            user_namespace: prepared.user_namespace,
            init: Arc::new(init),
            stage: Mutex::new(Stage::Created(launched.reports)),
            execs: Mutex::new(BTreeMap::new()),
        })
    }

    // Each change under these locks is one assignment: a panic elsewhere cannot leave half of one.
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn execs(&self) -> MutexGuard<'_, BTreeMap<String, Exec>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wrong_state(&self, state: &'static str) -> Error {
        Error::State {
            id: self.id.clone(),
            state,
        }
    }

    pub(crate) fn init_pid(&self) -> u32 {
        self.init.pid()
    }

    /// Lets the init execute the container's program, and waits until it has.
    pub(crate) async fn start(&self) -> Result<(), Error> {
        let reports = {
            let mut stage = self.stage();
            match std::mem::replace(&mut *stage, Stage::Starting) {
                Stage::Created(reports) if !self.init.has_ended() => reports,
                Stage::Created(_) => {
                    *stage = Stage::Running;
                    return Err(self.wrong_state("has ended before it was started"));
                }
                other => {
                    *stage = other;
                    return Err(self.wrong_state("has been started already"));
                }
            }
        };
        // libcontainer's start forks nothing: it tells the init on a socket and writes its state.
        let started = Runtime::load(Path::new(STATE).join(&self.id))
            .and_then(|mut runtime| runtime.start())
            .map_err(|error| Error::Start(error.to_string()));
        *self.stage() = Stage::Running;
        started?;
        // As with runc a program that cannot be executed is one that has ended: it says why on its
        // standard error.
        if let Err(error) = reports.executed().await {
            log::info!("container {}: {error}", self.id);
        }
        Ok(())
    }

    /// Adds a process to the container and executes it.
    pub(crate) async fn exec(
        &self,
        request: &ExecRequest,
        launcher: &Launcher,
        streams: &Streams,
    ) -> Result<u32, Error> {
        let id = request.exec_id.as_str();
        spec::check_id(id).map_err(|_| Error::ExecId(id.to_owned()))?;
        if self.init.has_ended() {
            return Err(self.wrong_state("has ended"));
        }
        if self.execs().contains_key(id) {
            return Err(Error::ExecExists(id.to_owned()));
        }
        // The name is taken from here on; a second request for it must not get as far as this.
        self.execs().insert(id.to_owned(), None);
        let made = self.run_exec(request, launcher, streams).await;
        match made {
            Ok(process) => {
                let pid = process.pid();
                self.execs().insert(id.to_owned(), Some(Arc::new(process)));
                Ok(pid)
            }
            Err(error) => {
                self.execs().remove(id);
                Err(error)
            }
        }
    }

    async fn run_exec(
        &self,
        request: &ExecRequest,
        launcher: &Launcher,
        streams: &Streams,
    ) -> Result<Process, Error> {
        let wanted = &request.streams;
        let (mut process, owner) =
            spec::prepare_exec(&request.process, &self.template, wanted.terminal)?;
        // The filter can only be loaded, and the terminal given away, after libcontainer has dropped
        // the capabilities for it.
        let borrowed = spec::lend(&mut process, &BORROWED);
        let user_namespace = self.user_namespace.then(|| report::UserNamespace {
            of: self.init.pid(),
            identity: Identity::take(&mut process),
        });
        // In a user namespace it is root without any by now.
        let groups = spec::take_groups(&mut process);
        let connections = Connections::of(wanted, streams).await?;
        let state = self.tenant.state(Path::new(STATE)).map_err(Error::Files)?;
        let name = format!("exec-{}", request.exec_id);
        let file = bundle(&self.id).join(format!("{name}.json"));
        let json = serde_json::to_vec(&process).map_err(|error| Error::Files(error.into()))?;
        fs::write(&file, json).map_err(Error::Files)?;
        let exec = report::Exec {
            process: file.clone(),
            borrowed,
            filtered: self.template.filtered,
            terminal_owner: owner.uid,
            user_namespace,
        };
        let request = Request {
            groups,
            ..worker_request(&self.id, state, wanted, Some(exec))
        };
        let outcome = run(launcher, request, wanted, connections, owner, &name).await;
        fs::remove_file(&file).map_err(Error::Files)?;
        let (launched, ends) = outcome?;
        Ok(Process::watch(launched.pid, launched.ended, ends, || ()))
    }

    /// The process `exec_id`, or init if that is empty.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.execs()
            .get(exec_id)
            .cloned()
            .flatten()
            .ok_or_else(|| Error::NoExec(exec_id.to_owned()))
    }

    /// Signals every process of the container.
    pub(crate) fn signal_all(&self, signal: u32) -> Result<(), Error> {
        if self.init.has_ended() {
            return Err(process::Error::Ended(self.init.pid()).into());
        }
        if signal == process::SIGKILL {
            return Ok(self.cgroup.kill()?);
        }
        for pid in self.cgroup.processes()? {
            match process::send_signal(pid, signal) {
                // It has ended since it was listed.
                Ok(()) | Err(process::Error::Ended(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Its processes with the ids of those that are execs; empty for the others.
    pub(crate) fn processes(&self) -> Result<Vec<(u32, String)>, Error> {
        let pids = self.cgroup.processes()?;
        let execs = self.execs();
        let name = |pid: u32| {
            execs
                .iter()
                .find(|(_, exec)| {
                    exec.as_ref()
                        .is_some_and(|exec| exec.pid() == pid && !exec.has_ended())
                })
                .map(|(id, _)| id.clone())
                .unwrap_or_default()
        };
        Ok(pids.into_iter().map(|pid| (pid, name(pid))).collect())
    }

    /// How many of its processes the kernel has killed for want of memory. One whose cgroup is gone has nothing to tell.
    pub(crate) fn oom_kills(&self) -> u64 {
        self.cgroup.oom_kills().unwrap_or(0)
    }

    /// Waits until these are more than `seen`.
    pub(crate) async fn more_oom_kills(&self, seen: u64) -> Result<u64, Error> {
        Ok(self.cgroup.more_oom_kills(seen).await?)
    }

    /// Sets the limits of its cgroup. Lowering that of memory may take as long as giving memory back does.
    pub(crate) async fn update(&self, resources: &[u8]) -> Result<(), Error> {
        let resources: LinuxResources =
            serde_json::from_slice(resources).map_err(spec::Error::Parse)?;
        self.cgroup.check_before_update(&resources)?;
        let cgroup = self.cgroup.clone();
        let limited = tokio::task::spawn_blocking(move || cgroup.limit(&resources)).await;
        Ok(limited.map_err(|error| cgroup::Error::Limits(error.to_string()))??)
    }

    /// What its cgroup has used.
    pub(crate) fn stats(&self) -> Result<StatsResponse, Error> {
        Ok(stats::of(&self.cgroup)?)
    }

    /// Forgets an exec that has ended: this process of that name, which may be another's by now.
    pub(crate) fn forget_exec(&self, exec_id: &str, process: &Arc<Process>) {
        let mut execs = self.execs();
        if let Some(Some(known)) = execs.get(exec_id)
            && Arc::ptr_eq(known, process)
        {
            execs.remove(exec_id);
        }
    }

    /// Removes what the container has in the guest. One that was never started is ended for it.
    pub(crate) async fn delete(&self) -> Result<(), Error> {
        let running = matches!(*self.stage(), Stage::Running | Stage::Starting);
        if running && !self.init.has_ended() {
            return Err(Error::StillRuns(self.init.pid()));
        }
        clean_up(&self.id).await
    }
}

/// What a worker is asked, but for its console.
fn worker_request(
    id: &str,
    state: PathBuf,
    wanted: &forkvm_api::agent::Streams,
    exec: Option<report::Exec>,
) -> Request {
    let window = || {
        let rows = u16::try_from(wanted.rows).ok().filter(|rows| *rows > 0)?;
        Some((rows, u16::try_from(wanted.columns).ok()?))
    };
    Request {
        container_id: id.to_owned(),
        bundle: bundle(id),
        state,
        console: None,
        window: window(),
        groups: Vec::new(),
        exec,
    }
}

/// Runs a worker with the standard streams that a request of a client names.
async fn run(
    launcher: &Launcher,
    mut request: Request,
    wanted: &forkvm_api::agent::Streams,
    connections: Connections,
    owner: Owner,
    name: &str,
) -> Result<(launch::Launched, stdio::AgentEnds), Error> {
    if !wanted.terminal {
        let (process_ends, agent_ends) = connections.pipes(owner)?;
        let launched = launcher.launch(&request, Some(process_ends)).await?;
        return Ok((launched, agent_ends));
    }
    let socket =
        ConsoleSocket::bind(request.bundle.join(format!("{name}.sock"))).map_err(Error::Console)?;
    request.console = Some(socket.path().to_owned());
    let of_init = request.exec.is_none();
    let launched = launcher.launch(&request, None).await?;
    let master = socket.master().map_err(Error::Console)?;
    if of_init {
        console::give_to(&master, owner.uid).map_err(Error::Console)?;
    }
    Ok((launched, connections.terminal(master)?))
}
