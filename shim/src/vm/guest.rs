//! What comes back of a call to the guest.

use std::{future::Future, time::Duration};

use tokio::time::timeout;
use ttrpc::{Code, context};

use forkvm_api::agent::Streams;

use crate::{machine::Error as MachineError, spec::ConsoleSize};

/// Most bytes of a text that the guest answers with: the sentence of an error, its causes and names of files.
const MESSAGE: usize = 1024;

/// Longest call to the agent that ttrpc can express: calls have limits of their own above this.
const NO_LIMIT: Duration = Duration::from_secs(u32::MAX as u64);

/// An answer that has to come within a time.
pub(super) async fn within<T>(
    limit: Duration,
    call: &'static str,
    answer: impl Future<Output = Result<T, MachineError>>,
) -> Result<T, MachineError> {
    timeout(limit, answer)
        .await
        .map_err(|_| MachineError::Late {
            call,
            seconds: limit.as_secs(),
        })?
}

/// Streams whose terminal has the size that the configuration names, if the client has named none.
pub(super) fn sized(mut streams: Streams, size: Option<ConsoleSize>) -> Streams {
    if let (true, 0, Some((rows, columns))) = (streams.terminal, streams.rows, size) {
        (streams.rows, streams.columns) = (rows, columns);
    }
    streams
}

/// What ttrpc tells of a call that failed.
pub(super) fn guest_error(call: &'static str, error: ttrpc::Error) -> MachineError {
    match error {
        ttrpc::Error::RpcStatus(status) => MachineError::Guest {
            call,
            code: status.code(),
            message: cut(status.message),
        },
        other => MachineError::Guest {
            call,
            code: Code::UNAVAILABLE,
            message: other.to_string(),
        },
    }
}

/// The guest's text, for logs and clients, which are not its to fill.
fn cut(mut message: String) -> String {
    if message.len() > MESSAGE {
        let end = (0..=MESSAGE).rev().find(|&at| message.is_char_boundary(at));
        message.truncate(end.unwrap_or(0));
        message.push_str(" [...]");
    }
    message
}

/// For calls that are raced against the end of the machine instead.
pub(super) fn no_limit() -> context::Context {
    context::with_duration(NO_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::{MESSAGE, cut};

    #[test]
    fn the_guest_does_not_fill_the_log() {
        assert_eq!(cut("no such file".to_owned()), "no such file");
        // A character of three bytes lies across the bound.
        let long = cut("\u{20ac}".repeat(MESSAGE));
        assert!(
            long.len() < MESSAGE + 10 && long.ends_with("\u{20ac} [...]"),
            "{}",
            long.len()
        );
    }
}
