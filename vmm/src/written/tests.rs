use std::io::Write as _;

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::memory::{LOW_END, anonymous, private, write};

const BYTES: u64 = 64 << 20;

fn text(early: &[Run], late: &[Run]) -> Vec<u8> {
    let written = Written {
        version: VERSION,
        early: early.to_vec(),
        late: late.to_vec(),
    };
    serde_json::to_vec(&written).unwrap()
}

/// A template of 64 MiB whose first 32 pages hold data.
fn template() -> (File, Vec<crate::memory::Segment>) {
    let memory = anonymous(BYTES).unwrap();
    for page in 0..32_u64 {
        memory
            .write_obj(page + 1, GuestAddress(page * PAGE))
            .unwrap();
    }
    let file = tempfile::tempfile().unwrap();
    let segments = write(&file, &memory).unwrap();
    (file, segments)
}

#[test]
fn what_is_written_is_found_and_copied_in_the_next_child() {
    let (file, segments) = template();
    let first = private(&file, BYTES, &segments).unwrap();
    let recorder = Recorder::new(first.clone()).unwrap();
    let touch = |page: u64| first.write_obj(99_u64, GuestAddress(page * PAGE)).unwrap();
    // Read, so there and not our own.
    assert_eq!(first.read_obj::<u64>(GuestAddress(0)).unwrap(), 1);
    [3, 4, 9].into_iter().for_each(touch);
    // One that was a hole.
    touch(500);
    recorder.note_early();
    [4, 5, 6, 7000].into_iter().for_each(touch);
    let written = recorder.finish().unwrap();
    assert_eq!(written.early, [(3, 2), (9, 1), (500, 1)]);
    assert_eq!(written.late, [(5, 2), (7000, 1)]);

    let second = private(&file, BYTES, &segments).unwrap();
    let own = |memory: &GuestMemory| Recorder::new(memory.clone()).unwrap().pages().unwrap();
    let written = Written::parse(&serde_json::to_vec(&written).unwrap(), &second).unwrap();
    written.copy_early(&second);
    assert_eq!(own(&second), [3, 4, 9, 500]);
    written.copy_late(&second);
    assert_eq!(own(&second), [3, 4, 5, 6, 9, 500, 7000]);
    // What was copied is the template's.
    assert_eq!(second.read_obj::<u64>(GuestAddress(4 * PAGE)).unwrap(), 5);
}

#[test]
fn a_start_that_asks_for_no_file_has_nothing_to_tell() {
    let (file, segments) = template();
    let memory = private(&file, BYTES, &segments).unwrap();
    let recorder = Recorder::new(memory).unwrap();
    assert_eq!(recorder.finish().unwrap(), Written::new(&[], &[]));
}

#[test]
fn a_run_may_cross_from_one_region_into_the_other() {
    let memory = anonymous(LOW_END + (2 << 20)).unwrap();
    let border = LOW_END / PAGE;
    let found: Vec<_> = parts((border - 1, 3), &memory)
        .map(|(region, first, count)| (region.start_addr().0, first, count))
        .collect();
    assert_eq!(
        found,
        [(0, border - 1, 1), (crate::memory::HIGH_START, 0, 2)]
    );
}

#[test]
fn lists_are_bounded_when_they_are_made_and_when_they_are_read() {
    let scattered: Vec<u64> = (0..10_000).map(|page| page * 2).collect();
    let written = Written::new(&scattered, &scattered);
    assert_eq!(
        (written.early.len(), written.late.len()),
        (MAX_RUNS, MAX_RUNS)
    );
    let dense: Vec<u64> = (0..10_000).collect();
    let written = Written::new(&dense, &dense);
    assert_eq!(
        (written.early, written.late),
        (vec![(0, MAX_PAGES)], vec![])
    );

    let memory = anonymous(BYTES).unwrap();
    let last = BYTES / PAGE;
    Written::parse(
        &text(&[(0, 1), (last - 1, 1)], &[(5, MAX_PAGES - 2)]),
        &memory,
    )
    .unwrap();
    for wrong in [
        text(&[(0, 1), (0, 1)], &[]),
        text(&[(9, 1), (1, 1)], &[]),
        text(&[(0, 0)], &[]),
        text(&[(last, 1)], &[]),
        text(&[], &[(last - 1, 2)]),
        text(&[(1, u64::MAX)], &[]),
        text(&[(0, MAX_PAGES)], &[(MAX_PAGES, 1)]),
        br#"{"version":2,"early":[],"late":[]}"#.to_vec(),
    ] {
        assert!(matches!(Written::parse(&wrong, &memory), Err(Error::Pages)));
    }
    let mut cut = tempfile::tempfile().unwrap();
    cut.write_all(b"{\"version\":1").unwrap();
    assert!(matches!(
        Written::read(&cut, &memory),
        Err(Error::Syntax(_))
    ));
}

proptest! {
    #[test]
    fn any_lists_are_taken_or_refused(early in prop::collection::vec(any::<Run>(), 0..8), late in prop::collection::vec((0..20_000_u64, 0..2000_u64), 0..8)) {
        let memory = anonymous(BYTES).unwrap();
        if let Ok(written) = Written::parse(&text(&early, &late), &memory) {
            for &run in written.early.iter().chain(&written.late) {
                let pages: u64 = parts(run, &memory).map(|(_, _, pages)| pages).sum();
                prop_assert_eq!(pages, run.1);
            }
        }
    }
}
