//! Events for containerd: published in order, from a bounded queue, with retries.

use std::{sync::Arc, time::Duration};

use containerd_shim::{event::Event, util::timestamp};
use containerd_shim_protos::{
    api::ForwardRequest,
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
};
use protobuf::Message;
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};
use ttrpc::context;

use crate::any::packed;

/// Events that wait while containerd is away. A task makes four and two for each exec.
const QUEUE: usize = 1024;

/// Pauses between the attempts for one event; it is dropped, and logged, after the last.
const RETRY: [Duration; 5] = [
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
];

/// The package of containerd's events (api/events/task.proto).
pub(crate) const PACKAGE: &str = "containerd.events";

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(5);

/// Where the shim's events go.
#[derive(Clone)]
pub(crate) struct Events {
    namespace: Arc<str>,
    queue: mpsc::Sender<Envelope>,
    /// Events taken and not yet delivered (or dropped).
    pending: Arc<watch::Sender<usize>>,
}

impl Events {
    /// Publishes to containerd's ttrpc `address`. Connects at the first event.
    pub(crate) fn new(namespace: &str, address: String) -> Self {
        let (events, receiver) = Self::queue(namespace);
        tokio::spawn(deliver(address, receiver, Arc::clone(&events.pending)));
        events
    }

    fn queue(namespace: &str) -> (Self, mpsc::Receiver<Envelope>) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        let pending = Arc::new(watch::Sender::new(0));
        (
            Self {
                namespace: namespace.into(),
                queue,
                pending,
            },
            receiver,
        )
    }

    /// A queue whose events a test reads itself.
    #[cfg(test)]
    pub(crate) fn for_test() -> (Self, mpsc::Receiver<Envelope>) {
        Self::queue("test")
    }

    /// Queues an event behind those that were queued before it. Never waits.
    pub(crate) fn publish(&self, event: impl Event + Message) {
        let topic = event.topic();
        let envelope = timestamp().and_then(|at| {
            let mut envelope = Envelope::new();
            envelope.set_timestamp(at);
            envelope.set_namespace(self.namespace.to_string());
            envelope.set_topic(topic.clone());
            envelope.set_event(packed(PACKAGE, &event)?);
            Ok(envelope)
        });
        self.pending.send_modify(|pending| *pending += 1);
        let queued = match envelope {
            Ok(envelope) => self
                .queue
                .try_send(envelope)
                .map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = queued {
            self.pending.send_modify(|pending| *pending -= 1);
            log::error!("event {topic} is lost: {error}");
        }
    }

    /// Waits until every event is delivered, or the time is over.
    pub(crate) async fn flush(&self, limit: Duration) {
        let mut pending = self.pending.subscribe();
        let _ = tokio::time::timeout(limit, pending.wait_for(|pending| *pending == 0)).await;
    }
}

async fn deliver(
    address: String,
    mut queue: mpsc::Receiver<Envelope>,
    pending: Arc<watch::Sender<usize>>,
) {
    let mut client = None;
    while let Some(envelope) = queue.recv().await {
        let topic = envelope.topic.clone();
        let mut request = ForwardRequest::new();
        request.set_envelope(envelope);
        let mut pauses = RETRY.iter();
        while let Err(error) = forward(&address, &mut client, &request).await {
            // A connection that failed once is not used again.
            client = None;
            match pauses.next() {
                Some(pause) => {
                    log::debug!("event {topic}: {error}; trying again");
                    sleep(*pause).await;
                }
                None => {
                    log::error!("event {topic} is lost: {error}");
                    break;
                }
            }
        }
        pending.send_modify(|pending| *pending -= 1);
    }
}

async fn forward(
    address: &str,
    client: &mut Option<EventsClient>,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let connected = match client {
        Some(connected) => connected,
        None => {
            let url = if address.contains("://") {
                address.to_owned()
            } else {
                format!("unix://{address}")
            };
            client.insert(EventsClient::new(Client::connect(&url).await?))
        }
    };
    connected
        .forward(context::with_duration(ATTEMPT), request)
        .await
        .map(drop)
}
