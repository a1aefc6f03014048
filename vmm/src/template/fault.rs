//! The fault that a test asks for in a build (`forkvm_api::fault`).

use forkvm_api::fault::{Kill, Process};
use rustix::process::{Pid, Signal, getpid, kill_process};

use crate::control::Monitor;

/// What is to be killed, if anything.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Fault(pub(super) Option<Kill>);

impl Fault {
    /// Called at every point of a build at which no monitor runs.
    pub(super) fn passed(self, point: &str) {
        self.kill(point, Process::Builder, Some(getpid()));
    }

    /// Called at every point at which one does.
    pub(super) fn passed_with(self, point: &str, monitor: &Monitor) {
        self.passed(point);
        let monitor = i32::try_from(monitor.pid()).ok().and_then(Pid::from_raw);
        self.kill(point, Process::Monitor, monitor);
    }

    fn kill(self, point: &str, process: Process, pid: Option<Pid>) {
        let asked = |kill: Kill| kill.process == process && kill.point == point;
        if self.0.is_some_and(asked)
            && let Some(pid) = pid
        {
            // What cannot be killed fails the test.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}
