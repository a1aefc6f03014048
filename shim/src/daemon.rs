//! The daemon: the process that `start` leaves behind. It serves the Task API until `Shutdown`.

use std::{
    env,
    fs::{self, OpenOptions},
    io,
    os::{
        fd::{FromRawFd as _, OwnedFd, RawFd},
        unix::{fs::OpenOptionsExt as _, net::UnixListener},
    },
    sync::Arc,
    time::Duration,
};

use containerd_shim::{Flags, logger::FifoLogger};
use forkvm_config::Config;
use rustix::{
    io::{FdFlags, fcntl_setfd},
    process::{Pid, set_child_subreaper, setsid},
};
use ttrpc::asynchronous::{Server, transport::Listener};

use crate::{bundle::Bundle, events::Events, reaper::Reaper, service::Service, vm};

/// The action by which `start` calls its own program.
pub(crate) const ACTION: &str = "serve";

/// The listening socket, inherited from `start`.
pub(crate) const LISTENER_FD: RawFd = 3;
/// The bundle's lock.
pub(crate) const LOCK_FD: RawFd = 4;
/// The mount namespace of the host.
pub(crate) const HOST_MOUNTS_FD: RawFd = 5;

/// Environment variable with the address to which events go.
pub(crate) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// How long the last events may take when the shim ends.
const FLUSH: Duration = Duration::from_secs(3);

/// Why a daemon did not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot {0}: {1}")]
    Setup(&'static str, io::Error),
    #[error("cannot use the inherited socket: {0}")]
    Listener(io::Error),
    #[error("cannot serve: {0}")]
    Serve(ttrpc::Error),
    #[error(transparent)]
    Bundle(#[from] crate::bundle::Error),
}

/// What `start` hands over.
struct Inherited {
    listener: UnixListener,
    /// Held until the process ends.
    _lock: OwnedFd,
    host_mounts: OwnedFd,
}

impl Inherited {
    fn take() -> io::Result<Self> {
        Ok(Self {
            listener: UnixListener::from(take_fd(LISTENER_FD)?),
            _lock: take_fd(LOCK_FD)?,
            host_mounts: take_fd(HOST_MOUNTS_FD)?,
        })
    }
}

/// Takes over one inherited descriptor. No child may have it: a monitor that held the lock would
/// look like a living shim.
fn take_fd(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: needed because a descriptor that was inherited is known by its number alone; `start`
    // is the only one that calls this action and puts it there, it is taken once, before anything
    // else of this process opens a descriptor, and a number that is not open only makes the next
    // line fail.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    if let Err(error) = fcntl_setfd(&fd, FdFlags::CLOEXEC) {
        // Nothing is there that could be closed.
        std::mem::forget(fd);
        return Err(error.into());
    }
    Ok(fd)
}

/// Runs until `Shutdown`.
pub(crate) fn run(flags: &Flags) -> Result<(), Error> {
    let inherited = Inherited::take().map_err(|e| Error::Setup("take what start hands over", e))?;
    let bundle = Bundle::open(&flags.bundle)?;
    // A session of its own: a signal to containerd's process group must not reach the container.
    setsid().map_err(|e| Error::Setup("start a session", e.into()))?;
    set_child_subreaper(Some(Pid::INIT))
        .map_err(|e| Error::Setup("become a subreaper", e.into()))?;
    // A broken configuration is told to the one who creates a container; the log begins without it.
    let config = Config::load();
    log_to(&bundle, flags.debug, config.as_ref().ok());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Error::Setup("start the runtime", e))?;
    let result = runtime.block_on(serve(flags, inherited, config));
    log::debug!("ended");
    if let Some(socket) = bundle.socket() {
        // It may be gone already: containerd removes the bundle.
        let _ = fs::remove_file(socket);
    }
    result
}

async fn serve(
    flags: &Flags,
    inherited: Inherited,
    config: Result<Config, forkvm_config::Error>,
) -> Result<(), Error> {
    let reaper = Reaper::start().map_err(|e| Error::Setup("watch for children", e))?;
    let events = Events::new(
        &flags.namespace,
        env::var(TTRPC_ADDRESS).unwrap_or_default(),
    );
    let backend = vm::Launcher::new(
        &flags.namespace,
        config,
        reaper.clone(),
        inherited.host_mounts,
    );
    let service = Arc::new(Service::new(
        &flags.namespace,
        Arc::new(backend),
        events.clone(),
        reaper,
    ));
    inherited
        .listener
        .set_nonblocking(true)
        .map_err(Error::Listener)?;
    let listener =
        tokio::net::UnixListener::from_std(inherited.listener).map_err(Error::Listener)?;
    let mut server = Server::new()
        .add_listener(Listener::from(listener))
        .register_service(service.methods());
    server.start().await.map_err(Error::Serve)?;
    log::debug!("serving {}/{}", flags.namespace, flags.id);
    service.ended().await;
    events.flush(FLUSH).await;
    log::debug!("every event is delivered");
    server.shutdown().await.map_err(Error::Serve)
}

/// Logs to the bundle's FIFO `log`, which containerd reads. It is opened for both directions and
/// without blocking: while containerd is away lines wait in the FIFO, and are dropped when it is
/// full.
fn log_to(bundle: &Bundle, debug: bool, config: Option<&Config>) {
    let level = match config {
        _ if debug => log::LevelFilter::Debug,
        Some(config) => config
            .log
            .level
            .as_str()
            .parse()
            .unwrap_or(log::LevelFilter::Info),
        None => log::LevelFilter::Info,
    };
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.path().join("log"));
    // Without a log there is nowhere to say so; the shim works all the same.
    if let Ok(fifo) = opened
        && log::set_boxed_logger(Box::new(FifoLogger::with_file(fifo))).is_ok()
    {
        log::set_max_level(level);
    }
}
