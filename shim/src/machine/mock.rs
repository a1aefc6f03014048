//! A machine without a guest: a test plays the guest's part.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use tokio::sync::Notify;

use super::*;
use crate::error::Error as AnyError;

/// PID of every mock's monitor.
pub(crate) const PID: u32 = 4242;

/// What a mock does with a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Guest {
    /// Answers.
    #[default]
    Well,
    /// Answers with an error.
    Fails,
    /// Never answers.
    Hangs,
}

/// Makes mocks and keeps the last of them.
#[derive(Default)]
pub(crate) struct MockBackend {
    pub(crate) machine: Mutex<Option<Arc<Mock>>>,
    /// The next launch fails.
    pub(crate) refuse: AtomicBool,
    /// The next machine's guest.
    pub(crate) guest: Mutex<Guest>,
}

impl MockBackend {
    pub(crate) fn machine(&self) -> Arc<Mock> {
        self.machine
            .lock()
            .unwrap()
            .clone()
            .expect("a machine was launched")
    }
}

#[async_trait]
impl Backend for MockBackend {
    async fn launch(&self, _: &Request) -> Result<Arc<dyn Machine>, AnyError> {
        if self.refuse.swap(false, Ordering::Relaxed) {
            return Err(crate::vm::Error::NoTemplate("there is no template".into()).into());
        }
        let mock = Arc::new(Mock::default());
        *mock.guest() = *self.guest.lock().unwrap();
        *self.machine.lock().unwrap() = Some(Arc::clone(&mock));
        Ok(mock)
    }
}

/// A machine whose guest is a table of processes.
#[derive(Default)]
pub(crate) struct Mock {
    /// How each call to the guest goes.
    guest: Mutex<Guest>,
    /// Ends of processes by exec id.
    exits: Mutex<HashMap<String, watch::Sender<Option<Exit>>>>,
    /// The guest's ends of streams by id.
    pub(crate) streams: Mutex<HashMap<u64, UnixStream>>,
    /// What the agent was told about streams, by exec id.
    pub(crate) names: Mutex<HashMap<String, Streams>>,
    /// Signals in the order in which they came.
    pub(crate) signals: Mutex<Vec<(String, u32, bool)>>,
    /// `start` waits for this while it is set.
    pub(crate) hold_start: AtomicBool,
    pub(crate) release_start: Notify,
    pub(crate) start_asked: Notify,
    /// SIGKILL of the init process does not end it.
    pub(crate) immortal: AtomicBool,
    pub(crate) destroyed: AtomicU32,
    /// How often its end was brought about.
    pub(crate) retired: AtomicU32,
    /// How many processes were killed for want of memory.
    pub(crate) oom_kills: watch::Sender<u64>,
    pub(crate) updates: Mutex<Vec<LinuxResources>>,
    /// What its processors were told: whether to stand still.
    pub(crate) paused: Mutex<Vec<bool>>,
    /// Whether they do: nothing is answered meanwhile.
    standing: watch::Sender<bool>,
    /// `pause` and `resume` wait for this while it is set.
    pub(crate) hold_pause: AtomicBool,
    pub(crate) release_pause: Notify,
    /// The next `destroy`, `pause` or `resume` fails.
    pub(crate) stuck: AtomicBool,
    ended: watch::Sender<Option<String>>,
}

impl Mock {
    pub(crate) fn guest(&self) -> MutexGuard<'_, Guest> {
        self.guest.lock().unwrap()
    }

    fn exit_of(&self, exec_id: &str) -> watch::Sender<Option<Exit>> {
        self.exits
            .lock()
            .unwrap()
            .entry(exec_id.to_owned())
            .or_default()
            .clone()
    }

    /// The guest's process ends.
    pub(crate) fn exit(&self, exec_id: &str, status: u32) {
        let exit = Exit {
            oom_kills: *self.oom_kills.borrow(),
            ..Exit::new(status, SystemTime::now())
        };
        self.exit_of(exec_id).send_if_modified(|known| {
            // A process ends once.
            known.get_or_insert(exit) == &exit
        });
    }

    /// The monitor is gone, for this reason.
    pub(crate) fn end(&self, reason: &str) {
        self.streams.lock().unwrap().clear();
        self.ended.send_replace(Some(reason.to_owned()));
    }

    async fn stand(&self, still: bool) -> Result<(), Error> {
        self.paused.lock().unwrap().push(still);
        if self.hold_pause.load(Ordering::Relaxed) {
            self.release_pause.notified().await;
        }
        if self.stuck.swap(false, Ordering::Relaxed) {
            return Err(Error::Io(std::io::Error::other("stuck")));
        }
        self.standing.send_replace(still);
        Ok(())
    }

    /// Answers for the guest, as soon as it does not stand still.
    async fn answer<T>(&self, value: T) -> Result<T, Error> {
        let mut standing = self.standing.subscribe();
        tokio::select! {
            biased;
            reason = ended(self) => return Err(Error::Ended(reason)),
            _ = standing.wait_for(|still| !still) => {}
        }
        let guest = *self.guest();
        match guest {
            Guest::Well => Ok(value),
            Guest::Fails => Err(Error::Guest {
                call: "test",
                code: Code::INTERNAL,
                message: "no".into(),
            }),
            Guest::Hangs => std::future::pending().await,
        }
    }
}

#[async_trait]
impl Machine for Mock {
    fn pid(&self) -> u32 {
        PID
    }

    async fn streams(&self, ids: [u64; 3]) -> Result<[Option<UnixStream>; 3], Error> {
        let mut opened = [None, None, None];
        for (id, opened) in ids.into_iter().zip(&mut opened) {
            if id != 0 {
                let (ours, theirs) = UnixStream::pair()?;
                let earlier = self.streams.lock().unwrap().insert(id, theirs);
                assert!(earlier.is_none(), "stream {id} twice");
                *opened = Some(ours);
            }
        }
        Ok(opened)
    }

    async fn create(&self, streams: Streams) -> Result<(), AnyError> {
        self.names.lock().unwrap().insert(String::new(), streams);
        Ok(self.answer(()).await?)
    }

    async fn start(&self) -> Result<(), AnyError> {
        self.start_asked.notify_one();
        if self.hold_start.load(Ordering::Relaxed) {
            self.release_start.notified().await;
        }
        tokio::select! {
            answer = self.answer(()) => answer?,
            reason = ended(self) => return Err(Error::Ended(reason).into()),
        }
        Ok(())
    }

    async fn exec(&self, exec_id: &str, _: &[u8], streams: Streams) -> Result<u32, AnyError> {
        self.names
            .lock()
            .unwrap()
            .insert(exec_id.to_owned(), streams);
        Ok(self.answer(7).await?)
    }

    async fn wait(&self, exec_id: &str) -> Result<Exit, Error> {
        let mut exit = self.exit_of(exec_id).subscribe();
        let exit = exit
            .wait_for(Option::is_some)
            .await
            .map_err(|_| Error::Ended("gone".into()))?;
        let exit = exit.ok_or_else(|| Error::Ended("gone".into()))?;
        if !exec_id.is_empty() {
            self.exits.lock().unwrap().remove(exec_id);
            self.names.lock().unwrap().remove(exec_id);
        }
        Ok(exit)
    }

    async fn signal(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        self.signals
            .lock()
            .unwrap()
            .push((exec_id.to_owned(), signal, all));
        self.answer(()).await?;
        if signal == 9 && !self.immortal.load(Ordering::Relaxed) {
            self.exit(exec_id, 137);
        }
        Ok(())
    }

    async fn processes(&self) -> Result<Vec<GuestProcess>, Error> {
        let execs = self
            .names
            .lock()
            .unwrap()
            .keys()
            .filter(|exec_id| !exec_id.is_empty())
            .cloned()
            .collect::<Vec<_>>();
        let mut list: Vec<_> = execs
            .into_iter()
            .map(|exec_id| GuestProcess { pid: 7, exec_id })
            .collect();
        list.sort_by(|a, b| a.exec_id.cmp(&b.exec_id));
        self.answer(list).await
    }

    async fn stats(&self) -> Result<StatsResponse, Error> {
        self.answer(StatsResponse {
            memory_total: 1 << 30,
            cpu_stat: [("usage_usec".to_owned(), 42)].into(),
            ..Default::default()
        })
        .await
    }

    async fn out_of_memory(&self, seen: u64) -> Result<u64, Error> {
        let mut kills = self.oom_kills.subscribe();
        let more = kills.wait_for(|kills| *kills > seen).await;
        more.map(|kills| *kills)
            .map_err(|_| Error::Ended("gone".into()))
    }

    async fn update(&self, change: &LinuxResources) -> Result<(), AnyError> {
        self.updates.lock().unwrap().push(change.clone());
        Ok(self.answer(()).await?)
    }

    async fn resize(&self, _: &str, _: u32, _: u32) -> Result<(), Error> {
        self.answer(()).await
    }

    async fn pause(&self) -> Result<(), Error> {
        self.stand(true).await
    }

    async fn resume(&self) -> Result<(), Error> {
        self.stand(false).await
    }

    async fn retire(&self) {
        self.retired.fetch_add(1, Ordering::Relaxed);
        self.kill();
    }

    fn kill(&self) {
        self.end("killed");
    }

    fn ended(&self) -> watch::Receiver<Option<String>> {
        self.ended.subscribe()
    }

    async fn destroy(&self) -> Result<(), AnyError> {
        if self.stuck.swap(false, Ordering::Relaxed) {
            return Err(Error::Io(std::io::Error::other("stuck")).into());
        }
        self.kill();
        self.destroyed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
