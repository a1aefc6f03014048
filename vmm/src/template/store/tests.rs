use std::os::unix::fs::FileExt;

use tempfile::TempDir;

use super::*;
use crate::template::lock::Lock;
use crate::template::testing::{STATE, fill, identity, manifest, write_manifest};

/// A store with one template whose files fit each other.
fn store() -> (TempDir, Store, Identity) {
    let root = tempfile::tempdir().unwrap();
    let identity = identity("host");
    fill(&identity, &root.path().join(identity.id()), 6).unwrap();
    let store = Store::new(root.path());
    (root, store, identity)
}

fn message(result: Result<Template, Error>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_whole_template_is_listed_and_opened() {
    let (root, store, identity) = store();
    fs::create_dir(root.path().join(".building-0123456789abcdef-7")).unwrap();
    fs::write(root.path().join(".digests.json"), "{}").unwrap();
    let id = identity.id();
    assert_eq!(store.list().unwrap(), [id]);
    let template = store.inspect(id).unwrap();
    assert_eq!(template.id(), id);
    assert_eq!(template.manifest().inputs.vcpus, 2);
    let (source, _) = template.source();
    assert_eq!(
        source,
        Source::Fork {
            template: id.into(),
            writes: Writes::Ignore,
        }
    );
    store.open(&identity).unwrap();
}

#[test]
fn what_the_first_start_wrote_is_kept_and_expected_of_later_ones() {
    let (root, store, identity) = store();
    let first = store.open(&identity).unwrap();
    assert!(first.records());
    // A start that recorded nothing leaves it to the next.
    first.keep_written(&Written::new(&[], &[])).unwrap();
    let second = store.open(&identity).unwrap();
    assert!(second.records());
    // Both were under way at once: the later one does not replace what others may be reading.
    first.keep_written(&Written::new(&[1, 2], &[7])).unwrap();
    second.keep_written(&Written::new(&[3], &[])).unwrap();
    let third = store.open(&identity).unwrap();
    assert!(!third.records());
    let (source, descriptors) = third.source_of_start();
    let id = identity.id().into();
    let expected = Source::Fork {
        template: id,
        writes: Writes::Expect,
    };
    assert_eq!((source, descriptors.len()), (expected, 3));
    let kept = fs::read_to_string(root.path().join(identity.id()).join(WRITTEN)).unwrap();
    assert_eq!(kept, r#"{"version":1,"early":[[1,2]],"late":[[7,1]]}"#);
    // What stands in it is the monitor's to judge; that the file is there does not make the template another one.
    store.inspect(identity.id()).unwrap();
}

/// Starts wait for nobody: not for a builder, nor for who counts, remembers or removes, nor for each other.
#[test]
fn a_hundred_starts_at_once_wait_for_no_lock() {
    let (root, store, identity) = store();
    let files = [
        store.builder_lock(identity.id()),
        root.path().join(".digests.json"),
        root.path().join(".record.json"),
    ];
    let _held = files.map(|file| Lock::wait(&file, || {}).unwrap());
    let folder = File::open(root.path()).unwrap();
    flock(&folder, FlockOperation::LockExclusive).unwrap();
    let (sender, opened) = std::sync::mpsc::channel();
    for _ in 0..100 {
        let (store, identity, sender) = (store.clone(), identity.clone(), sender.clone());
        std::thread::spawn(move || sender.send(Box::new(store.open(&identity).unwrap())));
    }
    // All of them are held until the last one is there.
    let children: Vec<_> = (0..100)
        .map(|_| opened.recv_timeout(Duration::from_secs(60)).unwrap())
        .collect();
    assert_eq!(children.len(), 100);
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
        let (root, store, identity) = store();
        let id = identity.id();
        damage(&root.path().join(id));
        let error = store.open(&identity).unwrap_err();
        assert!(error.needs_build());
        let text = error.to_string();
        assert!(text.contains(expected), "{text}");
        assert!(
            text.contains(&format!("template {id} is damaged"))
                && text.ends_with("run `forkvm template build`"),
            "{text}"
        );
        store.remove(id).unwrap();
        assert!(store.list().unwrap().is_empty());
    }
}

#[test]
fn a_template_of_another_version_or_machine_is_outdated() {
    let (root, store, here) = store();
    let folder = root.path().join(here.id());
    let whole = manifest(&here, &folder);
    let mut older = whole.clone();
    older.version -= 1;
    write_manifest(&folder, &older);
    let text = message(store.inspect(here.id()));
    assert!(text.contains("its manifest has version"), "{text}");
    write_manifest(&folder, &whole);
    let mut moved = here.clone();
    moved.machine.kernel_release = "6.13".into();
    let text = message(store.open(&moved));
    assert!(
        text.contains("made under Linux 6.12, this is 6.13"),
        "{text}"
    );
}

#[test]
fn a_template_is_forked_until_its_age_limit() {
    let (root, store, identity) = store();
    let folder = root.path().join(identity.id());
    let mut manifest = manifest(&identity, &folder);
    let limited = store.clone().with_limits(Limits {
        age: Some(Duration::from_secs(2 * DAY)),
        ..Limits::default()
    });
    limited.open(&identity).unwrap();
    // Too old, and made in the future: then nobody knows how old it is.
    for created in [now() - 2 * DAY - 60, now() + 3 * DAY] {
        manifest.created = created;
        write_manifest(&folder, &manifest);
        let error = limited.open(&identity).unwrap_err();
        assert!(error.needs_build());
        let text = error.to_string();
        assert!(
            text.contains(" days old") && text.contains("max_age_days"),
            "{text}"
        );
        store.open(&identity).unwrap();
    }
}

#[test]
fn a_template_in_use_is_not_removed() {
    let (_root, store, identity) = store();
    let id = identity.id();
    let template = store.inspect(id).unwrap();
    assert!(matches!(store.remove(id), Err(Error::InUse { .. })));
    // A monitor holds the same description of the file.
    let (_, [memory, _]) = template.source();
    let held = memory.try_clone_to_owned().unwrap();
    drop(template);
    assert!(matches!(store.remove(id), Err(Error::InUse { .. })));
    drop(held);
    store.remove(id).unwrap();
    assert!(matches!(store.inspect(id), Err(Error::Missing { .. })));
    assert_eq!(store.names().unwrap(), [""; 0]);
}

#[test]
fn what_is_open_is_of_one_folder_whatever_comes_after_it() {
    let (root, store, identity) = store();
    let path = root.path().join(identity.id());
    let folder = OwnedFd::from(File::open(&path).unwrap());
    assert!(is_at(&folder, &path));
    let template = store.inspect(identity.id()).unwrap();
    fs::remove_dir_all(&path).unwrap();
    assert!(!is_at(&folder, &path));
    fill(&identity, &path, 6).unwrap();
    assert!(!is_at(&folder, &path));
    let (_, [memory, _]) = template.source();
    assert_eq!(rustix::fs::fstat(memory).unwrap().st_nlink, 0);
}

#[test]
fn a_use_is_noted() {
    let (root, store, identity) = store();
    let folder = root.path().join(identity.id());
    let long_ago = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1);
    let times = fs::FileTimes::new().set_modified(long_ago);
    File::open(&folder).unwrap().set_times(times).unwrap();
    let template = store.open(&identity).unwrap();
    template.mark_used().unwrap();
    let after = fs::metadata(&folder).unwrap().modified().unwrap();
    assert!(after > long_ago + Duration::from_secs(1000));
    // The template itself is as it was.
    drop(template);
    store.open(&identity).unwrap();
}
