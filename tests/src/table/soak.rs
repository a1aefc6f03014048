//! The same again and again, and many at once: nothing may grow, and nothing may be left.

use crate::{
    case::{Case, scenario},
    container::{BUSYBOX, Client, Container, ctr},
    failure::{Failure, ensure},
    leak::Inventory,
    machine::Runtime,
    process::{self, End, Output, Running, Streams, parent_of, pid_of},
    scene::Scene,
    slope::Slopes,
};

use super::tasks::task_pid;

/// A round of cycles lies between two readings.
const ROUNDS: u32 = 10;

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("soak/containers-leave-nothing-in-containerd", containers)
            .alone()
            .patient(),
        scenario("soak/execs-leave-nothing-in-the-shim", execs)
            .alone()
            .patient(),
        scenario("soak/many-at-once-three-times", crowds)
            .alone()
            .patient(),
    ]
}

/// Cycles in one round: on runc enough to see that the case is right.
fn cycles_a_round(scene: &Scene<'_>) -> u32 {
    let all = match scene.runtime {
        Runtime::Forkvm => scene.repeats().cycles,
        Runtime::Runc => scene.repeats().cycles / 10,
    };
    all.div_ceil(ROUNDS)
}

/// What containerd and the machine hold does not depend on how many containers have come and gone.
fn containers(scene: &Scene<'_>) -> Result<(), Failure> {
    let containerd = pid_of("containerd")?;
    let container = ctr(BUSYBOX).command(["true"]);
    // The heap of a Go program that has just been started, as the cases of crashes do with containerd, grows until its first
    // collections: by half during the first ten containers, whoever runs them.
    for _ in 0..ROUNDS {
        scene.run(&container)?;
    }
    let mut slopes = Slopes::default();
    for _ in 0..=ROUNDS {
        for _ in 0..cycles_a_round(scene) {
            scene.run(&container)?;
        }
        // A Go program's memory is what its collector leaves lying about: a leak of a page a container is seen above it.
        let bound = 4.0 * f64::from(cycles_a_round(scene)) + 256.0;
        slopes.add_process("containerd", containerd, bound)?;
        let held = Inventory::take(scene.deadline())?.count();
        slopes.add("things on the machine", held as f64, 0.0);
    }
    scene.note(&slopes.judge()?);
    Ok(())
}

/// One shim and one monitor, and many execs.
fn execs(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = scene.detach(&ctr(BUSYBOX).command(["sleep", "100000"]))?;
    scene.check_kernel(Client::Ctr, &id)?;
    let task = task_pid(scene, &id)?;
    let shim = parent_of(task)?;
    let mut slopes = Slopes::default();
    for _ in 0..=ROUNDS {
        for _ in 0..cycles_a_round(scene) {
            let output = scene.exec(Client::Ctr, &id, ["echo", "here"])?.exits(0)?;
            ensure(output.text() == "here\n", || {
                format!("exec has written {:?}", output.text())
            })?;
        }
        let round = f64::from(cycles_a_round(scene));
        // runc's shim is a Go program, as containerd is.
        let bound = match scene.runtime {
            Runtime::Forkvm => 0.4 * round,
            Runtime::Runc => 256.0,
        };
        slopes.add_process("the shim", shim, bound)?;
        // A monitor's memory is its guest's, which moves about in it.
        slopes.add_descriptors("the task's process", task)?;
        if scene.runtime == Runtime::Forkvm {
            // A page for each exec: what slabs of the guest's kernel keep is less.
            let bound = 4.0 * round;
            slopes.add(
                "memory of the guest in KiB",
                guest_memory_kib(scene, &id)?,
                bound,
            );
        }
    }
    scene.note(&slopes.judge()?);
    scene.host(["ctr", "task", "rm", "--force", &id])?;
    scene.ok(["ctr", "container", "rm", &id]).map(drop)
}

/// What the guest has in use: all processes of it, its kernel's too.
fn guest_memory_kib(scene: &Scene<'_>, id: &str) -> Result<f64, Failure> {
    let output = scene
        .exec(Client::Ctr, id, ["cat", "/proc/meminfo"])?
        .exits(0)?;
    let text = output.text();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<f64>().ok()
    };
    match (value("MemTotal:"), value("MemFree:"), value("Cached:")) {
        (Some(total), Some(free), Some(cached)) => Ok(total - free - cached),
        _ => Err(output.failure("this is no /proc/meminfo")),
    }
}

/// Many clients start containers at once, and then many delete them at once.
fn crowds(scene: &Scene<'_>) -> Result<(), Failure> {
    let rounds = match scene.runtime {
        Runtime::Forkvm => 3,
        Runtime::Runc => 1,
    };
    for _ in 0..rounds {
        let before = Inventory::take(scene.deadline())?;
        crowd(
            scene,
            &ctr(BUSYBOX)
                .sh("exec sleep 100000")
                .detached()
                .option(&["--null-io"]),
        )?;
        let left = before.leaks(scene.within(60))?;
        ensure(left.is_empty(), || format!("left behind: {left:?}"))?;
    }
    Ok(())
}

/// A client of containerd among many.
struct Asking {
    words: Vec<String>,
    running: Running,
}

impl Asking {
    fn start(words: Vec<String>) -> Result<Self, Failure> {
        let running = Running::spawn(&words, Streams::Pipes)?;
        Ok(Self { words, running })
    }

    /// `ctr` allows a connection to containerd one second, and ten for all its tries (`ConnectParams` of its gRPC client),
    /// which is too little where many such clients share one slow processor. One that gave up has asked for nothing yet: it is run once more.
    fn wait(self, scene: &Scene<'_>) -> Result<Output, Failure> {
        let output = self.running.wait(scene.deadline())?;
        let gave_up =
            output.error_text().lines().last().is_some_and(|line| {
                line.contains("containerd.sock: use of closed network connection")
            });
        if output.end == End::Exited(1) && gave_up {
            return process::run(&self.words, b"", scene.deadline());
        }
        Ok(output)
    }
}

fn crowd(scene: &Scene<'_>, container: &Container) -> Result<(), Failure> {
    let mut clients = Vec::new();
    let mut ids = Vec::new();
    for _ in 0..scene.repeats().crowd {
        let id = scene.next_id();
        clients.push(Asking::start(container.arguments(scene.runtime, &id))?);
        ids.push(scene.will_clear(Client::Ctr, id));
    }
    for client in clients {
        client.wait(scene)?.exits(0)?;
    }
    scene.check_kernel(Client::Ctr, &ids[0])?;
    let mut removals = Vec::new();
    for id in &ids {
        let words = ["ctr", "task", "rm", "--force", id].map(String::from);
        removals.push(Asking::start(words.to_vec())?);
    }
    for removal in removals {
        removal.wait(scene)?.exits(0)?;
    }
    for id in &ids {
        scene.ok(["ctr", "container", "rm", id])?;
    }
    Ok(())
}
