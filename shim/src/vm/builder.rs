//! Building a template that a start has found missing, in a process of its own: it may wait for another builder, and it
//! reaps its monitor, which in the shim the reaper does. It ends with the shim, and its monitor with it.

use std::{
    io::{self, Read as _, Write as _},
    os::fd::OwnedFd,
    process::{Command, Stdio},
};

use forkvm_config::Config;
use forkvm_vmm::template::{self, Attempt, TemplateSpec};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt as _, net::unix::pipe};

use super::monitor::relay_log;
use crate::reaper::Reaper;

/// The action by which a shim calls its own program.
pub(crate) const ACTION: &str = "build-template";

/// Bytes of a builder's answer that are read: more than any message has.
const ANSWER: u64 = 16 << 10;

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot start a builder: {0}")]
    Start(io::Error),
    #[error("the builder's request is not valid: {0}")]
    Request(serde_json::Error),
    #[error("the builder's shim has ended")]
    Orphan,
    #[error(transparent)]
    Configuration(#[from] forkvm_config::Error),
    #[error(transparent)]
    Store(#[from] template::Error),
    /// What the builder has said.
    #[error("{0}")]
    Failed(String),
}

/// What a builder reads from its standard input.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    /// PID of the shim.
    shim: u32,
    spec: TemplateSpec,
}

/// Has a template built, or waits for whoever builds it. Its log goes into the shim's.
pub(super) async fn build(spec: &TemplateSpec, reaper: &Reaper) -> Result<(), Error> {
    let request = Request {
        shim: std::process::id(),
        spec: spec.clone(),
    };
    let request = serde_json::to_vec(&request).map_err(Error::Request)?;
    let program = std::env::current_exe().map_err(Error::Start)?;
    let mut command = Command::new(program);
    command
        .arg(ACTION)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = reaper.spawn(&mut command).map_err(Error::Start)?;
    if let Some(mut stdin) = child.stdin.take() {
        // Some hundred bytes, less than a pipe holds (pipe(7)): this does not block.
        stdin.write_all(&request).map_err(Error::Start)?;
    }
    if let Some(stderr) = child.stderr.take() {
        tokio::spawn(relay_log(stderr.into(), "template"));
    }
    let mut answer = String::new();
    if let Some(stdout) = child.stdout.take() {
        let pipe = pipe::Receiver::from_owned_fd(OwnedFd::from(stdout)).map_err(Error::Start)?;
        let read = pipe.take(ANSWER).read_to_string(&mut answer).await;
        read.map_err(Error::Start)?;
    }
    match child.ended.await {
        Ok(status) if status.success() => Ok(()),
        Ok(status) if answer.is_empty() => {
            Err(Error::Failed(format!("the builder ended with {status}")))
        }
        _ => Err(Error::Failed(answer)),
    }
}

/// The builder's process: the action. What it answers on failure is for [`build`].
pub(crate) fn run() -> Result<(), Error> {
    forkvm_vmm::log_to_stderr();
    let mut text = Vec::new();
    io::stdin()
        .take(ANSWER)
        .read_to_end(&mut text)
        .map_err(Error::Start)?;
    let request: Request = serde_json::from_slice(&text).map_err(Error::Request)?;
    // A build that nobody waits for would outlive its container; the next start begins anew and clears up.
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| Error::Start(e.into()))?;
    if getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs()) != Some(request.shim) {
        return Err(Error::Orphan);
    }
    let store = template::store(&Config::load()?);
    store.build(&request.spec, Attempt::Start, &mut |step| {
        log::info!("{step}");
    })?;
    Ok(())
}
