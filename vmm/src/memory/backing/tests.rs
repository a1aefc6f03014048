use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
};

use proptest::prelude::*;
use vm_memory::Bytes;

use super::super::{anonymous, checksum, private, write as write_file};
use super::*;

const MIB: u64 = 1 << 20;
const BYTES: u64 = 64 * MIB;

/// A template whose first and third MiB hold data, every page another.
fn template() -> (File, Vec<Segment>) {
    // A huge page would count for 512 that were not touched.
    rustix::thread::disable_transparent_huge_pages(true).unwrap();
    let file = tempfile::tempfile().unwrap();
    let memory = anonymous(BYTES).unwrap();
    for page in (0..MIB / PAGE).chain(2 * MIB / PAGE..3 * MIB / PAGE) {
        write(&memory, page, page + 1);
    }
    let segments = write_file(&file, &memory).unwrap();
    assert_eq!(segments.len(), 2);
    (file, segments)
}

fn write(memory: &GuestMemory, page: u64, value: u64) {
    memory.write_obj(value, GuestAddress(page * PAGE)).unwrap();
}

fn read(memory: &GuestMemory, page: u64) -> u64 {
    memory.read_obj(GuestAddress(page * PAGE)).unwrap()
}

fn give_back(backing: &mut Backing, memory: &GuestMemory, page: u64, pages: u64) {
    backing
        .give_back(memory, GuestAddress(page * PAGE), pages * PAGE)
        .unwrap();
}

/// How many mappings guest memory consists of.
fn mappings(memory: &GuestMemory) -> usize {
    let region = memory.iter().next().unwrap();
    let start = region.as_ptr() as u64;
    let inside = start..start + region.len();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|line| {
            let address = line.split('-').next().unwrap();
            inside.contains(&u64::from_str_radix(address, 16).unwrap())
        })
        .count()
}

/// Bytes of guest memory that are in the host's memory and this process' own. By page: the kernel joins a mapping with its
/// neighbours, which other tests make, and smaps shows them as one.
fn held(memory: &GuestMemory) -> u64 {
    let recorder = crate::written::Recorder::new(memory.clone()).unwrap();
    recorder.pages().unwrap().len() as u64 * PAGE
}

#[test]
fn what_a_child_gives_back_is_empty_and_not_the_templates() {
    let (file, segments) = template();
    let before = checksum(&file, &segments).unwrap();
    let memory = private(&file, BYTES, &segments).unwrap();
    let other = private(&file, BYTES, &segments).unwrap();
    let mut backing = Backing::template(BYTES, &segments).unwrap();
    for page in 0..1024 {
        write(&memory, page, 7);
    }
    assert_eq!(held(&memory), 1024 * PAGE);
    // From the middle of one stretch, over a hole, to the middle of the next.
    give_back(&mut backing, &memory, 100, 500);
    assert_eq!(held(&memory), 524 * PAGE);
    for page in 0..1024 {
        let expected = if (100..600).contains(&page) { 0 } else { 7 };
        assert_eq!(read(&memory, page), expected, "page {page}");
    }
    // It can be used again, and given back again.
    write(&memory, 150, 8);
    assert_eq!(read(&memory, 150), 8);
    give_back(&mut backing, &memory, 150, 1);
    assert_eq!(read(&memory, 150), 0);
    // Nobody else has noticed, neither today's other child nor a later one.
    assert_eq!(read(&other, 150), 151);
    assert_eq!(read(&private(&file, BYTES, &segments).unwrap(), 150), 151);
    assert_eq!(checksum(&file, &segments).unwrap(), before);
}

#[test]
fn what_was_given_back_is_not_in_a_template() {
    let file = tempfile::tempfile().unwrap();
    let memory = anonymous(BYTES).unwrap();
    for page in 0..256 {
        write(&memory, page, 7);
    }
    give_back(&mut Backing::Anonymous, &memory, 10, 200);
    assert_eq!(read(&memory, 9), 7);
    assert_eq!(read(&memory, 10), 0);
    assert_eq!(read(&memory, 209), 0);
    assert_eq!(read(&memory, 210), 7);
    let segments = write_file(&file, &memory).unwrap();
    assert_eq!(file.metadata().unwrap().blocks() * 512, 56 * PAGE);
    let child = private(&file, BYTES, &segments).unwrap();
    assert_eq!((read(&child, 9), read(&child, 10)), (7, 0));
}

#[test]
fn only_whole_pages_that_are_there_are_given_back() {
    let memory = anonymous(BYTES).unwrap();
    let last = BYTES / PAGE - 1;
    for page in [0, 1, 2, 3, last] {
        write(&memory, page, 7);
    }
    let mut backing = Backing::Anonymous;
    for (start, bytes) in [
        (0, 0),
        (0, PAGE - 1),
        (1, PAGE),
        (PAGE + 1, 2 * PAGE - 2),
        (BYTES, PAGE),
        (u64::MAX, PAGE),
        (u64::MAX - PAGE + 1, u64::MAX),
        (u64::MAX, u64::MAX),
    ] {
        backing
            .give_back(&memory, GuestAddress(start), bytes)
            .unwrap();
    }
    for page in [0, 1, 2, 3, last] {
        assert_eq!(read(&memory, page), 7, "page {page}");
    }
    backing
        .give_back(&memory, GuestAddress(PAGE + 1), 2 * PAGE)
        .unwrap();
    assert_eq!([0, 1, 2, 3].map(|page| read(&memory, page)), [7, 7, 0, 7]);
    // As far as there is memory.
    backing
        .give_back(&memory, GuestAddress(BYTES - PAGE), u64::MAX)
        .unwrap();
    assert_eq!(read(&memory, last), 0);
}

#[test]
fn neighbours_become_one_mapping_again() {
    let (file, segments) = template();
    let memory = private(&file, BYTES, &segments).unwrap();
    let mut backing = Backing::template(BYTES, &segments).unwrap();
    let before = mappings(&memory);
    for page in (0..256).step_by(2).chain((1..256).step_by(2)) {
        write(&memory, page, 7);
        give_back(&mut backing, &memory, page, 1);
    }
    assert_eq!(read(&memory, 77), 0);
    assert!(mappings(&memory) < before, "{}", mappings(&memory));
}

#[test]
fn a_guest_cannot_use_up_the_mappings() {
    let bytes = (2 * MAX_STRETCHES as u64 * PAGE + 8 * MIB).next_multiple_of(2 * MIB);
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    let segments = [Segment { offset: 0, bytes }];
    let memory = private(&file, bytes, &segments).unwrap();
    let mut backing = Backing::template(bytes, &segments).unwrap();
    for page in (0..bytes / PAGE).step_by(2) {
        give_back(&mut backing, &memory, page, 1);
    }
    assert!(mappings(&memory) <= 2 * MAX_STRETCHES + 1);
    // What cannot be cut out goes back all the same.
    let page = bytes / PAGE - 2;
    write(&memory, page, 7);
    let held_before = held(&memory);
    give_back(&mut backing, &memory, page, 1);
    assert_eq!(held(&memory), held_before - PAGE);
}

#[test]
fn the_place_of_a_stretch_in_a_large_guest_is_behind_the_window_of_the_devices() {
    let bytes = 4096 * MIB;
    let segments = [Segment {
        offset: 3071 * MIB,
        bytes: 2 * MIB,
    }];
    let backing = Backing::template(bytes, &segments).unwrap();
    let expected = BTreeMap::from([
        (3071 * MIB, 3072 * MIB),
        (super::super::HIGH_START, super::super::HIGH_START + MIB),
    ]);
    assert!(matches!(backing, Backing::Template(Stretches(found)) if found == expected));
}

proptest! {
    /// Against a set of single addresses.
    #[test]
    fn stretches_are_sets(
        stretches in prop::collection::vec((0_u64..60, 1_u64..20), 0..6),
        removals in prop::collection::vec((0_u64..80, 0_u64..30), 0..12),
    ) {
        let mut model = [false; 128];
        let mut tested = Stretches::default();
        for (start, length) in stretches {
            if !tested.meet(start, start + length) {
                tested.0.insert(start, start + length);
                model[start as usize..(start + length) as usize].fill(true);
            }
        }
        for (start, length) in removals {
            let end = start + length;
            let range = start as usize..end as usize;
            prop_assert_eq!(
                length > 0 && tested.meet(start, end),
                model[range.clone()].iter().any(|held| *held)
            );
            if length > 0 {
                tested.remove(start, end);
                model[range].fill(false);
            }
            for address in 0..128 {
                prop_assert_eq!(tested.meet(address, address + 1), model[address as usize]);
            }
        }
    }
}

/// Whatever is given back in whatever order: a page reads as last written, or zero.
#[test]
fn pages_are_the_childs_or_empty() {
    let (file, segments) = template();
    let steps = prop::collection::vec((any::<bool>(), 0_u64..800, 1_u64..80), 1..24);
    proptest!(|(steps in steps)| {
        let memory = private(&file, BYTES, &segments).unwrap();
        let mut backing = Backing::template(BYTES, &segments).unwrap();
        let mut model: Vec<u64> = (0..1024).map(|page| read(&memory, page)).collect();
        for (writes, start, pages) in steps {
            if writes {
                for page in start..start + pages {
                    write(&memory, page, 9);
                }
            } else {
                give_back(&mut backing, &memory, start, pages);
            }
            model[start as usize..(start + pages) as usize].fill(if writes { 9 } else { 0 });
        }
        for (page, expected) in model.iter().enumerate() {
            prop_assert_eq!(read(&memory, page as u64), *expected, "page {}", page);
        }
    });
}
