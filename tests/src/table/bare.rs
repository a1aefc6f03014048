//! The shim alone, asked by a client that is not containerd: a whole life with its events, and Shutdown at moments at
//! which containerd does not say it.

use containerd_shim_protos::api::Status;
use serde_json::{Value, json};

use crate::{
    bare_shim::{self, BareShim},
    case::{Case, scenario},
    container::reporting_kernel,
    failure::{Failure, ensure},
    scene::Scene,
};

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("shim/life-without-containerd", life),
        scenario("shim/shutdown-before-the-end", early_shutdown),
        scenario("shim/shutdown-during-an-exec", shutdown_during_exec),
    ]
}

/// What a process writes before its end.
const SIZE: usize = 8 << 20;

/// All a container needs: no user, cgroup, capability or device is named.
fn spec(command: &[&str]) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": process(command),
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}
        ],
        "linux": {"namespaces": [
            {"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}
        ]}
    })
}

/// A process that reports its kernel on standard error first.
fn process(command: &[&str]) -> Value {
    let mut args = reporting_kernel();
    args.extend(command.iter().map(|&word| word.into()));
    json!({"args": args, "cwd": "/", "env": ["PATH=/bin"]})
}

/// Holds the line of [`reporting_kernel`] against the runtime.
fn check_kernel(scene: &Scene<'_>, written: &[u8]) -> Result<(), Failure> {
    let line = String::from_utf8_lossy(written);
    scene.check_release(line.trim().trim_start_matches("kernel "))
}

fn is_in(shim: &BareShim<'_>, expected: Status) -> Result<(), Failure> {
    let found = shim.tasks.status()?;
    ensure(found == expected, || {
        format!("expected {expected:?}, found {found:?}")
    })
}

fn whole(written: &[u8]) -> Result<(), Failure> {
    let zeros = written.iter().filter(|&&byte| byte == 0).count();
    ensure(zeros == SIZE && written.len() == SIZE, || {
        format!(
            "expected {SIZE} zero bytes, found {zeros} of {}",
            written.len()
        )
    })
}

fn returned(expected: u32, found: u32) -> Result<(), Failure> {
    ensure(found == expected, || {
        format!("expected exit status {expected}, found {found}")
    })
}

fn life(scene: &Scene<'_>) -> Result<(), Failure> {
    let spec = spec(&["sh", "-c", "echo hello; exec sleep 1000"]);
    bare_shim::with(scene, &spec, |shim| {
        shim.create(true)?;
        let daemon = shim.process()?;
        is_in(shim, Status::CREATED)?;
        shim.tasks.start("")?;
        is_in(shim, Status::RUNNING)?;
        shim.stdout.until("hello\n", scene.deadline())?;
        shim.tasks.kill(9)?;
        returned(137, shim.tasks.wait("")?)?;
        is_in(shim, Status::STOPPED)?;
        returned(137, shim.tasks.delete("")?)?;
        shim.stdout.to_end(scene.deadline())?;
        check_kernel(scene, &shim.stderr.to_end(scene.deadline())?)?;
        shim.events(&[
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit",
            "/tasks/delete",
        ])?;
        shim.end(&daemon)
    })
}

/// A shim that has a container goes on, whoever says Shutdown: all of the output arrives, and then its end.
fn early_shutdown(scene: &Scene<'_>) -> Result<(), Failure> {
    let script = format!("head -c {SIZE} /dev/zero; exit 3");
    bare_shim::with(scene, &spec(&["sh", "-c", &script]), |shim| {
        shim.create(true)?;
        let daemon = shim.process()?;
        shim.tasks.start("")?;
        shim.tasks.shutdown()?;
        whole(&shim.stdout.to_end(scene.deadline())?)?;
        check_kernel(scene, &shim.stderr.to_end(scene.deadline())?)?;
        returned(3, shim.tasks.finish("")?)?;
        shim.end(&daemon)
    })
}

/// The same of a process that was added, to a container without streams.
fn shutdown_during_exec(scene: &Scene<'_>) -> Result<(), Failure> {
    bare_shim::with(scene, &spec(&["sleep", "1000"]), |shim| {
        shim.create(false)?;
        let daemon = shim.process()?;
        shim.tasks.start("")?;
        let script = format!("head -c {SIZE} /dev/zero; exit 3");
        let burst = process(&["sh", "-c", &script]);
        let streams = [shim.stdout.path(), shim.stderr.path()];
        shim.tasks
            .exec("burst", &burst, streams.each_ref().map(String::as_str))?;
        shim.tasks.start("burst")?;
        shim.tasks.shutdown()?;
        whole(&shim.stdout.to_end(scene.deadline())?)?;
        check_kernel(scene, &shim.stderr.to_end(scene.deadline())?)?;
        returned(3, shim.tasks.finish("burst")?)?;
        shim.tasks.kill(9)?;
        returned(137, shim.tasks.finish("")?)?;
        shim.end(&daemon)
    })
}
