//! The agent's first answer: a child's identity, as the shim sends it.

use std::{
    fs,
    io::{self, Read as _},
    os::{fd::AsFd as _, unix::net::UnixStream},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use forkvm_api::{
    AGENT_PORT,
    agent::{IdentifyRequest, Identity},
    agent_ttrpc::AgentClient,
};
use forkvm_vmm::control::{Monitor, Request};
use tokio::runtime::{Builder, Runtime};
use ttrpc::asynchronous::{Client, transport::Socket};

use super::Error;

/// Bytes of randomness for the guest's pool, as many as the shim gives.
const ENTROPY: usize = 64;

/// Calls agents, one at a time.
pub(super) struct Agents(Runtime);

impl Agents {
    /// A caller.
    ///
    /// # Errors
    /// No event loop can be made.
    pub(super) fn new() -> Result<Self, Error> {
        let runtime = Builder::new_current_thread().enable_all().build();
        Ok(Self(runtime.map_err(Error::io("an event loop"))?))
    }

    /// Gives a machine its identity; returns when its agent says that it is applied.
    ///
    /// # Errors
    /// An agent that refuses, or does not answer within `limit`.
    pub(super) fn identify(&self, monitor: &Monitor, limit: Duration) -> Result<(), Error> {
        let socket = Error::io("a connection to the agent");
        let (ours, theirs) = match UnixStream::pair() {
            Ok(pair) => pair,
            Err(error) => return Err(socket(error)),
        };
        monitor.send(&Request::Connect { port: AGENT_PORT }, &[theirs.as_fd()])?;
        drop(theirs);
        let request = IdentifyRequest {
            identity: Some(identity()?).into(),
            ..Default::default()
        };
        self.0.block_on(async {
            let stream = ours
                .set_nonblocking(true)
                .and_then(|()| tokio::net::UnixStream::from_std(ours))
                .map_err(socket)?;
            let agent = AgentClient::new(Client::new(Socket::new(stream)));
            let context = ttrpc::context::with_duration(limit);
            match tokio::time::timeout(limit, agent.identify(context, &request)).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => Err(Error::Guest(format!("the agent refuses: {error}"))),
                Err(_) => Err(Error::Guest(format!(
                    "the agent has not answered within {} s",
                    limit.as_secs_f32()
                ))),
            }
        })
    }
}

fn identity() -> Result<Identity, Error> {
    let mut entropy = vec![0; ENTROPY];
    fs::File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut entropy))
        .map_err(Error::io("/dev/urandom"))?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|error| Error::io("the clock")(io::Error::other(error)))?;
    Ok(Identity {
        entropy,
        realtime_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX),
        hostname: "bench".into(),
        machine_id: "0123456789abcdef0123456789abcdef".into(),
        boot_id: "01234567-89ab-4def-8123-456789abcdef".into(),
        ..Default::default()
    })
}
