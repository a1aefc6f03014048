//! What a container's cgroup has used (Documentation/admin-guide/cgroup-v2.rst of Linux).

use std::{fs, path::Path};

use forkvm_api::agent::{
    StatsResponse,
    stats_response::{Io, Usage},
};

use crate::cgroup::{Cgroup, Error, numbers};

/// Reads the files of a container's cgroup. A file that is not there counts as empty: a controller may be missing.
///
/// # Errors
/// A cgroup that is gone.
pub(crate) fn of(cgroup: &Cgroup) -> Result<StatsResponse, Error> {
    Ok(StatsResponse {
        cpu_stat: numbers(&cgroup.read("cpu.stat")?),
        memory_stat: numbers(&cgroup.read("memory.stat")?),
        memory_events: numbers(&cgroup.read("memory.events")?),
        memory: Some(usage(cgroup, "memory")?).into(),
        swap: Some(usage(cgroup, "memory.swap")?).into(),
        pids: Some(usage(cgroup, "pids")?).into(),
        io: cgroup.read("io.stat")?.lines().filter_map(device).collect(),
        memory_total: memory_total(),
        ..Default::default()
    })
}

fn usage(cgroup: &Cgroup, controller: &str) -> Result<Usage, Error> {
    let one = |file: &str| Ok(number(cgroup.read(&format!("{controller}.{file}"))?.trim()));
    Ok(Usage {
        current: one("current")?,
        peak: one("peak")?,
        max: one("max")?,
        ..Default::default()
    })
}

/// A number, or `max`. What is neither is 0.
fn number(text: &str) -> u64 {
    match text {
        "max" => u64::MAX,
        text => text.parse().unwrap_or(0),
    }
}

/// A line `major:minor name=number ...` of io.stat.
fn device(line: &str) -> Option<Io> {
    let (device, rest) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let pairs = rest.split_ascii_whitespace().filter_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        Some((name.to_owned(), value.parse().ok()?))
    });
    Some(Io {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        numbers: pairs.collect(),
        ..Default::default()
    })
}

/// `MemTotal` of proc_meminfo(5), in bytes; 0 if it is not there.
fn memory_total() -> u64 {
    let text = fs::read_to_string(Path::new("/proc/meminfo")).unwrap_or_default();
    let total = text.lines().find_map(|line| {
        let value = line.strip_prefix("MemTotal:")?.trim();
        value.strip_suffix(" kB")?.parse::<u64>().ok()
    });
    total.unwrap_or(0) << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_linux_writes_them() {
        assert_eq!(number("max"), u64::MAX);
        assert_eq!((number("4096"), number("")), (4096, 0));
    }

    #[test]
    fn a_device_of_io_stat_is_read() {
        let io = device("254:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0").unwrap();
        assert_eq!((io.major, io.minor), (254, 16));
        assert_eq!((io.numbers["wbytes"], io.numbers["rios"]), (2, 3));
        assert!(device("").is_none() && device("x:1 a=1").is_none());
    }

    #[test]
    fn a_machine_has_memory() {
        assert!(memory_total() > 1 << 20);
    }
}
