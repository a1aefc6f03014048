//! `forkvm template rm` and `prune`.

use std::collections::BTreeMap;

use forkvm_config::Config;
use forkvm_vmm::template::{self, Condition, Store};
use serde::Serialize;

use super::{Error, resolve, today};
use crate::output::{Bytes, print_json};

/// What became of a template that was to go.
#[derive(Debug, Serialize)]
struct Removed {
    id: String,
    removed: bool,
    /// Why it was not; empty if it was.
    problem: String,
}

/// Removes all that can be removed; reports each that cannot.
pub(super) fn run(store: &Store, ids: Vec<String>, json: bool) -> Result<(), Error> {
    let mut all = Vec::new();
    let mut failed = Vec::new();
    for id in ids {
        let removed = resolve(store, id.clone()).and_then(|id| {
            store.remove(&id)?;
            Ok(id)
        });
        let removed = match removed {
            Ok(id) => Removed {
                id,
                removed: true,
                problem: String::new(),
            },
            Err(error) => {
                let problem = error.to_string();
                failed.push(error);
                Removed {
                    id,
                    removed: false,
                    problem,
                }
            }
        };
        if removed.removed && !json {
            println!("{}", removed.id);
        }
        all.push(removed);
    }
    if json {
        print_json(&all);
    }
    match (failed.pop(), all.len()) {
        (None, _) => Ok(()),
        (Some(error), 1) => Err(error),
        (Some(last), all) => {
            failed.push(last);
            for error in &failed {
                eprintln!("forkvm: error: {error}");
            }
            Err(Error::NotRemoved {
                failed: failed.len(),
                all,
            })
        }
    }
}

/// A template that is of no use any more.
#[derive(Debug, Serialize)]
struct Pruned {
    id: String,
    reason: String,
    bytes: u64,
}

/// Removes what is of no use: damaged, outdated, expired, over the budget; never what is in use.
pub(super) fn prune(
    store: &Store,
    config: &Config,
    dry_run: bool,
    json: bool,
) -> Result<(), Error> {
    let mut pruned = Vec::new();
    for one in useless(store, config)? {
        if !dry_run {
            match store.remove(&one.id) {
                Ok(()) => {}
                // Somebody forked or removed it since.
                Err(template::Error::InUse { .. } | template::Error::Missing { .. }) => continue,
                Err(error) => return Err(error.into()),
            }
        }
        if !json {
            println!("{}  {} ({})", one.id, one.reason, Bytes(one.bytes));
        }
        pruned.push(one);
    }
    if !dry_run {
        store.sweep(None)?;
    }
    if json {
        print_json(&pruned);
    }
    Ok(())
}

fn useless(store: &Store, config: &Config) -> Result<Vec<Pruned>, Error> {
    let listed = store.survey(today(store, config).as_ref())?;
    let bytes: BTreeMap<_, _> = listed
        .iter()
        .map(|one| (one.id.clone(), one.bytes))
        .collect();
    let mut going: Vec<_> = listed
        .into_iter()
        .filter(|one| one.condition != Condition::Usable && !one.in_use)
        .map(|one| Pruned {
            reason: format!("{}: {}", one.condition, one.reason),
            id: one.id,
            bytes: one.bytes,
        })
        .collect();
    let gone: Vec<_> = going.iter().map(|one| one.id.clone()).collect();
    for id in store.over_budget(&gone)? {
        going.push(Pruned {
            bytes: bytes.get(&id).copied().unwrap_or(0),
            id,
            reason: "over the budget, and not used for longest".into(),
        });
    }
    Ok(going)
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    #[test]
    fn all_that_can_be_removed_is() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        fs::create_dir(folder.path().join("0123456789abcdef")).unwrap();
        let ids = ["not-an-id", "0123456789abcdef", "ffffffffffffffff"].map(String::from);
        let error = run(&store, ids.to_vec(), false).unwrap_err();
        assert_eq!(error.to_string(), "2 of 3 templates were not removed");
        assert!(store.list().unwrap().is_empty());
        // One alone fails with its own message.
        let error = run(&store, vec!["ffffffffffffffff".into()], true).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("there is no template ffffffffffffffff")
        );
    }

    #[test]
    fn what_is_of_no_use_goes_unless_it_is_a_dry_run() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        let config = Config::parse("", Path::new("/etc/forkvm/config.toml")).unwrap();
        fs::create_dir(folder.path().join("0123456789abcdef")).unwrap();
        fs::create_dir(folder.path().join(".building-0123456789abcdef-1")).unwrap();
        prune(&store, &config, true, false).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        let found = useless(&store, &config).unwrap();
        assert_eq!(found[0].reason, "damaged: memory is missing");
        prune(&store, &config, false, true).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
