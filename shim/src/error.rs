//! The one place where errors become the codes that containerd's clients act on.

use ttrpc::Code;

use crate::{bundle, cgroup, container, hooks, machine, rootfs, run_state, spec, streams, vm};

/// Whatever a call of the Task API can end with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Container(#[from] container::Error),
    #[error(transparent)]
    Machine(#[from] machine::Error),
    #[error(transparent)]
    Stream(#[from] streams::Error),
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    #[error(transparent)]
    Configuration(#[from] std::sync::Arc<forkvm_config::Error>),
    #[error(transparent)]
    Spec(#[from] spec::Error),
    #[error(transparent)]
    Rootfs(#[from] rootfs::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    #[error(transparent)]
    RunState(#[from] run_state::Error),
    #[error(transparent)]
    Vm(#[from] vm::Error),
}

impl Error {
    /// The code of the answer. containerd's clients act on these: a `Kill` that is `NotFound`
    /// counts as done, a `Create` that is `AlreadyExists` is not retried.
    pub(crate) fn code(&self) -> Code {
        match self {
            Error::Container(error) => match error {
                container::Error::NoContainer(_)
                | container::Error::NoProcess { .. }
                | container::Error::Finished(_) => Code::NOT_FOUND,
                container::Error::ContainerExists(_) | container::Error::ProcessExists(_) => {
                    Code::ALREADY_EXISTS
                }
                container::Error::OneContainer { .. } => Code::FAILED_PRECONDITION,
                container::Error::State { .. } | container::Error::NoTerminal(_) => {
                    Code::FAILED_PRECONDITION
                }
                container::Error::Invalid(_) => Code::INVALID_ARGUMENT,
                container::Error::Unimplemented(_) => Code::UNIMPLEMENTED,
            },
            Error::Machine(error) => match error {
                machine::Error::Ended(_) => Code::UNAVAILABLE,
                machine::Error::Late { .. } => Code::DEADLINE_EXCEEDED,
                machine::Error::Guest { code, .. } => *code,
                machine::Error::Io(_) => Code::INTERNAL,
            },
            Error::Stream(error) => match error {
                streams::Error::Scheme(_) => Code::UNIMPLEMENTED,
                streams::Error::Open { .. } => Code::INVALID_ARGUMENT,
            },
            Error::Bundle(error) => match error {
                bundle::Error::Folder { .. } | bundle::Error::Parse { .. } => {
                    Code::INVALID_ARGUMENT
                }
                bundle::Error::Read { .. }
                | bundle::Error::Write { .. }
                | bundle::Error::Lock { .. } => Code::INTERNAL,
            },
            Error::Configuration(_) => Code::FAILED_PRECONDITION,
            Error::Spec(error) => match error {
                spec::Error::Read { .. } | spec::Error::Parse { .. } | spec::Error::Invalid(_) => {
                    Code::INVALID_ARGUMENT
                }
                spec::Error::Unsupported(_) => Code::UNIMPLEMENTED,
                spec::Error::Encode(_) => Code::INTERNAL,
            },
            Error::Rootfs(error) => match error {
                rootfs::Error::Missing(_) => Code::NOT_FOUND,
                rootfs::Error::Mount { .. }
                | rootfs::Error::Export { .. }
                | rootfs::Error::Unmount { .. } => Code::INTERNAL,
            },
            Error::Cgroup(_) | Error::Hook(_) | Error::RunState(_) => Code::INTERNAL,
            Error::Vm(error) => error.code(),
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::error::get_rpc_status(error.code(), error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_error_has_its_code() {
        let cases: Vec<(Error, Code)> = vec![
            (
                container::Error::NoContainer("c".into()).into(),
                Code::NOT_FOUND,
            ),
            (
                container::Error::NoProcess {
                    container: "c".into(),
                    exec: "e".into(),
                }
                .into(),
                Code::NOT_FOUND,
            ),
            (
                container::Error::Finished("c".into()).into(),
                Code::NOT_FOUND,
            ),
            (
                container::Error::ContainerExists("c".into()).into(),
                Code::ALREADY_EXISTS,
            ),
            (
                container::Error::ProcessExists("e".into()).into(),
                Code::ALREADY_EXISTS,
            ),
            (
                container::Error::OneContainer {
                    held: "c".into(),
                    asked: "d".into(),
                }
                .into(),
                Code::FAILED_PRECONDITION,
            ),
            (
                container::Error::State {
                    action: "start",
                    process: "c".into(),
                    state: "running",
                }
                .into(),
                Code::FAILED_PRECONDITION,
            ),
            (
                container::Error::NoTerminal("c".into()).into(),
                Code::FAILED_PRECONDITION,
            ),
            (
                container::Error::Invalid("signal 99".into()).into(),
                Code::INVALID_ARGUMENT,
            ),
            (
                container::Error::Unimplemented("stats").into(),
                Code::UNIMPLEMENTED,
            ),
            (
                machine::Error::Ended("killed".into()).into(),
                Code::UNAVAILABLE,
            ),
            (
                machine::Error::Late {
                    call: "pids",
                    seconds: 2,
                }
                .into(),
                Code::DEADLINE_EXCEEDED,
            ),
            (
                machine::Error::Guest {
                    call: "start",
                    code: Code::NOT_FOUND,
                    message: "no such file".into(),
                }
                .into(),
                Code::NOT_FOUND,
            ),
            (
                streams::Error::Scheme("npipe".into()).into(),
                Code::UNIMPLEMENTED,
            ),
            (
                spec::Error::Unsupported("the host's PID namespace".into()).into(),
                Code::UNIMPLEMENTED,
            ),
            (
                spec::Error::Invalid("no process".into()).into(),
                Code::INVALID_ARGUMENT,
            ),
            (rootfs::Error::Missing("/x".into()).into(), Code::NOT_FOUND),
            (
                vm::Error::NoTemplate("x".into()).into(),
                Code::FAILED_PRECONDITION,
            ),
        ];
        for (error, code) in cases {
            assert_eq!(error.code(), code, "{error}");
        }
    }

    #[test]
    fn the_message_reaches_the_client() {
        let error = ttrpc::Error::from(Error::from(container::Error::Unimplemented("stats")));
        match error {
            ttrpc::Error::RpcStatus(status) => {
                assert_eq!(status.message(), "stats is not implemented by forkvm yet");
            }
            other => panic!("{other:?}"),
        }
    }
}
