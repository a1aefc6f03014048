//! Boots a guest, freezes it and forks it, with the monitor's program as its users run it.
//!
//! Needs a KVM that runs 64-bit guests; `FORKVM_TEST_MONITOR`, `FORKVM_TEST_KERNEL` and
//! `FORKVM_TEST_INITRAMFS` (with forkvm's agent in it) name the files. `tests/run monitor` sets them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

use std::{
    env,
    fs::File,
    io::{Read, Seek, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use forkvm_api::{AGENT_PORT, points};
use forkvm_vmm::{
    control::{
        Event, FailureKind, Launch, Monitor, NetworkNamespace, Purpose, Request, Source, Writes,
    },
    template::{Attempt, Domain, Error, Store, Template, TemplateSpec},
};

const TIMEOUT: Duration = Duration::from_secs(120);

/// What the environment names.
struct Host {
    monitor: PathBuf,
    spec: TemplateSpec,
}

fn host(vcpus: u8) -> Host {
    let path = |name: &str| PathBuf::from(env::var_os(name).unwrap_or_else(|| panic!("{name}")));
    Host {
        monitor: path("FORKVM_TEST_MONITOR"),
        spec: TemplateSpec {
            kernel: path("FORKVM_TEST_KERNEL"),
            initramfs: path("FORKVM_TEST_INITRAMFS"),
            monitor: path("FORKVM_TEST_MONITOR"),
            domain: Domain::Host,
            vcpus,
            memory_bytes: 256 << 20,
            cmdline: String::new(),
        },
    }
}

fn deadline() -> Instant {
    Instant::now() + TIMEOUT
}

fn launch(monitor: &Monitor, source: Source, fds: &[BorrowedFd<'_>], console: &File) {
    let mut fds = fds.to_vec();
    fds.push(console.as_fd());
    monitor
        .send(
            &Request::Launch(Launch {
                source,
                purpose: Purpose::Run,
                network_namespace: NetworkNamespace::New,
                console: true,
                exports: Vec::new(),
            }),
            &fds,
        )
        .unwrap();
}

fn fork(host: &Host, template: &Template, console: &File) -> Monitor {
    let monitor = Monitor::spawn(&host.monitor, Stdio::inherit()).unwrap();
    let (source, fds) = template.source();
    launch(&monitor, source, &fds, console);
    monitor
}

/// The points of the first exit.
fn running(monitor: &Monitor) -> Vec<(String, u64)> {
    match monitor.receive_before(deadline()).unwrap() {
        Some(Event::Running { points }) => points
            .into_iter()
            .map(|point| (point.name, point.at_ns))
            .collect(),
        other => panic!("{other:?}"),
    }
}

/// Asks the agent for a method that it does not have: any answer shows that it is there.
fn agent_answers(child: &Monitor) {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(TIMEOUT)).unwrap();
    child
        .send(&Request::Connect { port: AGENT_PORT }, &[theirs.as_fd()])
        .unwrap();
    drop(theirs);
    // ttrpc: length, stream id, type 1 (request), flags; then fields 1 and 2 of its Request.
    let request = b"\x0a\x01S\x12\x01M";
    let mut frame = (request.len() as u32).to_be_bytes().to_vec();
    frame.extend(1_u32.to_be_bytes());
    frame.extend([1, 0]);
    frame.extend(request);
    let before = now();
    ours.write_all(&frame).unwrap();
    let mut header = [0; 10];
    ours.read_exact(&mut header).unwrap();
    assert_eq!(header[8], 2, "type of a response");
    eprintln!("  the agent answered in {} us", (now() - before) / 1000);
}

fn build(host: &Host, store: &Store) -> Template {
    store
        .build(&host.spec, Attempt::Asked, &mut |step| {
            eprintln!("  {step}");
        })
        .unwrap()
}

fn boots_freezes_and_forks(vcpus: u8) {
    let host = host(vcpus);
    let folder = tempfile::tempdir().unwrap();
    let store = Store::new(folder.path());
    let template = build(&host, &store);
    template.verify().unwrap();
    let manifest = template.manifest();
    eprintln!(
        "  {} bytes of data, {} of state",
        manifest.memory.data_bytes, manifest.state.bytes
    );
    assert!(manifest.memory.data_bytes < 100 << 20);
    assert_eq!(store.list().unwrap(), [template.id()]);

    // Two at once, so that neither is the only user of the template.
    let consoles = [0, 1].map(|_| tempfile::tempfile().unwrap());
    let before = now();
    let children = [0, 1].map(|child: usize| fork(&host, &template, &consoles[child]));
    for child in &children {
        let points = running(child);
        let names: Vec<_> = points.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                points::VMM_LAUNCHED,
                points::TEMPLATE_MAPPED,
                points::VM_CREATED,
                points::DEVICES_RESTORED,
                points::STATE_RESTORED,
                points::VCPU_ENTERED,
                points::VCPU_FIRST_EXIT
            ]
        );
        for (name, at) in points {
            eprintln!("  {name:20} {:8} us", (at - before) / 1000);
        }
    }
    assert!(matches!(
        store.remove(template.id()),
        Err(Error::InUse { .. })
    ));
    let id = template.id().to_owned();
    drop(template);
    assert!(
        matches!(store.remove(&id), Err(Error::InUse { .. })),
        "the children hold the template"
    );
    children.iter().for_each(agent_answers);
    // Pause and go on.
    for child in &children {
        child.send(&Request::Pause, &[]).unwrap();
        assert_eq!(
            child.receive_before(deadline()).unwrap(),
            Some(Event::Paused)
        );
        child.send(&Request::Resume, &[]).unwrap();
        assert_eq!(
            child.receive_before(deadline()).unwrap(),
            Some(Event::Resumed)
        );
    }
    for child in children {
        assert!(child.close().unwrap().success());
    }
    for mut console in consoles {
        let mut text = String::new();
        console.rewind().unwrap();
        console.read_to_string(&mut text).unwrap();
        eprintln!("{text}");
    }
    damaged_copies_are_refused(&host, &store.inspect(&id).unwrap());
    store.remove(&id).unwrap();
    assert!(store.list().unwrap().is_empty());
}

/// A monitor that is given a damaged copy of a template's state, or a memory file of another length, says so in one
/// sentence and runs nothing. (The store has found that out before; the monitor does not rely on it.)
fn damaged_copies_are_refused(host: &Host, template: &Template) {
    let state = std::fs::read(template.folder().join("state")).unwrap();
    let memory = File::open(template.folder().join("memory")).unwrap();
    let mut copies = Vec::new();
    // Inside and behind each part of the header, then all over the content.
    for length in [
        0,
        7,
        8,
        11,
        12,
        15,
        16,
        23,
        24,
        25,
        state.len() / 2,
        state.len() - 1,
    ] {
        copies.push(state[..length].to_vec());
    }
    for bit in (0..state.len() * 8).step_by(state.len() / 12 * 8 + 5) {
        let mut copy = state.clone();
        copy[bit / 8] ^= 1 << (bit % 8);
        copies.push(copy);
    }
    copies.push([&state[..], &[0]].concat());
    for copy in copies {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&copy).unwrap();
        refused(host, &memory, &file);
    }
    let whole = File::open(template.folder().join("state")).unwrap();
    let bytes = memory.metadata().unwrap().len();
    for length in [0, bytes / 2, bytes - 4096, bytes + 4096] {
        let other = tempfile::tempfile().unwrap();
        other.set_len(length).unwrap();
        refused(host, &other, &whole);
    }
}

fn refused(host: &Host, memory: &File, state: &File) {
    let monitor = Monitor::spawn(&host.monitor, Stdio::inherit()).unwrap();
    let console = tempfile::tempfile().unwrap();
    let source = Source::Fork {
        template: "0123456789abcdef".into(),
        writes: Writes::Ignore,
    };
    launch(&monitor, source, &[memory.as_fd(), state.as_fd()], &console);
    match monitor.receive_before(deadline()).unwrap() {
        Some(Event::Failed { kind, message }) => {
            assert_eq!(kind, FailureKind::Template, "{message}");
            assert!(
                message.contains("forkvm template build --force"),
                "{message}"
            );
        }
        other => panic!("{other:?}"),
    }
    assert!(!monitor.close().unwrap().success());
}

fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/run monitor runs it"]
fn one_vcpu_boots_freezes_and_forks() {
    boots_freezes_and_forks(1);
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/run monitor runs it"]
fn four_vcpus_boot_freeze_and_fork() {
    boots_freezes_and_forks(4);
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/run monitor runs it"]
fn a_damaged_state_is_one_clear_error() {
    let host = host(1);
    let folder = tempfile::tempdir().unwrap();
    let mut kernel = tempfile::NamedTempFile::new_in(folder.path()).unwrap();
    kernel.write_all(b"not a kernel").unwrap();
    refused(&host, kernel.as_file(), kernel.as_file());
}
