//! The packets of a monitor's control socket, in both directions.
//!
//! *The attacker* is a monitor that its guest has taken over, which sends its shim any packet with any
//! descriptors; the other way it is a launcher with a fault.
//!
//! *What must hold*: no panic; memory is bounded; a packet is understood or refused; descriptors that
//! came with one are closed with it; a launch names as many as it got.

use std::fs::File;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

use forkvm_vmm::control::{
    Event, Export, FailureKind, Frozen, Launch, NetworkNamespace, Purpose, Request, Socket, Source,
    TimePoint, Writes,
};
use forkvm_vmm::fuzzing;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::heap;

/// Most bytes allocated at a time: a packet is 64 KiB at most, and its values are some times that.
const HEAP: usize = 4 << 20;

/// Most descriptors sent with a packet.
const DESCRIPTORS: usize = 16;

/// Runs an input: the first byte says for whom the rest is and how many descriptors come with it.
pub fn run(bytes: &[u8]) {
    let Some((&kind, packet)) = bytes.split_first() else {
        return;
    };
    let null = File::open("/dev/null").expect("a descriptor");
    let free = null.as_raw_fd();
    heap::bounded(HEAP, || {
        let (ours, theirs) = Socket::pair().expect("a socket");
        send(
            &ours,
            packet,
            &null,
            usize::from(kind >> 1) % (DESCRIPTORS + 1),
        );
        if kind.is_multiple_of(2) {
            // A packet of no bytes is the end.
            if let Ok(Some((event, _))) = theirs.receive::<Event>() {
                check_again(&event);
            }
        } else if let Ok(Some((request, descriptors))) = theirs.receive::<Request>() {
            check_again(&request);
            let count = descriptors.len();
            if let Request::Launch(launch) = request
                && let Ok(exports) = fuzzing::launch(launch, descriptors)
            {
                assert!(
                    exports + 2 <= count,
                    "{exports} exports from {count} descriptors"
                );
            }
        }
    });
    drop(null);
    let now = File::open("/dev/null").expect("a descriptor").as_raw_fd();
    assert_eq!(now, free, "descriptors were left open");
}

fn send(socket: &Socket, packet: &[u8], null: &File, count: usize) {
    let descriptors = vec![null.as_fd(); count];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if count > 0 {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let sent = sendmsg(
        socket,
        &[IoSlice::new(packet)],
        &mut ancillary,
        SendFlags::empty(),
    );
    assert_eq!(sent, Ok(packet.len()));
}

/// What was understood says the same when it is sent again.
fn check_again<M>(message: &M)
where
    M: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let text = serde_json::to_vec(message).expect("a message in memory");
    assert_eq!(
        &serde_json::from_slice::<M>(&text).expect("what was written can be read"),
        message
    );
}

/// One packet of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let launch = |source, purpose, exports: &[&str]| {
        Request::Launch(Launch {
            source,
            purpose,
            network_namespace: NetworkNamespace::Join,
            console: true,
            exports: exports
                .iter()
                .map(|name| Export {
                    name: (*name).to_owned(),
                    read_only: false,
                    shared: true,
                })
                .collect(),
        })
    };
    let boot = Source::Boot {
        vcpus: 1,
        memory_bytes: 64 << 20,
        cmdline: "quiet".to_owned(),
    };
    let fork = Source::Fork {
        template: "0123456789abcdef".to_owned(),
        writes: Writes::Expect,
    };
    let requests = [
        (launch(fork, Purpose::Run, &["rootfs", "vol-0"]), 7),
        (launch(boot, Purpose::Freeze, &[]), 4),
        (Request::Connect { port: 1024 }, 1),
        (Request::Connect { port: 1025 }, 3),
        (Request::Pause, 0),
        (Request::Resume, 0),
        (Request::Written, 0),
        (Request::Freeze, 2),
    ];
    let point = TimePoint {
        name: "vm.created".to_owned(),
        at_ns: 7,
    };
    let events = [
        Event::Running {
            points: vec![point; 3],
        },
        Event::AgentListening,
        Event::Frozen(Frozen {
            data_bytes: 1,
            state_bytes: 2,
        }),
        Event::Progress {
            step: "a step".to_owned(),
        },
        Event::Paused,
        Event::Resumed,
        Event::Stopped {
            reason: "why".to_owned(),
        },
        Event::Failed {
            kind: FailureKind::NoKvm,
            message: "what to do".to_owned(),
        },
    ];
    let text = |kind: u8, bytes: serde_json::Result<Vec<u8>>| {
        [&[kind], &bytes.expect("a message in memory")[..]].concat()
    };
    let requests = requests
        .iter()
        .map(|(request, count)| text(1 | count << 1, serde_json::to_vec(request)));
    let events = events
        .iter()
        .map(|event| text(0, serde_json::to_vec(event)));
    requests.chain(events).collect()
}
