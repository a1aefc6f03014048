//! `forkvm template`: makes, lists, shows and removes templates.

mod progress;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use forkvm_config::Config;
use forkvm_vmm::template::{self, Manifest, Store, TemplateSpec};
use serde::Serialize;

use self::progress::Display;
use crate::{
    args,
    output::{Age, Bytes, Table, print_json},
};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The store's own error; each says what to do.
    #[error(transparent)]
    Store(#[from] template::Error),
    /// Some of several templates could not be removed; each was reported.
    #[error("{failed} of {all} templates were not removed")]
    NotRemoved {
        /// How many.
        failed: usize,
        /// Of how many.
        all: usize,
    },
}

/// What the base template is made from, by the configuration.
pub(crate) fn base_spec(config: &Config) -> TemplateSpec {
    TemplateSpec {
        kernel: config.paths.kernel.clone(),
        initramfs: config.paths.initramfs.clone(),
        vcpus: config.vm.vcpus,
        memory_bytes: config.vm.memory_mib << 20,
        cmdline: String::new(),
    }
}

/// Runs one of the sub-commands.
pub(crate) fn run(command: args::Template, config: &Config) -> Result<(), Error> {
    let store = Store::new(&config.paths.templates);
    match command {
        args::Template::Build {
            which: args::Which::Base,
            force,
        } => build(&store, config, force),
        args::Template::Ls { quiet, json } => list(&store, config, quiet, json),
        args::Template::Inspect { id } => inspect(&store, &resolve(&store, config, id)?),
        args::Template::Rm { ids, all } => {
            let ids = if all { store.list()? } else { ids };
            remove(&store, config, ids)
        }
    }
}

/// "base" stands for the template that containers start from.
fn resolve(store: &Store, config: &Config, id: String) -> Result<String, Error> {
    match id.as_str() {
        "base" => Ok(store.base_id(&base_spec(config))?),
        _ => Ok(id),
    }
}

fn build(store: &Store, config: &Config, force: bool) -> Result<(), Error> {
    let spec = base_spec(config);
    let display = Display::new();
    display.show("reading the guest image");
    if force {
        match store.base_id(&spec).and_then(|id| store.remove(&id)) {
            Ok(()) | Err(template::Error::Missing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut worked = false;
    let built = store.build(&spec, &config.paths.monitor, &mut |step| {
        worked |= step != template::Progress::Waiting;
        display.show(&step.to_string());
    });
    let took = display.elapsed();
    drop(display);
    let manifest = built?.manifest().clone();
    if worked {
        println!("{}", built_line(&manifest, took));
    } else {
        println!("base template {} is there already", manifest.id);
    }
    Ok(())
}

fn built_line(manifest: &Manifest, took: Duration) -> String {
    format!(
        "base template {} built in {:.1} s: {} vCPUs, {} of memory, {} on disk",
        manifest.id,
        took.as_secs_f64(),
        manifest.inputs.vcpus,
        Bytes(manifest.inputs.memory_bytes),
        Bytes(manifest.memory.data_bytes + manifest.state.bytes),
    )
}

/// What `ls` shows of a template.
#[derive(Debug, Serialize)]
struct Listed {
    id: String,
    /// Whether containers start from it.
    current: bool,
    /// "usable", or the reason why it is not.
    status: String,
    manifest: Option<Manifest>,
}

fn list(store: &Store, config: &Config, quiet: bool, json: bool) -> Result<(), Error> {
    let ids = store.list()?;
    if quiet {
        ids.iter().for_each(|id| println!("{id}"));
        return Ok(());
    }
    // Without a guest image or KVM no template is the current one; the list is shown all the same.
    let current = store.base_id(&base_spec(config)).ok();
    let listed: Vec<_> = ids
        .into_iter()
        .map(|id| {
            let status = match store.open(&id) {
                Ok(_) => "usable".to_owned(),
                Err(error) => error.to_string(),
            };
            Listed {
                current: Some(&id) == current.as_ref(),
                manifest: store
                    .inspect(&id)
                    .ok()
                    .map(|template| template.manifest().clone()),
                status,
                id,
            }
        })
        .collect();
    if json {
        print_json(&listed);
    } else {
        print!("{}", table(&listed, now()));
    }
    Ok(())
}

fn table(listed: &[Listed], now: u64) -> Table {
    let mut table = Table::new(&[
        "ID", "KIND", "VCPUS", "MEMORY", "ON DISK", "CREATED", "STATUS",
    ]);
    for template in listed {
        let show = |cell: &dyn Fn(&Manifest) -> String| {
            template.manifest.as_ref().map_or("-".into(), cell)
        };
        table.row([
            template.id.clone(),
            if template.current {
                "base, current"
            } else {
                "base"
            }
            .into(),
            show(&|manifest| manifest.inputs.vcpus.to_string()),
            show(&|manifest| Bytes(manifest.inputs.memory_bytes).to_string()),
            show(&|manifest| Bytes(manifest.memory.data_bytes + manifest.state.bytes).to_string()),
            show(&|manifest| Age(now.saturating_sub(manifest.created)).to_string()),
            template.status.clone(),
        ]);
    }
    table
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn inspect(store: &Store, id: &str) -> Result<(), Error> {
    let template = store.inspect(id)?;
    print_json(template.manifest());
    template.verify()?;
    Ok(())
}

/// Removes all that can be removed; reports each that cannot.
fn remove(store: &Store, config: &Config, ids: Vec<String>) -> Result<(), Error> {
    let all = ids.len();
    let mut failed = Vec::new();
    for id in ids {
        let removed = resolve(store, config, id).and_then(|id| {
            store.remove(&id)?;
            println!("{id}");
            Ok(())
        });
        if let Err(error) = removed {
            failed.push(error);
        }
    }
    match (failed.pop(), all) {
        (None, _) => Ok(()),
        (Some(error), 1) => Err(error),
        (Some(last), _) => {
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
    }

    #[test]
    fn a_damaged_template_is_listed_with_its_reason() {
        let listed = Listed {
            id: "0123456789abcdef".into(),
            current: false,
            status: "template 0123456789abcdef is damaged (state is missing)".into(),
            manifest: None,
        };
        let text = table(&[listed], 0).to_string();
        let line = text.lines().nth(1).unwrap();
        assert!(line.starts_with("0123456789abcdef  base  -"), "{line}");
        assert!(line.ends_with("is damaged (state is missing)"), "{line}");
    }

    #[test]
    fn all_that_can_be_removed_is() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::new(folder.path());
        std::fs::create_dir(folder.path().join("0123456789abcdef")).unwrap();
        let ids = ["not-an-id", "0123456789abcdef", "ffffffffffffffff"].map(String::from);
        let error = remove(&store, &config(), ids.to_vec()).unwrap_err();
        assert_eq!(error.to_string(), "2 of 3 templates were not removed");
        assert!(store.list().unwrap().is_empty());
        // One alone fails with its own message.
        let error = remove(&store, &config(), vec!["ffffffffffffffff".into()]).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("there is no template ffffffffffffffff")
        );
    }
}
