//! `forkvm template`: makes, lists, shows, removes and verifies templates.

mod build;
mod inspect;
mod list;
mod progress;
mod remove;
mod verify;

use std::time::{SystemTime, UNIX_EPOCH};

use forkvm_config::{Config, Demand, TooLarge};
use forkvm_vmm::template::{self, Domain, Identity, Store, TemplateSpec};

use crate::args;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The store's own error; each says what to do.
    #[error(transparent)]
    Store(#[from] template::Error),
    /// Templates are not used.
    #[error(
        "templates.sharing is \"none\" in the configuration: every container is booted, and templates are not used"
    )]
    NotShared,
    /// A size that no machine has.
    #[error("there is no machine for {0}")]
    Size(#[from] TooLarge),
    /// The beginning of several ids.
    #[error("several templates begin with {0}: give more of the id")]
    Ambiguous(String),
    /// Some of several templates could not be removed; each was reported.
    #[error("{failed} of {all} templates were not removed")]
    NotRemoved {
        /// How many.
        failed: usize,
        /// Of how many.
        all: usize,
    },
    /// Some templates are damaged; each was reported.
    #[error("{damaged} of {all} templates cannot be used: `forkvm template prune` removes them")]
    NotWhole {
        /// How many.
        damaged: usize,
        /// Of how many.
        all: usize,
    },
}

/// What the base template of the default namespace is made from, by the configuration; of any if there are none.
pub(crate) fn base_spec(config: &Config) -> TemplateSpec {
    let domain = template::domain(config, "default").unwrap_or(Domain::Host);
    let class = config.vm.class(&Demand::default());
    // A container without limits fits the default class.
    let class = class.unwrap_or(forkvm_config::Class {
        vcpus: config.vm.vcpus,
        memory_mib: config.vm.memory_mib,
    });
    template::spec(config, domain, class)
}

/// Runs one of the sub-commands.
pub(crate) fn run(command: args::Template, config: &Config) -> Result<(), Error> {
    let store = template::store(config);
    match command {
        args::Template::Build {
            which: args::Which::Base,
            namespace,
            vcpus,
            memory,
            force,
            json,
        } => {
            let demand = Demand {
                memory: memory.map(|mib| mib << 20),
                quota: vcpus.map(|vcpus| (vcpus, Some(1))),
                cpuset: None,
            };
            build::run(&store, config, &namespace, &demand, force, json)
        }
        args::Template::Ls { quiet, json } => list::run(&store, config, quiet, json),
        args::Template::Inspect { id, json } => inspect::run(&store, &resolve(&store, id)?, json),
        args::Template::Rm { ids, all, json } => {
            let ids = if all { store.list()? } else { ids };
            remove::run(&store, ids, json)
        }
        args::Template::Prune { dry_run, json } => remove::prune(&store, config, dry_run, json),
        args::Template::Verify { ids, json } => verify::run(&store, ids, json),
    }
}

/// The id that begins with the text, if there is just one; else the text itself, which the store will judge.
fn resolve(store: &Store, text: String) -> Result<String, Error> {
    let mut found: Vec<String> = store.list()?;
    found.retain(|id| !text.is_empty() && id.starts_with(&text));
    match found.len() {
        0 => Ok(text),
        1 => Ok(found.swap_remove(0)),
        _ => Err(Error::Ambiguous(text)),
    }
}

/// What identifies templates that are made now; none without a guest image or KVM.
fn today(store: &Store, config: &Config) -> Option<Identity> {
    store.identity(&base_spec(config)).ok()
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config() -> Config {
        Config::parse("", Path::new("/etc/forkvm/config.toml")).unwrap()
    }

    #[test]
    fn the_specification_is_the_configuration_s() {
        let spec = base_spec(&config());
        assert_eq!(spec.memory_bytes, config().vm.memory_mib * 1024 * 1024);
        assert_eq!(spec.vcpus, config().vm.vcpus);
        assert_eq!(spec.kernel, config().paths.kernel);
        assert_eq!(spec.domain, Domain::Namespace("default".into()));
    }

    #[test]
    fn the_beginning_of_an_id_is_enough_if_it_is_the_only_one() {
        let folder = tempfile::tempdir().unwrap();
        for id in ["0123456789abcdef", "0123ffff89abcdef"] {
            std::fs::create_dir(folder.path().join(id)).unwrap();
        }
        let store = Store::new(folder.path());
        let resolve = |text: &str| resolve(&store, text.to_owned());
        assert_eq!(resolve("01234").unwrap(), "0123456789abcdef");
        assert!(matches!(resolve("0123"), Err(Error::Ambiguous(_))));
        assert_eq!(resolve("../etc").unwrap(), "../etc");
        assert_eq!(resolve("").unwrap(), "");
    }
}
