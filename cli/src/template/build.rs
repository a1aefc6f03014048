//! `forkvm template build`.

use std::time::Duration;

use forkvm_config::{Config, Demand};
use forkvm_vmm::template::{self, Attempt, Manifest, Progress, Store};
use serde::Serialize;

use super::{Error, progress::Display};
use crate::output::{Bytes, print_json};

/// What became of one template.
#[derive(Debug, Serialize)]
struct Built {
    /// False if it was there already.
    built: bool,
    seconds: f64,
    manifest: Manifest,
}

/// Makes the templates of some namespaces, of the size that containers with such limits get.
pub(super) fn run(
    store: &Store,
    config: &Config,
    namespaces: &[String],
    demand: &Demand,
    force: bool,
    json: bool,
) -> Result<(), Error> {
    let class = config.vm.class(demand)?;
    let mut specs = Vec::new();
    for namespace in namespaces {
        let domain = template::domain(config, namespace).ok_or(Error::NotShared)?;
        let spec = template::spec(config, domain, class);
        // Those of all namespaces are the same if the host shares them.
        if !specs.contains(&spec) {
            specs.push(spec);
        }
    }
    let attempt = if force { Attempt::Anew } else { Attempt::Asked };
    let mut all = Vec::new();
    for spec in &specs {
        let display = Display::new();
        display.show("reading the guest image");
        let mut worked = false;
        let built = store.build(spec, attempt, &mut |step| {
            worked |= step != Progress::Waiting;
            display.show(&step.to_string());
        });
        let took = display.elapsed();
        drop(display);
        let built = Built {
            built: worked,
            seconds: took.as_secs_f64(),
            manifest: built?.manifest().clone(),
        };
        if !json {
            println!("{}", line(&built, took));
        }
        all.push(built);
    }
    if json {
        print_json(&all);
    }
    Ok(())
}

fn line(built: &Built, took: Duration) -> String {
    let manifest = &built.manifest;
    let what = format!("template {} ({})", manifest.id, manifest.inputs.domain);
    if !built.built {
        return format!("{what} is there already");
    }
    format!(
        "{what} built in {:.1} s: {} vCPUs, {} of memory, {} on disk",
        took.as_secs_f64(),
        manifest.inputs.vcpus,
        Bytes(manifest.inputs.memory_bytes),
        Bytes(manifest.memory.data_bytes + manifest.state.bytes),
    )
}
