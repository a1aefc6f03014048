//! What a container has used, as containerd's clients read it: cgroup v2 `Metrics` (containerd/cgroups,
//! cgroup2/stats/metrics.proto).
//!
//! The numbers are the guest's: what the container's processes did, as under runc. What the machine itself takes on the host is
//! in the monitor's cgroup there.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use forkvm_api::agent::{
    StatsResponse,
    stats_response::{Io, Usage},
};
use protobuf::MessageField;

/// Devices that are told: more than a guest of ours has.
const MAX_DEVICES: usize = 64;

/// The package of [`Metrics`].
pub(crate) const PACKAGE: &str = "io.containerd.cgroups.v2";

/// What the guest told, as containerd's clients read it. Names that the message does not have are left out, so that an answer of any
/// size becomes one of bounded size.
pub(crate) fn metrics(stats: &StatsResponse) -> Metrics {
    let devices = stats.io.iter().take(MAX_DEVICES).map(device).collect();
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids.current,
            // As containerd's own library: none is 0.
            limit: limit(&stats.pids).unwrap_or(0),
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(&stats.cpu_stat)),
        memory: MessageField::some(memory(stats)),
        memory_events: MessageField::some(memory_events(&stats.memory_events)),
        io: MessageField::some(IOStat {
            usage: devices,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn limit(usage: &Usage) -> Option<u64> {
    (usage.max != u64::MAX).then_some(usage.max)
}

/// A number by its name; 0 if the guest's kernel does not have it.
fn of(numbers: &HashMap<String, u64>, name: &str) -> u64 {
    numbers.get(name).copied().unwrap_or(0)
}

fn cpu(stat: &HashMap<String, u64>) -> CPUStat {
    CPUStat {
        usage_usec: of(stat, "usage_usec"),
        user_usec: of(stat, "user_usec"),
        system_usec: of(stat, "system_usec"),
        nr_periods: of(stat, "nr_periods"),
        nr_throttled: of(stat, "nr_throttled"),
        throttled_usec: of(stat, "throttled_usec"),
        nr_bursts: of(stat, "nr_bursts"),
        burst_usec: of(stat, "burst_usec"),
        ..Default::default()
    }
}

fn memory(stats: &StatsResponse) -> MemoryStat {
    let stat = &stats.memory_stat;
    // `workingset_refault` and its like are split by kind since Linux 5.9.
    let both = |name: &str| {
        of(stat, &format!("{name}_anon")).saturating_add(of(stat, &format!("{name}_file")))
    };
    // Without a limit of its own a container can use what its machine has: clients show a share of that.
    let usage_limit = match stats.memory_total {
        0 => stats.memory.max,
        total => stats.memory.max.min(total),
    };
    MemoryStat {
        anon: of(stat, "anon"),
        file: of(stat, "file"),
        kernel_stack: of(stat, "kernel_stack"),
        slab: of(stat, "slab"),
        sock: of(stat, "sock"),
        shmem: of(stat, "shmem"),
        file_mapped: of(stat, "file_mapped"),
        file_dirty: of(stat, "file_dirty"),
        file_writeback: of(stat, "file_writeback"),
        anon_thp: of(stat, "anon_thp"),
        inactive_anon: of(stat, "inactive_anon"),
        active_anon: of(stat, "active_anon"),
        inactive_file: of(stat, "inactive_file"),
        active_file: of(stat, "active_file"),
        unevictable: of(stat, "unevictable"),
        slab_reclaimable: of(stat, "slab_reclaimable"),
        slab_unreclaimable: of(stat, "slab_unreclaimable"),
        pgfault: of(stat, "pgfault"),
        pgmajfault: of(stat, "pgmajfault"),
        workingset_refault: both("workingset_refault"),
        workingset_activate: both("workingset_activate"),
        workingset_nodereclaim: of(stat, "workingset_nodereclaim"),
        pgrefill: of(stat, "pgrefill"),
        pgscan: of(stat, "pgscan"),
        pgsteal: of(stat, "pgsteal"),
        pgactivate: of(stat, "pgactivate"),
        pgdeactivate: of(stat, "pgdeactivate"),
        pglazyfree: of(stat, "pglazyfree"),
        pglazyfreed: of(stat, "pglazyfreed"),
        thp_fault_alloc: of(stat, "thp_fault_alloc"),
        thp_collapse_alloc: of(stat, "thp_collapse_alloc"),
        usage: stats.memory.current,
        usage_limit,
        max_usage: stats.memory.peak,
        swap_usage: stats.swap.current,
        swap_limit: stats.swap.max,
        swap_max_usage: stats.swap.peak,
        ..Default::default()
    }
}

fn memory_events(events: &HashMap<String, u64>) -> MemoryEvents {
    MemoryEvents {
        low: of(events, "low"),
        high: of(events, "high"),
        max: of(events, "max"),
        oom: of(events, "oom"),
        oom_kill: of(events, "oom_kill"),
        oom_group_kill: of(events, "oom_group_kill"),
        ..Default::default()
    }
}

fn device(io: &Io) -> IOEntry {
    IOEntry {
        major: io.major.into(),
        minor: io.minor.into(),
        rbytes: of(&io.numbers, "rbytes"),
        wbytes: of(&io.numbers, "wbytes"),
        rios: of(&io.numbers, "rios"),
        wios: of(&io.numbers, "wios"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use protobuf::Message as _;

    use super::*;

    fn numbers(pairs: &[(&str, u64)]) -> HashMap<String, u64> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), *value))
            .collect()
    }

    fn guest() -> StatsResponse {
        StatsResponse {
            cpu_stat: numbers(&[("usage_usec", 30), ("user_usec", 20), ("system_usec", 10)]),
            memory_stat: numbers(&[
                ("anon", 4096),
                ("inactive_file", 8192),
                ("workingset_refault_anon", 1),
                ("workingset_refault_file", 2),
                ("not in Metrics", 9),
            ]),
            memory_events: numbers(&[("oom_kill", 1)]),
            memory: Some(Usage {
                current: 1 << 20,
                peak: 2 << 20,
                max: u64::MAX,
                ..Default::default()
            })
            .into(),
            pids: Some(Usage {
                current: 3,
                max: 100,
                ..Default::default()
            })
            .into(),
            memory_total: 512 << 20,
            io: vec![Io {
                major: 254,
                numbers: numbers(&[("rbytes", 7)]),
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn what_the_guest_counts_arrives() {
        let metrics = metrics(&guest());
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.user_usec), (30, 20));
        let memory = &metrics.memory;
        assert_eq!((memory.anon, memory.inactive_file), (4096, 8192));
        assert_eq!((memory.usage, memory.max_usage), (1 << 20, 2 << 20));
        assert_eq!(memory.workingset_refault, 3);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 100));
        assert_eq!(metrics.memory_events.oom_kill, 1);
        assert_eq!(
            (metrics.io.usage[0].major, metrics.io.usage[0].rbytes),
            (254, 7)
        );
    }

    #[test]
    fn no_limit_is_the_machines_memory_and_no_limit_of_processes_is_0() {
        let mut stats = guest();
        assert_eq!(metrics(&stats).memory.usage_limit, 512 << 20);
        stats.memory.mut_or_insert_default().max = 1 << 20;
        stats.pids.mut_or_insert_default().max = u64::MAX;
        let metrics = metrics(&stats);
        assert_eq!(
            (metrics.memory.usage_limit, metrics.pids.limit),
            (1 << 20, 0)
        );
    }

    #[test]
    fn a_guest_that_tells_too_much_is_cut() {
        let mut stats = guest();
        stats.io = vec![stats.io[0].clone(); 10_000];
        for number in 0..10_000 {
            stats.memory_stat.insert(format!("x{number}"), u64::MAX);
        }
        assert!(metrics(&stats).write_to_bytes().unwrap().len() < 4096);
        // Sums of what a guest says do not overflow.
        stats.memory_stat = numbers(&[
            ("workingset_refault_anon", u64::MAX),
            ("workingset_refault_file", u64::MAX),
        ]);
        assert_eq!(metrics(&stats).memory.workingset_refault, u64::MAX);
    }
}
