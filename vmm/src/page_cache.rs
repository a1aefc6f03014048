//! When the guest is asked to give back what it has cached of files.
//!
//! Nobody in the guest knows that the host could use the memory, and nobody there should wake up
//! to look. But all that the guest's page cache holds has passed through the file server: so the
//! monitor asks when much has passed and then little more. It waits for that only after much has
//! passed, and a guest that leaves its files alone is left alone.

use std::{
    io::ErrorKind,
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::net::{RecvFlags, recv};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::fs::Traffic;

/// Bytes that pass before it is worth the while.
const MUCH: u64 = 4 << 20;
/// How long the guest's files have to rest.
const REST: Duration = Duration::from_secs(5);
/// Fewer bytes than this within [`REST`] are rest: a program that writes a log is at it for ever.
const LITTLE: u64 = 1 << 20;

/// What the monitor knows of one guest's page cache.
pub(crate) struct PageCache {
    traffic: Arc<Traffic>,
    /// While much has passed: when to look again, and how much had passed when it was set.
    watch: Option<(Instant, u64)>,
    /// Much has passed when it is this much.
    much: u64,
    /// Our end of the connection by which the guest was asked last.
    asked: Option<UnixStream>,
}

impl PageCache {
    /// `wake` is written to when [`look`](Self::look) has something to do.
    pub(crate) fn new(traffic: Arc<Traffic>, wake: EventFd) -> Self {
        traffic.wakes(wake);
        traffic.alarm(MUCH);
        Self {
            traffic,
            watch: None,
            much: MUCH,
            asked: None,
        }
    }

    /// When to call [`look`](Self::look) although nothing has happened.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.watch.map(|(at, _)| at)
    }

    /// Whether it is time to ask.
    pub(crate) fn look(&mut self, now: Instant) -> bool {
        let passed = self.traffic.bytes();
        match self.watch {
            None if passed < self.much => false,
            Some((at, _)) if now < at => false,
            Some((_, before)) if passed - before < LITTLE => {
                self.watch = None;
                self.much = passed + MUCH;
                self.traffic.alarm(self.much);
                true
            }
            _ => {
                self.watch = Some((now + REST, passed));
                false
            }
        }
    }

    /// A stream for the guest: a connection is the question, and its end the answer. None if the
    /// guest has not answered the one before.
    pub(crate) fn ask(&mut self) -> Option<UnixStream> {
        if self.asked.as_ref().is_some_and(is_open) {
            return None;
        }
        match UnixStream::pair() {
            Ok((ours, theirs)) => {
                self.asked = Some(ours);
                Some(theirs)
            }
            Err(error) => {
                log::warn!("cannot ask the guest for its page cache: {error}");
                None
            }
        }
    }
}

fn is_open(stream: &UnixStream) -> bool {
    let mut byte = [0];
    let received = recv(stream, &mut byte[..], RecvFlags::DONTWAIT | RecvFlags::PEEK);
    matches!(received.map_err(std::io::Error::from), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn watched() -> (PageCache, Arc<Traffic>, Instant) {
        let traffic = Arc::new(Traffic::default());
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        (
            PageCache::new(Arc::clone(&traffic), wake),
            traffic,
            Instant::now(),
        )
    }

    #[test]
    fn a_guest_that_reads_little_is_never_asked() {
        let (mut cache, traffic, now) = watched();
        traffic.add(MUCH - 1);
        assert!(!cache.look(now));
        assert_eq!(cache.deadline(), None);
    }

    #[test]
    fn a_guest_is_asked_once_its_files_rest() {
        let (mut cache, traffic, now) = watched();
        traffic.add(MUCH);
        assert!(!cache.look(now));
        assert_eq!(cache.deadline(), Some(now + REST));
        // Woken for something else.
        assert!(!cache.look(now + REST / 2));
        assert_eq!(cache.deadline(), Some(now + REST));
        // It still reads.
        traffic.add(LITTLE);
        assert!(!cache.look(now + REST));
        assert_eq!(cache.deadline(), Some(now + 2 * REST));
        // It writes a log.
        traffic.add(LITTLE - 1);
        assert!(cache.look(now + 2 * REST));
        assert_eq!(cache.deadline(), None);
        // And again only when as much has passed again.
        traffic.add(MUCH - 1);
        assert!(!cache.look(now + 10 * REST));
        assert_eq!(cache.deadline(), None);
        traffic.add(1);
        assert!(!cache.look(now + 11 * REST));
        assert!(cache.look(now + 12 * REST));
    }

    #[test]
    fn a_guest_that_does_not_answer_is_not_asked_twice() {
        let (mut cache, _, _) = watched();
        let question = cache.ask().unwrap();
        assert!(cache.ask().is_none());
        drop(question);
        assert!(cache.ask().is_some());
    }
}
