use std::{
    path::PathBuf,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::template::{
    Condition, Limits, RecordFile,
    testing::{fill, identity, manifest, write_manifest},
};

const MIB: usize = 1 << 20;

fn store(limits: Limits) -> (TempDir, Store) {
    let root = tempfile::tempdir().unwrap();
    let store = Store::new(root.path().join("templates"))
        .with_limits(limits)
        .with_record(RecordFile::new(root.path().join("record.json")));
    fs::create_dir(store.root()).unwrap();
    (root, store)
}

fn record(store: &Store) -> Record {
    store.record().unwrap().read().unwrap()
}

fn build(store: &Store, identity: &Identity, attempt: Attempt) -> Result<Template, Error> {
    store.build_with(identity, attempt, &mut |_| {}, |folder, _| {
        fill(identity, folder, MIB)
    })
}

fn fails(store: &Store, identity: &Identity, attempt: Attempt) -> Error {
    let built = store.build_with(identity, attempt, &mut |_| {}, |folder, _| {
        fs::create_dir(folder).unwrap();
        fs::write(folder.join("memory"), "half").unwrap();
        Err(Error::Build("the guest does not boot".into()))
    });
    built.unwrap_err()
}

fn names(store: &Store) -> Vec<String> {
    let mut names = store.names().unwrap();
    names.sort();
    names
}

#[test]
fn a_template_is_built_once_and_nothing_else_is_left() {
    let (_root, store) = store(Limits::default());
    let identity = identity("host");
    for attempt in [Attempt::Start, Attempt::Start, Attempt::Asked] {
        assert_eq!(
            build(&store, &identity, attempt).unwrap().id(),
            identity.id()
        );
    }
    assert_eq!(record(&store).built, 1);
    assert_eq!(names(&store), [identity.id()]);
}

#[test]
fn many_who_want_the_same_wait_for_one_builder() {
    const WAITERS: usize = 49;
    let (_root, store) = store(Limits::default());
    let identity = identity("host");
    let builds = AtomicUsize::new(0);
    let (waits, waiting) = mpsc::channel();
    thread::scope(|scope| {
        let (begun, go_on) = (mpsc::channel(), mpsc::channel::<()>());
        let (store, identity, builds) = (&store, &identity, &builds);
        let (sender, receiver) = (begun.0, go_on.1);
        scope.spawn(move || {
            let fill = |folder: &Path, _: &mut dyn FnMut(Progress)| {
                builds.fetch_add(1, Ordering::SeqCst);
                sender.send(()).unwrap();
                receiver.recv().unwrap();
                fill(identity, folder, MIB)
            };
            store
                .build_with(identity, Attempt::Start, &mut |_| {}, fill)
                .unwrap();
        });
        begun.1.recv().unwrap();
        for _ in 0..WAITERS {
            let waits = waits.clone();
            scope.spawn(move || {
                let mut progress = |step| {
                    if step == Progress::Waiting {
                        waits.send(()).unwrap();
                    }
                };
                let fill = |folder: &Path, _: &mut dyn FnMut(Progress)| {
                    builds.fetch_add(1, Ordering::SeqCst);
                    fill(identity, folder, MIB)
                };
                store
                    .build_with(identity, Attempt::Start, &mut progress, fill)
                    .unwrap();
            });
        }
        for _ in 0..WAITERS {
            waiting.recv().unwrap();
        }
        go_on.0.send(()).unwrap();
    });
    assert_eq!(builds.into_inner(), 1);
    assert_eq!(names(&store), [identity.id()]);
}

#[test]
fn a_build_that_failed_is_told_to_those_who_come_within_the_minute() {
    let (_root, store) = store(Limits::default());
    let identity = identity("host");
    fails(&store, &identity, Attempt::Start);
    assert_eq!(names(&store), [""; 0], "nothing of it is left");
    let error = build(&store, &identity, Attempt::Start).unwrap_err();
    assert!(
        error.to_string().contains("the guest does not boot"),
        "{error}"
    );
    assert!(!error.needs_build());
    // Another template's build is another matter, and an operator knows what he asks for.
    build(
        &store,
        &crate::template::testing::identity("namespace moby"),
        Attempt::Start,
    )
    .unwrap();
    build(&store, &identity, Attempt::Asked).unwrap();
    let record = record(&store);
    assert_eq!((record.built, record.failed), (2, 1));
    assert!(record.failures.is_empty());
}

#[test]
fn after_a_minute_it_is_tried_again() {
    let (_root, store) = store(Limits::default());
    let identity = identity("host");
    fails(&store, &identity, Attempt::Start);
    store.record().unwrap().change(|record| {
        for failure in record.failures.values_mut() {
            failure.at -= RETRY.as_secs();
        }
    });
    build(&store, &identity, Attempt::Start).unwrap();
}

#[test]
fn what_cannot_be_used_is_replaced_though_a_child_lives() {
    let week = Limits {
        age: Some(Duration::from_secs(7 * 24 * 3600)),
        ..Limits::default()
    };
    let (_root, store) = store(week);
    let identity = identity("host");
    let folder: PathBuf = store.root().join(identity.id());
    let child = build(&store, &identity, Attempt::Start).unwrap();
    let mut old = manifest(&identity, &folder);
    old.created -= 8 * 24 * 3600;
    write_manifest(&folder, &old);
    let second = build(&store, &identity, Attempt::Start).unwrap();
    fs::write(folder.join("state"), "cut").unwrap();
    build(&store, &identity, Attempt::Start).unwrap();
    let fourth = build(&store, &identity, Attempt::Anew).unwrap();
    let record = record(&store);
    assert_eq!((record.expired, record.damaged, record.built), (1, 1, 4));
    assert_eq!(names(&store), [identity.id()]);
    // Each child has the files that it was given.
    let inode = |template: &Template| rustix::fs::fstat(template.source().1[0]).unwrap().st_ino;
    assert_ne!(inode(&child), inode(&second));
    assert_ne!(inode(&second), inode(&fourth));
}

#[test]
fn one_more_makes_the_least_recently_used_go_but_none_in_use() {
    let two = Limits {
        count: Some(2),
        ..Limits::default()
    };
    let (_root, store) = store(two);
    let [first, second, third, fourth] = ["a", "b", "c", "d"].map(identity);
    let child = build(&store, &first, Attempt::Start).unwrap();
    drop(build(&store, &second, Attempt::Start).unwrap());
    drop(build(&store, &third, Attempt::Start).unwrap());
    let mut left = [first.id(), third.id()];
    left.sort_unstable();
    assert_eq!(store.list().unwrap(), left);
    let other = store.open(&third).unwrap();
    // All others are in use: the budget is an aim, the new one stays.
    drop(build(&store, &fourth, Attempt::Start).unwrap());
    assert_eq!(store.list().unwrap().len(), 3);
    drop((child, other));
    assert_eq!(store.over_budget(&[]).unwrap().len(), 1);
    assert_eq!(record(&store).evicted, 1);
}

#[test]
fn bytes_are_those_on_disk() {
    let limits = Limits {
        bytes: Some(5 * MIB as u64 / 2),
        ..Limits::default()
    };
    let (_root, store) = store(limits);
    let [first, second, third] = ["a", "b", "c"].map(identity);
    for one in [&first, &second, &third] {
        drop(build(&store, one, Attempt::Start).unwrap());
    }
    let mut left = [second.id(), third.id()];
    left.sort_unstable();
    assert_eq!(store.list().unwrap(), left);
    let listed = store.survey(None).unwrap();
    assert!(
        listed
            .iter()
            .all(|one| one.bytes >= MIB as u64 && one.bytes < 2 * MIB as u64)
    );
}

#[test]
fn a_survey_tells_the_condition_of_each() {
    let (_root, store) = store(Limits::default());
    let [whole, damaged, used] = ["a", "b", "c"].map(identity);
    for one in [&whole, &damaged, &used] {
        drop(build(&store, one, Attempt::Start).unwrap());
    }
    fs::remove_file(store.root().join(damaged.id()).join("memory")).unwrap();
    let _child = store.open(&used).unwrap();
    let find = |today: Option<&Identity>, id: &str| {
        let listed = store.survey(today).unwrap();
        listed.into_iter().find(|one| one.id == id).unwrap()
    };
    assert_eq!(find(None, whole.id()).condition, Condition::Usable);
    assert!(!find(None, whole.id()).in_use);
    assert!(find(None, used.id()).in_use);
    let found = find(None, damaged.id());
    assert_eq!(found.condition, Condition::Damaged);
    assert_eq!(found.reason, "memory is missing");
    // Another size or domain outdates nothing; another monitor does.
    let mut today = identity("elsewhere");
    assert_eq!(find(Some(&today), whole.id()).condition, Condition::Usable);
    today.inputs.monitor = "newer".into();
    let found = find(Some(&today), whole.id());
    assert_eq!(found.condition, Condition::Outdated);
    assert_eq!(found.reason, "made with another monitor");
}

#[test]
fn a_disk_without_room_is_told_before_a_guest_boots() {
    let (_root, store) = store(Limits::default());
    store.check_room(0).unwrap();
    let error = store.check_room(u64::MAX).unwrap_err().to_string();
    assert!(
        error.contains("MiB are free in") && error.contains("paths.templates"),
        "{error}"
    );
}

#[derive(Clone, Debug)]
enum Step {
    Build(usize),
    Fail(usize),
    Damage(usize),
    Open(usize),
    Close(usize),
    Remove(usize),
    Die(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let one = 0_usize..4;
    prop_oneof![
        one.clone().prop_map(Step::Build),
        one.clone().prop_map(Step::Fail),
        one.clone().prop_map(Step::Damage),
        one.clone().prop_map(Step::Open),
        one.clone().prop_map(Step::Close),
        one.clone().prop_map(Step::Remove),
        one.prop_map(Step::Die),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever happens in whatever order: what is published is whole or was damaged from outside, what a child holds is
    /// not taken from it, the number is kept, and nothing is left.
    #[test]
    fn a_store_stays_whole(steps in prop::collection::vec(step(), 1..30)) {
        let (_root, store) = store(Limits { count: Some(2), ..Limits::default() });
        let all = ["a", "b", "c", "d"].map(identity);
        let mut children: [Option<Template>; 4] = Default::default();
        for step in steps {
            match step {
                Step::Build(one) => drop(build(&store, &all[one], Attempt::Asked).unwrap()),
                Step::Fail(one) => {
                    let whole = store.open(&all[one]).is_ok();
                    let result = store.build_with(&all[one], Attempt::Asked, &mut |_| {}, |folder, _| {
                        fs::create_dir(folder).unwrap();
                        Err(Error::Build("no".into()))
                    });
                    prop_assert_eq!(result.is_ok(), whole);
                }
                Step::Damage(one) => drop(fs::remove_file(store.root().join(all[one].id()).join("state"))),
                Step::Open(one) => children[one] = store.open(&all[one]).ok(),
                Step::Close(one) => children[one] = None,
                Step::Remove(one) => match store.remove(all[one].id()) {
                    Ok(()) | Err(Error::Missing { .. } | Error::InUse { .. }) => {}
                    Err(error) => prop_assert!(false, "{error}"),
                },
                // A builder that was killed.
                Step::Die(one) => {
                    let id = all[one].id();
                    let _ = fs::create_dir(store.root().join(format!(".building-{id}-1")));
                    fs::write(store.builder_lock(id), "").unwrap();
                }
            }
            let most = 2 + children.iter().flatten().count();
            prop_assert!(store.list().unwrap().len() <= most);
            for child in children.iter().flatten() {
                let (_, [memory, _]) = child.source();
                prop_assert_eq!(rustix::fs::fstat(memory).unwrap().st_size, MIB as i64);
            }
        }
        store.sweep(None).unwrap();
        prop_assert_eq!(names(&store), store.list().unwrap());
    }
}
