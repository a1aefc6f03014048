use std::{fs, os::unix::fs::FileExt};

use tempfile::TempDir;

use super::*;
use crate::template::manifest::{MemoryFile, StateFile};

const STATE: &[u8] = b"any bytes: opening compares the checksum";

/// A store with one template whose files fit each other.
fn store() -> (TempDir, Store, String) {
    let root = tempfile::tempdir().unwrap();
    let inputs = Inputs {
        kernel: "k".into(),
        initramfs: "i".into(),
        cmdline: String::new(),
        vcpus: 2,
        memory_bytes: 1 << 30,
        state_version: state::VERSION,
    };
    let machine = machine();
    let digest = digest(&inputs, &machine);
    let id = digest[..ID_DIGITS].to_owned();
    let folder = root.path().join(&id);
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("memory"), "memory").unwrap();
    fs::write(folder.join("state"), STATE).unwrap();
    let manifest = Manifest {
        version: manifest::VERSION,
        id: id.clone(),
        digest,
        created: 0,
        inputs,
        machine,
        memory: MemoryFile {
            stamp: Stamp::of(&folder.join("memory")).unwrap(),
            data_bytes: 6,
            checksum: 0,
        },
        state: StateFile {
            bytes: STATE.len() as u64,
            checksum: crc32fast::hash(STATE),
        },
    };
    let text = serde_json::to_vec(&manifest).unwrap();
    fs::write(folder.join("manifest.json"), text).unwrap();
    let store = Store::new(root.path());
    (root, store, id)
}

fn machine() -> Machine {
    Machine {
        cpu_model: "a processor".into(),
        cpuid: "c".into(),
        microcode: "0x1".into(),
        tsc_khz: 2_000_000,
        kernel_release: "6.12".into(),
    }
}

fn message(result: Result<Template, Error>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_whole_template_is_listed_and_inspected() {
    let (root, store, id) = store();
    fs::create_dir(root.path().join(".building-0123456789abcdef-7")).unwrap();
    fs::write(root.path().join(".digests.json"), "{}").unwrap();
    assert_eq!(store.list().unwrap(), [id.as_str()]);
    let template = store.inspect(&id).unwrap();
    assert_eq!(template.id(), id);
    assert_eq!(template.manifest().inputs.vcpus, 2);
    let (source, _) = template.source();
    assert_eq!(source, Source::Fork { template: id });
}

#[test]
fn a_store_that_does_not_exist_is_empty() {
    let store = Store::new("/nonexistent/forkvm");
    assert!(store.list().unwrap().is_empty());
    assert!(message(store.inspect("0123456789abcdef")).contains("there is no template"));
}

#[test]
fn ids_cannot_leave_the_store() {
    let (_root, store, _) = store();
    for id in ["", "..", "../../etc", "0123456789ABCDEF", "0123456789abcde"] {
        assert!(
            matches!(store.inspect(id), Err(Error::BadId { .. })),
            "{id}"
        );
        assert!(matches!(store.remove(id), Err(Error::BadId { .. })), "{id}");
    }
}

#[test]
fn each_damage_is_named_and_says_what_to_do() {
    type Damage = fn(&Path);
    let cases: [(&str, Damage); 6] = [
        ("checksum of state differs", |folder| {
            let mut bytes = STATE.to_vec();
            bytes[3] ^= 1;
            fs::write(folder.join("state"), bytes).unwrap();
        }),
        ("checksum of state differs", |folder| {
            fs::write(folder.join("state"), &STATE[1..]).unwrap();
        }),
        ("state is missing", |folder| {
            fs::remove_file(folder.join("state")).unwrap();
        }),
        ("memory was changed", |folder| {
            let memory = File::options()
                .write(true)
                .open(folder.join("memory"))
                .unwrap();
            memory.write_all_at(b"longer memory", 0).unwrap();
        }),
        ("manifest.json", |folder| {
            fs::write(folder.join("manifest.json"), "{").unwrap();
        }),
        ("digest in manifest.json differs", |folder| {
            let path = folder.join("manifest.json");
            let text = fs::read_to_string(&path).unwrap();
            fs::write(path, text.replace("\"vcpus\":2", "\"vcpus\":3")).unwrap();
        }),
    ];
    for (expected, damage) in cases {
        let (root, store, id) = store();
        damage(&root.path().join(&id));
        let text = message(store.inspect(&id));
        assert!(text.contains(expected), "{text}");
        assert!(
            text.contains(&format!("template {id} is damaged"))
                && text.ends_with("run `forkvm template build base`"),
            "{text}"
        );
        store.remove(&id).unwrap();
        assert!(store.list().unwrap().is_empty());
    }
}

#[test]
fn a_template_in_use_is_not_removed() {
    let (_root, store, id) = store();
    let template = store.inspect(&id).unwrap();
    assert!(matches!(store.remove(&id), Err(Error::InUse { .. })));
    // A monitor holds the same description of the file.
    let (_, [memory, _]) = template.source();
    let held = memory.try_clone_to_owned().unwrap();
    drop(template);
    assert!(matches!(store.remove(&id), Err(Error::InUse { .. })));
    drop(held);
    store.remove(&id).unwrap();
    assert!(matches!(store.inspect(&id), Err(Error::Missing { .. })));
}

#[test]
fn another_machine_is_told_by_what_differs() {
    let here = machine();
    assert_eq!(here.difference(&here), None);
    type Change = fn(&mut Machine);
    let changes: [(&str, Change); 4] = [
        ("processor", |machine| machine.cpuid.push('x')),
        ("processor", |machine| machine.microcode.push('1')),
        ("Linux 6.12, this is 6.13", |machine| {
            machine.kernel_release = "6.13".into();
        }),
        ("2000000 kHz, this has 2100000 kHz", |machine| {
            machine.tsc_khz = 2_100_000;
        }),
    ];
    for (expected, change) in changes {
        let mut other = here.clone();
        change(&mut other);
        let text = here.difference(&other).unwrap();
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn everything_that_differs_gives_another_id() {
    let (_root, store, id) = store();
    let manifest = store.inspect(&id).unwrap().manifest().clone();
    let (inputs, machine) = (manifest.inputs, manifest.machine);
    let first = digest(&inputs, &machine);
    let input_changes: [fn(&mut Inputs); 6] = [
        |inputs| inputs.kernel.push('x'),
        |inputs| inputs.initramfs.push('x'),
        |inputs| inputs.cmdline.push('x'),
        |inputs| inputs.vcpus += 1,
        |inputs| inputs.memory_bytes += 1,
        |inputs| inputs.state_version += 1,
    ];
    for change in input_changes {
        let mut other = inputs.clone();
        change(&mut other);
        assert_ne!(digest(&other, &machine), first);
    }
    // Parts do not run into each other.
    let mut shifted = inputs.clone();
    shifted.kernel = "ki".into();
    shifted.initramfs = String::new();
    assert_ne!(digest(&shifted, &machine), first);
}
