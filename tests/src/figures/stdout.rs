//! The figures named `stdout`: a container that writes much, beside runc.

use std::{collections::BTreeSet, fs, path::Path, time::Instant};

use super::{
    measure::{deadline, retried, unique_name},
    report::Report,
    running::{RunningContainer, sleeping},
    samples::Samples,
    show,
    tracing::{self, Calls},
};
use crate::{failure::Failure, machine::Runtime, process};

/// What the container writes.
const MIB: u64 = 256;

/// What is measured of one runtime.
#[derive(Default)]
struct Flow {
    /// MiB a second, of each run.
    rates: Samples,
    /// Times that the runtime's processes on the host have moved each byte.
    copies: f64,
    /// Exits of the virtual machine for each MiB; none of runc.
    exits: Option<f64>,
}

/// Measures and writes the report `stdout` into `folder`. `mode` says how the machine keeps time.
///
/// # Errors
/// When anything at all goes wrong: there are no figures of half a run.
pub fn run(runs: usize, mode: &str, folder: &Path) -> Result<(), Failure> {
    tracing::mount()?;
    let bench = super::measure::Bench::new()?;
    let file = bench.path("much");
    fs::File::create(&file)
        .and_then(|file| file.set_len(MIB << 20))
        .map_err(Failure::io(file.display()))?;
    let mut flows = Vec::new();
    for runtime in [Runtime::Runc, Runtime::Forkvm] {
        show::progress(&format!(
            "\n{MIB} MiB of output of {}: {runs} runs ",
            runtime.name()
        ));
        // A guest that hangs is known by the deadline alone, and is measured anew.
        flows.push(retried(runtime, || flow(runtime, mode, runs, &file))?);
    }
    show::progress("\n");
    let mut table = show::table([
        &format!("cat of {MIB} MiB"),
        "MiB/s",
        "copies by the runtime on the host",
        "exits for each MiB",
    ]);
    for (name, flow) in ["runc", "forkvm"].iter().zip(&flows) {
        table.add_row([
            (*name).to_owned(),
            show::number(flow.rates.p50()),
            show::number(flow.copies),
            flow.exits.map_or_else(|| "-".to_owned(), show::number),
        ]);
    }
    println!("{table}");
    let mut report = Report::default();
    if let [runc, forkvm] = &flows[..] {
        let named = |what: &str| format!("stdout, cat of {MIB} MiB: {what} ({mode})");
        report.add(
            &named("forkvm against runc, p50"),
            forkvm.rates.p50(),
            "MiB/s",
            Some(runc.rates.p50()),
        );
        report.add(
            &named("copies of each byte by the runtime's processes on the host"),
            forkvm.copies,
            "copies",
            Some(runc.copies),
        );
        let exits = forkvm.exits.unwrap_or(f64::NAN);
        report.add(&named("exits"), exits, "exits/MiB", None);
        for (name, flow) in ["runc", "forkvm"].iter().zip(&flows) {
            report.samples.insert(named(name), flow.rates.clone());
        }
    }
    Ok(report.write(folder, "stdout")?)
}

fn flow(runtime: Runtime, mode: &str, runs: usize, file: &Path) -> Result<Flow, Failure> {
    let mount = format!(
        "type=bind,src={},dst=/much,options=rbind:ro",
        file.display()
    );
    let container = sleeping().option(&["--mount", &mount]);
    let container = RunningContainer::start(&container, runtime, mode)?;
    let task = container.task_pid()?;
    let mut flow = Flow::default();
    // The first of them reads the file from the host.
    write_all(container.id())?;
    for _ in 0..runs {
        flow.rates.add(MIB as f64 / write_all(container.id())?);
        show::progress(".");
    }
    // In a run of its own: what is counted is slower.
    let exits = (runtime == Runtime::Forkvm).then(|| tracing::exits(task));
    let before = exits.transpose()?;
    let calls = Calls::count()?;
    write_all(container.id())?;
    let moved = calls.moved(&processes(task)?)?;
    flow.copies = moved as f64 / (MIB << 20) as f64;
    if let Some(before) = before {
        flow.exits = Some((tracing::exits(task)? - before) as f64 / MIB as f64);
    }
    container.remove()?;
    Ok(flow)
}

/// The threads of a task's process and of its shim.
fn processes(task: u32) -> Result<BTreeSet<u32>, Failure> {
    let shim = process::parent_of(task)?;
    let mut threads = BTreeSet::new();
    for pid in [task, shim] {
        let folder = format!("/proc/{pid}/task");
        let entries = fs::read_dir(&folder).map_err(Failure::io(&folder))?;
        threads.extend(
            entries
                .flatten()
                .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()),
        );
    }
    Ok(threads)
}

/// Seconds that the container's output takes to arrive.
fn write_all(id: &str) -> Result<f64, Failure> {
    let name = unique_name();
    let line = format!("ctr task exec --exec-id {name} {id} cat /much | wc -c");
    let began = Instant::now();
    let words = ["sh", "-c", &line].map(String::from);
    let output = process::run(&words, b"", deadline())?.exits(0)?;
    let took = began.elapsed();
    if output.text().trim() != (MIB << 20).to_string() {
        return Err(output.failure(format!("expected {} bytes", MIB << 20)));
    }
    Ok(took.as_secs_f64())
}
