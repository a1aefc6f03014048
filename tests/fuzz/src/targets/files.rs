//! The file server's requests (FUSE, linux/fuse.h).
//!
//! *The attacker* is the guest's kernel: any request with any arguments, for any node and handle,
//! with any room for the answer.
//!
//! *What must hold*: no panic; nothing outside of the exports is read, listed or changed, whatever
//! links and names lead to; nodes, descriptors and open files stay within their bounds; memory
//! stays within what one request may take.

use forkvm_vmm::devices::Backends;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{BUFFERS, Guest};
use crate::heap;
use crate::input::{Input, Output};
use crate::place::{self, Place};

/// hiprio and requests.
const QUEUES: usize = 2;

/// Most requests of an input.
const STEPS: usize = 300;

/// Most bytes allocated at a time: a request's data, 1 MiB at most, some times over.
const HEAP: usize = 16 << 20;

/// Where requests and answers lie, and most room for an answer.
const REQUEST: u64 = BUFFERS;
const ANSWER: u64 = BUFFERS + 0x2000;
const ROOM: u32 = 0x1_0000;

/// Bytes of `struct fuse_in_header`.
const HEADER: usize = 40;

/// Names that mean something here; others come with the arguments.
const NAMES: [&str; 12] = [
    "rootfs", "vol-0", "d", "e", "f", "g", "up", "out", "file", "new", "..", "known",
];

/// Requests (linux/fuse.h), for the seeds.
mod op {
    pub(super) const LOOKUP: u8 = 1;
    pub(super) const FORGET: u8 = 2;
    pub(super) const GETATTR: u8 = 3;
    pub(super) const SETATTR: u8 = 4;
    pub(super) const READLINK: u8 = 5;
    pub(super) const SYMLINK: u8 = 6;
    pub(super) const MKNOD: u8 = 8;
    pub(super) const MKDIR: u8 = 9;
    pub(super) const UNLINK: u8 = 10;
    pub(super) const RMDIR: u8 = 11;
    pub(super) const LINK: u8 = 13;
    pub(super) const OPEN: u8 = 14;
    pub(super) const READ: u8 = 15;
    pub(super) const WRITE: u8 = 16;
    pub(super) const STATFS: u8 = 17;
    pub(super) const RELEASE: u8 = 18;
    pub(super) const FSYNC: u8 = 20;
    pub(super) const SETXATTR: u8 = 21;
    pub(super) const GETXATTR: u8 = 22;
    pub(super) const LISTXATTR: u8 = 23;
    pub(super) const REMOVEXATTR: u8 = 24;
    pub(super) const FLUSH: u8 = 25;
    pub(super) const INIT: u8 = 26;
    pub(super) const OPENDIR: u8 = 27;
    pub(super) const READDIR: u8 = 28;
    pub(super) const RELEASEDIR: u8 = 29;
    pub(super) const ACCESS: u8 = 34;
    pub(super) const CREATE: u8 = 35;
    pub(super) const DESTROY: u8 = 38;
    pub(super) const BATCH_FORGET: u8 = 42;
    pub(super) const FALLOCATE: u8 = 43;
    pub(super) const READDIRPLUS: u8 = 44;
    pub(super) const RENAME2: u8 = 45;
    pub(super) const LSEEK: u8 = 46;
    pub(super) const COPY_FILE_RANGE: u8 = 47;
    pub(super) const SYNCFS: u8 = 50;
    pub(super) const TMPFILE: u8 = 51;
    pub(super) const STATX: u8 = 52;
}

/// Bits of the byte that says how a request is made.
mod shape {
    /// Its node is eight bytes, not one.
    pub(super) const WIDE_NODE: u8 = 1;
    /// Its caller is not root.
    pub(super) const USER: u8 = 2;
    /// Its length is what it says, not what it is.
    pub(super) const LIE: u8 = 4;
    /// As many of [`super::NAMES`] follow its arguments.
    pub(super) const ONE_NAME: u8 = 8;
    pub(super) const TWO_NAMES: u8 = 16;
    /// The answer has room for 16 bytes, not 64 KiB.
    pub(super) const SHORT: u8 = 32;
    /// Many zeroes follow: data to write.
    pub(super) const DATA: u8 = 64;
    /// The machine is forked before it.
    pub(super) const FORK: u8 = 128;
}

/// Runs an input.
pub fn run(bytes: &[u8]) {
    place::with(|place| heap::bounded(HEAP, || serve(bytes, place)));
}

fn backends(place: &Place) -> Backends {
    Backends {
        exports: place.exports(),
        ..Backends::default()
    }
}

fn serve(bytes: &[u8], place: &Place) {
    drive(bytes, place).finish();
}

/// A machine whose guest has looked some names up.
pub(super) fn after_lookups(place: &Place) -> Guest {
    let seeds = seeds();
    drive(&seeds[seeds.len() - 1], place)
}

fn drive(bytes: &[u8], place: &Place) -> Guest {
    let mut guest = Guest::new(VIRTIO_ID_FS, backends(place));
    guest.bring_up(u64::MAX, 64);
    let mut input = Input::new(bytes);
    for _ in 0..STEPS {
        let Some((queue, request, room, fork)) = next(&mut input) else {
            break;
        };
        if fork {
            guest.fork(backends(place));
        }
        guest.write(REQUEST, &request);
        guest.offer(
            queue,
            &[(REQUEST, request.len() as u32, false), (ANSWER, room, true)],
        );
        guest.notify(queue);
        while let Some((_, written)) = guest.take_used(queue) {
            assert!(written <= room, "{written} bytes in a room of {room}");
            check_answer(&guest, written, place);
        }
    }
    guest
}

/// The next request: its queue, its bytes, the room for its answer, and whether a fork comes first.
fn next(input: &mut Input<'_>) -> Option<(usize, Vec<u8>, u32, bool)> {
    let (operation, how) = (input.u8()?, input.u8()?);
    let has = |bit| how & bit != 0;
    let node = if has(shape::WIDE_NODE) {
        input.u64()?
    } else {
        input.u8()?.into()
    };
    let length = if has(shape::LIE) {
        Some(input.u32()?)
    } else {
        None
    };
    let mut body = input.bytes()?.to_vec();
    let names = usize::from(has(shape::ONE_NAME)) + 2 * usize::from(has(shape::TWO_NAMES));
    for _ in 0..names {
        let name = NAMES[usize::from(input.u8()?) % NAMES.len()];
        body.extend_from_slice(name.as_bytes());
        body.push(0);
    }
    if has(shape::DATA) {
        body.resize(body.len() + 5000, 0);
    }
    let user = if has(shape::USER) { 1000 } else { 0 };
    let request = Output::default()
        .u32(length.unwrap_or((HEADER + body.len()) as u32))
        // The highest bit chooses the queue: no request has a number that large.
        .u32((operation & 0x7f).into())
        .u64(7)
        .u64(node)
        .u32(user)
        .u32(user)
        .u32(1)
        .u32(0)
        .raw(&body);
    let queue = usize::from(operation < 0x80) % QUEUES;
    let room = if has(shape::SHORT) { 16 } else { ROOM };
    Some((queue, request.0, room, has(shape::FORK)))
}

/// Whatever the answer is, it has nothing of what lies outside.
fn check_answer(guest: &Guest, written: u32, place: &Place) {
    let mut answer = vec![0; written as usize];
    let read = guest.memory.read_slice(&mut answer, GuestAddress(ANSWER));
    read.expect("an answer in memory");
    let secret = place.secret();
    let found = answer.windows(secret.len()).any(|window| window == secret);
    assert!(!found, "the guest has read what is outside of its export");
}

/// A request with its arguments, for a node, with names.
fn ask(to: Output, operation: u8, node: u8, arguments: &[u8], names: &[u8]) -> Output {
    let how = match names.len() {
        0 => 0,
        1 => shape::ONE_NAME,
        _ => shape::TWO_NAMES,
    };
    to.raw(&[operation, how, node]).bytes(arguments).raw(names)
}

/// Sessions of a well-behaved guest.
pub fn seeds() -> Vec<Vec<u8>> {
    let words = |words: &[u32]| {
        words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<_>>()
    };
    let zeroes = |count: usize| vec![0; count];
    let init = words(&[7, 38, 0x2_0000, u32::MAX]);
    let begin = ask(
        Output::default(),
        op::INIT,
        0,
        &[&init[..], &zeroes(48)].concat(),
        &[],
    );
    // Nodes: 1 is the root, 2 and 3 the exports, 4 the folder `d`, 5 the file `f`, then the links.
    let mut known = begin;
    for (parent, name) in [(1, 0), (1, 1), (2, 2), (2, 4), (2, 6), (2, 7), (2, 8)] {
        known = ask(known, op::LOOKUP, parent, &[], &[name]);
    }
    let of = |requests: &[(u8, u8, Vec<u8>, &[u8])]| {
        let begin = known.clone();
        let all = requests
            .iter()
            .fold(begin, |to, (operation, node, arguments, names)| {
                ask(to, *operation, *node, arguments, names)
            });
        all.0
    };
    let handle = |first: u32, more: usize| [words(&[first, 0]), zeroes(more)].concat();
    let mut data = [words(&[1, 0, 0, 0, 10, 0]), zeroes(16)].concat();
    data.extend_from_slice(b"0123456789");
    vec![
        of(&[
            (op::OPEN, 5, words(&[2, 0]), &[]),
            (
                op::READ,
                5,
                [words(&[1, 0, 0, 0, 4096]), zeroes(20)].concat(),
                &[],
            ),
            (op::WRITE, 5, data, &[]),
            (
                op::FALLOCATE,
                5,
                [words(&[1, 0, 0, 0, 4096, 0]), zeroes(8)].concat(),
                &[],
            ),
            (
                op::LSEEK,
                5,
                [words(&[1, 0, 0, 0, 3]), zeroes(4)].concat(),
                &[],
            ),
            (
                op::COPY_FILE_RANGE,
                5,
                [words(&[1, 0, 0, 0, 5, 0, 1, 0, 9, 0, 5]), zeroes(12)].concat(),
                &[],
            ),
            (op::FSYNC, 5, handle(1, 8), &[]),
            (op::FLUSH, 5, handle(1, 16), &[]),
            (op::RELEASE, 5, handle(1, 16), &[]),
        ]),
        of(&[
            (op::OPENDIR, 2, zeroes(8), &[]),
            (
                op::READDIRPLUS,
                2,
                [words(&[1, 0, 0, 0, 4096]), zeroes(20)].concat(),
                &[],
            ),
            (
                op::READDIR,
                2,
                [words(&[1, 0, 0, 0, 4096]), zeroes(20)].concat(),
                &[],
            ),
            (op::RELEASEDIR, 2, handle(1, 16), &[]),
            (op::STATFS, 2, vec![], &[]),
            (op::ACCESS, 2, zeroes(8), &[]),
        ]),
        of(&[
            (op::CREATE, 4, words(&[0o102, 0o644, 0, 0]), &[9]),
            (op::MKDIR, 2, words(&[0o755, 0]), &[9]),
            (op::MKNOD, 2, words(&[0o010_644, 0, 0, 0]), &[10]),
            (op::MKNOD, 4, words(&[0o010_644, 0, 0, 0]), &[3]),
            (op::RENAME2, 2, words(&[4, 0, 0, 0]), &[4, 9]),
            (op::LINK, 4, words(&[5, 0]), &[11]),
            (op::UNLINK, 4, vec![], &[11]),
            (op::RMDIR, 2, vec![], &[9]),
            (op::TMPFILE, 2, words(&[0o102, 0o644, 0, 0]), &[4]),
        ]),
        of(&[
            (op::READLINK, 6, vec![], &[]),
            (op::LOOKUP, 6, vec![], &[11]),
            (op::OPENDIR, 7, zeroes(8), &[]),
            (op::OPEN, 8, words(&[0, 0]), &[]),
            (op::SYMLINK, 2, b"new\0../outside\0".to_vec(), &[]),
            (op::LOOKUP, 2, vec![], &[10]),
            (op::CREATE, 2, words(&[0o1102, 0o644, 0, 0]), &[8]),
        ]),
        of(&[
            (op::GETATTR, 5, zeroes(16), &[]),
            (op::STATX, 5, [zeroes(16), words(&[0, 0xfff])].concat(), &[]),
            (
                op::SETATTR,
                5,
                [words(&[0x9, 0]), zeroes(8), words(&[100, 0]), zeroes(64)].concat(),
                &[],
            ),
            (
                op::SETATTR,
                5,
                [words(&[0x1, 0]), zeroes(60), words(&[0o600]), zeroes(16)].concat(),
                &[],
            ),
            (
                op::SETXATTR,
                5,
                [words(&[1, 0]), b"user.a\0x".to_vec()].concat(),
                &[],
            ),
            (
                op::GETXATTR,
                5,
                [words(&[100, 0]), b"user.a\0".to_vec()].concat(),
                &[],
            ),
            (op::LISTXATTR, 5, words(&[100, 0]), &[]),
            (op::REMOVEXATTR, 5, b"user.a\0".to_vec(), &[]),
        ]),
        of(&[
            (op::FORGET, 5, words(&[1, 0]), &[]),
            (
                op::BATCH_FORGET,
                0,
                words(&[2, 0, 4, 0, 1, 0, 6, 0, 1, 0]),
                &[],
            ),
            (op::SYNCFS, 2, zeroes(8), &[]),
            (op::DESTROY, 0, vec![], &[]),
            (op::LOOKUP, 2, vec![], &[4]),
        ]),
        {
            let mut forked =
                known
                    .clone()
                    .raw(&[op::LOOKUP, shape::FORK | shape::ONE_NAME, 2, 0, 4]);
            forked = forked.raw(&[
                op::LOOKUP | 0x80,
                shape::WIDE_NODE | shape::USER | shape::SHORT,
            ]);
            forked.u64(1 << 40).bytes(b"f\0").0
        },
    ]
}
