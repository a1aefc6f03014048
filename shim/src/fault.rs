//! Carries out the fault that a test asks for (`forkvm_api::fault`).

use std::sync::{Arc, OnceLock};

use forkvm_api::fault::{Kill, Process};
use rustix::process::{Signal, getpid, kill_process};

/// What is to be killed, and how the monitor is. Without a kill it does nothing.
#[derive(Clone, Default)]
pub(crate) struct Fault {
    kill: Option<Kill>,
    monitor: Arc<OnceLock<Box<dyn Fn() + Send + Sync>>>,
}

impl std::fmt::Debug for Fault {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.kill.fmt(out)
    }
}

impl Fault {
    pub(crate) fn new(kill: Option<Kill>) -> Self {
        Self {
            kill,
            monitor: Arc::default(),
        }
    }

    /// From now on there is a monitor, which `kill` kills.
    pub(crate) fn set_monitor(&self, kill: impl Fn() + Send + Sync + 'static) {
        // A shim has one.
        let _ = self.monitor.set(Box::new(kill));
    }

    /// The point at which the monitor is to wait for its end, or that of its shim.
    pub(crate) fn in_monitor(&self) -> Option<&'static str> {
        let kill = self.kill.filter(Kill::is_in_monitor)?;
        Some(kill.point)
    }

    /// Called at every point.
    pub(crate) fn passed(&self, point: &str) {
        let Some(kill) = self.kill.filter(|kill| kill.point == point) else {
            return;
        };
        log::warn!("test.kill: {kill}");
        match kill.process {
            Process::Shim => {
                // There is nobody left to be told if it fails.
                let _ = kill_process(getpid(), Signal::KILL);
            }
            Process::Monitor => {
                if let Some(kill) = self.monitor.get() {
                    kill();
                }
            }
            // It dies in its own process.
            Process::Builder => {}
        }
    }
}
