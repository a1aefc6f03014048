//! What the state machine of a container needs of a virtual machine, so that it can be tested
//! without one.

use std::{path::PathBuf, sync::Arc, time::SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::api::Mount;
use forkvm_api::agent::{StatsResponse, Streams};
use oci_spec::runtime::LinuxResources;
use tokio::{net::UnixStream, sync::watch};
use ttrpc::Code;

#[cfg(test)]
pub(crate) mod mock;

/// Why a machine has ended whose monitor was killed for want of memory on the host.
pub(crate) const OUT_OF_MEMORY: &str = "it was killed because its cgroup on the host is out of memory: give the container, or the cgroup above it, more";

/// Why a machine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the virtual machine has ended: {0}")]
    Ended(String),
    #[error("the guest has not answered {call} within {seconds} s")]
    Late { call: &'static str, seconds: u64 },
    #[error("{call} failed in the guest: {message}")]
    Guest {
        call: &'static str,
        code: Code,
        message: String,
    },
    #[error("cannot talk to the virtual machine: {0}")]
    Io(#[from] std::io::Error),
}

/// What `Create` asks for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Request {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    /// Mounts that make up the root file system; none when it is the spec's `root.path` as it is.
    pub(crate) rootfs: Vec<Mount>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0 to 255; 128 + n when ended by signal n.
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
    /// Of the init process: how many of the container's processes were killed for want of memory by then.
    pub(crate) oom_kills: u64,
}

impl Exit {
    /// An end of which nobody told about memory.
    pub(crate) fn new(status: u32, at: SystemTime) -> Self {
        Self {
            status,
            at,
            oom_kills: 0,
        }
    }

    /// The end of a process whose machine was killed: 128 + SIGKILL.
    pub(crate) fn killed() -> Self {
        Self::new(137, SystemTime::now())
    }
}

/// A process of the guest: its PID there, and the exec id if the shim started it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestProcess {
    pub(crate) pid: u32,
    pub(crate) exec_id: String,
}

/// Makes machines.
#[async_trait]
pub(crate) trait Backend: Send + Sync {
    /// Prepares everything that belongs to the container on the host and starts its machine. An
    /// error leaves nothing behind.
    async fn launch(&self, request: &Request) -> Result<Arc<dyn Machine>, crate::error::Error>;
}

/// A running virtual machine that holds one container. An empty exec id names the container's init
/// process. Calls to the guest may take as long as the guest likes, unless they say otherwise.
#[async_trait]
pub(crate) trait Machine: Send + Sync {
    /// PID of the monitor, the task's PID for containerd.
    fn pid(&self) -> u32;
    /// Opens the connections of standard input, output and error by their names; none for 0.
    async fn streams(&self, ids: [u64; 3]) -> Result<[Option<UnixStream>; 3], Error>;
    /// Makes the container; its init process waits for `start`.
    async fn create(&self, streams: Streams) -> Result<(), crate::error::Error>;
    /// Executes the container's process.
    async fn start(&self) -> Result<(), crate::error::Error>;
    /// Adds a process and executes it; answers the guest's PID.
    async fn exec(
        &self,
        exec_id: &str,
        process: &[u8],
        streams: Streams,
    ) -> Result<u32, crate::error::Error>;
    /// Waits for a process to end. Its output has been handed to its streams then, and the guest forgets an exec.
    async fn wait(&self, exec_id: &str) -> Result<Exit, Error>;
    /// Sends a signal to a process, or to `all` of the container.
    async fn signal(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), Error>;
    /// The container's processes but for the init process. Bounded: an error after two seconds.
    async fn processes(&self) -> Result<Vec<GuestProcess>, Error>;
    /// What the container has used. Bounded: an error after two seconds.
    async fn stats(&self) -> Result<StatsResponse, Error>;
    /// Waits until more of the container's processes than `seen` were killed for want of memory; answers how many.
    async fn out_of_memory(&self, seen: u64) -> Result<u64, Error>;
    /// Changes what the container may use: what `change` names. Bounded.
    async fn update(&self, change: &LinuxResources) -> Result<(), crate::error::Error>;
    /// Sets the size of a process's terminal.
    async fn resize(&self, exec_id: &str, rows: u32, columns: u32) -> Result<(), Error>;
    /// Stops the processors. Does not ask the guest.
    async fn pause(&self) -> Result<(), Error>;
    /// Lets them go on.
    async fn resume(&self) -> Result<(), Error>;
    /// The container has ended: the guest flushes what it holds for the container's files, and the machine is killed, without
    /// waiting for its end. Bounded: a guest that does not answer is killed all the same.
    async fn retire(&self);
    /// Kills the machine without asking the guest.
    fn kill(&self);
    /// Becomes the reason once the monitor is gone.
    fn ended(&self) -> watch::Receiver<Option<String>>;
    /// Ends the machine and removes all that belongs to the container on the host. May be called
    /// again after an error.
    async fn destroy(&self) -> Result<(), crate::error::Error>;
}

/// Resolves when the machine has ended.
pub(crate) async fn ended(machine: &dyn Machine) -> String {
    let mut ended = machine.ended();
    match ended.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or_default(),
        Err(_) => "the monitor is gone".to_owned(),
    }
}
