//! A template that is cut or changed: it is never forked.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{
    case::{Case, scenario},
    config_file::ConfigFile,
    container::{BUSYBOX, ctr},
    failure::{Failure, ensure},
    scene::Scene,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("template/cut-or-changed-is-never-forked", never_forked)
            .alone()
            .forkvm_only("runc has no templates"),
    ]
}

/// The store of the case; `missing` says what a start does without a template.
fn configure(scene: &Scene<'_>, missing: &str) -> Result<ConfigFile, Failure> {
    ConfigFile::changed(&format!(
        "[vm]\nmemory_mib = 128\n[templates]\nmissing = \"{missing}\"\n[paths]\ntemplates = \"{}\"\nrecord = \"{}\"\n",
        scene.path_text("store"),
        scene.path_text("record.json"),
    ))
}

/// A file's copies, cut at each of these lengths and with one bit changed at each of these bytes.
fn damaged(whole: &[u8], lengths: &[usize], changed: &[usize]) -> Vec<Vec<u8>> {
    let cut = lengths.iter().map(|&length| whole[..length].to_vec());
    let flipped = changed.iter().map(|&at| {
        let mut copy = whole.to_vec();
        copy[at] ^= 1 << (at % 8);
        copy
    });
    cut.chain(flipped).collect()
}

fn refused(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = ctr(BUSYBOX).command(["true"]);
    let refused = container.refused(["template", "damaged", "forkvm template build"]);
    scene.run(&refused).map(drop)
}

fn never_forked(scene: &Scene<'_>) -> Result<(), Failure> {
    let refusing = configure(scene, "fail")?;
    scene.ok(["forkvm", "template", "build"])?;
    let template = template_in(&scene.path("store"))?;
    let io = |path: &Path| Failure::io(path.display().to_string());
    for name in ["state", "manifest.json"] {
        let path = template.join(name);
        let whole = fs::read(&path).map_err(io(&path))?;
        let end = whole.len();
        // The parts of the state's header (vmm/src/snapshot/state.rs), and places in what follows.
        let lengths = [0, 8, 12, 16, 24, end / 2, end - 2];
        let changed: &[usize] = match name {
            "state" => &[0, 9, 13, 17, 24, 1000, end / 3, end - 1],
            // A bit of a number or a name in it may be any other.
            _ => &[0],
        };
        for copy in damaged(&whole, &lengths, changed) {
            fs::write(&path, copy).map_err(io(&path))?;
            refused(scene)?;
        }
        fs::write(&path, whole).map_err(io(&path))?;
    }
    scene.run(&ctr(BUSYBOX).command(["true"]))?;

    let memory = template.join("memory");
    let file = fs::File::options()
        .write(true)
        .open(&memory)
        .map_err(io(&memory))?;
    let bytes = file.metadata().map_err(io(&memory))?.len();
    for length in [bytes - 4096, 0, bytes] {
        file.set_len(length).map_err(io(&memory))?;
        refused(scene)?;
    }
    drop((file, refusing));

    let _building = configure(scene, "build")?;
    scene.run(&ctr(BUSYBOX).command(["true"]))?;
    let list = scene.ok(["forkvm", "template", "ls", "--json"])?;
    let found: serde_json::Value = serde_json::from_slice(&list.stdout)
        .map_err(|error| list.failure(format!("not JSON: {error}")))?;
    let record = &found["record"];
    ensure(
        record["built"] == 2 && record["damaged"] == 1 && record["fall_backs"] == 0,
        || format!("the record is {record:#}"),
    )
}

/// The one template of a store.
fn template_in(store: &Path) -> Result<PathBuf, Failure> {
    let entries = fs::read_dir(store).map_err(Failure::io(store.display()))?;
    let mut paths = entries.flatten().map(|entry| entry.path());
    paths
        .find(|path| path.join("manifest.json").exists())
        .ok_or_else(|| Failure::new(format!("no template in {}", store.display())))
}
