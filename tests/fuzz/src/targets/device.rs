//! A device behind the MMIO transport.
//!
//! *The attacker* is the guest's kernel: it writes any register with any value in any order, and
//! has any bytes in its memory, rings and descriptor tables among them, before and between them.
//!
//! *What must hold*: no panic; no access outside of guest memory; never more given back than was
//! made available; bounds on what is kept and allocated; what can be frozen can be restored; and
//! after a reset the guest's memory is left alone.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use forkvm_vmm::devices::{Backends, console};
use forkvm_vmm::memory::Backing;
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_bindings::virtio_ids::{VIRTIO_ID_CONSOLE, VIRTIO_ID_FS};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;

use crate::guest::{BUFFERS, Guest, WRITE};
use crate::heap;
use crate::input::{Input, Output};
use crate::place::{self, Place};

/// Most bytes that the devices may allocate at a time for one input: a request of the file server
/// takes its data's size, 1 MiB at most, some times over.
const HEAP: usize = 32 << 20;

/// Most steps of an input, and most streams of its host.
const STEPS: usize = 512;
const STREAMS: usize = 16;

/// Kinds of steps, the first byte of each.
mod step {
    pub(super) const REGISTER: u8 = 0;
    pub(super) const WRITE: u8 = 1;
    pub(super) const READ: u8 = 2;
    pub(super) const MEMORY: u8 = 3;
    pub(super) const NOTIFY: u8 = 4;
    pub(super) const TURN: u8 = 5;
    pub(super) const BRING_UP: u8 = 6;
    pub(super) const DESCRIBE: u8 = 7;
    pub(super) const PUBLISH: u8 = 8;
    pub(super) const AVAILABLE: u8 = 9;
    pub(super) const HOST: u8 = 10;
    pub(super) const FORK: u8 = 11;
    pub(super) const OFFER: u8 = 12;
    pub(super) const KINDS: u8 = 13;
}

/// Runs an input for the device of this type.
pub fn run<const TYPE: u32>(bytes: &[u8]) {
    if TYPE == VIRTIO_ID_FS {
        place::with(|place| heap::bounded(HEAP, || drive(TYPE, bytes, Some(place))));
    } else {
        heap::bounded(HEAP, || drive(TYPE, bytes, None));
    }
}

/// The device's own backend.
struct Host<'a> {
    place: Option<&'a Place>,
    console: Option<File>,
    /// The host's ends of vsock connections.
    streams: Vec<UnixStream>,
}

impl Host<'_> {
    fn backends(&self) -> Backends {
        Backends {
            exports: self.place.map_or_else(Vec::new, Place::exports),
            console: self
                .console
                .as_ref()
                .map(|file| console::Output::shared(file.try_clone().expect("a descriptor"))),
            taps: Vec::new(),
            entropy: true,
            memory: Backing::default(),
        }
    }

    /// Something happens on the host.
    fn act(&mut self, guest: &Guest, input: &mut Input<'_>) -> Option<()> {
        let (action, which) = (input.u8()?, input.u8()?);
        if action.is_multiple_of(4) {
            if self.streams.len() < STREAMS {
                let (ours, theirs) = UnixStream::pair().expect("a stream");
                ours.set_nonblocking(true).expect("a stream");
                let connected = guest.machine.devices().connect(which.into(), [theirs]);
                connected.expect("fewer connections than the bound");
                self.streams.push(ours);
            }
            return Some(());
        }
        let count = self.streams.len();
        let mut stream = self.streams.get(usize::from(which) % count.max(1))?;
        match action % 4 {
            // A full stream or one whose other end is closed is no fault of the device.
            1 => drop(stream.write(&[which; 3000])),
            2 => drop(stream.read(&mut [0; 0x1_0000])),
            _ if action < 64 => drop(stream.shutdown(Shutdown::Write)),
            _ => drop(self.streams.swap_remove(usize::from(which) % count)),
        }
        Some(())
    }
}

fn drive(device_type: u32, bytes: &[u8], place: Option<&Place>) {
    let console = (device_type == VIRTIO_ID_CONSOLE).then(|| {
        memfd_create("console", MemfdFlags::CLOEXEC)
            .expect("a file")
            .into()
    });
    let mut host = Host {
        place,
        console,
        streams: Vec::new(),
    };
    let mut guest = Guest::new(device_type, host.backends());
    let mut input = Input::new(bytes);
    for _ in 0..STEPS {
        if take(&mut guest, &mut host, &mut input).is_none() {
            break;
        }
        guest.check();
    }
    guest.settle();
    guest.finish();
    if let Some(file) = &host.console {
        let length = file.metadata().expect("a file").len();
        assert!(
            length <= console::MAX_OUTPUT + 100,
            "{length} bytes of output"
        );
    }
}

/// Takes one step; none if the input is at its end.
fn take(guest: &mut Guest, host: &mut Host<'_>, input: &mut Input<'_>) -> Option<()> {
    match input.u8()? % step::KINDS {
        step::REGISTER => guest.set(u32::from(input.u8()?) * 4, input.u32()?),
        step::WRITE => {
            let offset = input.u16()?;
            guest.access(offset.into(), &mut input.bytes()?.to_vec(), true);
        }
        step::READ => {
            let (offset, length) = (input.u16()?, input.u8()?);
            guest.access(offset.into(), &mut vec![0; length.into()], false);
        }
        step::MEMORY => guest.write(input.u32()?.into(), input.bytes()?),
        step::NOTIFY => guest.set(VIRTIO_MMIO_QUEUE_NOTIFY, input.u8()?.into()),
        step::TURN => guest.settle(),
        step::BRING_UP => guest.bring_up(input.u64()?, input.u16()?),
        step::DESCRIBE => {
            let (queue, index) = (input.u8()?, input.u16()?);
            let descriptor = (input.u64()?, input.u32()?, input.u16()?, input.u16()?);
            guest.describe(queue.into(), index, descriptor);
        }
        step::PUBLISH => guest.publish(input.u8()?.into(), input.u16()?),
        step::AVAILABLE => guest.set_available(input.u8()?.into(), input.u16()?),
        step::HOST => host.act(guest, input)?,
        step::FORK => guest.fork(host.backends()),
        _ => {
            let (queue, split) = (input.u8()?, input.u8()?);
            let (data, room) = (input.bytes()?, input.u16()?);
            offer(guest, queue.into(), split.into(), data, room.into());
        }
    }
    Some(())
}

/// Makes a well-formed chain available: data to read in up to two pieces, and room to write.
fn offer(guest: &mut Guest, queue: usize, split: usize, data: &[u8], room: u32) {
    let split = split.min(data.len());
    let (first, second) = (BUFFERS, BUFFERS + 0x1000);
    guest.write(first, &data[..split]);
    guest.write(second, &data[split..]);
    let pieces = [
        (first, split as u32, false),
        (second, (data.len() - split) as u32, false),
        (BUFFERS + 0x2000, room, true),
    ];
    let pieces: Vec<_> = pieces.into_iter().filter(|piece| piece.1 > 0).collect();
    if !pieces.is_empty() {
        guest.offer(queue, &pieces);
        guest.notify(queue);
    }
}

/// A device that is set up, and chains of each kind for each queue; with and without a fork.
pub fn seeds() -> Vec<Vec<u8>> {
    let up = Output::default().u8(step::BRING_UP).u64(u64::MAX).u16(64);
    let offer = |to: Output, queue: u8, data: &[u8], room: u16| {
        to.u8(step::OFFER).u8(queue).u8(20).bytes(data).u16(room)
    };
    let connected = up
        .clone()
        .raw(&[step::HOST, 0, 7, step::TURN, step::HOST, 1, 0]);
    let mut seeds = Vec::new();
    for start in [up, connected] {
        for queue in 0..3 {
            // 26 is FUSE_INIT; the rest of a request's header, and of a packet's, is mostly zeroes.
            let request = [&[56, 0, 0, 0, 26][..], &[0; 51]].concat();
            let mut all = offer(start.clone(), queue, &request, 4000);
            all = offer(all, queue, &[], 4000);
            all = offer(all, queue, b"some text", 0);
            seeds.push(all.clone().0);
            let forked = all.u8(step::FORK).u8(step::TURN);
            seeds.push(offer(forked, queue, &request, 100).0);
        }
    }
    // By hand, register by register: a chain with an indirect table, and one that is a loop.
    let raw = Output::default()
        .raw(&[step::BRING_UP])
        .u64(u64::MAX)
        .u16(8)
        .u8(step::DESCRIBE)
        .u8(1)
        .u16(0)
        .u64(BUFFERS)
        .u32(32)
        .u16(4)
        .u16(0)
        .u8(step::DESCRIBE)
        .u8(0)
        .u16(1)
        .u64(BUFFERS)
        .u32(64)
        .u16(1 | WRITE)
        .u16(1)
        .u8(step::MEMORY)
        .u32(BUFFERS as u32)
        .bytes(&[0, 0x20, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 2, 0, 0, 0])
        .raw(&[
            step::PUBLISH,
            1,
            0,
            0,
            step::NOTIFY,
            1,
            step::PUBLISH,
            0,
            1,
            0,
        ])
        .raw(&[
            step::NOTIFY,
            0,
            step::TURN,
            step::AVAILABLE,
            1,
            9,
            0,
            step::NOTIFY,
            1,
        ])
        .raw(&[step::REGISTER, 0x1c, 0, 0, 0, 0, step::WRITE, 0, 1, 2, 7, 7])
        .raw(&[step::READ, 0, 1, 16, step::TURN]);
    seeds.push(raw.0);
    // Buffers that begin in memory and end outside of it, again and again.
    let mut edge = Output::default()
        .raw(&[step::BRING_UP])
        .u64(u64::MAX)
        .u16(8);
    for flags in [0, WRITE] {
        for queue in 0..2 {
            edge = edge
                .u8(step::DESCRIBE)
                .u8(queue)
                .u16(0)
                .u64(BUFFERS)
                .u32(u32::MAX)
                .u16(flags)
                .u16(0);
            for _ in 0..30 {
                edge = edge.raw(&[step::PUBLISH, queue, 0, 0, step::NOTIFY, queue, step::TURN]);
            }
        }
    }
    seeds.push(edge.0);
    seeds
}
