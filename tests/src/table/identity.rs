//! What a child of a template must not share with its siblings (docs/fork-correctness.md): two children each time, with
//! as many vCPUs as are configured and with four.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    case::{Case, scenario},
    config_file::ConfigFile,
    container::{BUSYBOX, Client, Container, PYTHON, ctr},
    failure::{Failure, ensure},
    machine::Runtime,
    process::{self, Output},
    scene::Scene,
};

const MANY: u8 = 4;

pub(super) fn cases() -> Vec<Case> {
    let cases = [
        scenario("identity/two-children-differ", two_children),
        scenario("identity/random-on-every-processor", kernel_random),
        scenario("identity/random-state-of-programs", program_random),
        scenario("identity/wall-clock", wall_clock),
        scenario("identity/monotonic-clock-goes-on", monotonic_clock),
        scenario("identity/timers-on-every-processor", timers),
        scenario("identity/uptime-and-boot-time-agree", uptime),
        scenario("identity/tcp-secrets", tcp_secrets),
        scenario("identity/names-are-stable", stable_names),
        scenario("identity/nobody-from-before-the-fork", nobody_else),
        scenario("identity/memory-is-a-childs-own", own_memory),
    ];
    let with_many: Vec<Case> = cases.iter().map(|case| case.with_vcpus(MANY)).collect();
    let mut all: Vec<Case> = cases.into();
    all.extend(with_many);
    all.push(
        scenario("identity/no-secret-in-a-template", no_secrets)
            .alone()
            .forkvm_only("runc has no templates"),
    );
    all
}

/// Two containers started together: what each wrote.
fn pair(scene: &Scene<'_>, containers: [&Container; 2]) -> Result<[Output; 2], Failure> {
    let start = |container| {
        let (_, mut running) = scene.start(container)?;
        running.close_stdin();
        Ok::<_, Failure>(running)
    };
    let [one, two] = [start(containers[0])?, start(containers[1])?];
    let one = scene.finish(containers[0], one)?;
    Ok([one, scene.finish(containers[1], two)?])
}

/// The same container twice.
fn twins(scene: &Scene<'_>, container: &Container) -> Result<[Output; 2], Failure> {
    pair(scene, [container, container])
}

/// Holds line against line: none is the same in both, but for those that begin with a word of `shared`.
fn all_differ(outputs: &[Output; 2], lines: usize, shared: &[&str]) -> Result<(), Failure> {
    let [one, two] = outputs.each_ref().map(Output::text);
    ensure(
        one.lines().count() == lines && two.lines().count() == lines,
        || format!("expected {lines} lines each, found {one:?} and {two:?}"),
    )?;
    for (one, two) in one.lines().zip(two.lines()) {
        let shared = shared.iter().any(|word| one.starts_with(word));
        ensure(shared || one != two, || {
            format!("both children have '{one}'")
        })?;
    }
    Ok(())
}

/// What runc's containers share with the machine.
fn shared_on_runc<'a>(scene: &Scene<'_>, words: &'a [&'a str]) -> &'a [&'a str] {
    match scene.runtime {
        Runtime::Runc => words,
        Runtime::Forkvm => &[],
    }
}

fn two_children(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = "echo random $(head -c 16 /dev/urandom | od -An -tx1); \
                  echo uuid $(cat /proc/sys/kernel/random/uuid); \
                  echo hostname $(hostname); echo boot_id $(cat /proc/sys/kernel/random/boot_id)";
    let container = |name| {
        let expected = format!("hostname {name}\n");
        ctr(BUSYBOX)
            .option(&["--hostname", name])
            .sh(script)
            .stdout_has([&expected, "random ", "uuid ", "boot_id "])
    };
    let outputs = pair(scene, [&container("first"), &container("second")])?;
    all_differ(&outputs, 4, shared_on_runc(scene, &["boot_id"]))?;
    let text = outputs[0].text();
    let random = text.lines().next().unwrap_or_default();
    ensure(random.split_whitespace().count() == 17, || {
        format!("expected 16 random bytes, found '{random}'")
    })
}

/// The kernel keeps a generator for each processor: all are fresh, and the pool is full.
fn kernel_random(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = r"
import os
assert open('/proc/sys/kernel/random/entropy_avail').read() == '256\n'
seen = set()
for cpu in sorted(os.sched_getaffinity(0)):
    os.sched_setaffinity(0, [cpu])
    seen |= {os.getrandom(32), os.getrandom(32, os.GRND_RANDOM), open('/dev/urandom', 'rb').read(32)}
print(len(seen) // 3, *(bytes.hex() for bytes in seen))
";
    let outputs = twins(scene, &ctr(PYTHON).python(script))?;
    let [one, two] = outputs.each_ref().map(Output::text);
    let bytes =
        |text: &str| -> Vec<String> { text.split_whitespace().skip(1).map(String::from).collect() };
    let (one, two) = (bytes(&one), bytes(&two));
    ensure(one.len() >= 3 && one.len() == two.len(), || {
        format!("expected three readings on each processor, found {one:?} and {two:?}")
    })?;
    match one.iter().find(|bytes| two.contains(bytes)) {
        None => Ok(()),
        Some(bytes) => Err(Failure::new(format!("both children have read {bytes}"))),
    }
}

/// What a program gets of the kernel's randomness when it is executed, and what it makes of it.
fn program_random(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = r"
import struct
auxv = dict(struct.iter_unpack('QQ', open('/proc/self/auxv', 'rb').read()))
memory = open('/proc/self/mem', 'rb')
memory.seek(auxv[25])
print('AT_RANDOM', memory.read(16).hex())
print('AT_SYSINFO_EHDR', hex(auxv[33]))
print('program', hex(auxv[3]))
for line in open('/proc/self/maps'):
    if '[stack]' in line:
        print('stack', line.split('-')[0])
print('library', next(line for line in open('/proc/self/maps') if 'libc' in line).split('-')[0])
print('hash', hash('forkvm'))
import random, tempfile, uuid
print('random', random.getrandbits(64))
print('name', next(tempfile._get_candidate_names()))
print('uuid', uuid.uuid4())
";
    let outputs = twins(scene, &ctr(PYTHON).python(script))?;
    // Debian's python3 is not position independent: it says itself where it is.
    all_differ(&outputs, 9, &["program"])
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}

/// The containers' time lies between the moments before their start and after their end, on each processor.
fn wall_clock(scene: &Scene<'_>) -> Result<(), Failure> {
    // What the two readings may differ by: the host's clock is read, sent and set.
    const TOLERANCE: f64 = 0.05;
    let script = r"
import os, time
for cpu in sorted(os.sched_getaffinity(0)):
    os.sched_setaffinity(0, [cpu])
    print(time.time())
";
    let before = now();
    let outputs = twins(scene, &ctr(PYTHON).python(script))?;
    let after = now();
    for output in outputs {
        for line in output.text().lines() {
            let inside: f64 = line
                .parse()
                .map_err(|_| output.failure("expected numbers"))?;
            ensure(
                (before - TOLERANCE..after + TOLERANCE).contains(&inside),
                || {
                    format!(
                        "the container's clock is at {inside}, the host's went from {before} to {after}"
                    )
                },
            )?;
        }
    }
    Ok(())
}

/// No clock that counts ever goes back, whichever processor reads it, and they run at the host's rate.
fn monotonic_clock(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = r"
import ctypes, mmap, os, time
# rdtsc; shl rdx, 32; or rax, rdx; ret
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex('0f3148c1e2204809d0c3'))
tsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
clocks = [lambda id=id: time.clock_gettime_ns(id) for id in (
    time.CLOCK_MONOTONIC, time.CLOCK_MONOTONIC_RAW, time.CLOCK_BOOTTIME, time.CLOCK_REALTIME)] + [tsc]
cpus = sorted(os.sched_getaffinity(0))
last = [0] * len(clocks)
for turn in range(400):
    os.sched_setaffinity(0, [cpus[turn % len(cpus)]])
    now = [clock() for clock in clocks]
    assert all(before <= after for before, after in zip(last, now)), (turn, last, now)
    last = now
def both(): return time.monotonic(), time.time(), time.monotonic()
one = both(); time.sleep(0.5); two = both()
# Each reading of the wall clock lies between two of the other, however long this process had to wait meanwhile.
least, passed, most = two[0] - one[2], two[1] - one[1], two[2] - one[0]
assert most >= 0.5 and least - 0.05 <= passed <= most + 0.05, (least, passed, most)
assert abs(time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()) < 3600 * 24 * 365
print('ok')
";
    twins(scene, &ctr(PYTHON).python(script).stdout("ok\n")).map(drop)
}

/// Each processor's own timer goes on.
fn timers(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = r"
import os, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
for cpu in sorted(os.sched_getaffinity(0)):
    os.sched_setaffinity(0, [cpu])
    for wait in 0.001, 0.02, 0.2:
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, wait)
        assert signal.sigtimedwait([signal.SIGALRM], wait + 5), (cpu, wait)
        assert wait <= time.monotonic() - began, (cpu, wait)
print('ok')
";
    twins(scene, &ctr(PYTHON).python(script).stdout("ok\n")).map(drop)
}

/// `/proc/stat` says since when the machine runs, `/proc/uptime` for how long: they fit the wall clock.
fn uptime(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = r"
import time
before = time.time()
booted = next(int(line.split()[1]) for line in open('/proc/stat') if line.startswith('btime'))
up = float(open('/proc/uptime').read().split()[0])
# The kernel tells the boot in whole seconds.
assert before - 2 < booted + up < time.time() + 2, (before, booted, up, time.time())
start = int(open('/proc/self/stat').read().rsplit(')', 1)[1].split()[19]) / 100
assert 0 <= up - start < 60, (up, start)
print('ok')
";
    twins(scene, &ctr(PYTHON).python(script).stdout("ok\n")).map(drop)
}

/// The kernel seeds its TCP secrets at the first connection, and no template has had one. The one that can be seen: the
/// offset of a connection's time stamps (RFC 7323, section 5.4), a keyed hash of its addresses.
fn tcp_secrets(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = r"
import socket, time
TCP_TIMESTAMP = 24
listener = socket.create_server(('127.0.0.1', 0))
one = socket.create_connection(listener.getsockname())
stamp = one.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP) & 0xffffffff
print('offset', (stamp - time.monotonic_ns() // 1000000 & 0xffffffff) // 1000)
";
    let outputs = twins(scene, &ctr(PYTHON).python(script))?;
    // Two containers on runc have the machine's one secret, and a network namespace's own hash.
    all_differ(&outputs, 1, shared_on_runc(scene, &["offset"]))
}

/// boot_id is one over a container's life, whoever asks.
fn stable_names(scene: &Scene<'_>) -> Result<(), Failure> {
    let boot_id = "/proc/sys/kernel/random/boot_id";
    let mut seen = Vec::new();
    for name in ["first", "second"] {
        let sleeper = ctr(BUSYBOX)
            .option(&["--hostname", name])
            .command(["sleep", "1000"]);
        let id = scene.detach(&sleeper)?;
        scene.check_kernel(Client::Ctr, &id)?;
        let ask = || -> Result<String, Failure> {
            let script =
                format!("hostname; cat {boot_id}; (echo x >{boot_id}) 2>/dev/null; cat {boot_id}");
            Ok(scene
                .exec(Client::Ctr, &id, ["sh", "-c", &script])?
                .exits(0)?
                .text())
        };
        let (once, again) = (ask()?, ask()?);
        let lines: Vec<&str> = once.lines().collect();
        ensure(
            once == again && lines.len() == 3 && lines[0] == name && lines[1] == lines[2],
            || format!("first {once:?}, then {again:?}"),
        )?;
        seen.push(lines[1].to_owned());
    }
    ensure(scene.runtime == Runtime::Runc || seen[0] != seen[1], || {
        format!("both children have the boot_id {}", seen[0])
    })
}

/// Processes and cgroups of the template's own container are not the child's, and its ids are its own.
fn nobody_else(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = "echo $$ /proc/[0-9]*; find /sys/fs/cgroup -type d; hostname";
    let container = |name| {
        ctr(BUSYBOX)
            .option(&["--hostname", name])
            .sh(script)
            .stdout(&format!("1 /proc/1\n/sys/fs/cgroup\n{name}\n"))
    };
    pair(scene, [&container("first"), &container("second")]).map(drop)
}

/// What one child writes to its memory reaches neither its sibling nor the template.
fn own_memory(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = r"
import os
name = os.uname().nodename.encode()
pages = [bytearray(name * (4096 // len(name))) for _ in range(4096)]
assert all(page == pages[0] for page in pages)
print('ok')
";
    let container = |name| {
        ctr(PYTHON)
            .option(&["--hostname", name])
            .python(script)
            .stdout("ok\n")
    };
    pair(scene, [&container("first"), &container("second")])?;
    if scene.runtime == Runtime::Forkvm {
        // Reads all templates whole and compares their checksums.
        scene.ok(["forkvm", "template", "verify"])?;
    }
    Ok(())
}

/// A template that is built beside a tenant's container, by somebody with secrets in the environment, has neither.
fn no_secrets(scene: &Scene<'_>) -> Result<(), Failure> {
    let canary = format!(
        "canary-{}",
        scene.read("/proc/sys/kernel/random/uuid")?.trim()
    );
    let secret = format!("SECRET={canary}");
    let sleeper = ctr(BUSYBOX)
        .option(&["--env", &secret, "--hostname", &canary])
        .command(["sleep", "1000"]);
    let id = scene.detach(&sleeper)?;
    scene.check_kernel(Client::Ctr, &id)?;

    let store = scene.path("templates");
    let _config = ConfigFile::changed(&format!(
        "[vm]\nmemory_mib = 128\n[paths]\ntemplates = \"{}\"\nrecord = \"{}\"\n",
        store.display(),
        scene.path_text("record.json")
    ))?;
    let build = ["env", &secret, "forkvm", "template", "build"].map(String::from);
    process::run(&build, b"", scene.deadline())?.exits(0)?;

    let mut secrets = vec![canary];
    for file in ["/etc/machine-id", "/proc/sys/kernel/random/boot_id"] {
        secrets.push(scene.read(file)?.trim().to_owned());
    }
    let secrets = scene.write("secrets", &secrets.join("\n"))?;
    let control = scene.write("control", "forkvm-agent")?;
    for file in files_below(&store)? {
        let mode = fs::metadata(&file)
            .map_err(Failure::io(file.display()))?
            .permissions()
            .mode();
        ensure(mode & 0o077 == 0, || {
            format!("{} may be read by others: mode {mode:o}", file.display())
        })?;
        ensure(!has_one_of(scene, &file, &secrets)?, || {
            format!(
                "{} holds a secret of the host or of a tenant",
                file.display()
            )
        })?;
        // The search finds what is there.
        if file.ends_with("memory") {
            ensure(has_one_of(scene, &file, &control)?, || {
                format!(
                    "{} does not hold the agent: the search is wrong",
                    file.display()
                )
            })?;
        }
    }
    Ok(())
}

/// The files of the template in `store`; there has to be one.
fn files_below(store: &Path) -> Result<Vec<std::path::PathBuf>, Failure> {
    let list = |folder: &Path| -> Result<Vec<std::path::PathBuf>, Failure> {
        let entries = fs::read_dir(folder).map_err(Failure::io(folder.display()))?;
        Ok(entries.flatten().map(|entry| entry.path()).collect())
    };
    for template in list(store)? {
        if template.join("memory").exists() {
            return list(&template);
        }
    }
    Err(Failure::new(format!("no template in {}", store.display())))
}

/// Whether `file` has one of the lines of `words` in it.
fn has_one_of(scene: &Scene<'_>, file: &Path, words: &Path) -> Result<bool, Failure> {
    // Words between zero bytes in place of lines: memory has few line ends and many zeros.
    let words = words.display().to_string();
    let search = [
        "grep",
        "--null-data",
        "--quiet",
        "--fixed-strings",
        "--file",
        &words,
    ];
    let mut search: Vec<String> = search.map(String::from).into();
    search.push(file.display().to_string());
    let output = process::run(&search, b"", scene.deadline())?;
    match output.end {
        process::End::Exited(0) => Ok(true),
        process::End::Exited(1) => Ok(false),
        _ => Err(output.failure("expected a search")),
    }
}
