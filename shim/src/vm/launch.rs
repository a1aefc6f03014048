//! From a request of `Create` to a machine whose agent can be called.

use std::{
    fs,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::{Arc, Mutex, atomic::AtomicU32},
    time::Duration,
};

use async_trait::async_trait;
use forkvm_api::{AGENT_PORT, ROOTFS_EXPORT, agent_ttrpc::AgentClient, points};
use forkvm_config::{Class, Config};
use forkvm_vmm::{
    control::{Export, Launch, NetworkNamespace, Purpose, Request as MonitorRequest, Source},
    devices::console::MAX_OUTPUT,
    template::Template,
};
use tokio::{sync::OnceCell, time::timeout};
use ttrpc::asynchronous::transport::Socket as TtrpcSocket;

use super::{
    Error, Footprint, Monitor, Vm,
    origin::{self, Asked, Origin},
};
use crate::{
    error::Error as AnyError,
    fault::Fault,
    hooks::HookRunner,
    machine::{Backend, Machine, Request},
    reaper::Reaper,
    rootfs,
    run_state::State,
    spec::{self, Network, Plan},
    timings::Points,
};

/// How long a machine may take to run: a cold boot on a slow host.
const RUNNING: Duration = Duration::from_secs(60);

/// Starts virtual machines as the configuration says.
pub(crate) struct Launcher {
    namespace: String,
    /// What was wrong with it is told to each `Create`.
    config: Result<Config, Arc<forkvm_config::Error>>,
    reaper: Reaper,
    hooks: HookRunner,
}

impl Launcher {
    pub(crate) fn new(
        namespace: &str,
        config: Result<Config, forkvm_config::Error>,
        reaper: Reaper,
        host_mounts: OwnedFd,
    ) -> Self {
        Self {
            namespace: namespace.to_owned(),
            config: config.map_err(Arc::new),
            hooks: HookRunner::new(reaper.clone(), host_mounts),
            reaper,
        }
    }

    /// Everything up to a machine with an agent that answers; what is left behind on the host
    /// stands in `footprint`.
    async fn build(
        &self,
        request: &Request,
        config: &Config,
        points: &mut Points,
        footprint: &mut Footprint,
        fault: &Fault,
    ) -> Result<Vm, AnyError> {
        let plan = spec::load(&request.bundle, &self.namespace, &request.id, config)?;
        let asked = Asked {
            namespace: &self.namespace,
            id: &request.id,
            class: plan.class,
        };
        // Before anything of the container is on the host: it may be a build.
        let origin = origin::find(config, &asked, &self.reaper).await?;
        let root = if request.rootfs.is_empty() {
            plan.root.clone()
        } else {
            let target = request.bundle.join("rootfs");
            footprint.rootfs = Some(target.clone());
            rootfs::mount(&request.rootfs, &target)?;
            target
        };
        rootfs::check_root(&root)?;
        let mut launch = Launching::new(config, origin, plan.class)?;
        launch.network(&plan.network)?;
        launch.console(config, &self.namespace, &request.id)?;
        launch.exports(&root, &plan)?;
        points.take(points::ROOTFS_MOUNTED);

        let mut state = State {
            namespace: self.namespace.clone(),
            id: request.id.clone(),
            bundle: request.bundle.clone(),
            mode: launch.mode().to_owned(),
            template: launch.template.clone(),
            reason: launch.reason.clone(),
            fall_back: launch.fall_back,
            shim_pid: std::process::id(),
            monitor_pid: 0,
            monitor_start: 0,
            cgroup: plan.cgroup.clone(),
        };
        // Before there is anything else to clean up: `delete` reads it.
        // A full disk leaves half of it.
        footprint.wrote_state = true;
        footprint.run_folder.write_state(&state)?;
        let cgroup = footprint.make_cgroup(&plan, &request.id)?;
        let monitor = Arc::new(Monitor::spawn(
            &config.paths.monitor,
            cgroup.as_ref().map(|folder| folder.as_fd()),
            &self.reaper,
        )?);
        footprint.monitor = Some(Arc::clone(&monitor));
        let killed = Arc::clone(&monitor);
        fault.set_monitor(move || killed.kill());
        points.take(points::VMM_SPAWNED);
        (state.monitor_pid, state.monitor_start) = (monitor.pid(), monitor.start_time());
        footprint.run_folder.write_state(&state)?;
        if cgroup.is_none() {
            footprint.join_cgroup(&plan, monitor.pid())?;
        }
        if let Some(score) = plan.oom_score_adj {
            fs::write(
                format!("/proc/{}/oom_score_adj", monitor.pid()),
                score.to_string(),
            )
            .map_err(Error::OomScore)?;
        }
        let boots = matches!(launch.message.source, Source::Boot { .. });
        if let Some(point) = fault.in_monitor() {
            let point = point.to_owned();
            monitor.send(&MonitorRequest::StopAt { point }, &[]).await?;
        }
        monitor
            .send(&MonitorRequest::Launch(launch.message), &launch.descriptors)
            .await?;
        drop(launch.descriptors);
        let entered = timeout(RUNNING, monitor.running(boots, fault))
            .await
            .map_err(|_| Error::Late(RUNNING.as_secs()))??;
        for point in entered {
            points.add(&point.name, point.at_ns);
        }
        let agent = AgentClient::new(ttrpc::asynchronous::Client::new(TtrpcSocket::new(
            monitor.connect(AGENT_PORT).await?,
        )));
        Ok(Vm {
            id: request.id.clone(),
            namespace: self.namespace.clone(),
            bundle: request.bundle.clone(),
            monitor,
            agent,
            resources: tokio::sync::Mutex::new(plan.resources.clone()),
            plan,
            mode: state.mode,
            timings: config.log.timings.clone(),
            hooks: self.hooks.clone(),
            points: Mutex::default(),
            init_pid: AtomicU32::new(0),
            retired: OnceCell::new(),
            recording: Mutex::new(launch.recording),
            footprint: tokio::sync::Mutex::new(Footprint::new(&config.paths.run, "", "")),
        })
    }
}

#[async_trait]
impl Backend for Launcher {
    async fn launch(&self, request: &Request) -> Result<Arc<dyn Machine>, AnyError> {
        let config = self.config.as_ref().map_err(Arc::clone)?;
        let fault = Fault::new(config.test.kill());
        let mut points = Points::with(fault.clone());
        points.take(points::CREATE_RECEIVED);
        let mut footprint = Footprint::new(&config.paths.run, &self.namespace, &request.id);
        match self
            .build(request, config, &mut points, &mut footprint, &fault)
            .await
        {
            Ok(mut vm) => {
                vm.points = Mutex::new(points);
                vm.footprint = tokio::sync::Mutex::new(footprint);
                Ok(Arc::new(vm))
            }
            Err(error) => {
                if let Err(left) = footprint.remove().await {
                    log::error!("after a failed create of {}: {left}", request.id);
                }
                Err(error)
            }
        }
    }
}

/// A launch request being put together.
struct Launching {
    message: Launch,
    /// In the order in which the message names them.
    descriptors: Vec<OwnedFd>,
    template: String,
    /// See [`State::reason`].
    reason: String,
    /// See [`State::fall_back`].
    fall_back: bool,
    /// The template, if this start is to be recorded.
    recording: Option<Box<Template>>,
}

impl Launching {
    fn new(config: &Config, origin: Origin, class: Class) -> Result<Self, Error> {
        let (mut template, mut why, mut fell_back) = (String::new(), String::new(), false);
        let mut recording = None;
        let (source, descriptors) = match origin {
            Origin::Boot { reason, fall_back } => {
                (why, fell_back) = (reason, fall_back);
                let open = |path: &PathBuf| {
                    fs::File::open(path)
                        .map(OwnedFd::from)
                        .map_err(|error| Error::Open(path.clone(), error))
                };
                let source = Source::Boot {
                    vcpus: class.vcpus,
                    memory_bytes: class.memory_bytes(),
                    cmdline: String::new(),
                };
                let descriptors = vec![open(&config.paths.kernel)?, open(&config.paths.initramfs)?];
                (source, descriptors)
            }
            Origin::Fork(opened) => {
                template = opened.id().to_owned();
                let (source, borrowed) = opened.source_of_start();
                let mut descriptors = Vec::new();
                for fd in borrowed {
                    let copy = fd.try_clone_to_owned();
                    descriptors.push(copy.map_err(|e| Error::Open(opened.folder().to_owned(), e))?);
                }
                recording = opened.records().then_some(opened);
                (source, descriptors)
            }
        };
        let message = Launch {
            source,
            purpose: Purpose::Run,
            network_namespace: NetworkNamespace::New,
            console: false,
            exports: Vec::new(),
        };
        Ok(Self {
            message,
            descriptors,
            template,
            reason: why,
            fall_back: fell_back,
            recording,
        })
    }

    fn mode(&self) -> &'static str {
        match self.message.source {
            Source::Boot { .. } => "boot",
            Source::Fork { .. } => "fork",
        }
    }

    fn network(&mut self, network: &Network) -> Result<(), Error> {
        if let Network::Join(path) = network {
            let file = fs::File::open(path).map_err(|error| Error::Open(path.clone(), error))?;
            self.message.network_namespace = NetworkNamespace::Join;
            self.descriptors.push(file.into());
        }
        Ok(())
    }

    fn console(&mut self, config: &Config, namespace: &str, id: &str) -> Result<(), Error> {
        if config.log.consoles.as_os_str().is_empty() {
            return Ok(());
        }
        let path = config.log.consoles.join(format!("{namespace}-{id}.log"));
        let file = fs::create_dir_all(&config.log.consoles)
            .and_then(|()| fs::OpenOptions::new().create(true).append(true).open(&path))
            .and_then(|file| {
                // One machine writes no more than that; a container that is started over and over begins anew.
                if file.metadata()?.len() > MAX_OUTPUT {
                    file.set_len(0)?;
                }
                Ok(file)
            })
            .map_err(|error| Error::Open(path, error))?;
        self.message.console = true;
        self.descriptors.push(file.into());
        Ok(())
    }

    fn exports(&mut self, root: &std::path::Path, plan: &Plan) -> Result<(), rootfs::Error> {
        self.descriptors.push(rootfs::export(root, true, false)?);
        self.message.exports.push(Export {
            name: ROOTFS_EXPORT.to_owned(),
            // A read-only root is remounted so in the guest, once its mount points are made.
            read_only: false,
            shared: false,
        });
        for volume in &plan.volumes {
            self.descriptors.push(rootfs::export(
                &volume.source,
                volume.recursive,
                volume.read_only,
            )?);
            self.message.exports.push(Export {
                name: volume.name.clone(),
                read_only: volume.read_only,
                shared: true,
            });
        }
        Ok(())
    }
}
