//! Requests as they come out of a queue: well-formed ones, and whatever a hostile guest sends.

use std::fs;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{
    BatchForgetIn, CreateIn, EntryOut, ForgetIn, ForgetOne, InHeader, InitIn, InitIn2, InitOut,
    Opcode, OpenIn, OpenOut, OutHeader, ReadIn, WriteIn, WriteOut,
};
use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::guest::{LIMITS, export};
use super::place::Place;
use crate::devices::fs::FileServer;
use crate::devices::fs::request::Answerer;
use crate::devices::virtio::Chain;
use crate::memory::GuestMemory;

/// Where things lie in the guest's memory.
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x5000;
const USED: u64 = 0x6000;
const REQUEST: u64 = 0x1_0000;
const REPLY: u64 = 0x20_0000;
const MEMORY: usize = 0x40_0000;

/// A descriptor: address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

const NEXT: u16 = 1;
const WRITE: u16 = 2;

struct Machine {
    memory: Arc<GuestMemory>,
    answerer: Answerer,
    unique: u64,
}

impl Machine {
    fn new(place: &Place) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let server = FileServer::new(vec![export("rootfs", &place.path("root"))], LIMITS).unwrap();
        Machine {
            memory: Arc::new(memory),
            answerer: Answerer::new(Arc::new(server)),
            unique: 0,
        }
    }

    /// A chain of these descriptors, as a device takes it from its queue.
    fn chain(&self, descriptors: &[Descriptor]) -> Option<Chain> {
        for (index, (address, length, flags, next)) in descriptors.iter().enumerate() {
            let at = GuestAddress(TABLE + 16 * index as u64);
            self.memory.write_obj(*address, at).unwrap();
            self.memory
                .write_obj(*length, at.0.checked_add(8).map(GuestAddress).unwrap())
                .unwrap();
            self.memory
                .write_obj(*flags, GuestAddress(at.0 + 12))
                .unwrap();
            self.memory
                .write_obj(*next, GuestAddress(at.0 + 14))
                .unwrap();
        }
        self.memory
            .write_obj([0_u16, 1, 0], GuestAddress(AVAILABLE))
            .unwrap();
        let mut queue = Queue::new(512).unwrap();
        queue.set_desc_table_address(Some(TABLE as u32), Some(0));
        queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
        queue.set_used_ring_address(Some(USED as u32), Some(0));
        queue.set_ready(true);
        queue.iter(self.memory.clone()).unwrap().next()
    }

    fn send_raw(&self, request: &[u8], room: u32) -> u32 {
        self.memory
            .write_slice(request, GuestAddress(REQUEST))
            .unwrap();
        // In two pieces each, as a driver sends headers and data.
        let half = (request.len() / 2) as u32;
        let rest = request.len() as u32 - half;
        let descriptors = [
            (REQUEST, half, NEXT, 1),
            (REQUEST + u64::from(half), rest, NEXT, 2),
            (REPLY, room / 2, NEXT | WRITE, 3),
            (REPLY + u64::from(room / 2), room - room / 2, WRITE, 0),
        ];
        self.answerer.answer(self.chain(&descriptors).unwrap())
    }

    /// A request with its header; gives the error number and the rest of the reply.
    fn send(&mut self, opcode: u32, node: u64, body: &[&[u8]]) -> (i32, Vec<u8>) {
        self.unique += 1;
        let body = body.concat();
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len()) as u32,
            opcode,
            unique: self.unique,
            nodeid: node,
            ..InHeader::default()
        };
        let request = [header.as_slice(), &body].concat();
        let written = self.send_raw(&request, 0x11000) as usize;
        let mut reply = vec![0; written];
        self.memory
            .read_slice(&mut reply, GuestAddress(REPLY))
            .unwrap();
        let out = *OutHeader::from_slice(&reply[..size_of::<OutHeader>()]).unwrap();
        assert_eq!(out.unique, self.unique);
        assert_eq!(out.len as usize, written);
        (out.error, reply.split_off(size_of::<OutHeader>()))
    }

    fn expect<T: ByteValued>(&mut self, opcode: Opcode, node: u64, body: &[&[u8]]) -> T {
        let (error, reply) = self.send(opcode as u32, node, body);
        assert_eq!(error, 0, "{opcode:?}");
        *T::from_slice(&reply[..size_of::<T>()]).unwrap()
    }

    /// An INIT as Linux 6.12 sends it, with all options that it has without DAX.
    fn init(&mut self) -> InitOut {
        let first = InitIn {
            major: 7,
            minor: 41,
            max_readahead: 128 << 10,
            flags: 0x7bff_fffb,
        };
        let second = InitIn2 {
            flags2: 0x3ff,
            ..InitIn2::default()
        };
        self.expect(Opcode::Init, 0, &[first.as_slice(), second.as_slice()])
    }
}

fn machine() -> (Place, Machine) {
    let place = Place::new();
    place.file("root/f", "contents");
    place.dir("root/d");
    let mut machine = Machine::new(&place);
    machine.init();
    (place, machine)
}

#[test]
fn the_session_is_agreed_on() {
    let (_place, mut machine) = machine();
    let out = machine.init();
    assert_eq!((out.major, out.max_write, out.max_pages), (7, 1 << 20, 256));
    let flags = u64::from(out.flags) | u64::from(out.flags2) << 32;
    let has = |bit: u32| flags & (1 << bit) != 0;
    // Numbers of the flags in linux/fuse.h.
    for (bit, name) in [
        (27, "SUBMOUNTS"),
        (28, "HANDLE_KILLPRIV_V2"),
        (6, "DONT_MASK"),
        (12, "AUTO_INVAL_DATA"),
        (13, "DO_READDIRPLUS"),
        (20, "POSIX_ACL"),
        (18, "PARALLEL_DIROPS"),
    ] {
        assert!(has(bit), "{name}");
    }
    for (bit, name) in [
        (1, "POSIX_LOCKS"),
        (10, "FLOCK_LOCKS"),
        (16, "WRITEBACK_CACHE"),
        (4, "EXPORT_SUPPORT"),
        (19, "HANDLE_KILLPRIV"),
    ] {
        assert!(!has(bit), "{name}");
    }
}

#[test]
fn a_file_is_read_and_written_through_guest_memory() {
    let (place, mut machine) = machine();
    let root: EntryOut = machine.expect(Opcode::Lookup, 1, &[b"rootfs\0"]);
    assert_eq!(root.attr.flags, 1, "a submount");
    let file: EntryOut = machine.expect(Opcode::Lookup, root.nodeid, &[b"f\0"]);
    assert_eq!(file.attr.size, 8);
    let open = OpenIn {
        flags: libc::O_RDWR as u32,
        fuse_flags: 0,
    };
    let opened: OpenOut = machine.expect(Opcode::Open, file.nodeid, &[open.as_slice()]);
    let read = ReadIn {
        fh: opened.fh,
        size: 4096,
        ..ReadIn::default()
    };
    let (error, data) = machine.send(Opcode::Read as u32, file.nodeid, &[read.as_slice()]);
    assert_eq!((error, data.as_slice()), (0, b"contents".as_slice()));
    let data = vec![7; 200_000];
    let write = WriteIn {
        fh: opened.fh,
        offset: 3,
        size: data.len() as u32,
        ..WriteIn::default()
    };
    let written: WriteOut = machine.expect(Opcode::Write, file.nodeid, &[write.as_slice(), &data]);
    assert_eq!(written.size, 200_000);
    assert_eq!(
        fs::read(place.path("root/f")).unwrap(),
        [b"con".as_slice(), &data].concat()
    );
}

#[test]
fn requests_newer_than_the_library() {
    let (place, mut machine) = machine();
    let root: EntryOut = machine.expect(Opcode::Lookup, 1, &[b"rootfs\0"]);
    let (error, _) = machine.send(50, root.nodeid, &[&[0; 8]]);
    assert_eq!(error, 0, "syncfs");
    assert_eq!(machine.send(50, 1, &[&[0; 8]]).0, 0, "syncfs of the root");
    let create = CreateIn {
        flags: (libc::O_TMPFILE | libc::O_RDWR) as u32,
        mode: 0o600,
        ..CreateIn::default()
    };
    let (error, reply) = machine.send(51, root.nodeid, &[create.as_slice(), b"\0"]);
    assert_eq!(
        (error, reply.len()),
        (0, size_of::<EntryOut>() + size_of::<OpenOut>()),
        "tmpfile"
    );
    let file: EntryOut = machine.expect(Opcode::Lookup, root.nodeid, &[b"f\0"]);
    let (error, reply) = machine.send(52, file.nodeid, &[&[0; 24]]);
    assert_eq!((error, reply.len()), (0, 288), "statx");
    let field = |at: usize| u64::from_le_bytes(reply[at..at + 8].try_into().unwrap());
    let host = rustix::fs::statx(
        rustix::fs::CWD,
        place.path("root/f"),
        rustix::fs::AtFlags::empty(),
        rustix::fs::StatxFlags::BTIME,
    )
    .unwrap();
    // 32 bytes of the reply's own, then struct statx: stx_ino at 32, stx_size at 40, btime at 80.
    assert_eq!((field(64), field(72)), (host.stx_ino, 8));
    assert_eq!(field(112) as i64, host.stx_btime.tv_sec);
    assert_eq!(machine.send(52, 1, &[&[0; 24]]).0, 0, "statx of the root");
    let open = OpenIn {
        flags: libc::O_RDWR as u32,
        fuse_flags: 0,
    };
    let opened: OpenOut = machine.expect(Opcode::Open, file.nodeid, &[open.as_slice()]);
    let copy = [opened.fh, 0, file.nodeid, opened.fh, 8, 8, 0]
        .map(u64::to_le_bytes)
        .concat();
    let copied: WriteOut = machine.expect(Opcode::CopyFileRange, file.nodeid, &[&copy]);
    assert_eq!(copied.size, 8);
    assert_eq!(fs::read(place.path("root/f")).unwrap(), b"contentscontents");
}

#[test]
fn forgetting_is_not_answered() {
    let (_place, mut machine) = machine();
    let root: EntryOut = machine.expect(Opcode::Lookup, 1, &[b"rootfs\0"]);
    let message = |opcode, node, body: &[u8]| {
        let header = InHeader {
            len: (size_of::<InHeader>() + body.len()) as u32,
            opcode: opcode as u32,
            nodeid: node,
            ..InHeader::default()
        };
        [header.as_slice(), body].concat()
    };
    let again: EntryOut = machine.expect(Opcode::Lookup, 1, &[b"rootfs\0"]);
    assert_eq!(again.nodeid, root.nodeid);
    let forget = message(
        Opcode::Forget,
        root.nodeid,
        ForgetIn { nlookup: 1 }.as_slice(),
    );
    assert_eq!(machine.send_raw(&forget, 0), 0);
    assert_eq!(machine.answerer.files().nodes().counts().0, 2);
    let one = ForgetOne {
        nodeid: root.nodeid,
        nlookup: 1,
    };
    let count = BatchForgetIn { count: 1, dummy: 0 };
    let batch = message(
        Opcode::BatchForget,
        0,
        &[count.as_slice(), one.as_slice()].concat(),
    );
    assert_eq!(machine.send_raw(&batch, 0), 0);
    assert_eq!(machine.answerer.files().nodes().counts().0, 1);
}

#[test]
fn the_end_of_a_session_leaves_nothing() {
    let (_place, mut machine) = machine();
    let root: EntryOut = machine.expect(Opcode::Lookup, 1, &[b"rootfs\0"]);
    let _: OpenOut = machine.expect(
        Opcode::Opendir,
        root.nodeid,
        &[OpenIn::default().as_slice()],
    );
    assert_eq!(machine.send(Opcode::Destroy as u32, 0, &[]).0, 0);
    let files = machine.answerer.files();
    assert_eq!((files.nodes().counts(), files.open_files()), ((1, 0), 0));
    machine.init();
    let _: EntryOut = machine.expect(Opcode::Lookup, 1, &[b"rootfs\0"]);
}

#[test]
fn what_is_malformed_gets_an_error() {
    let (_place, mut machine) = machine();
    let root: EntryOut = machine.expect(Opcode::Lookup, 1, &[b"rootfs\0"]);
    let send = |machine: &mut Machine, opcode: u32, body: &[u8]| {
        machine.send(opcode, root.nodeid, &[body]).0
    };
    for opcode in [0, 7, 19, 48, 49, 53, 4096, u32::MAX, 26 << 24] {
        assert_eq!(
            send(&mut machine, opcode, &[0; 64]),
            -libc::ENOSYS,
            "{opcode}"
        );
    }
    let named = [
        Opcode::Lookup,
        Opcode::Unlink,
        Opcode::Mkdir,
        Opcode::Create,
        Opcode::Symlink,
    ];
    for opcode in named {
        assert_eq!(
            send(&mut machine, opcode as u32, b"no end"),
            -libc::EINVAL,
            "{opcode:?}"
        );
        assert_eq!(
            send(&mut machine, opcode as u32, b""),
            -libc::EINVAL,
            "{opcode:?}"
        );
    }
    for opcode in [
        Opcode::Getattr,
        Opcode::Read,
        Opcode::Write,
        Opcode::Open,
        Opcode::Fallocate,
    ] {
        assert_eq!(
            send(&mut machine, opcode as u32, &[0; 3]),
            -libc::EINVAL,
            "{opcode:?} too short"
        );
    }
    for opcode in [47, 51, 52] {
        assert!(
            send(&mut machine, opcode, &[0; 3]) < 0,
            "{opcode} too short"
        );
    }
    // A length that is not there.
    let header = InHeader {
        len: 1 << 20,
        opcode: Opcode::Lookup as u32,
        unique: 77,
        nodeid: root.nodeid,
        ..InHeader::default()
    };
    assert_eq!(
        machine.send_raw(&[header.as_slice(), b"f\0"].concat(), 100),
        16
    );
    let out: OutHeader = machine.memory.read_obj(GuestAddress(REPLY)).unwrap();
    assert_eq!((out.error, out.unique), (-libc::EINVAL, 77));
    // No room for an answer, no request at all.
    assert_eq!(
        machine.send_raw(&[header.as_slice(), b"f\0"].concat(), 8),
        0
    );
    assert_eq!(machine.send_raw(&[1, 2, 3], 100), 0);
    assert_eq!(machine.send_raw(&[], 100), 0);
}

#[test]
fn chains_beyond_the_bounds_are_dropped() {
    let (_place, mut machine) = machine();
    let header = InHeader {
        len: 40,
        opcode: Opcode::Statfs as u32,
        nodeid: 1,
        ..InHeader::default()
    };
    machine
        .memory
        .write_obj(header, GuestAddress(REQUEST))
        .unwrap();
    let good = [(REQUEST, 40, NEXT, 1), (REPLY, 4096, WRITE, 0)];
    let answered = machine.answerer.answer(machine.chain(&good).unwrap());
    assert_eq!(answered, 96);
    let bad: [&[Descriptor]; 6] = [
        // Outside of memory, and across its end.
        &[(1 << 40, 40, NEXT, 1), (REPLY, 4096, WRITE, 0)],
        &[(REQUEST, 40, NEXT, 1), (MEMORY as u64 - 8, 4096, WRITE, 0)],
        &[(REQUEST, 40, NEXT, 1), (u64::MAX, 4096, WRITE, 0)],
        // Much more than a request may have: in one piece, and in all.
        &[(REQUEST, 40, NEXT, 1), (REPLY, 0x1f_0000, WRITE, 0)],
        &[
            (REQUEST, 40, NEXT, 1),
            (REPLY, 0x9_0000, WRITE | NEXT, 2),
            (REPLY, 0x9_0000, WRITE, 0),
        ],
        &[(REQUEST, u32::MAX, NEXT, 1), (REPLY, u32::MAX, WRITE, 0)],
    ];
    for descriptors in bad {
        let chain = machine.chain(descriptors).unwrap();
        assert_eq!(machine.answerer.answer(chain), 0, "{descriptors:?}");
    }
    // A circle ends where the queue does.
    let circle = [(REQUEST, 40, NEXT, 1), (REPLY, 4096, WRITE | NEXT, 1)];
    let chain = machine.chain(&circle).unwrap();
    machine.answerer.answer(chain);
    let _: InitOut = machine.init();
}

proptest! {
    // A serving thread is in /proc/self/fd, from where no source file is found to write beside.
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever comes, nobody panics, replies stay in their room, and the next request works.
    #[test]
    fn hostile_requests_are_survived(
        requests in prop::collection::vec(
            (0_u32..56, prop_oneof![0_u64..8, any::<u64>()], any::<u32>(), prop::collection::vec(any::<u8>(), 0..200), 0_u32..9000, any::<bool>()),
            1..80,
        )
    ) {
        let (_place, mut machine) = machine();
        let root: EntryOut = machine.expect(Opcode::Lookup, 1, &[b"rootfs\0"]);
        let _: EntryOut = machine.expect(Opcode::Lookup, root.nodeid, &[b"f\0"]);
        for (opcode, node, length, mut body, room, honest) in requests {
            let own = (size_of::<InHeader>() + body.len()) as u32;
            if honest {
                // Small numbers look like handles, and a name ends.
                for byte in &mut body[..] {
                    *byte &= 3;
                }
                if let Some(last) = body.last_mut() {
                    *last = 0;
                }
            }
            let header = InHeader {
                len: if honest { own } else { length },
                opcode,
                unique: 1,
                nodeid: node,
                ..InHeader::default()
            };
            let written = machine.send_raw(&[header.as_slice(), &body].concat(), room);
            prop_assert!(written <= room, "{written} bytes in room for {room}: {opcode}");
        }
        machine.init();
        let _: EntryOut = machine.expect(Opcode::Lookup, 1, &[b"rootfs\0"]);
    }

    /// Chains of any shape.
    #[test]
    fn hostile_chains_are_survived(
        descriptors in prop::collection::vec(
            (prop_oneof![Just(REQUEST), Just(REPLY), 0..MEMORY as u64 + 4096, any::<u64>()],
             prop_oneof![0_u32..5000, any::<u32>()], 0_u16..4, 0_u16..24),
            1..24,
        ),
        opcode in 0_u32..56,
    ) {
        let (_place, mut machine) = machine();
        let header = InHeader { len: 48, opcode, unique: 1, nodeid: 1, ..InHeader::default() };
        machine.memory.write_obj(header, GuestAddress(REQUEST)).unwrap();
        if let Some(chain) = machine.chain(&descriptors) {
            let room: u64 = chain.clone().writable().map(|descriptor| u64::from(descriptor.len())).sum();
            let written = machine.answerer.answer(chain);
            prop_assert!(u64::from(written) <= room);
        }
        machine.init();
    }
}
