//! Limits by the names of files of cgroup v2 (OCI runtime specification, `linux.resources.unified`; the files are those of
//! Documentation/admin-guide/cgroup-v2.rst of Linux). What has a field of its own too becomes that field, so that it
//! acts where the field does.

use std::collections::BTreeMap;

use oci_spec::runtime::LinuxResources;

use super::Error;

/// `memory.max` and `cpu.max`, if there is no limit.
const MAX: &str = "max";

/// The file that libcgroups leaves alone when the container is to have no swap at all.
const SWAP: &str = "memory.swap.max";

/// Moves what has a field of its own to that field.
///
/// # Errors
/// Names that are no files of a cgroup, values that such a file does not take.
pub(super) fn settle(resources: &mut LinuxResources) -> Result<(), Error> {
    let Some(mut unified) = resources.unified().clone() else {
        return Ok(());
    };
    if let Some(name) = unified
        .keys()
        .find(|name| name.contains('/') || !name.contains('.'))
    {
        return Err(Error::Invalid(format!(
            "{name:?} in linux.resources.unified is not the name of a cgroup's file"
        )));
    }
    let mut memory = resources.memory().unwrap_or_default();
    let mut cpu = resources.cpu().clone().unwrap_or_default();
    let (memory_before, cpu_before) = (memory, cpu.clone());
    if let Some(value) = unified.remove("memory.max") {
        memory.set_limit(Some(bytes("memory.max", &value)?));
    }
    if let Some(value) = unified.remove("cpu.max") {
        let (quota, period) = value.trim().split_once(' ').unwrap_or((value.trim(), ""));
        cpu.set_quota(Some(match quota {
            MAX => -1,
            quota => number("cpu.max", quota)?,
        }));
        if !period.is_empty() {
            cpu.set_period(Some(number("cpu.max", period)?));
        }
    }
    if let Some(value) = unified.remove("cpu.max.burst") {
        cpu.set_burst(Some(number("cpu.max.burst", &value)?));
    }
    if let Some(value) = unified.remove("cpu.idle") {
        cpu.set_idle(Some(number("cpu.idle", &value)?));
    }
    if let Some(value) = unified.remove("cpuset.cpus") {
        cpu.set_cpus(Some(value));
    }
    if let Some(value) = unified.remove("cpuset.mems") {
        cpu.set_mems(Some(value));
    }
    if memory != memory_before {
        resources.set_memory(Some(memory));
    }
    if cpu != cpu_before {
        resources.set_cpu(Some(cpu));
    }
    resources.set_unified(Some(unified));
    Ok(())
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, Error> {
    value.trim().parse().map_err(|_| {
        Error::Invalid(format!(
            "{name} in linux.resources.unified cannot be {value:?}"
        ))
    })
}

/// Bytes as the kernel reads them, with K, M or G behind the number or not; -1 is no limit.
fn bytes(name: &str, value: &str) -> Result<i64, Error> {
    let value = value.trim();
    if value == MAX {
        return Ok(-1);
    }
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'K' | b'k') => (&value[..value.len() - 1], 10),
        Some(b'M' | b'm') => (&value[..value.len() - 1], 20),
        Some(b'G' | b'g') => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    let count: i64 = number(name, digits)?;
    count
        .checked_mul(1 << shift)
        .ok_or_else(|| Error::Invalid(format!("{name} in linux.resources.unified is too large")))
}

/// Files that are written on the host. Block devices are the host's; the weight acts on the monitor as well.
pub(crate) fn of_host(resources: &LinuxResources) -> BTreeMap<String, String> {
    let mut files: BTreeMap<String, String> = resources
        .unified()
        .iter()
        .flatten()
        .filter(|(name, _)| is_of_block_devices(name) || name.starts_with("cpu.weight"))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    files.extend(no_swap(resources));
    files
}

/// Leaves in `resources` what is written in the guest.
pub(super) fn keep_of_guest(resources: &mut LinuxResources) {
    let mut files = resources.unified().clone().unwrap_or_default();
    files.retain(|name, _| !is_of_block_devices(name));
    files.extend(no_swap(resources));
    resources.set_unified((!files.is_empty()).then_some(files));
}

fn is_of_block_devices(name: &str) -> bool {
    name.starts_with("io.")
}

/// A limit of memory and swap together that is the one of memory.
fn no_swap(resources: &LinuxResources) -> Option<(String, String)> {
    let memory = (*resources.memory())?;
    let limit = memory.limit().filter(|limit| *limit > 0)?;
    (memory.swap() == Some(limit)).then(|| (SWAP.to_owned(), "0".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(json: &str) -> Result<LinuxResources, Error> {
        let mut resources = serde_json::from_str(json).unwrap();
        settle(&mut resources).map(|()| resources)
    }

    #[test]
    fn what_has_a_field_becomes_it_and_wins() {
        let resources = settled(
            r#"{"memory":{"limit":5,"swap":9},
                "unified":{"memory.max":"64M","cpu.max":"5000 10000","cpuset.cpus":"0-1","pids.max":"7"}}"#,
        )
        .unwrap();
        let memory = (*resources.memory()).unwrap();
        assert_eq!((memory.limit(), memory.swap()), (Some(64 << 20), Some(9)));
        let cpu = resources.cpu().clone().unwrap();
        assert_eq!((cpu.quota(), cpu.period()), (Some(5000), Some(10000)));
        assert_eq!(cpu.cpus().as_deref(), Some("0-1"));
        let unified = resources.unified().clone().unwrap();
        assert_eq!(unified.len(), 1);
        assert_eq!(unified["pids.max"], "7");

        let resources = settled(r#"{"unified":{"memory.max":"max","cpu.max":"max"}}"#).unwrap();
        assert_eq!((*resources.memory()).unwrap().limit(), Some(-1));
        assert_eq!(resources.cpu().clone().unwrap().quota(), Some(-1));
        assert!(settled("{}").unwrap().unified().is_none());
    }

    #[test]
    fn what_a_file_does_not_take_is_refused() {
        for unified in [
            r#"{"../memory.max":"1"}"#,
            r#"{"memory":"1"}"#,
            r#"{"memory.max":"much"}"#,
            r#"{"memory.max":"9999999999G"}"#,
            r#"{"cpu.max":"1 2 3"}"#,
        ] {
            let error = settled(&format!(r#"{{"unified":{unified}}}"#)).unwrap_err();
            assert!(
                error.to_string().contains("linux.resources.unified"),
                "{error}"
            );
        }
    }

    #[test]
    fn block_devices_are_the_hosts_and_no_swap_is_said_to_both() {
        let mut resources = settled(
            r#"{"memory":{"limit":4096,"swap":4096},
                "unified":{"io.max":"8:0 rbps=1","cpu.weight":"5","memory.high":"9"}}"#,
        )
        .unwrap();
        let host = of_host(&resources);
        assert_eq!(
            host.keys().collect::<Vec<_>>(),
            ["cpu.weight", "io.max", "memory.swap.max"]
        );
        keep_of_guest(&mut resources);
        let guest: BTreeMap<_, _> = resources.unified().clone().unwrap().into_iter().collect();
        assert_eq!(
            guest.keys().collect::<Vec<_>>(),
            ["cpu.weight", "memory.high", "memory.swap.max"]
        );
        assert_eq!(guest["memory.swap.max"], "0");
    }
}
