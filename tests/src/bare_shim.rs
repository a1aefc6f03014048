//! A runtime's shim without containerd: bundle, streams and the receiver of its events are the case's own. What a shim
//! does is seen here without what containerd makes of it, and in orders that containerd never asks for.

use std::{
    fs,
    os::{fd::AsRawFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Instant,
};

use containerd_shim_protos::{
    Events, api::CreateTaskRequest, create_events, protobuf::well_known_types::empty::Empty,
    shim::events::ForwardRequest, ttrpc,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde_json::Value;

use crate::{
    failure::{Failure, ensure},
    fifo::Fifo,
    machine::Runtime,
    oci_config::make_root,
    process::{self, Output},
    scene::Scene,
    task_client::{NAMESPACE, TaskClient},
};

/// A shim that listens, with the streams of its container.
pub struct BareShim<'a> {
    scene: &'a Scene<'a>,
    bundle: PathBuf,
    /// What it is asked.
    pub tasks: TaskClient,
    /// The container's standard output.
    pub stdout: Fifo,
    /// The container's standard error.
    pub stderr: Fifo,
    received: Arc<Received>,
}

/// The topics of the events that have come, in their order.
#[derive(Default)]
struct Received {
    topics: Mutex<Vec<String>>,
    changed: Condvar,
}

/// Hands events over.
struct Receiver(Arc<Received>);

impl Events for Receiver {
    fn forward(&self, _: &ttrpc::TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        if request.envelope.namespace == NAMESPACE {
            let topic = request.envelope.topic.clone();
            let topics = self.0.topics.lock();
            topics.unwrap_or_else(PoisonError::into_inner).push(topic);
            self.0.changed.notify_all();
        }
        Ok(Empty::new())
    }
}

/// A server for the events of a shim.
struct Listener {
    /// ttrpc does not close what it listens on.
    _socket: UnixListener,
    server: ttrpc::Server,
}

impl Listener {
    fn bind(path: &Path, received: Arc<Received>) -> Result<Self, Failure> {
        let broken = |error: ttrpc::Error| Failure::new(format!("the receiver of events: {error}"));
        let socket = UnixListener::bind(path).map_err(Failure::io(path.display()))?;
        let mut server = ttrpc::Server::new()
            .add_listener(socket.as_raw_fd())
            .map_err(broken)?
            .register_service(create_events(Arc::new(Receiver(received))));
        server.start().map_err(broken)?;
        Ok(Self {
            _socket: socket,
            server,
        })
    }
}

/// Starts the shim of the runtime under test for a container of the configuration `spec`, whose root is a bind mount of a
/// folder with busybox, and does `steps` with it. Whatever they leave is removed.
///
/// # Errors
/// Those of the steps, with what the shim has logged; a shim that does not start.
pub fn with(
    scene: &Scene<'_>,
    spec: &Value,
    steps: impl FnOnce(&mut BareShim<'_>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    make_root(scene)?;
    let id = scene.next_id();
    // runc's shim looks for the bundle in a folder that is called like the container.
    let bundle = scene.path(&id);
    fs::create_dir_all(bundle.join("rootfs")).map_err(Failure::io(bundle.display()))?;
    scene.write(&format!("{id}/config.json"), &spec.to_string())?;
    let mut log = Fifo::make(bundle.join("log"))?;

    let received = Arc::new(Received::default());
    let events = scene.path("events");
    let listener = Listener::bind(&events, received.clone())?;
    let call = Call {
        scene,
        bundle: &bundle,
        id: &id,
        events: &events,
    };
    let done = call.start().and_then(|address| {
        steps(&mut BareShim {
            scene,
            tasks: TaskClient::at(&address, &id)?,
            stdout: Fifo::make(bundle.join("stdout"))?,
            stderr: Fifo::make(bundle.join("stderr"))?,
            bundle: bundle.clone(),
            received,
        })
    });
    let removed = call.delete();
    listener.server.shutdown();
    done.and(removed)
        .map_err(|failure| failure.about(&format!("the shim logged:\n{}\n", log.text())))
}

/// What a call of the shim's program is about.
struct Call<'a> {
    scene: &'a Scene<'a>,
    bundle: &'a Path,
    id: &'a str,
    events: &'a Path,
}

impl Call<'_> {
    /// Calls it as containerd does.
    fn run(&self, action: &str) -> Result<Output, Failure> {
        let program = match self.scene.runtime {
            Runtime::Runc => "containerd-shim-runc-v2",
            Runtime::Forkvm => "containerd-shim-forkvm-v2",
        };
        let bundle = self.bundle.display().to_string();
        let events = self.events.display().to_string();
        let ttrpc = format!("TTRPC_ADDRESS={events}");
        let words = [
            "env",
            "--chdir",
            &bundle,
            &ttrpc,
            program,
            "-namespace",
            NAMESPACE,
            "-id",
            self.id,
            "-bundle",
            &bundle,
            "-address",
            &events,
            action,
        ];
        process::run(&words.map(String::from), b"", self.scene.within(60))?.exits(0)
    }

    /// Has the shim started; gives its address, which it says plainly or in JSON (containerd, `core/runtime/v2`).
    fn start(&self) -> Result<String, Failure> {
        let output = self.run("start")?;
        let text = output.text();
        if !text.starts_with('{') {
            return Ok(text.trim().to_owned());
        }
        let answer: Value = serde_json::from_str(&text)
            .map_err(|error| output.failure(format!("the answer to start: {error}")))?;
        let address = answer["address"].as_str().map(str::to_owned);
        address.ok_or_else(|| output.failure("the answer to start has no address"))
    }

    /// Removes what is left, as containerd does with a shim that it has lost.
    fn delete(&self) -> Result<(), Failure> {
        self.run("delete")?;
        let root = self.bundle.join("rootfs").display().to_string();
        self.scene.host(["umount", "--quiet", &root]).map(drop)
    }
}

impl BareShim<'_> {
    /// Makes the container, with its streams or with none.
    ///
    /// # Errors
    /// The shim refuses it.
    pub fn create(&self, streams: bool) -> Result<(), Failure> {
        let mut request = CreateTaskRequest::new();
        request.bundle = self.bundle.display().to_string();
        let mut mount = containerd_shim_protos::types::mount::Mount::new();
        mount.type_ = "bind".into();
        mount.source = self.scene.path_text("root");
        mount.options = ["rbind", "rw"].map(String::from).into();
        request.rootfs = vec![mount];
        if streams {
            request.stdout = self.stdout.path();
            request.stderr = self.stderr.path();
        }
        self.tasks.create(request)
    }

    /// Waits for events of these topics, which have to be all that come and in this order.
    ///
    /// # Errors
    /// Others come, or too few before the case's end.
    pub fn events(&self, topics: &[&str]) -> Result<(), Failure> {
        let received = &self.received;
        let mut seen = received
            .topics
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        while seen.len() < topics.len() {
            let Some(left) = self.scene.deadline().checked_duration_since(Instant::now()) else {
                break;
            };
            let waited = received.changed.wait_timeout(seen, left);
            seen = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        ensure(*seen == topics, || {
            format!("expected the events {topics:?}, found {seen:?}")
        })
    }

    /// Asks the shim to end, now that it has no container, and waits until its process is gone.
    ///
    /// # Errors
    /// It does not end. Go's shims may end before they have answered, which is none.
    pub fn end(&self, process: &impl std::os::fd::AsFd) -> Result<(), Failure> {
        let _ = self.tasks.shutdown();
        let left = self
            .scene
            .deadline()
            .saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| Failure::new("no time is left"))?;
        let mut events = [PollFd::new(process, PollFlags::IN)];
        let ready = poll(&mut events, Some(&left))
            .map_err(|error| Failure::new(format!("waiting for the shim: {error}")))?;
        ensure(ready == 1, || "the shim did not end at Shutdown".into())
    }

    /// The shim's process.
    ///
    /// # Errors
    /// It is gone, or it has no container yet.
    pub fn process(&self) -> Result<std::os::fd::OwnedFd, Failure> {
        let pid = self.tasks.shim()?;
        pidfd_open(pid, PidfdFlags::empty())
            .map_err(|error| Failure::new(format!("the shim's process: {error}")))
    }
}

impl Drop for BareShim<'_> {
    /// A shim that still has its container is killed: nobody else knows of it.
    fn drop(&mut self) {
        if let Ok(process) = self.process() {
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
    }
}
