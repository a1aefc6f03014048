//! Listens, tells the monitor, and serves.
//!
//! The order is the point: the listeners exist before the ready signal, because a template is frozen
//! inside it; the runtime, its timers and its random numbers exist only after it, in each child anew.

use std::{
    io,
    os::fd::{IntoRawFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use forkvm_api::{AGENT_PORT, RECLAIM_PORT, STREAM_PORT, agent_ttrpc};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, bind, listen,
    socket,
};

use crate::{
    boot, identity::Clock, launch::Launcher, ready, reaper::Reaper, reclaim, sandbox::Sandbox,
    service::Service, streams::Streams, warm_up,
};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// Why the agent does not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Boot(#[from] boot::Error),
    #[error("cannot listen on {address}: {source}")]
    Listen { address: String, source: nix::Error },
    #[error(transparent)]
    Ready(#[from] ready::Error),
    #[error("cannot start the runtime: {0}")]
    Runtime(io::Error),
    #[error("cannot serve the API: {0}")]
    Api(ttrpc::Error),
    #[error("cannot reap processes: {0}")]
    Reap(io::Error),
    #[error("cannot accept stream connections: {0}")]
    Accept(io::Error),
    #[error("cannot make the agent the parent of orphans: {0}")]
    Subreaper(nix::Error),
}

/// Serves on vsock, as PID 1 of a guest. Only returns if it fails.
pub(crate) fn vsock() -> Result<(), Error> {
    warm_up::run_if_asked();
    let api = listen_on(
        &VsockAddr::new(libc::VMADDR_CID_ANY, AGENT_PORT),
        "vsock port 1024",
    )?;
    let streams = listen_on(
        &VsockAddr::new(libc::VMADDR_CID_ANY, STREAM_PORT),
        "vsock port 1025",
    )?;
    let reclaim = listen_on(
        &VsockAddr::new(libc::VMADDR_CID_ANY, RECLAIM_PORT),
        "vsock port 1026",
    )?;
    log::info!("listening on vsock ports {AGENT_PORT} and {STREAM_PORT}");
    ready::announce()?;
    // SAFETY: the descriptor is a listening vsock socket that nothing else owns.
    serve(streams, Some(reclaim), Clock::Step, |server| unsafe {
        server.add_vsock_listener(api.into_raw_fd())
    })
}

/// Serves on Unix sockets in `folder`. Only returns if it fails.
pub(crate) fn unix(folder: &Path) -> Result<(), Error> {
    crate::log::to_stderr();
    // What workers make must end up here, whichever process runs the agent.
    nix::sys::prctl::set_child_subreaper(true).map_err(Error::Subreaper)?;
    let listener = |name: &str| {
        let path = folder.join(name);
        let address = path.display().to_string();
        let socket = UnixAddr::new(&path).map_err(|source| Error::Listen {
            address: address.clone(),
            source,
        })?;
        listen_on(&socket, &address)
    };
    let streams = listener("streams.sock")?;
    let api = listener("agent.sock")?;
    // SAFETY: the descriptor is a listening Unix socket that nothing else owns.
    serve(streams, None, Clock::Keep, |server| unsafe {
        server.add_unix_listener(api.into_raw_fd())
    })
}

fn listen_on(address: &dyn SockaddrLike, name: &str) -> Result<OwnedFd, Error> {
    let open = || -> nix::Result<OwnedFd> {
        let family = address.family().unwrap_or(AddressFamily::Unspec);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(family, SockType::Stream, flags, None)?;
        bind(std::os::fd::AsRawFd::as_raw_fd(&listener), address)?;
        listen(&listener, Backlog::new(BACKLOG)?)?;
        Ok(listener)
    };
    open().map_err(|source| Error::Listen {
        address: name.to_owned(),
        source,
    })
}

fn serve(
    stream_listener: OwnedFd,
    reclaim_listener: Option<OwnedFd>,
    clock: Clock,
    listen: impl FnOnce(ttrpc::r#async::Server) -> ttrpc::Result<ttrpc::r#async::Server>,
) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    runtime.block_on(async {
        let reaper = Reaper::default();
        let streams = Streams::default();
        let sandbox = Sandbox::new(clock, Launcher::new(reaper.clone()), streams.clone());
        let service = Arc::new(Service {
            sandbox: Arc::new(sandbox),
        });
        if let Some(listener) = reclaim_listener {
            tokio::spawn(async {
                if let Err(error) = reclaim::run(listener).await {
                    log::error!("no more memory is given back: {error}");
                }
            });
        }
        let server = listen(ttrpc::r#async::Server::new()).map_err(Error::Api)?;
        let mut server = server.register_service(agent_ttrpc::create_agent(service));
        server.start().await.map_err(Error::Api)?;
        tokio::select! {
            outcome = reaper.run() => outcome.map_err(Error::Reap),
            outcome = streams.run(stream_listener) => outcome.map_err(Error::Accept),
        }
    })
}
