//! A guest's vsock, before and after a fork, with one vCPU and with four: bytes both ways, ends of
//! both directions, refused and abandoned connections; and that it finds all of its devices.
//!
//! Needs a KVM that runs 64-bit guests; `FORKVM_TEST_MONITOR`, `FORKVM_TEST_KERNEL` and
//! `FORKVM_TEST_VSOCK` (an initramfs made from `vsock/guest.rs` as that file says) name the files.
//! `tests/run monitor` sets them.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

use std::{
    env,
    fs::File,
    io::{Read, Seek, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{fs::MetadataExt as _, net::UnixStream},
    },
    path::PathBuf,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use forkvm_vmm::control::{
    Event, Launch, Monitor, NetworkNamespace, Purpose, Request, Source, Writes,
};
use rustix::net::{RecvFlags, recv, sockopt::set_socket_send_buffer_size};

const ECHO: u32 = 2000;
const COUNT: u32 = 2001;
const SOURCE: u32 = 2002;
const FACTS: u32 = 2003;
const NOTES: u32 = 2004;
const MIB: usize = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(120);

fn named(name: &str) -> PathBuf {
    PathBuf::from(env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")))
}

/// A machine, and where its console goes.
struct Guest {
    monitor: Monitor,
    console: File,
}

impl Guest {
    fn launch(source: Source, purpose: Purpose, files: &[&File]) -> Self {
        let console = tempfile::tempfile().unwrap();
        let monitor = Monitor::spawn(&named("FORKVM_TEST_MONITOR"), Stdio::inherit()).unwrap();
        let mut fds: Vec<BorrowedFd<'_>> = files.iter().map(|file| file.as_fd()).collect();
        fds.push(console.as_fd());
        let launch = Launch {
            source,
            purpose,
            network_namespace: NetworkNamespace::New,
            console: true,
            exports: Vec::new(),
        };
        monitor.send(&Request::Launch(launch), &fds).unwrap();
        Self { monitor, console }
    }

    fn boot(vcpus: u8, purpose: Purpose) -> Self {
        let kernel = File::open(named("FORKVM_TEST_KERNEL")).unwrap();
        let initramfs = File::open(named("FORKVM_TEST_VSOCK")).unwrap();
        let source = Source::Boot {
            vcpus,
            memory_bytes: 256 << 20,
            cmdline: String::new(),
        };
        Self::launch(source, purpose, &[&kernel, &initramfs])
    }

    /// Waits for an event, which must come.
    fn wait(&mut self, wanted: fn(&Event) -> bool) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            match self.monitor.receive_before(deadline) {
                Ok(Some(event)) if wanted(&event) => return,
                Ok(Some(
                    Event::Progress { .. } | Event::Running { .. } | Event::AgentListening,
                )) => {}
                other => {
                    let mut console = String::new();
                    self.console.rewind().unwrap();
                    self.console.read_to_string(&mut console).unwrap();
                    panic!("{other:?}; the guest's console:\n{console}");
                }
            }
        }
    }

    fn connect(&self, port: u32) -> UnixStream {
        self.connect_over(UnixStream::pair().unwrap(), port)
    }

    /// Connects to the guest by the second of two sockets; gives the first.
    fn connect_over(&self, (ours, theirs): (UnixStream, UnixStream), port: u32) -> UnixStream {
        ours.set_read_timeout(Some(TIMEOUT)).unwrap();
        ours.set_write_timeout(Some(TIMEOUT)).unwrap();
        self.monitor
            .send(&Request::Connect { port }, &[theirs.as_fd()])
            .unwrap();
        ours
    }

    fn facts(&self) -> String {
        rest(&mut self.connect(FACTS))
    }

    /// Has the guest keep a note; answers all that it has kept.
    fn note(&self, note: &str) -> String {
        let mut stream = self.connect(NOTES);
        stream.write_all(note.as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        rest(&mut stream)
    }

    /// Makes a template of it.
    fn freeze(mut self) -> Template {
        let template = Template {
            memory: tempfile::tempfile().unwrap(),
            state: tempfile::tempfile().unwrap(),
        };
        let files = [template.memory.as_fd(), template.state.as_fd()];
        self.monitor.send(&Request::Freeze, &files).unwrap();
        self.wait(|event| matches!(event, Event::Frozen(_)));
        template
    }
}

/// The files of a template.
struct Template {
    memory: File,
    state: File,
}

impl Template {
    fn fork(&self, purpose: Purpose) -> Guest {
        (&self.state).rewind().unwrap();
        let source = Source::Fork {
            template: "vsock".into(),
            writes: Writes::Ignore,
        };
        Guest::launch(source, purpose, &[&self.memory, &self.state])
    }
}

fn rest(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|index| (index * 131 + (index >> 11)) as u8)
        .collect()
}

fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// All that is asked of a guest that runs.
fn work(guest: &Guest) {
    finds_its_devices(&guest.facts());
    the_end_of_input_is_the_guests_end_of_file(guest);
    the_end_of_output_comes_behind_it(guest);
    what_a_slow_reader_leaves_comes_later(guest);
    echoes_pass_each_other(guest);
    a_refused_connection_is_closed(guest);
    abandoned_connections_leave_nothing_behind(guest);
}

fn finds_its_devices(facts: &str) {
    for line in [
        "devices 0x0001 0x0001 0x0003 0x0004 0x0005 0x0013 0x001a\n",
        "drivers 7\n",
        "eth0 02:66:6b:76:6d:00\n",
        "eth1 02:66:6b:76:6d:01\n",
        "host Some(ConnectionReset)\n",
    ] {
        assert!(facts.contains(line), "no {line} in {facts}");
    }
}

fn the_end_of_input_is_the_guests_end_of_file(guest: &Guest) {
    let bytes = pattern(3 * MIB + 12_345);
    let mut stream = guest.connect(COUNT);
    stream.write_all(&bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(
        rest(&mut stream),
        format!("{} {:x}\n", bytes.len(), hash(&bytes))
    );
}

fn the_end_of_output_comes_behind_it(guest: &Guest) {
    let mut stream = guest.connect(SOURCE);
    let length = 4 * MIB;
    stream.write_all(&(length as u64).to_le_bytes()).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), length);
    let pattern = pattern(MIB / 4);
    assert!(bytes.chunks(MIB / 4).all(|chunk| chunk == pattern));
}

/// The socket takes less than one packet of the guest, and nobody reads while the monitor hands one to it.
fn what_a_slow_reader_leaves_comes_later(guest: &Guest) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    // The kernel makes it the smallest there is, some 4 KiB.
    set_socket_send_buffer_size(&theirs, 1).unwrap();
    let mut stream = guest.connect_over((ours, theirs), SOURCE);
    let length = MIB / 4;
    stream.write_all(&(length as u64).to_le_bytes()).unwrap();
    // The first packet is being handed over ...
    let (first, _) = recv(&stream, &mut [0u8; 1][..], RecvFlags::PEEK).unwrap();
    assert_eq!(first, 1);
    // ... and no longer is once this comes, which the same thread hands over after it.
    guest.facts();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert!(bytes == pattern(length), "{} bytes", bytes.len());
}

fn echoes_pass_each_other(guest: &Guest) {
    let bytes = pattern(MIB);
    thread::scope(|scope| {
        for start in 0..4 {
            let bytes = &bytes[start..];
            let mut stream = guest.connect(ECHO);
            let mut writer = stream.try_clone().unwrap();
            scope.spawn(move || {
                writer.write_all(bytes).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).unwrap();
                assert!(answer == bytes, "{} of {} bytes", answer.len(), bytes.len());
            });
        }
    });
}

fn a_refused_connection_is_closed(guest: &Guest) {
    let mut stream = guest.connect(4242);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

fn abandoned_connections_leave_nothing_behind(guest: &Guest) {
    for _ in 0..20 {
        let mut stream = guest.connect(SOURCE);
        stream.write_all(&(1u64 << 30).to_le_bytes()).unwrap();
        stream.read_exact(&mut [0; 64]).unwrap();
    }
    let mut stream = guest.connect(ECHO);
    stream.write_all(b"alive").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&mut stream), "alive");
}

fn before_and_after_a_fork(vcpus: u8) {
    let mut cold = Guest::boot(vcpus, Purpose::Run);
    cold.wait(|event| *event == Event::AgentListening);
    work(&cold);
    drop(cold);

    let mut booted = Guest::boot(vcpus, Purpose::Freeze);
    booted.wait(|event| *event == Event::AgentListening);
    let template = booted.freeze();
    let children = [Purpose::Run; 2].map(|purpose| template.fork(purpose));
    // What a device of the template had given would be the same in both.
    let facts = children.each_ref().map(Guest::facts);
    assert_ne!(
        facts[0], facts[1],
        "two children have the same random bytes"
    );
    children.iter().for_each(work);
}

/// A template that is forked, changed and frozen again, five times over: each is whole by itself, knows what its ancestors
/// were told, and is no larger for them.
fn a_chain_of_templates(vcpus: u8) {
    let mut booted = Guest::boot(vcpus, Purpose::Freeze);
    booted.wait(|event| *event == Event::AgentListening);
    let mut template = booted.freeze();
    let mut all = String::new();
    let mut blocks = Vec::new();
    for generation in 1..=5 {
        let child = template.fork(Purpose::Freeze);
        let note = format!("{generation} ");
        all.push_str(&note);
        assert_eq!(child.note(&note), all);
        let began = Instant::now();
        // The parent's files are closed by this: nobody needs them any more.
        template = child.freeze();
        blocks.push(template.memory.metadata().unwrap().blocks());
        eprintln!(
            "  template {generation}: {} KiB, frozen in {:?}",
            blocks[blocks.len() - 1] / 2,
            began.elapsed()
        );
        let grandchild = template.fork(Purpose::Run);
        assert_eq!(grandchild.note(""), all);
        if generation == 5 {
            work(&grandchild);
        }
    }
    // What a generation writes anew stays far below a tenth of a template.
    assert!(blocks[4] < blocks[0] + blocks[0] / 10, "{blocks:?}");
    let stray = template.fork(Purpose::Run);
    let files = [template.memory.as_fd(), template.state.as_fd()];
    stray.monitor.send(&Request::Freeze, &files).unwrap();
    let answer = loop {
        match stray
            .monitor
            .receive_before(Instant::now() + TIMEOUT)
            .unwrap()
        {
            Some(Event::Running { .. }) => {}
            other => break other,
        }
    };
    assert!(
        matches!(&answer, Some(Event::Failed { message, .. }) if message.contains("was launched for it")),
        "{answer:?}"
    );
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/run monitor runs it"]
fn with_one_vcpu() {
    before_and_after_a_fork(1);
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/run monitor runs it"]
fn templates_of_templates() {
    a_chain_of_templates(1);
}

#[test]
#[ignore = "needs a KVM that runs guests: tests/run monitor runs it"]
fn with_four_vcpus() {
    before_and_after_a_fork(4);
}
