//! What a container is limited to, as far as it decides the size of its machine.

use forkvm_config::Demand;
use oci_spec::runtime::LinuxResources;

/// The limits in a container's resources; those that are no limit (zero, negative) are none here.
pub(super) fn demand(resources: &LinuxResources) -> Demand {
    let positive = |value: Option<i64>| {
        let value = value.and_then(|value| u64::try_from(value).ok());
        value.filter(|value| *value > 0)
    };
    let memory = resources.memory().as_ref();
    let cpu = resources.cpu().as_ref();
    Demand {
        memory: positive(memory.and_then(|memory| memory.limit())),
        quota: positive(cpu.and_then(|cpu| cpu.quota()))
            .map(|quota| (quota, cpu.and_then(|cpu| cpu.period()))),
        cpuset: cpu
            .and_then(|cpu| cpu.cpus().as_deref())
            .and_then(processors),
    }
}

/// Number of processors in a list such as `0-3,8` (cpuset(7), "List format"); none if it is no list, which the kernel
/// tells when the cgroup is made.
fn processors(list: &str) -> Option<usize> {
    let mut count = 0_usize;
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().ok()?;
        let last: usize = last.trim().parse().ok()?;
        count = count.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Demand {
        demand(&serde_json::from_str(json).unwrap())
    }

    #[test]
    fn limits_are_read_and_what_is_none_is_not() {
        let all = r#"{"memory":{"limit":1000},"cpu":{"quota":5,"period":10,"cpus":"0-2,5"}}"#;
        let demand = of(all);
        assert_eq!(demand.memory, Some(1000));
        assert_eq!(demand.quota, Some((5, Some(10))));
        assert_eq!(demand.cpuset, Some(4));
        for none in [
            "{}",
            r#"{"memory":{"limit":-1},"cpu":{"quota":-1,"period":10}}"#,
            r#"{"memory":{"limit":0},"cpu":{"quota":0,"cpus":""}}"#,
        ] {
            assert_eq!(of(none), Demand::default(), "{none}");
        }
    }

    #[test]
    fn processors_are_counted() {
        for (list, count) in [
            ("0", Some(1)),
            ("0-3", Some(4)),
            (" 1,3-4\n", Some(3)),
            ("", None),
            ("3-1", None),
            ("0-18446744073709551615", None),
            ("all", None),
        ] {
            assert_eq!(processors(list), count, "{list:?}");
        }
    }
}
