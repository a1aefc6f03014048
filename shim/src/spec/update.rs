//! Changing the resources of a container that runs.

use std::collections::HashMap;

use forkvm_config::Class;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::{Error, demand::demand, unified};

/// Reads what an update asks for.
///
/// # Errors
/// Text that is no resources of an OCI configuration.
pub(crate) fn resources(json: &[u8]) -> Result<LinuxResources, Error> {
    let mut resources = serde_json::from_slice(json)
        .map_err(|error| Error::Invalid(format!("the resources of the update: {error}")))?;
    unified::settle(&mut resources)?;
    Ok(resources)
}

/// `now` with what `change` names. Zero names nothing, as for runc: Docker sends it for what it does not change. Rules for devices
/// stay what they are.
pub(crate) fn merged(now: &LinuxResources, change: &LinuxResources) -> LinuxResources {
    let mut merged = now.clone();
    if let Some(change) = change.memory() {
        merged.set_memory(Some(memory(now.memory().unwrap_or_default(), change)));
    }
    if let Some(change) = change.cpu() {
        merged.set_cpu(Some(cpu(now.cpu().clone().unwrap_or_default(), change)));
    }
    if let Some(pids) = change.pids().filter(|pids| pids.limit() != 0) {
        merged.set_pids(Some(pids));
    }
    if change.block_io().is_some() {
        merged.set_block_io(change.block_io().clone());
    }
    if change.hugepage_limits().is_some() {
        merged.set_hugepage_limits(change.hugepage_limits().clone());
    }
    if let Some(change) = change.unified() {
        let mut unified: HashMap<_, _> = now.unified().clone().unwrap_or_default();
        unified.extend(change.clone());
        merged.set_unified(Some(unified));
    }
    merged
}

fn memory(mut now: LinuxMemory, change: &LinuxMemory) -> LinuxMemory {
    let named = |value: Option<i64>| value.filter(|value| *value != 0);
    now.set_limit(named(change.limit()).or(now.limit()));
    now.set_reservation(named(change.reservation()).or(now.reservation()));
    now.set_swap(named(change.swap()).or(now.swap()));
    // It is about this change alone.
    now.set_check_before_update(change.check_before_update());
    now
}

fn cpu(mut now: LinuxCpu, change: &LinuxCpu) -> LinuxCpu {
    let named = |list: &Option<String>| list.clone().filter(|list| !list.is_empty());
    let shares = change.shares().filter(|shares| *shares != 0);
    now.set_shares(shares.or(now.shares()));
    let quota = change.quota().filter(|quota| *quota != 0);
    now.set_quota(quota.or(now.quota()));
    let period = change.period().filter(|period| *period != 0);
    now.set_period(period.or(now.period()));
    now.set_burst(change.burst().or(now.burst()));
    now.set_idle(change.idle().or(now.idle()));
    let cpus = named(change.cpus()).or(now.cpus().clone());
    now.set_cpus(cpus);
    let mems = named(change.mems()).or(now.mems().clone());
    now.set_mems(mems);
    now
}

/// Whether a machine of this class has what the resources allow. Its size was chosen when it started.
///
/// # Errors
/// [`Error::Unsupported`], with what it has.
pub(crate) fn fits(resources: &LinuxResources, class: Class) -> Result<(), Error> {
    class
        .holds(&demand(resources))
        .map_err(|error| Error::Unsupported(error.to_string()))
}

/// Whether the host has to allow more memory before the guest does.
pub(crate) fn raises_memory(now: &LinuxResources, wanted: &LinuxResources) -> bool {
    let limit = |resources: &LinuxResources| {
        let limit = resources.memory().and_then(|memory| memory.limit());
        limit.filter(|limit| *limit > 0).unwrap_or(i64::MAX)
    };
    limit(wanted) > limit(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> LinuxResources {
        resources(json.as_bytes()).unwrap()
    }

    #[test]
    fn what_is_named_changes_and_the_rest_stays() {
        let now = of(
            r#"{"memory":{"limit":1000,"swap":2000},"cpu":{"shares":512,"quota":5,"period":10,"cpus":"0"},
                "pids":{"limit":7},"unified":{"memory.low":"1","memory.high":"2"},"devices":[{"allow":false,"access":"rwm"}]}"#,
        );
        // As Docker sends it: zeros and empty lists for what it does not change.
        let change = of(
            r#"{"memory":{"limit":3000,"swap":4000,"reservation":0},"cpu":{"shares":0,"quota":-1,"cpus":""},
                "pids":{"limit":0},"unified":{"memory.high":"3"},"devices":[{"allow":true,"access":"rwm"}]}"#,
        );
        let expected = of(
            r#"{"memory":{"limit":3000,"swap":4000},"cpu":{"shares":512,"quota":-1,"period":10,"cpus":"0"},
                "pids":{"limit":7},"unified":{"memory.low":"1","memory.high":"3"},"devices":[{"allow":false,"access":"rwm"}]}"#,
        );
        assert_eq!(merged(&now, &change), expected);
        assert_eq!(merged(&now, &of("{}")), now);
        let alone = of(r#"{"pids":{"limit":9}}"#);
        assert_eq!(merged(&of("{}"), &alone), alone);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for text in ["", "7", r#"{"memory":{"limit":"much"}}"#] {
            let error = resources(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("the resources of the update"), "{error}");
        }
    }

    #[test]
    fn a_machine_does_not_grow() {
        let class = Class {
            vcpus: 2,
            memory_mib: 512,
        };
        fits(
            &of(r#"{"memory":{"limit":-1},"cpu":{"quota":200000,"period":100000}}"#),
            class,
        )
        .unwrap();
        fits(&of(r#"{"memory":{"limit":104857600}}"#), class).unwrap();
        let error = fits(&of(r#"{"memory":{"limit":1073741824}}"#), class).unwrap_err();
        assert_eq!(
            error.to_string(),
            "forkvm does not support a memory limit of 1024 MiB in a machine of 512 MiB, of which a container can have 448: \
             start the container with that limit, for a larger one"
        );
        let error = fits(&of(r#"{"cpu":{"quota":300000,"period":100000}}"#), class).unwrap_err();
        assert_eq!(
            error.to_string(),
            "forkvm does not support a processor limit of 3 CPUs in a machine of 2: start the container with that limit, for \
             a larger one"
        );
    }

    #[test]
    fn the_host_gives_way_first() {
        let of_limit = |limit: i64| of(&format!(r#"{{"memory":{{"limit":{limit}}}}}"#));
        assert!(raises_memory(&of_limit(10), &of_limit(20)));
        assert!(raises_memory(&of_limit(10), &of_limit(-1)));
        assert!(!raises_memory(&of_limit(20), &of_limit(10)));
        assert!(!raises_memory(&of("{}"), &of_limit(10)));
        assert!(!raises_memory(&of("{}"), &of("{}")));
    }
}
