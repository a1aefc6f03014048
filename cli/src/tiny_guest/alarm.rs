//! A deadline for a system call of this thread: from then on a signal interrupts it.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use nix::{
    sys::{
        signal::{
            SaFlags, SigAction, SigEvent, SigHandler, SigSet, SigevNotify, Signal, sigaction,
        },
        timer::{Expiration, Timer, TimerSetTimeFlags},
    },
    time::ClockId,
    unistd::gettid,
};

/// How often the signal is repeated after the deadline. One that arrives just before the system
/// call is entered interrupts nothing; the next one does.
const AGAIN: Duration = Duration::from_millis(20);

extern "C" fn interrupt(_signal: libc::c_int) {}

/// Installs the handler, once: it does nothing, its being there lets the signal interrupt system
/// calls.
fn install() -> nix::Result<()> {
    static INSTALLED: OnceLock<nix::Result<()>> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        let action = SigAction::new(
            SigHandler::Handler(interrupt),
            SaFlags::empty(),
            SigSet::empty(),
        );
        // SAFETY: the handler is an empty function, which is async-signal-safe, and nothing else in
        // this program uses SIGALRM.
        unsafe { sigaction(Signal::SIGALRM, &action) }.map(drop)
    })
}

/// A deadline; while it lives, system calls of the thread that made it end with EINTR once it has
/// passed.
pub(super) struct Alarm {
    deadline: Instant,
    _timer: Timer,
}

impl Alarm {
    /// A deadline from now.
    ///
    /// # Errors
    /// The kernel gives no timer.
    pub(super) fn after(limit: Duration) -> nix::Result<Self> {
        install()?;
        let mut timer = Timer::new(
            ClockId::CLOCK_MONOTONIC,
            SigEvent::new(SigevNotify::SigevThreadId {
                signal: Signal::SIGALRM,
                thread_id: gettid().as_raw(),
                si_value: 0,
            }),
        )?;
        timer.set(
            Expiration::IntervalDelayed(limit.into(), AGAIN.into()),
            TimerSetTimeFlags::empty(),
        )?;
        Ok(Self {
            deadline: Instant::now() + limit,
            _timer: timer,
        })
    }

    /// Whether the deadline has passed.
    pub(super) fn rang(&self) -> bool {
        Instant::now() >= self.deadline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_call_that_waits_for_ever_is_interrupted() {
        let alarm = Alarm::after(Duration::from_millis(30)).unwrap();
        loop {
            // `pause` returns only when a signal was handled.
            nix::unistd::pause();
            if alarm.rang() {
                break;
            }
        }
    }
}
