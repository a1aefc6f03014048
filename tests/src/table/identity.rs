//! What a child of a template must not share with its siblings (docs/fork-correctness.md).

use std::time::{SystemTime, UNIX_EPOCH};

use crate::{
    case::{Case, scenario},
    container::{BUSYBOX, PYTHON, ctr},
    failure::{Failure, ensure},
    machine::Runtime,
    scene::Scene,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("identity/two-children-differ", two_children),
        scenario("identity/wall-clock", wall_clock),
        scenario("identity/monotonic-clock-goes-on", monotonic_clock),
    ]
}

/// Two containers started together; a line of each for everything that must differ.
fn two_children(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = "echo random $(head -c 16 /dev/urandom | od -An -tx1); \
                  echo uuid $(cat /proc/sys/kernel/random/uuid); \
                  echo auxv $(od -An -tx1 /proc/self/auxv | tr -d '\\n' | md5sum); \
                  echo hostname $(hostname); echo boot_id $(cat /proc/sys/kernel/random/boot_id)";
    let container = |name| ctr(BUSYBOX).option(&["--hostname", name]).sh(script);
    let names = ["first", "second"];
    let mut started = Vec::new();
    for name in names {
        started.push(scene.start(&container(name))?.1);
    }
    let mut outputs = Vec::new();
    for (name, mut running) in names.into_iter().zip(started) {
        running.close_stdin();
        let row = container(name).stdout_has(["random ", "uuid ", "boot_id ", "auxv "]);
        let text = scene.finish(&row, running)?.text();
        ensure(text.contains(&format!("hostname {name}\n")), || {
            format!("the container '{name}' says {text:?}")
        })?;
        outputs.push(text);
    }
    for (one, two) in outputs[0].lines().zip(outputs[1].lines()) {
        // On runc, both share the host's boot id.
        let shared = scene.runtime == Runtime::Runc && one.starts_with("boot_id");
        ensure(shared || one != two, || {
            format!("both children have '{one}'")
        })?;
    }
    let random = outputs[0].lines().next().unwrap_or_default();
    ensure(random.split_whitespace().count() == 17, || {
        format!("expected 16 random bytes, found '{random}'")
    })
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64()
}

/// The container's time lies between the moments before its start and after its end.
fn wall_clock(scene: &Scene<'_>) -> Result<(), Failure> {
    // What the two readings may differ by: the host's clock is read, sent and set.
    const TOLERANCE: f64 = 0.05;
    let before = now();
    let output = scene.run(&ctr(PYTHON).python("import time; print(time.time())"))?;
    let after = now();
    let inside: f64 = output
        .text()
        .trim()
        .parse()
        .map_err(|_| output.failure("expected a number"))?;
    ensure(
        (before - TOLERANCE..after + TOLERANCE).contains(&inside),
        || {
            format!(
                "the container's clock is at {inside}, the host's went from {before} to {after}"
            )
        },
    )
}

/// Monotonic time never goes back, on any processor, and runs at the host's rate.
fn monotonic_clock(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = r"
import os, time
cpus = sorted(os.sched_getaffinity(0))
last = time.monotonic_ns()
for turn in range(400):
    os.sched_setaffinity(0, [cpus[turn % len(cpus)]])
    now = time.monotonic_ns()
    assert now >= last, (turn, last, now)
    last = now
began, wall = time.monotonic(), time.time()
time.sleep(0.5)
slept, passed = time.monotonic() - began, time.time() - wall
assert 0.5 <= slept < 5 and abs(slept - passed) < 0.05, (slept, passed)
print('ok')
";
    scene
        .run(&ctr(PYTHON).python(script).stdout("ok\n"))
        .map(drop)
}
