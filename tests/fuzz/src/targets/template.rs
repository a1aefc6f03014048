//! The files of the template store that are text: `manifest.json` of a template, the remembered
//! digests, `.digests.json`, and the record of what happened.
//!
//! *The attacker* can write these files, or the disk has damaged them.
//!
//! *What must hold*: no panic; memory is bounded; a template is opened only if its manifest is of its
//! id, its version and its very files.

use std::fs;
use std::path::Path;

use forkvm_vmm::fuzzing;
use forkvm_vmm::template::{Record, RecordFile, Store};

use crate::heap;
use crate::place;

/// Most bytes allocated at a time: the texts, some times over.
const HEAP: usize = 4 << 20;

/// The template's id, and what its files hold.
const ID: &str = "0123456789abcdef";

/// Runs an input: the first byte says which file the rest is.
pub fn run(bytes: &[u8]) {
    let Some((&kind, text)) = bytes.split_first() else {
        return;
    };
    place::with(|place| {
        heap::bounded(HEAP, || {
            let root = &place.scratch();
            match kind % 3 {
                0 => {
                    fs::write(root.join(".digests.json"), text).expect("a file");
                    // A cache that cannot be read is an empty one.
                    let _ = fuzzing::digests(root);
                }
                1 => inspect(root, text),
                _ => record(root, text),
            }
        });
    });
}

/// What cannot be read begins anew; what can goes on.
fn record(root: &Path, text: &[u8]) {
    let path = root.join("record.json");
    fs::write(&path, text).expect("a file");
    let file = RecordFile::new(path);
    let _ = file.read();
    file.change(|record| record.fell_back("a container", "a reason"));
    let last = file.read().expect("a record").last_fall_back;
    assert_eq!(last.expect("what was counted").reason, "a reason");
}

fn inspect(root: &Path, manifest: &[u8]) {
    let id = fuzzing::manifest_id(manifest).unwrap_or_else(|| ID.to_owned());
    let folder = root.join(&id);
    fs::create_dir(&folder).expect("a folder");
    fs::write(folder.join("memory"), "memory").expect("a file");
    fs::write(folder.join("state"), "state").expect("a file");
    // With its stamp, digest and checksums as they should be, so that what is behind them is reached.
    let fixed = fuzzing::fix_manifest(manifest, &folder);
    fs::write(
        folder.join("manifest.json"),
        fixed.as_deref().unwrap_or(manifest),
    )
    .expect("a file");
    if let Ok(template) = Store::new(root).inspect(&id) {
        assert_eq!(template.id(), id);
        // Its state is not one.
        assert!(template.verify().is_err());
    }
}

/// A manifest and a cache as the store writes them.
pub fn seeds() -> Vec<Vec<u8>> {
    let [manifest, digests] = fuzzing::example_texts(Path::new("/proc/version")).expect("texts");
    let mut record = Record::default();
    record.fell_back("a container", "why");
    let record = serde_json::to_vec(&record).expect("a text in memory");
    vec![
        [&[1], &manifest[..]].concat(),
        [&[0], &digests[..]].concat(),
        b"\x01{}".to_vec(),
        b"\x00{}".to_vec(),
        [&[2], &record[..]].concat(),
    ]
}
