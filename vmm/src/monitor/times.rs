//! The named time points that a monitor passes, and the one at which a test has it stop.

use rustix::event::{PollFd, PollFlags, poll};

use crate::control::{Event, Socket, TimePoint};

/// The time points passed so far.
pub(super) struct Times<'a> {
    pub(super) passed: Vec<TimePoint>,
    /// See [`Request::StopAt`].
    pub(super) stop_at: Option<String>,
    socket: &'a Socket,
}

impl<'a> Times<'a> {
    pub(super) fn new(socket: &'a Socket) -> Self {
        Self {
            passed: Vec::new(),
            stop_at: None,
            socket,
        }
    }

    pub(super) fn pass(&mut self, name: &str) {
        self.at(name, crate::now());
        if self.stop_at.as_deref() == Some(name) {
            self.stop();
        }
    }

    pub(super) fn at(&mut self, name: &str, at_ns: u64) {
        self.passed.push(TimePoint {
            name: name.to_owned(),
            at_ns,
        });
    }

    /// Tells the launcher, and waits until it does anything: it kills this process, or is killed itself.
    pub(super) fn stop(&self) {
        let Some(point) = self.stop_at.clone() else {
            return;
        };
        // Who waits for the event and who is gone are the same here.
        if self.socket.send(&Event::Reached { point }, &[]).is_ok() {
            while let Err(rustix::io::Errno::INTR) =
                poll(&mut [PollFd::new(self.socket, PollFlags::IN)], None)
            {}
        }
    }
}
