//! Memory that a container has used and does not use any more goes back to the host.

use std::{
    fs,
    os::unix::fs::FileExt,
    thread,
    time::{Duration, Instant},
};

use crate::{
    case::{Case, row, scenario},
    container::{BUSYBOX, Container, PYTHON, ctr},
    failure::{Failure, ensure},
    figures::memory::private_dirty,
    machine::Runtime,
    process::Running,
    scene::Scene,
};

use super::tasks::task_pid;

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("memory/what-is-freed-goes-back", freed),
        scenario("memory/what-was-read-goes-back", read),
        scenario("memory/one-child-gives-back-alone", one_of_two),
        row(
            "memory/the-agent-lies-in-huge-pages",
            // Of the shared memory that is mapped in huge pages: the constants, and the text, which is twice as large.
            ctr(BUSYBOX)
                .sh("awk '/ShmemPmdMapped/ { print $2, $3 }' /proc/meminfo")
                .stdout("6144 kB\n"),
        )
        .forkvm_only("runc has no agent"),
    ]
}

const MIB: u64 = 1 << 20;

/// At each line of its input it takes the next step: uses 100 MB and frees them, then uses them
/// anew, which must be empty and then hold what is written.
const HOLDER: &str = r"
import mmap, sys
mega = 1 << 20
def step(word):
    print(word, flush=True)
    sys.stdin.readline()
def filled(first):
    memory = mmap.mmap(-1, 100 * mega)
    for index in range(100):
        at = index * mega
        assert memory[at:at + mega] == bytes(mega), index
        memory[at:at + mega] = bytes([first + index]) * mega
    return memory
def check(memory, first):
    for index in range(100):
        at = index * mega
        assert memory[at:at + mega] == bytes([first + index]) * mega, index
memory = filled(1)
step('used')
check(memory, 1)
memory.close()
step('freed')
memory = filled(101)
step('used again')
check(memory, 101)
print('ok', flush=True)
";

/// What it has used.
const USED: u64 = 100 * MIB;

/// Waits until a task's process holds less than so many bytes alone. Nobody tells when memory goes
/// back, so it is looked at.
fn falls_below(scene: &Scene<'_>, pid: u32, bytes: u64) -> Result<(), Failure> {
    let deadline = scene.within(120);
    loop {
        let held = private_dirty(pid)?;
        if held < bytes {
            return Ok(());
        }
        ensure(Instant::now() < deadline, || {
            format!("process {pid} still holds {} MiB alone", held / MIB)
        })?;
        thread::sleep(Duration::from_millis(200));
    }
}

fn holds(pid: u32, bytes: u64) -> Result<(), Failure> {
    let held = private_dirty(pid)?;
    ensure(held >= bytes, || {
        format!("process {pid} holds only {} MiB alone", held / MIB)
    })
}

/// A container of [`HOLDER`] that has used its memory, and the process of its task.
fn holder(scene: &Scene<'_>, container: &Container) -> Result<(Running, u32), Failure> {
    let (id, running) = scene.start(container)?;
    running.line("used", scene.deadline())?;
    let pid = task_pid(scene, &id)?;
    holds(pid, USED)?;
    Ok((running, pid))
}

fn freed(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = ctr(PYTHON).python(HOLDER);
    let (mut running, pid) = holder(scene, &container)?;
    running.write(b"\n")?;
    running.line("freed", scene.deadline())?;
    falls_below(scene, pid, 40 * MIB)?;
    running.write(b"\n")?;
    running.line("used again", scene.deadline())?;
    holds(pid, USED)?;
    running.write(b"\n")?;
    running.close_stdin();
    scene.finish(&container, running).map(drop)
}

/// What it has cached of a file, the guest gives back when nobody reads any more.
fn read(scene: &Scene<'_>) -> Result<(), Failure> {
    let file = scene.write("data", "begin")?;
    fs::File::options()
        .write(true)
        .open(&file)
        .and_then(|file| {
            file.set_len(100 * MIB)?;
            file.write_all_at(b"end", 100 * MIB - 3)
        })
        .map_err(Failure::io(file.display()))?;
    let mount = format!(
        "type=bind,src={},dst=/data,options=rbind:ro",
        file.display()
    );
    let script = "cat /data >/dev/null; echo read; read line; head -c 5 /data; tail -c 3 /data";
    let container = ctr(BUSYBOX)
        .option(&["--mount", &mount])
        .sh(script)
        .stdout("read\nbeginend");
    let (id, mut running) = scene.start(&container)?;
    running.line("read", scene.deadline())?;
    let pid = task_pid(scene, &id)?;
    if scene.runtime == Runtime::Forkvm {
        holds(pid, 80 * MIB)?;
    }
    falls_below(scene, pid, 30 * MIB)?;
    running.write(b"\n")?;
    running.close_stdin();
    scene.finish(&container, running).map(drop)
}

/// What one child gives back, its sibling and the template keep.
fn one_of_two(scene: &Scene<'_>) -> Result<(), Failure> {
    let container = ctr(PYTHON).python(HOLDER);
    let (mut other, other_pid) = holder(scene, &container)?;
    let (mut first, first_pid) = holder(scene, &container)?;
    first.write(b"\n")?;
    first.line("freed", scene.deadline())?;
    falls_below(scene, first_pid, 40 * MIB)?;
    holds(other_pid, USED)?;
    // It looks at every page that it has.
    other.write(b"\n")?;
    other.line("freed", scene.deadline())?;
    if scene.runtime == Runtime::Forkvm {
        // Reads every memory file whole and compares checksums.
        scene.ok(["forkvm", "template", "verify"])?;
    }
    for mut running in [first, other] {
        running.write(b"\n\n")?;
        running.close_stdin();
        scene.finish(&container, running)?;
    }
    scene
        .run(&ctr(BUSYBOX).sh("echo ok").stdout("ok\n"))
        .map(drop)
}
