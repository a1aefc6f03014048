//! The virtio device (virtio 1.2, section 5.11).

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::request::Answerer;
use super::{Error, Export, FileServer, Limits, Traffic};
use crate::devices::virtio::{
    ConfigSpace, DrainError, F_EVENT_IDX, F_INDIRECT_DESC, QueueError, VirtioDevice, Virtqueue,
};

/// The name by which the guest mounts the file system.
pub const TAG: &str = "forkvm";

/// Bytes of the tag in the configuration space.
const TAG_BYTES: usize = 36;

/// The queue for requests that must not wait (hiprio), and one for all others.
const QUEUES: [u16; 2] = [128, 512];

/// The file server as a device. It works in an event loop of its own: its requests may take as
/// long as the host's disks do.
pub struct Fs {
    queues: Vec<Virtqueue>,
    /// Called before the first request is looked at.
    before_first: Option<Box<dyn FnOnce() + Send>>,
    config: Arc<ConfigSpace>,
    pub(super) answerer: Answerer,
    traffic: Arc<Traffic>,
}

impl Fs {
    /// A device of these exports. Opens `/proc/self/fd`, so `/proc` must be there; nothing of the
    /// host's file system is opened by a path after that.
    pub fn new(exports: Vec<Export>) -> Result<Self, Error> {
        let server = FileServer::new(exports, Limits::for_this_process())?;
        Ok(Fs::serving(server))
    }

    /// Has `call` made, by the device's thread, when the guest's first request arrives and before it is looked at.
    pub(crate) fn call_before_first_request(&mut self, call: Box<dyn FnOnce() + Send>) {
        self.before_first = Some(call);
    }

    /// Nodes, nodes that hold a descriptor, and open files; and the bounds of each.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn kept(&self) -> ([usize; 3], Limits) {
        let files = self.answerer.files();
        let (nodes, open) = files.nodes().counts();
        ([nodes, open, files.open_files()], files.limits)
    }

    pub(super) fn serving(server: FileServer) -> Self {
        let mut config = vec![0; TAG_BYTES];
        config[..TAG.len()].copy_from_slice(TAG.as_bytes());
        let request_queues = QUEUES.len() as u32 - 1;
        config.extend_from_slice(&request_queues.to_le_bytes());
        Fs {
            queues: Vec::new(),
            before_first: None,
            config: Arc::new(ConfigSpace::new(config)),
            answerer: Answerer::new(Arc::new(server)),
            traffic: Arc::default(),
        }
    }

    /// How much passes between the guest and the server.
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        F_EVENT_IDX | F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUES
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.config)
    }

    fn queues(&self) -> &[Virtqueue] {
        &self.queues
    }

    fn queues_mut(&mut self) -> &mut Vec<Virtqueue> {
        &mut self.queues
    }

    fn reset(&mut self) {
        self.queues.clear();
        self.answerer.files().end();
    }

    fn process_queue(&mut self, index: usize) -> Result<(), QueueError> {
        let answerer = &self.answerer;
        // The first time in this thread; nothing the second time.
        if let Err(error) = answerer.files().prepare_thread() {
            log::error!("the file server's thread cannot be set up, so it makes no files: {error}");
        }
        let before_first = &mut self.before_first;
        match self.queues.get_mut(index) {
            Some(queue) => queue.serve(|chain| {
                if let Some(call) = before_first.take() {
                    call();
                }
                let asked: u64 = chain
                    .clone()
                    .readable()
                    .map(|part| u64::from(part.len()))
                    .sum();
                let written = answerer.answer(chain);
                self.traffic.add(asked.saturating_add(written.into()));
                written
            }),
            None => Ok(()),
        }
    }

    fn drain(&mut self) -> Result<(), DrainError> {
        let answerer = &self.answerer;
        let queues = &mut self.queues;
        // In a thread of its own: serving changes a thread's working directory and file creation
        // mask, and this one is the caller's.
        std::thread::scope(|scope| {
            let serving = std::thread::Builder::new().spawn_scoped(scope, move || {
                queues
                    .iter_mut()
                    .try_for_each(|queue| queue.serve_all(|chain| answerer.answer(chain)))
            });
            match serving.map(std::thread::ScopedJoinHandle::join) {
                Ok(Ok(served)) => Ok(served?),
                Ok(Err(_)) => Err(DrainError::InFlight("a request that panicked".to_owned())),
                Err(error) => Err(DrainError::InFlight(format!(
                    "a request for which no thread could be started ({error})"
                ))),
            }
        })?;
        match answerer.files().open_files() {
            0 => Ok(()),
            count => Err(DrainError::InFlight(format!(
                "what the guest does with its open files ({count}, {} among them)",
                answerer.files().an_open_file()
            ))),
        }
    }
}
