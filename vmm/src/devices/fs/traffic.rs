//! How much passes between the guest and the file server.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

use vmm_sys_util::eventfd::EventFd;

/// Bytes of requests and of answers: whatever the guest's page cache holds has passed here. The
/// file server's thread counts, another one may wait for a sum.
#[derive(Debug, Default)]
pub struct Traffic {
    bytes: AtomicU64,
    alarm: OnceLock<Alarm>,
}

#[derive(Debug)]
struct Alarm {
    at: AtomicU64,
    event: EventFd,
}

impl Traffic {
    /// The sum so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    /// Sets whom an [`alarm`](Self::alarm) wakes: `event` is written to. The first one stays.
    pub fn wakes(&self, event: EventFd) {
        let at = AtomicU64::new(u64::MAX);
        self.alarm.get_or_init(|| Alarm { at, event });
    }

    /// Sets an alarm for when the sum reaches `at`; it rings once.
    pub fn alarm(&self, at: u64) {
        let Some(alarm) = self.alarm.get() else {
            return;
        };
        alarm.at.store(at, Ordering::SeqCst);
        // What was counted while the sum was set passed it unseen.
        if self.bytes() >= at {
            alarm.ring();
        }
    }

    pub(crate) fn add(&self, bytes: u64) {
        let before = self.bytes.fetch_add(bytes, Ordering::SeqCst);
        if let Some(alarm) = self.alarm.get() {
            let at = alarm.at.load(Ordering::SeqCst);
            if before < at && before.saturating_add(bytes) >= at {
                alarm.ring();
            }
        }
    }
}

impl Alarm {
    fn ring(&self) {
        if let Err(error) = self.event.write(1) {
            log::error!("cannot tell of the file server's traffic: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn rung(event: &EventFd) -> bool {
        event.read().is_ok()
    }

    #[test]
    fn the_alarm_rings_once_at_its_sum() {
        let traffic = Traffic::default();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        traffic.wakes(event.try_clone().unwrap());
        traffic.add(50);
        traffic.alarm(100);
        traffic.add(49);
        assert!(!rung(&event));
        traffic.add(1);
        assert!(rung(&event));
        traffic.add(1000);
        assert!(!rung(&event));
        traffic.alarm(1200);
        assert!(!rung(&event));
        traffic.add(500);
        assert!(rung(&event));
        assert_eq!(traffic.bytes(), 1600);
    }

    #[test]
    fn a_sum_that_was_passed_already_rings() {
        let traffic = Traffic::default();
        traffic.add(10);
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        traffic.wakes(event.try_clone().unwrap());
        assert!(!rung(&event));
        traffic.alarm(10);
        assert!(rung(&event));
    }
}
