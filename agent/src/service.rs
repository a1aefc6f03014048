//! The ttrpc service: each handler unpacks its request, calls the sandbox and packs the answer.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use forkvm_api::{agent as api, agent_ttrpc};
use ttrpc::{Code, r#async::TtrpcContext};

use crate::{
    cgroup, container, identity, launch, process,
    sandbox::{Error, Sandbox},
    stdio,
};

/// The service `forkvm.agent.v1.Agent`.
pub(crate) struct Service {
    pub(crate) sandbox: Arc<Sandbox>,
}

/// The one place that maps what went wrong to a status of ttrpc.
fn code(error: &Error) -> Code {
    match error {
        Error::NoIdentity | Error::SecondIdentity => Code::FAILED_PRECONDITION,
        Error::Identity(identity::Error::Invalid { .. }) => Code::INVALID_ARGUMENT,
        Error::Identity(identity::Error::Apply { .. }) => Code::INTERNAL,
        Error::Exists(_) => Code::ALREADY_EXISTS,
        Error::NoContainer(_) => Code::NOT_FOUND,
        Error::Down => Code::UNAVAILABLE,
        Error::Container(error) => container_code(error),
    }
}

fn container_code(error: &container::Error) -> Code {
    use container::Error as E;
    match error {
        E::Spec(_) | E::ExecId(_) => Code::INVALID_ARGUMENT,
        E::Cgroup(cgroup::Error::Limits(_)) => Code::INVALID_ARGUMENT,
        E::Streams(stdio::Error::Stream(_)) => Code::DEADLINE_EXCEEDED,
        E::State { .. } | E::StillRuns(_) => Code::FAILED_PRECONDITION,
        E::ExecExists(_) => Code::ALREADY_EXISTS,
        E::NoExec(_) | E::Process(process::Error::Ended(_)) => Code::NOT_FOUND,
        E::Process(process::Error::NoSignal(_)) => Code::INVALID_ARGUMENT,
        E::Process(process::Error::NoTerminal(_)) => Code::FAILED_PRECONDITION,
        // libcontainer's refusal of a spec and its failure are one to us.
        E::Launch(launch::Error::Failed(_)) => Code::UNKNOWN,
        E::Streams(_)
        | E::Launch(_)
        | E::Cgroup(_)
        | E::Process(_)
        | E::Files(_)
        | E::Start(_)
        | E::Console(_) => Code::INTERNAL,
    }
}

fn status(error: Error) -> ttrpc::Error {
    log::debug!("refused: {error}");
    ttrpc::Error::RpcStatus(ttrpc::get_status(code(&error), error))
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn since_1970(time: SystemTime) -> i64 {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// A window's size has 16 bits; more is the most there is.
fn cells(count: u32) -> u16 {
    u16::try_from(count).unwrap_or(u16::MAX)
}

#[async_trait]
impl agent_ttrpc::Agent for Service {
    async fn identify(
        &self,
        _: &TtrpcContext,
        request: api::IdentifyRequest,
    ) -> ttrpc::Result<api::IdentifyResponse> {
        let took = self.sandbox.identify(&request.identity).map_err(status)?;
        Ok(api::IdentifyResponse {
            took_ns: nanoseconds(took),
            ..Default::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateRequest,
    ) -> ttrpc::Result<api::CreateResponse> {
        let created = self.sandbox.create(&request).await.map_err(status)?;
        Ok(api::CreateResponse {
            pid: created.pid,
            identity_ns: nanoseconds(created.identity),
            create_ns: nanoseconds(created.create),
            ..Default::default()
        })
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> ttrpc::Result<api::StartResponse> {
        self.sandbox
            .start(&request.container_id)
            .await
            .map_err(status)?;
        Ok(api::StartResponse::default())
    }

    async fn exec(
        &self,
        _: &TtrpcContext,
        request: api::ExecRequest,
    ) -> ttrpc::Result<api::ExecResponse> {
        let pid = self.sandbox.exec(&request).await.map_err(status)?;
        Ok(api::ExecResponse {
            pid,
            ..Default::default()
        })
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::WaitRequest,
    ) -> ttrpc::Result<api::WaitResponse> {
        let exit = self
            .sandbox
            .wait(&request.container_id, &request.exec_id)
            .await
            .map_err(status)?;
        let oom_kills = match &*request.exec_id {
            "" => self.sandbox.oom_kills(&request.container_id).unwrap_or(0),
            _ => 0,
        };
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at_ns: since_1970(exit.at),
            oom_kills,
            ..Default::default()
        })
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        request: api::SignalRequest,
    ) -> ttrpc::Result<api::SignalResponse> {
        self.sandbox
            .signal(
                &request.container_id,
                &request.exec_id,
                request.signal,
                request.all,
            )
            .map_err(status)?;
        Ok(api::SignalResponse::default())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> ttrpc::Result<api::DeleteResponse> {
        self.sandbox
            .delete(&request.container_id)
            .await
            .map_err(status)?;
        Ok(api::DeleteResponse::default())
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: api::PidsRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        let processes = self
            .sandbox
            .processes(&request.container_id)
            .map_err(status)?;
        let processes = processes
            .into_iter()
            .map(|(pid, exec_id)| api::pids_response::Process {
                pid,
                exec_id,
                ..Default::default()
            })
            .collect();
        Ok(api::PidsResponse {
            processes,
            ..Default::default()
        })
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: api::ResizePtyRequest,
    ) -> ttrpc::Result<api::ResizePtyResponse> {
        let (rows, columns) = (cells(request.rows), cells(request.columns));
        self.sandbox
            .resize(&request.container_id, &request.exec_id, rows, columns)
            .map_err(status)?;
        Ok(api::ResizePtyResponse::default())
    }

    async fn out_of_memory(
        &self,
        _: &TtrpcContext,
        request: api::OutOfMemoryRequest,
    ) -> ttrpc::Result<api::OutOfMemoryResponse> {
        let asked = self
            .sandbox
            .more_oom_kills(&request.container_id, request.seen);
        Ok(api::OutOfMemoryResponse {
            kills: asked.await.map_err(status)?,
            ..Default::default()
        })
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        request: api::UpdateRequest,
    ) -> ttrpc::Result<api::UpdateResponse> {
        self.sandbox
            .update(&request.container_id, &request.resources)
            .await
            .map_err(status)?;
        Ok(api::UpdateResponse::default())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> ttrpc::Result<api::StatsResponse> {
        self.sandbox.stats(&request.container_id).map_err(status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_the_codes_that_the_shim_acts_on() {
        let ended = Error::from(process::Error::Ended(5));
        assert_eq!(code(&ended), Code::NOT_FOUND);
        assert_eq!(code(&Error::NoIdentity), Code::FAILED_PRECONDITION);
        assert_eq!(code(&Error::Exists("a".to_owned())), Code::ALREADY_EXISTS);
        let runs = Error::Container(container::Error::StillRuns(5));
        assert_eq!(code(&runs), Code::FAILED_PRECONDITION);
        let words = launch::Error::Failed("no".to_owned());
        assert_eq!(code(&Error::Container(words.into())), Code::UNKNOWN);
    }
}
