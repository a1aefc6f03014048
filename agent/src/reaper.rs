//! Reaps every process that ends, and tells whoever waits for it.
//!
//! PID 1 is the parent of workers, of each container's init and of each exec, and inherits orphans.
//! A worker says the PID of what it made in its answer, and that process may have ended by then: so
//! while a worker is at work, the exits of processes that nobody has claimed are kept.

use std::{
    collections::BTreeMap,
    os::unix::process::ExitStatusExt as _,
    process::ExitStatus,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use rustix::{
    io::Errno,
    process::{WaitOptions, wait},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// Unclaimed exits that are kept at most. Only orphans fill it, and only while a worker runs; the
/// oldest goes first.
const UNCLAIMED: usize = 4096;

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0 to 255; 128 + n when ended by signal n.
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

/// Changes from `None` when the process ends.
pub(crate) type Ended = watch::Receiver<Option<Exit>>;

#[derive(Debug, Default)]
struct State {
    claimed: BTreeMap<u32, watch::Sender<Option<Exit>>>,
    unclaimed: Vec<(u32, Exit)>,
    workers: usize,
}

/// The reaper. Clones share one state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reaper {
    state: Arc<Mutex<State>>,
}

/// While it lives, the exits of unknown processes are kept for [`Reaper::claim`].
#[derive(Debug)]
pub(crate) struct WorkerAtWork {
    reaper: Reaper,
}

impl Drop for WorkerAtWork {
    fn drop(&mut self) {
        let mut state = self.reaper.state();
        state.workers -= 1;
        if state.workers == 0 {
            state.unclaimed.clear();
        }
    }
}

impl Reaper {
    // A panic elsewhere cannot leave the maps half-changed.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be held from before a worker starts until what it made has been claimed.
    pub(crate) fn worker_at_work(&self) -> WorkerAtWork {
        self.state().workers += 1;
        WorkerAtWork {
            reaper: self.clone(),
        }
    }

    /// Asks to be told of the end of `pid`, a child of this process that has not been reaped or was
    /// reaped while a [`WorkerAtWork`] was held.
    pub(crate) fn claim(&self, pid: u32) -> Ended {
        let mut state = self.state();
        let (sender, receiver) = watch::channel(None);
        match state.unclaimed.iter().position(|(ended, _)| *ended == pid) {
            Some(index) => {
                let (_, exit) = state.unclaimed.remove(index);
                sender.send_replace(Some(exit));
            }
            None => {
                state.claimed.insert(pid, sender);
            }
        }
        receiver
    }

    fn ended(&self, pid: u32, exit: Exit) {
        let mut state = self.state();
        if let Some(sender) = state.claimed.remove(&pid) {
            sender.send_replace(Some(exit));
        } else if state.workers > 0 {
            if state.unclaimed.len() == UNCLAIMED {
                state.unclaimed.remove(0);
            }
            state.unclaimed.push((pid, exit));
        }
    }

    /// Reaps what has ended so far.
    fn reap(&self) {
        loop {
            // Not by nix: it has no real-time signals, and takes the end by one for an error.
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    let pid = pid.as_raw_nonzero().get().unsigned_abs();
                    if let Some(status) = exit_status(ExitStatus::from_raw(status.as_raw())) {
                        let at = SystemTime::now();
                        self.ended(pid, Exit { status, at });
                    }
                }
                Err(Errno::INTR) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Reaps for ever.
    pub(crate) async fn run(self) -> std::io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            // One signal stands for any number of ends, and for those from before it was asked for.
            self.reap();
            if children.recv().await.is_none() {
                return Ok(());
            }
        }
    }
}

/// 0 to 255; 128 + n of an end by signal n.
fn exit_status(status: ExitStatus) -> Option<u32> {
    let by_signal = || Some(128 + status.signal()?);
    u32::try_from(status.code().or_else(by_signal)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(status: u32) -> Exit {
        Exit {
            status,
            at: SystemTime::UNIX_EPOCH,
        }
    }

    #[test]
    fn an_exit_before_the_claim_is_kept_while_a_worker_is_at_work() {
        let reaper = Reaper::default();
        let guard = reaper.worker_at_work();
        reaper.ended(7, exit(3));
        assert_eq!(*reaper.claim(7).borrow(), Some(exit(3)));
        // Claimed once: a later process of that number is another one.
        assert_eq!(*reaper.claim(7).borrow(), None);
        drop(guard);
    }

    #[test]
    fn an_exit_is_forgotten_when_no_worker_can_claim_it() {
        let reaper = Reaper::default();
        reaper.ended(7, exit(3));
        assert_eq!(*reaper.claim(7).borrow(), None);
        let first = reaper.worker_at_work();
        let second = reaper.worker_at_work();
        reaper.ended(8, exit(1));
        drop(first);
        reaper.ended(9, exit(2));
        drop(second);
        assert_eq!(*reaper.claim(8).borrow(), None);
        assert_eq!(*reaper.claim(9).borrow(), None);
    }

    #[test]
    fn an_exit_after_the_claim_is_told() {
        let reaper = Reaper::default();
        let ended = reaper.claim(7);
        reaper.ended(7, exit(137));
        assert_eq!(*ended.borrow(), Some(exit(137)));
    }

    #[test]
    fn unclaimed_exits_are_bounded_and_the_newest_stay() {
        let reaper = Reaper::default();
        let _guard = reaper.worker_at_work();
        for pid in 0..=UNCLAIMED {
            reaper.ended(u32::try_from(pid).unwrap(), exit(0));
        }
        assert_eq!(reaper.state().unclaimed.len(), UNCLAIMED);
        assert_eq!(*reaper.claim(0).borrow(), None);
        assert_eq!(*reaper.claim(1).borrow(), Some(exit(0)));
    }

    #[test]
    fn a_signal_is_128_and_its_number() {
        for (script, expected) in [("exit 3", 3), ("kill -9 $$", 137), ("kill -34 $$", 162)] {
            let ended = std::process::Command::new("sh")
                .args(["-c", script])
                .status()
                .unwrap();
            assert_eq!(exit_status(ended), Some(expected));
        }
    }
}
