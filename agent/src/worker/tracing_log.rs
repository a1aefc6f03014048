//! Hands what libcontainer logs to the agent: every line as a report on the worker's socket.
//!
//! libcontainer says the cause of many a failure only in its log ("failed to bind mount rootfs,
//! err=ENOENT") and a general word in its error ("failed to prepare rootfs").

use std::{fmt::Write, os::fd::BorrowedFd};

use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use super::SOCKET;
use crate::report::{self, Report};

/// A warning about every process that is made: libcontainer's intermediate process is PID 1's child, which reaps it.
const ALWAYS_SAID: &str = "intermediate process already reaped";

/// Sends warnings and errors; the rest of libcontainer's log is about its own steps.
struct ToAgent;

pub(super) fn install() {
    // Fails only if it was done before.
    let _ = tracing::subscriber::set_global_default(ToAgent);
}

impl Subscriber for ToAgent {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        if line.message == ALWAYS_SAID {
            return;
        }
        let level = match *event.metadata().level() {
            Level::ERROR => log::Level::Error,
            _ => log::Level::Warn,
        };
        // SAFETY: the worker never closes this descriptor, and what libcontainer forks from it only
        // marks it to be closed on exec; a send on another one would fail, not corrupt.
        let socket = unsafe { BorrowedFd::borrow_raw(SOCKET) };
        report::send(
            socket,
            &Report::Log {
                level: level as u8,
                text: line.message + &line.fields,
            },
        );
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, ", {}: {value:?}", field.name())
        };
    }
}
