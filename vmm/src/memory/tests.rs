use std::os::unix::fs::MetadataExt as _;

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;

const MIB: u64 = 1 << 20;

#[test]
fn a_small_guest_has_one_region_and_a_large_one_two() {
    assert_eq!(
        regions(512 * MIB).unwrap(),
        [Region {
            start: 0,
            bytes: 512 * MIB,
            offset: 0
        }]
    );
    assert_eq!(
        regions(4096 * MIB).unwrap(),
        [
            Region {
                start: 0,
                bytes: 3072 * MIB,
                offset: 0
            },
            Region {
                start: HIGH_START,
                bytes: 1024 * MIB,
                offset: 3072 * MIB
            }
        ]
    );
}

#[test]
fn sizes_that_no_guest_can_have_are_refused() {
    for bytes in [0, MIB, 65 * MIB, MAX_BYTES + GRANULE, u64::MAX] {
        assert!(matches!(regions(bytes), Err(Error::Size(_))), "{bytes}");
    }
}

#[test]
fn a_child_sees_the_template_and_keeps_its_writes_to_itself() {
    let file = tempfile::tempfile().unwrap();
    let bytes = 64 * MIB;
    let at = |address| GuestAddress(address);
    let builder = anonymous(bytes).unwrap();
    builder.write_obj(1_u32, at(0)).unwrap();
    builder.write_obj(2_u32, at(PAGE * 3)).unwrap();
    builder.write_obj(3_u32, at(32 * MIB)).unwrap();
    builder.write_obj(4_u32, at(bytes - PAGE)).unwrap();
    let segments = write(&file, &builder).unwrap();
    drop(builder);
    assert_eq!(
        segments,
        [
            Segment {
                offset: 0,
                bytes: 4 * PAGE
            },
            Segment {
                offset: 32 * MIB,
                bytes: PAGE
            },
            Segment {
                offset: bytes - PAGE,
                bytes: PAGE
            }
        ]
    );
    // Four pages of data: what is between them takes no room.
    assert!(file.metadata().unwrap().blocks() * 512 <= 8 * PAGE);
    let before = checksum(&file, &segments).unwrap();
    let one = private(&file, bytes, &segments).unwrap();
    let other = private(&file, bytes, &segments).unwrap();
    one.write_obj(5_u32, at(0)).unwrap();
    one.write_obj(6_u32, at(16 * MIB)).unwrap();
    for (address, ours, theirs) in [
        (0, 5_u32, 1_u32),
        (PAGE * 3, 2, 2),
        (16 * MIB, 6, 0),
        (32 * MIB, 3, 3),
        (bytes - PAGE, 4, 4),
    ] {
        assert_eq!(one.read_obj::<u32>(at(address)).unwrap(), ours);
        assert_eq!(other.read_obj::<u32>(at(address)).unwrap(), theirs);
    }
    assert_eq!(checksum(&file, &segments).unwrap(), before);

    // A template of a child is as whole as one of a boot.
    let second = tempfile::tempfile().unwrap();
    let segments = write(&second, &one).unwrap();
    let grandchild = private(&second, bytes, &segments).unwrap();
    for (address, value) in [(0, 5_u32), (PAGE * 3, 2), (16 * MIB, 6), (bytes - PAGE, 4)] {
        assert_eq!(grandchild.read_obj::<u32>(at(address)).unwrap(), value);
    }
}

#[test]
fn segments_that_do_not_fit_are_refused() {
    let file = tempfile::tempfile().unwrap();
    let bytes = 64 * MIB;
    file.set_len(bytes).unwrap();
    let segment = |offset, bytes| Segment { offset, bytes };
    for segments in [
        vec![segment(1, PAGE)],
        vec![segment(0, 1)],
        vec![segment(0, 0)],
        vec![segment(PAGE, PAGE), segment(0, PAGE)],
        vec![segment(0, 2 * PAGE), segment(PAGE, PAGE)],
        vec![segment(bytes, PAGE)],
        vec![segment(PAGE, u64::MAX - PAGE + 1)],
    ] {
        assert!(
            matches!(private(&file, bytes, &segments), Err(Error::Segments)),
            "{segments:?}"
        );
    }
    file.set_len(bytes / 2).unwrap();
    assert!(matches!(
        private(&file, bytes, &[]),
        Err(Error::FileSize { .. })
    ));
}

proptest! {
    #[test]
    fn any_list_of_segments_is_taken_or_refused(
        list in prop::collection::vec((any::<u64>(), any::<u64>()), 0..8)
    ) {
        let segments: Vec<_> = list
            .iter()
            .map(|&(offset, bytes)| Segment { offset, bytes })
            .collect();
        let _ = check(64 * MIB, &segments);
    }
}
