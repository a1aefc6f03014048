//! Random sequences of accesses.

use proptest::prelude::*;

use super::saving::restore;
use super::*;

/// Registers, and offsets around them.
fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..0x40).prop_map(|register| register * 4),
        1 => 0u64..0x1000,
    ]
}

/// Values that mean something, and others.
fn value() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0u32..0x100,
        2 => (0u32..8).prop_map(|page| page << 12),
        1 => any::<u32>(),
        1 => Just(RUNNING),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever a driver writes, and in whatever order, the device is only ever active with
    /// queues that lie in memory and features that were offered, and can be saved and restored.
    #[test]
    fn no_sequence_of_accesses_does_harm(
        prefix in 0usize..4,
        writes in proptest::collection::vec((offset(), value()), 0..200),
        filler in any::<u64>(),
    ) {
        let (machine, _) = Machine::running();
        if prefix == 0 {
            machine.set(VIRTIO_MMIO_STATUS, 0);
        }
        let garbage: Vec<u8> = (0..0x8000u64)
            .map(|index| (filler.wrapping_mul(index | 1) >> (filler % 50)) as u8)
            .collect();
        machine.memory.write_slice(&garbage, GuestAddress(0x4000)).unwrap();
        for (offset, value) in writes {
            machine.transport.write(offset, &value.to_le_bytes());
            let mut data = [0; 4];
            machine.transport.read(offset, &mut data);
            let mut device = machine.device.lock().unwrap();
            for index in 0..device.queues.len() {
                let state = device.queues[index].state();
                prop_assert!(!state.ready || rings_valid(&state, &machine.memory));
                // An error is as good as a result.
                let _ = device.process_queue(index);
            }
            prop_assert_eq!(device.features & !(OFFERED | F_VERSION_1), 0);
        }
        let state = machine.transport.save();
        let child = restore(&machine, &state).unwrap();
        prop_assert_eq!(child.transport.save(), state);
        prop_assert_eq!(child.is_active(), machine.is_active());
    }
}
