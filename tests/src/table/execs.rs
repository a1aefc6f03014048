//! Processes beside the container's own, and clients that come and go.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::{
    case::{Case, scenario},
    container::{BUSYBOX, Client, ctr},
    failure::{Failure, ensure},
    process::{Running, Streams},
    scene::Scene,
};

use super::tasks::sleeper;

pub(super) fn cases() -> Vec<Case> {
    vec![
        scenario("exec/exit-statuses", statuses),
        scenario("exec/8-mib-then-the-end", large_output),
        scenario("exec/8-mib-there-and-back", large_round_trip),
        scenario("exec/sees-the-hosts-time", clock),
        scenario("exec/one-after-the-other-and-side-by-side", many),
        scenario("exec/another-client-takes-over-the-streams", taken_over),
    ]
}

/// What goes through a stream where much does.
const SIZE: usize = 8 << 20;

fn statuses(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = sleeper(scene)?;
    for status in [0, 1, 2, 42, 127, 255] {
        let script = format!("exit {status}");
        scene
            .exec(Client::Ctr, &id, ["sh", "-c", &script])?
            .exits(status)?;
    }
    Ok(())
}

/// The process ends at once behind its last byte, which still has to arrive.
fn large_output(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = sleeper(scene)?;
    let script = format!("head -c {SIZE} /dev/zero; exit 3");
    let output = scene
        .exec(Client::Ctr, &id, ["sh", "-c", &script])?
        .exits(3)?;
    ensure(
        output.stdout.len() == SIZE && output.stdout.iter().all(|&byte| byte == 0),
        || format!("expected {SIZE} zero bytes, found {}", output.stdout.len()),
    )
}

fn large_round_trip(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = sleeper(scene)?;
    let sent: Vec<u8> = (0..SIZE).map(|at| (at % 251) as u8).collect();
    let words = exec_words("round-trip", &id, &["cat"]);
    let output = crate::process::run(&words, &sent, scene.deadline())?.exits(0)?;
    ensure(output.stdout == sent, || {
        let same = output.stdout.iter().zip(&sent).take_while(|(a, b)| a == b);
        format!(
            "of {SIZE} bytes {} came back, the first {} as they were sent",
            output.stdout.len(),
            same.count()
        )
    })
}

/// In whole seconds, as `date` says them.
fn clock(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = sleeper(scene)?;
    let before = now();
    let output = scene.exec(Client::Ctr, &id, ["date", "+%s"])?.exits(0)?;
    let after = now();
    let inside = output.text().trim().parse().ok();
    ensure(
        inside.is_some_and(|inside| (before..=after).contains(&inside)),
        || format!("the process says {inside:?}, the host's clock went from {before} to {after}"),
    )
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn many(scene: &Scene<'_>) -> Result<(), Failure> {
    let id = sleeper(scene)?;
    for number in 0..5 {
        let number = number.to_string();
        let output = scene.exec(Client::Ctr, &id, ["echo", &number])?.exits(0)?;
        ensure(output.text() == format!("{number}\n"), || {
            format!("process {number} wrote {:?}", output.text())
        })?;
    }
    let mut running = Vec::new();
    for number in 1..=4 {
        let script = format!("echo {number}; exit {number}");
        let words = exec_words(&format!("number-{number}"), &id, &["sh", "-c", &script]);
        running.push((number, Running::spawn(&words, Streams::Pipes)?));
    }
    for (number, mut running) in running {
        running.close_stdin();
        let output = running.wait(scene.deadline())?.exits(number)?;
        ensure(output.text() == format!("{number}\n"), || {
            format!("process {number} wrote {:?}", output.text())
        })?;
    }
    Ok(())
}

/// The first client is killed and so closes nothing; the second one finds the container where the first one left it.
fn taken_over(scene: &Scene<'_>) -> Result<(), Failure> {
    let streams = scene.path_text("streams");
    std::fs::create_dir(&streams).map_err(Failure::io(&streams))?;
    let script =
        "echo ready; while read line; do echo \"<$line>\"; [ $line != end ] || exit 9; done";
    let container = ctr(BUSYBOX).option(&["--fifo-dir", &streams]).sh(script);
    let (id, mut first) = scene.start(&container)?;
    first.line("ready", scene.deadline())?;
    first.write(b"one\n")?;
    first.line("<one>", scene.deadline())?;
    drop(first);
    scene.check_kernel(Client::Ctr, &id)?;

    let words = ["ctr", "task", "attach", &id].map(String::from);
    let mut second = Running::spawn(&words, Streams::Pipes)?;
    second.write(b"two\n")?;
    second.line("<two>", scene.deadline())?;
    second.write(b"end\n")?;
    second.line("<end>", scene.deadline())?;
    second.wait(scene.deadline())?.exits(9).map(drop)
}

/// The command line of a process in the container `id`.
fn exec_words(name: &str, id: &str, command: &[&str]) -> Vec<String> {
    let words = ["ctr", "task", "exec", "--exec-id", name, id];
    words
        .iter()
        .chain(command)
        .map(|&word| word.into())
        .collect()
}
