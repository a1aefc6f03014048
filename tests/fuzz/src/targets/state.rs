//! The state file of a template, and the restore of a machine's memory and devices from it.
//!
//! *The attacker* can write the file: a disk that fails, a copy that was cut short, or somebody who
//! was given the store. Its checksum holds off accidents alone, so some inputs get a right one.
//!
//! *What must hold*: whatever the bytes are, they are refused with an error or make devices that can
//! be driven and saved again, with the same state; no panic; no allocation beyond the file's size and
//! what an empty machine takes; and no mapping beyond the memory file.

use forkvm_vmm::devices::{Backends, DevicesState};
use forkvm_vmm::fuzzing::Machine;
use forkvm_vmm::memory;
use forkvm_vmm::snapshot::{MemoryState, Snapshot, state};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::guest::QUEUES;
use crate::place::{self, Place};
use crate::{heap, ram};

/// Most bytes allocated at a time: a number of nodes for each byte of an input, and their tables.
const HEAP: usize = 32 << 20;

/// Bytes in front of the payload.
const HEADER: usize = 24;

/// Largest memory that is mapped here.
const MOST_MEMORY: u64 = 1 << 32;

/// Runs an input: the first byte says whether the rest is a whole file or a payload.
pub fn run(bytes: &[u8]) {
    let Some((&kind, rest)) = bytes.split_first() else {
        return;
    };
    let file = if kind % 2 == 0 {
        rest.to_vec()
    } else {
        with_header(rest)
    };
    place::with(|place| {
        heap::bounded(HEAP, || {
            if let Ok(snapshot) = state::parse(&file) {
                map(&snapshot.memory);
                restore(&snapshot.devices, place);
            }
        });
    });
}

/// A file whose header fits the payload.
fn with_header(payload: &[u8]) -> Vec<u8> {
    let mut bytes = state::MAGIC.to_vec();
    bytes.extend(state::VERSION.to_le_bytes());
    bytes.extend(crc32fast::hash(payload).to_le_bytes());
    bytes.extend((payload.len() as u64).to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// Maps a memory file as long as it should be, all of it holes.
fn map(state: &MemoryState) {
    if state.bytes > MOST_MEMORY {
        return;
    }
    let file = std::fs::File::from(memfd_create("memory", MemfdFlags::CLOEXEC).expect("a file"));
    file.set_len(state.bytes).expect("a file of holes");
    if memory::private(&file, state.bytes, &state.segments).is_ok() {
        let end = state
            .segments
            .last()
            .map_or(0, |last| last.offset + last.bytes);
        assert!(
            end <= state.bytes,
            "a segment outside of the memory was mapped"
        );
    }
}

fn backends(place: &Place) -> Backends {
    Backends {
        exports: place.exports(),
        entropy: true,
        ..Backends::default()
    }
}

/// Makes devices of the state, lets them work, and makes others of what they save.
fn restore(state: &DevicesState, place: &Place) {
    let memory = ram::fresh();
    let Ok(machine) = Machine::new(memory.clone(), backends(place), Some(state)) else {
        return;
    };
    let bytes = |machine: &Machine| {
        let state = machine.devices().save().expect("every slot has a device");
        postcard::to_stdvec(&state).expect("a state in memory")
    };
    let saved = bytes(&machine);
    let again = postcard::from_bytes(&saved).expect("what was saved can be read");
    let second = Machine::new(memory, backends(place), Some(&again)).expect("and be restored");
    assert!(
        bytes(&second) == saved,
        "a state is not what was restored from it"
    );
    drop(second);
    // The driver that the state has set up notifies every queue.
    for device_type in 0..32 {
        let Some(registers) = machine.registers(device_type) else {
            continue;
        };
        for queue in 0..QUEUES as u32 {
            let notify = registers + forkvm_vmm::devices::virtio::mmio::QUEUE_NOTIFY;
            machine.devices().mmio_write(notify, &queue.to_le_bytes());
        }
    }
    for _ in 0..32 {
        if !machine.turn().expect("epoll") {
            break;
        }
    }
}

/// A state file of a machine whose guest has used its devices, of one that was never started, and
/// the payload of each.
pub fn seeds() -> Vec<Vec<u8>> {
    use crate::guest::Guest;
    use virtio_bindings::virtio_ids::{VIRTIO_ID_RNG, VIRTIO_ID_VSOCK};

    let device = |device_type, up: bool| {
        let mut guest = Guest::new(device_type, Backends::default());
        if up {
            guest.bring_up(u64::MAX, 64);
        }
        guest
            .machine
            .devices()
            .save()
            .expect("every slot has a device")
    };
    let states = [
        device(VIRTIO_ID_RNG, false),
        device(VIRTIO_ID_RNG, true),
        device(VIRTIO_ID_VSOCK, true),
    ];
    // The file server's as a guest leaves it that has looked names up.
    let files = place::with(|place| {
        let guest = super::files::after_lookups(place);
        guest
            .machine
            .devices()
            .save()
            .expect("every slot has a device")
    });
    let mut seeds = Vec::new();
    for devices in states.into_iter().chain([files]) {
        // Zeroes are a valid value of every part that is KVM's.
        let zeroes = [0; 0x1_0000];
        let snapshot = Snapshot {
            memory: MemoryState {
                bytes: memory::MIN_BYTES,
                segments: vec![memory::Segment {
                    offset: memory::PAGE,
                    bytes: 2 * memory::PAGE,
                }],
            },
            vm: postcard::from_bytes(&zeroes).expect("a state of zeroes"),
            vcpus: Vec::new(),
            devices,
        };
        let file = state::serialize(&snapshot).expect("a small state");
        seeds.push([&[1], &file[HEADER..]].concat());
        seeds.push([&[0], &file[..]].concat());
    }
    seeds
}
