//! Why a case failed, with what its reader needs to see.

use std::{fmt, io};

use crate::process::Output;

/// At most this much of an output is shown; the middle is left out.
const SHOWN: usize = 1200;

/// Why a case failed.
#[derive(Clone, Debug, thiserror::Error)]
pub struct Failure {
    message: String,
    output: Option<Box<Output>>,
}

impl Failure {
    /// A failure that one sentence explains.
    pub fn new(message: impl Into<String>) -> Self {
        Failure {
            message: message.into(),
            output: None,
        }
    }

    /// A failure of a program, shown with its command line and output.
    pub fn with_output(message: impl Into<String>, output: &Output) -> Self {
        Failure {
            message: message.into(),
            output: Some(Box::new(output.clone())),
        }
    }

    /// Turns an [`io::Error`] about `what` into a failure.
    pub fn io(what: impl fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |error| Failure::new(format!("{what}: {error}"))
    }

    /// The same failure, with what was going on in front of it.
    #[must_use]
    pub fn about(mut self, what: &str) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// The sentence alone.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl From<forkvm::bench::Error> for Failure {
    fn from(error: forkvm::bench::Error) -> Self {
        Failure::new(error.to_string())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.message)?;
        if let Some(output) = &self.output {
            let command = excerpt(output.command.as_bytes());
            write!(out, "\ncommand: {command}")?;
            write!(
                out,
                "\nended:   {} after {:.1} s",
                output.end,
                output.took.as_secs_f32()
            )?;
            for (name, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
                if !bytes.is_empty() {
                    write!(out, "\n{name}:  {}", excerpt(bytes))?;
                }
            }
        }
        Ok(())
    }
}

fn excerpt(bytes: &[u8]) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).trim_end().to_owned();
    if bytes.len() <= SHOWN {
        return text(bytes);
    }
    let half = SHOWN / 2;
    format!(
        "{}\n[... {} bytes ...]\n{}",
        text(&bytes[..half]),
        bytes.len() - SHOWN,
        text(&bytes[bytes.len() - half..])
    )
}

/// A failure unless `holds`.
///
/// # Errors
/// When it does not hold.
pub fn ensure(holds: bool, message: impl FnOnce() -> String) -> Result<(), Failure> {
    if holds {
        Ok(())
    } else {
        Err(Failure::new(message()))
    }
}
