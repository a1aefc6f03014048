//! Gives memory back to the host when the monitor asks for it.
//!
//! What is free, the kernel reports to the balloon device by itself. What it has cached of files is
//! not free: the kernel keeps it until it needs the memory. The monitor, which serves the files,
//! asks when they rest.

use std::{fs, io, os::fd::OwnedFd};

use rustix::net::SocketFlags;
use tokio::{io::Interest, task::yield_now};

use crate::{cgroup, channel};

/// The cgroup of all containers: what they have read is charged to it.
const STAT: &str = "/sys/fs/cgroup/forkvm/memory.stat";
const RECLAIM: &str = "/sys/fs/cgroup/forkvm/memory.reclaim";

/// What is left to the containers: the code of what they run. The kernel takes what was used least.
const KEPT: u64 = 2 << 20;

/// Bytes that are reclaimed at once: the agent answers nobody meanwhile.
const STEP: u64 = 4 << 20;

/// Takes the monitor's connections for ever: each is a question, and closed when that is done.
pub(crate) async fn run(listener: OwnedFd) -> io::Result<()> {
    let listener = channel::register(listener, Interest::READABLE)?;
    loop {
        let mut guard = listener.readable().await?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(listener.get_ref(), flags) {
            Ok(question) => {
                match reclaim().await {
                    Ok(bytes) => log::debug!("{bytes} bytes of cached files are given back"),
                    Err(error) => log::warn!("cached files cannot be given back: {error}"),
                }
                drop(question);
            }
            Err(rustix::io::Errno::AGAIN) => guard.clear_ready(),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Has the kernel drop what it can drop without harm, down to [`KEPT`]. Returns how much.
async fn reclaim() -> io::Result<u64> {
    let wanted = droppable(&fs::read_to_string(STAT)?).saturating_sub(KEPT);
    let mut left = wanted;
    while left > 0 {
        let step = left.min(STEP);
        match fs::write(RECLAIM, step.to_string()) {
            Ok(()) => left -= step,
            // The rest is in use.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => break,
            Err(error) => return Err(error),
        }
        yield_now().await;
    }
    Ok(wanted - left)
}

/// Bytes of cached files, names and attributes in a `memory.stat` (cgroup-v2.rst). Files of a tmpfs are not among them: they
/// are nowhere else.
fn droppable(stat: &str) -> u64 {
    let numbers = cgroup::numbers(stat);
    let counted = ["inactive_file", "active_file", "slab_reclaimable"];
    counted.iter().filter_map(|name| numbers.get(*name)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_and_names_can_be_dropped_and_nothing_else() {
        let stat = "anon 1000\nfile 2000\nshmem 500\ninactive_file 30\nactive_file 4\n\
                    slab_reclaimable 200\nslab 9000\nworkingset_refault_file 7\nactive_file x\n";
        assert_eq!(droppable(stat), 234);
        assert_eq!(droppable(""), 0);
    }
}
