//! Bounds on what a guest can make the host keep.

use rustix::process::{Resource, getrlimit};

/// Bounds of one file server. A guest that reaches one gets `ENFILE`, and nothing is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Nodes that the guest may know at a time. A node takes some 300 bytes on the host and more
    /// than three times that in the guest.
    pub nodes: usize,
    /// Descriptors (`O_PATH`) kept of nodes; beyond it those least recently used are closed, and
    /// opened again by path when they are needed.
    pub open_nodes: usize,
    /// Files and directories that the guest may have open at a time.
    pub handles: usize,
}

/// Descriptors that are not the file server's.
const RESERVED: u64 = 128;

impl Limits {
    /// With this many descriptors the bounds are as wide as they get; a process has no use for more.
    pub const DESCRIPTORS: u64 = 4 * 64 * 1024 + RESERVED;

    /// The bounds for a process that may have `descriptors` open (`RLIMIT_NOFILE`): a part stays
    /// free for the other devices, the rest is divided between nodes and handles.
    pub fn for_descriptors(descriptors: u64) -> Self {
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        let usable = descriptors.saturating_sub(RESERVED as usize).max(16);
        Limits {
            nodes: 512 * 1024,
            open_nodes: (usable / 2).clamp(8, 32 * 1024),
            handles: (usable / 4).clamp(4, 64 * 1024),
        }
    }

    /// The bounds for this process.
    pub fn for_this_process() -> Self {
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        Self::for_descriptors(limit)
    }
}

#[cfg(test)]
mod tests {
    use super::Limits;

    #[test]
    fn more_descriptors_than_there_is_use_for_change_nothing() {
        let most = Limits::for_descriptors(Limits::DESCRIPTORS);
        assert_eq!(most, Limits::for_descriptors(u64::MAX));
        assert_ne!(most, Limits::for_descriptors(Limits::DESCRIPTORS - 64));
    }

    #[test]
    fn the_bounds_fit_the_descriptors() {
        for descriptors in [256, 1024, 4096, 65_536, 1 << 20, u64::MAX] {
            let limits = Limits::for_descriptors(descriptors);
            let most = (limits.open_nodes + limits.handles) as u64;
            assert!(most + 64 <= descriptors, "{limits:?} for {descriptors}");
        }
    }
}
