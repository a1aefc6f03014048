//! The figures named `density`: what a container's machine takes of the host's memory, at rest and
//! after work.

use std::{collections::BTreeMap, fs, path::Path, thread::sleep, time::Duration};

use super::{
    measure::{Bench, Way},
    memory,
    report::Report,
    running::{MountedImage, RunningContainer, sleeping, spec_with_hook},
    show,
};
use crate::{
    container::{BUSYBOX, Container, PYTHON, ctr},
    failure::Failure,
    machine::Runtime,
};

/// How many containers share the machine when its memory is looked at.
const CROWD: usize = 50;

/// How long after its work a machine's memory is looked at.
const PAUSE: Duration = Duration::from_secs(30);

/// Measures all of it and writes the report `density` into `folder`. `mode` says how the machine
/// keeps time, on which memory does not depend.
///
/// # Errors
/// When anything at all goes wrong: there are no figures of half a run.
pub fn run(mode: &str, crowd: bool, folder: &Path) -> Result<(), Failure> {
    let mut report = Report::default();
    measure(&mut report, mode, crowd)?;
    Ok(report.write(folder, "density")?)
}

/// Measures all of it, for a report that has more in it.
///
/// # Errors
/// When anything goes wrong.
pub fn measure(report: &mut Report, mode: &str, crowd: bool) -> Result<(), Failure> {
    let bench = Bench::new()?;
    at_rest(&bench, report, mode)?;
    after_work(&bench, report, mode)?;
    if crowd {
        crowds(report, mode, CROWD)?;
    }
    Ok(())
}

/// What a monitor alone holds when the agent has answered (a hook between Create and Start
/// looks), and while the container sleeps.
///
/// # Errors
/// When the container does not run.
pub fn at_rest(bench: &Bench, report: &mut Report, mode: &str) -> Result<(), Failure> {
    let answered = bench.path("answered");
    let spec = bench.path("spec.json");
    let root = MountedImage::new(BUSYBOX, &bench.path("root"))?;
    let text = spec_with_hook(&answered, &root.path)?;
    fs::write(&spec, text).map_err(Failure::io(spec.display()))?;
    let log = bench.path("memory.jsonl");
    let config = bench.configure(Way::Fork, &log)?;
    let container = Container::of_spec(&spec.display().to_string())
        .detached()
        .option(&["--null-io"]);
    let running = RunningContainer::start(&container, Runtime::Forkvm, mode)?;
    drop(config);
    let at_answer = fs::read_to_string(&answered).map_err(Failure::io(answered.display()))?;
    let at_answer: u64 = at_answer
        .trim()
        .parse()
        .map_err(|_| Failure::new(format!("the hook wrote '{at_answer}'")))?;
    let asleep = memory::private_dirty(running.task_pid()?)?;
    running.remove()?;
    let mut table = show::table(["private memory of a monitor", "MiB"]);
    for (what, bytes, limit) in [
        ("when its agent has answered", at_answer, 2.0),
        ("while its container sleeps", asleep, 5.0),
    ] {
        table.add_row([what.to_owned(), show::number(mebibytes(bytes))]);
        add(report, mode, what, bytes, limit);
    }
    println!("\n{table}");
    Ok(())
}

/// What a monitor holds half a minute after its container has used memory, and read files.
///
/// # Errors
/// When a container does not run.
pub fn after_work(bench: &Bench, report: &mut Report, mode: &str) -> Result<(), Failure> {
    // Of zeros, which the guest does not know: it caches a gigabyte all the same.
    let file = bench.path("gigabyte");
    fs::File::create(&file)
        .and_then(|file| file.set_len(1 << 30))
        .map_err(Failure::io(file.display()))?;
    let mount = format!(
        "type=bind,src={},dst=/gigabyte,options=rbind:ro",
        file.display()
    );
    let python = "python3 -c 'memory = bytearray(b\"x\") * (50 << 20)'; echo done; exec sleep 1000";
    let mut table = show::table(["private memory of a monitor, MiB", "at once", "30 s later"]);
    for (what, container, limit) in [
        (
            "a python script used 50 MB and ended",
            ctr(PYTHON).bare().sh(python),
            15.0,
        ),
        (
            "1 GiB of a file was read",
            ctr(BUSYBOX)
                .bare()
                .option(&["--mount", &mount])
                .sh("cat /gigabyte >/dev/null; echo done; exec sleep 1000"),
            30.0,
        ),
    ] {
        show::progress(&format!("\n{what} "));
        let (container, _client) = RunningContainer::until(&container, Runtime::Forkvm, "done")?;
        let monitor = container.task_pid()?;
        let at_once = memory::private_dirty(monitor)?;
        sleep(PAUSE);
        let later = memory::private_dirty(monitor)?;
        container.remove()?;
        table.add_row([
            what.to_owned(),
            show::number(mebibytes(at_once)),
            show::number(mebibytes(later)),
        ]);
        add(report, mode, &format!("30 s after {what}"), later, limit);
    }
    println!("\n{table}");
    Ok(())
}

/// What each of `count` sleeping containers takes, beside runc.
///
/// # Errors
/// When a container does not run.
pub fn crowds(report: &mut Report, mode: &str, count: usize) -> Result<(), Failure> {
    let mut table = show::table([&format!("memory of each of {count} containers"), "MiB"]);
    let mut found = BTreeMap::new();
    for runtime in [Runtime::Runc, Runtime::Forkvm] {
        show::progress(&format!("\n{count} containers of {} ", runtime.name()));
        let each = crowd(runtime, mode, count)?;
        show::progress("\n");
        table.add_row([runtime.name().to_owned(), show::number(each)]);
        found.insert(runtime, each);
    }
    println!("{table}");
    let name = format!("MemAvailable for each of {count} sleeping containers ({mode})");
    let fork = found.get(&Runtime::Forkvm).copied().unwrap_or(f64::NAN);
    report.add(&name, fork, "MiB", found.get(&Runtime::Runc).copied());
    report.aim("under 15 MiB", fork < 15.0);
    Ok(())
}

/// MiB of MemAvailable that each of many sleeping containers takes.
fn crowd(runtime: Runtime, mode: &str, count: usize) -> Result<f64, Failure> {
    let container = sleeping();
    // One before the first reading: what the first of all brings in is nobody's share.
    let first = RunningContainer::start(&container, runtime, mode)?;
    let before = memory::available()?;
    let mut running = Vec::new();
    for _ in 0..count {
        running.push(RunningContainer::start(&container, runtime, mode)?);
        show::progress(".");
    }
    let after = memory::available()?;
    for container in running {
        container.remove()?;
    }
    first.remove()?;
    Ok((before as f64 - after as f64) / count as f64 / f64::from(1 << 20))
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn add(report: &mut Report, mode: &str, what: &str, bytes: u64, limit: f64) {
    let name = format!("Private_Dirty of the monitor {what} ({mode})");
    report.add(&name, mebibytes(bytes), "MiB", None);
    report.aim(&format!("under {limit} MiB"), mebibytes(bytes) < limit);
}
