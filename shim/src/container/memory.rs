//! Processes that were killed for want of memory: TaskOOM.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use containerd_shim_protos::events::task::TaskOOM;
use tokio::time::sleep;

use super::Container;
use crate::machine;

/// How long after its start the guest is asked first. What happens before is told then, or at the container's end, which comes with
/// the number; most containers that end so soon are never asked.
const FIRST: Duration = Duration::from_secs(1);

/// Events of one container at most: a guest can make as many as it likes.
const MOST: u64 = 64;

impl Container {
    /// Publishes an event when processes are killed, until the machine ends.
    pub(super) async fn watch_memory(self: Arc<Self>) {
        let watch = async {
            sleep(FIRST).await;
            let mut seen = 0;
            for _ in 0..MOST {
                match self.machine.out_of_memory(seen).await {
                    Ok(kills) if kills > seen => seen = kills,
                    // A guest without the controller, or one that makes no sense.
                    _ => return,
                }
                self.tell_out_of_memory(seen);
            }
        };
        tokio::select! {
            () = watch => {}
            _ = machine::ended(&*self.machine) => {}
        }
    }

    /// Publishes an event if more were killed than it is known.
    pub(super) fn tell_out_of_memory(&self, kills: u64) {
        if self.oom_kills.fetch_max(kills, Ordering::Relaxed) < kills {
            self.events.publish(TaskOOM {
                container_id: self.id.clone(),
                ..Default::default()
            });
        }
    }
}
