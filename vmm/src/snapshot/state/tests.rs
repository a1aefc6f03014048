use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::{
    memory::Segment,
    snapshot::{MemoryState, VcpuState, VmState},
};

/// A state file with any payload.
fn file(payload: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(crc32fast::hash(payload).to_le_bytes());
    bytes.extend((payload.len() as u64).to_le_bytes());
    bytes.extend(payload);
    bytes
}

#[test]
fn each_kind_of_damage_has_its_error() {
    let good = file(b"payload");
    assert_eq!(payload(&good).unwrap(), b"payload");
    let changed = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        bytes
    };
    assert!(matches!(payload(&changed(0)), Err(Error::Magic)));
    assert!(matches!(payload(&changed(8)), Err(Error::Version(_))));
    assert!(matches!(payload(&changed(12)), Err(Error::Checksum)));
    assert!(matches!(payload(&changed(16)), Err(Error::Length)));
    assert!(matches!(payload(&changed(24)), Err(Error::Checksum)));
    assert!(matches!(payload(&[]), Err(Error::Length)));
    let long = vec![0; MAX_BYTES as usize + 1];
    assert!(matches!(payload(&long), Err(Error::TooLong)));
}

#[test]
fn a_file_is_read_from_its_start_whatever_its_offset() {
    let mut state = tempfile::tempfile().unwrap();
    state.write_all(b"state").unwrap();
    assert_eq!(read(&state).unwrap(), b"state");
    assert_eq!(read(&state).unwrap(), b"state");
    state.set_len(MAX_BYTES + 1).unwrap();
    assert!(matches!(read(&state), Err(Error::TooLong)));
}

/// The state of a machine with two vCPUs.
fn example() -> Vec<u8> {
    let snapshot = Snapshot {
        memory: MemoryState {
            bytes: 64 << 20,
            segments: vec![
                Segment {
                    offset: 4096,
                    bytes: 8192
                };
                3
            ],
        },
        vm: VmState::example(),
        vcpus: vec![VcpuState::example(0), VcpuState::example(1)],
        devices: crate::devices::tests::example(),
    };
    serialize(&snapshot).unwrap()
}

/// At every byte, and so at every border of a structure; with a header that fits what is left, too.
#[test]
fn a_state_that_was_cut_is_an_error_wherever_it_was() {
    let whole = example();
    let content = payload(&whole).unwrap();
    assert_eq!(parse(&whole).unwrap().vcpus.len(), 2);
    for length in 0..whole.len() {
        assert!(
            matches!(parse(&whole[..length]), Err(Error::Length)),
            "{length}"
        );
    }
    for length in 0..content.len() {
        let cut = parse(&file(&content[..length]));
        assert!(matches!(cut, Err(Error::Content(_))), "{length}");
    }
    let long = [content, &[0]].concat();
    assert!(matches!(parse(&file(&long)), Err(Error::Length)));
}

proptest! {
    #[test]
    fn flipped_bits_are_found(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0..8_u32), 1..8),
    ) {
        let whole = example();
        let mut bad = whole.clone();
        for (at, bit) in flips {
            bad[at.index(whole.len())] ^= 1 << bit;
        }
        // Two of them may have been one.
        prop_assert!(bad == whole || parse(&bad).is_err());
    }

    #[test]
    fn flipped_bits_under_a_right_checksum_are_no_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0..8_u32), 1..8),
    ) {
        let whole = example();
        let mut content = payload(&whole).unwrap().to_vec();
        for (at, bit) in flips {
            let at = at.index(content.len());
            content[at] ^= 1 << bit;
        }
        let _ = parse(&file(&content));
    }

    #[test]
    fn a_cut_or_changed_file_is_an_error(
        content in prop::collection::vec(any::<u8>(), 0..256),
        cut in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        bit in 0..8_u32,
    ) {
        let good = file(&content);
        prop_assert!(payload(&good[..cut.index(good.len())]).is_err());
        let mut bad = good.clone();
        bad[at.index(good.len())] ^= 1 << bit;
        prop_assert!(payload(&bad).is_err());
        let mut long = good;
        long.push(0);
        prop_assert!(payload(&long).is_err());
    }

    #[test]
    fn a_right_checksum_over_nonsense_is_no_panic(
        content in prop::collection::vec(any::<u8>(), 0..4096),
    ) {
        let _ = parse(&file(&content));
    }
}
