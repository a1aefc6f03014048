//! Takes the connections of standard streams and hands each to the process that named it.
//!
//! A connection says its id in its first eight bytes (`forkvm_api::stream`). It may arrive before or
//! after the request that names it.

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use forkvm_api::stream;
use rustix::net::SocketFlags;
use tokio::{io::Interest, sync::oneshot, time::timeout};

use crate::channel::{self, Channel};

/// How long a request waits for a connection that it names, and a connection for its header. The
/// shim connects before or beside the request: more than this and it is gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connections that nobody has asked for yet, at most.
const WAITING: usize = 256;

/// A stream that a request names and that is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("stream {id} has not been connected within {} seconds", PATIENCE.as_secs())]
    Missing { id: u64 },
    #[error("stream {id} is named twice")]
    Twice { id: u64 },
}

#[derive(Debug)]
enum Rendezvous {
    Arrived(Channel),
    Awaited(oneshot::Sender<Channel>),
}

/// Connections by id. Clones share one table.
#[derive(Debug, Clone, Default)]
pub(crate) struct Streams {
    table: Arc<Mutex<BTreeMap<u64, Rendezvous>>>,
}

impl Streams {
    // Every change of the table is one call: a panic elsewhere cannot leave it half-changed.
    fn table(&self) -> MutexGuard<'_, BTreeMap<u64, Rendezvous>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection `id`, now or when it arrives; `None` for 0, the stream that is not wanted.
    pub(crate) async fn take(&self, id: u64) -> Result<Option<Channel>, Error> {
        if id == 0 {
            return Ok(None);
        }
        let arrival = {
            let mut table = self.table();
            match table.remove(&id) {
                Some(Rendezvous::Arrived(channel)) => return Ok(Some(channel)),
                Some(awaited @ Rendezvous::Awaited(_)) => {
                    table.insert(id, awaited);
                    return Err(Error::Twice { id });
                }
                None => {
                    let (sender, receiver) = oneshot::channel();
                    table.insert(id, Rendezvous::Awaited(sender));
                    receiver
                }
            }
        };
        match timeout(PATIENCE, arrival).await {
            Ok(Ok(channel)) => Ok(Some(channel)),
            _ => {
                self.table().remove(&id);
                Err(Error::Missing { id })
            }
        }
    }

    fn arrived(&self, id: u64, channel: Channel) {
        let mut table = self.table();
        match table.remove(&id) {
            Some(Rendezvous::Awaited(sender)) => {
                // If the request has given up meanwhile the connection is closed with it.
                let _ = sender.send(channel);
            }
            Some(earlier @ Rendezvous::Arrived(_)) => {
                log::warn!("stream {id} was connected twice; the second connection is closed");
                table.insert(id, earlier);
            }
            None if table.len() < WAITING => {
                table.insert(id, Rendezvous::Arrived(channel));
            }
            None => log::warn!("stream {id} is closed: {WAITING} others wait already"),
        }
    }

    /// Accepts connections for ever.
    pub(crate) async fn run(self, listener: OwnedFd) -> io::Result<()> {
        let listener = channel::register(listener, Interest::READABLE)?;
        loop {
            let mut guard = listener.readable().await?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::accept_with(listener.get_ref(), flags) {
                Ok(connection) => {
                    tokio::spawn(self.clone().greet(connection));
                }
                Err(rustix::io::Errno::AGAIN) => guard.clear_ready(),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn greet(self, connection: OwnedFd) {
        let channel = match Channel::new(connection) {
            Ok(channel) => channel,
            Err(error) => return log::warn!("cannot take a stream connection: {error}"),
        };
        let mut header = [0; stream::HEADER_LEN];
        match timeout(PATIENCE, channel.read_exact(&mut header)).await {
            Ok(Ok(())) => match stream::id(header) {
                0 => log::warn!("a stream connection names the stream 0, which is none"),
                id => self.arrived(id, channel),
            },
            _ => log::warn!("a stream connection was closed before it said its id"),
        }
    }
}
