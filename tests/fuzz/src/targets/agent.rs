//! The agent's answers (ttrpc and its messages, `api/proto/agent.proto`), as the shim takes them.
//!
//! *The attacker* is the guest: any bytes on the connection to its agent, at any time.
//!
//! *What must hold*: no panic; memory is bounded by the largest frame; every call comes to an end when
//! the connection does, if not before; what was answered is what the bytes say.

use std::time::Duration;

use forkvm_api::agent::{
    CreateResponse, ExecRequest, OutOfMemoryRequest, PidsRequest, PidsResponse, SignalRequest,
    StartRequest, StatsRequest, StatsResponse, WaitRequest, WaitResponse,
    pids_response::Process,
    stats_response::{Io, Usage},
};
use forkvm_api::agent_ttrpc::AgentClient;
use protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;
use ttrpc::asynchronous::{Client, transport::Socket};
use ttrpc::context;
use ttrpc::proto::{Code, Response, Status};

use crate::heap;
use crate::input::{Input, Output};

/// Most bytes allocated at a time: a frame of 4 MiB, what is made of it, and the runtime.
const HEAP: usize = 24 << 20;

/// Longest a call may take after the end of its connection, which takes no time at all.
const END: Duration = Duration::from_secs(5);

/// Most frames of an input.
const FRAMES: usize = 64;

/// Types of frames (ttrpc's PROTOCOL.md).
const RESPONSE: u8 = 2;
const DATA: u8 = 3;

/// Runs an input: whole frames, their headers with a lie or none, and raw bytes.
pub fn run(bytes: &[u8]) {
    heap::bounded(HEAP, || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime");
        runtime.block_on(talk(&mut Input::new(bytes)));
    });
}

async fn talk(input: &mut Input<'_>) {
    let (ours, mut guest) = tokio::io::duplex(1 << 16);
    let agent = AgentClient::new(Client::new(Socket::new(ours)));
    let calls = calls(&agent);
    // The calls are on their way when the first answer comes: their frames have the numbers 1, 3, 5...
    let mut scrap = [0; 4096];
    for _ in &calls {
        read_away(&mut guest, &mut scrap).await;
    }
    for _ in 0..FRAMES {
        let Some(frame) = next(input) else { break };
        // A connection that the shim has given up takes no more.
        if guest.write_all(&frame).await.is_err() {
            break;
        }
        read_away(&mut guest, &mut scrap).await;
    }
    drop(guest);
    for call in calls {
        let ended = tokio::time::timeout(END, call).await;
        ended
            .expect("a call outlives its connection")
            .expect("a call panicked");
    }
}

/// Takes what the shim has sent meanwhile.
async fn read_away(guest: &mut DuplexStream, scrap: &mut [u8]) {
    tokio::task::yield_now().await;
    tokio::select! {
        biased;
        _ = guest.read(scrap) => {}
        () = std::future::ready(()) => {}
    }
}

/// One call of each kind whose answer holds something.
fn calls(agent: &AgentClient) -> Vec<JoinHandle<()>> {
    let limit = || context::with_duration(Duration::from_secs(1000));
    let [one, two, three, four, five, six, seven] = std::array::from_fn(|_| agent.clone());
    vec![
        tokio::spawn(async move {
            let answer = one.wait(limit(), &WaitRequest::new()).await;
            check(answer);
        }),
        tokio::spawn(async move {
            let answer = two.pids(limit(), &PidsRequest::new()).await;
            check(answer);
        }),
        tokio::spawn(async move {
            let answer = three.exec(limit(), &ExecRequest::new()).await;
            check(answer);
        }),
        tokio::spawn(async move {
            let answer = four.start(limit(), &StartRequest::new()).await;
            check(answer);
        }),
        tokio::spawn(async move {
            let answer = five.signal(limit(), &SignalRequest::new()).await;
            check(answer);
        }),
        tokio::spawn(async move {
            let answer = six.stats(limit(), &StatsRequest::new()).await;
            check(answer);
        }),
        tokio::spawn(async move {
            let answer = seven
                .out_of_memory(limit(), &OutOfMemoryRequest::new())
                .await;
            check(answer);
        }),
    ]
}

/// An answer says the same when it is written and read again; an error can be shown.
fn check<M: Message + std::fmt::Debug>(answer: ttrpc::Result<M>) {
    match answer {
        Ok(message) => {
            let bytes = message.write_to_bytes().expect("a message in memory");
            let again = M::parse_from_bytes(&bytes).expect("what was written can be read");
            assert_eq!(again, message);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// The next bytes on the connection.
fn next(input: &mut Input<'_>) -> Option<Vec<u8>> {
    let (kind, flags, stream) = (input.u8()?, input.u8()?, input.u8()?);
    let frame = |length: u32, stream: u32, payload: &[u8]| {
        [
            &length.to_be_bytes()[..],
            &stream.to_be_bytes(),
            &[kind & 0x3, flags],
            payload,
        ]
        .concat()
    };
    Some(match kind >> 6 {
        // A well-formed frame.
        0 => {
            let payload = input.bytes()?;
            frame(payload.len() as u32, stream.into(), payload)
        }
        // An answer in its envelope.
        1 => {
            let response = Response {
                payload: input.bytes()?.to_vec(),
                ..Response::new()
            };
            let payload = response.write_to_bytes().expect("a message in memory");
            frame(payload.len() as u32, stream.into(), &payload)
        }
        // A header that lies.
        2 => {
            let length = input.u32()?;
            frame(length, stream.into(), input.bytes()?)
        }
        _ => input.bytes()?.to_vec(),
    })
}

/// Answers to the calls, in order and not; an error; and frames of other types.
pub fn seeds() -> Vec<Vec<u8>> {
    let answer = |to: Output, stream: u8, message: Vec<u8>| {
        to.raw(&[1 << 6 | RESPONSE, 0, stream]).bytes(&message)
    };
    let bytes = |message: &dyn protobuf::MessageDyn| {
        message.write_to_bytes_dyn().expect("a message in memory")
    };
    let wait = bytes(&WaitResponse {
        exit_status: 137,
        exited_at_ns: 1 << 60,
        ..WaitResponse::new()
    });
    let process = |pid| Process {
        pid,
        exec_id: "e1".to_owned(),
        ..Process::new()
    };
    let pids = bytes(&PidsResponse {
        processes: vec![process(1), process(u32::MAX)],
        ..PidsResponse::new()
    });
    let exec = bytes(&CreateResponse {
        pid: 7,
        identity_ns: u64::MAX,
        create_ns: 1,
        ..CreateResponse::new()
    });
    let numbers = || [("usage_usec".to_owned(), u64::MAX), ("anon".to_owned(), 1)].into();
    let stats = bytes(&StatsResponse {
        cpu_stat: numbers(),
        memory_stat: numbers(),
        memory: Some(Usage {
            max: u64::MAX,
            ..Usage::new()
        })
        .into(),
        io: vec![Io {
            numbers: numbers(),
            ..Io::new()
        }],
        ..StatsResponse::new()
    });
    let refusal = bytes(&Response {
        status: Some(Status {
            code: Code::NOT_FOUND.into(),
            message: "no such process".to_owned(),
            ..Status::new()
        })
        .into(),
        ..Response::new()
    });
    let start = Output::default;
    let all = answer(answer(answer(start(), 1, wait), 3, pids.clone()), 5, exec);
    let data = start().raw(&[1 << 6 | DATA, 0, 3]).bytes(&pids);
    vec![
        answer(start(), 11, stats).0,
        answer(all, 7, vec![]).0,
        start().raw(&[RESPONSE, 0, 9]).bytes(&refusal).0,
        data.raw(&[DATA, 1, 3]).bytes(&[]).0,
        start()
            .raw(&[2 << 6 | RESPONSE, 0, 1])
            .u32(u32::MAX)
            .bytes(&[0; 20])
            .0,
        start()
            .raw(&[2 << 6 | RESPONSE, 0, 1])
            .u32(4 << 20)
            .bytes(&[0; 20])
            .0,
        start()
            .raw(&[3 << 6, 0, 0])
            .bytes(&[0, 0, 0, 0, 0, 0, 0, 1, 1, 0])
            .0,
    ]
}
