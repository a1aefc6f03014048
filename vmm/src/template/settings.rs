//! The store as the configuration describes it: one place for the shim and the operator's tool, so that both mean the
//! same templates.

use std::time::Duration;

use forkvm_config::{Class, Config, Sharing};

use super::{Domain, Limits, RecordFile, Store, TemplateSpec};

const DAY: u64 = 24 * 60 * 60;

/// The configured store.
pub fn store(config: &Config) -> Store {
    let limit = |value: u64| (value > 0).then_some(value);
    let templates = &config.templates;
    Store::new(&config.paths.templates)
        .with_limits(Limits {
            bytes: limit(templates.max_mib).map(|mib| mib.saturating_mul(1 << 20)),
            count: (templates.max_count > 0).then_some(templates.max_count),
            age: limit(templates.max_age_days)
                .map(|days| Duration::from_secs(days.saturating_mul(DAY))),
        })
        .with_record(RecordFile::new(&config.paths.record))
        .with_fault(config.test.kill())
}

/// The sharing domain of a container of a containerd namespace; none if templates are not shared.
pub fn domain(config: &Config, namespace: &str) -> Option<Domain> {
    match config.templates.sharing {
        Sharing::Namespace => Some(Domain::Namespace(namespace.to_owned())),
        Sharing::Host => Some(Domain::Host),
        Sharing::None => None,
    }
}

/// What the base template of a domain and a size class is made from.
pub fn spec(config: &Config, domain: Domain, class: Class) -> TemplateSpec {
    TemplateSpec {
        kernel: config.paths.kernel.clone(),
        initramfs: config.paths.initramfs.clone(),
        monitor: config.paths.monitor.clone(),
        domain,
        vcpus: class.vcpus,
        memory_bytes: class.memory_bytes(),
        cmdline: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(text, Path::new("/etc/forkvm/config.toml")).unwrap()
    }

    #[test]
    fn domains_are_what_the_configuration_says() {
        let domain = |text| domain(&config(text), "moby");
        let own = Domain::Namespace("moby".into());
        assert_eq!(domain(""), Some(own));
        assert_eq!(
            domain("[templates]\nsharing = \"host\""),
            Some(Domain::Host)
        );
        assert_eq!(domain("[templates]\nsharing = \"none\""), None);
        // No namespace is taken for the whole host.
        let named = Domain::Namespace("host".into());
        assert_ne!(named.to_string(), Domain::Host.to_string());
    }

    #[test]
    fn zero_is_no_limit() {
        let none = "[templates]\nmax_mib = 0\nmax_count = 0\nmax_age_days = 0";
        assert_eq!(*store(&config(none)).limits(), Limits::default());
        let some = store(&config(
            "[templates]\nmax_mib = 3\nmax_count = 2\nmax_age_days = 1",
        ));
        assert_eq!(some.limits().bytes, Some(3 << 20));
        assert_eq!(some.limits().count, Some(2));
        assert_eq!(some.limits().age, Some(Duration::from_secs(86400)));
    }
}
