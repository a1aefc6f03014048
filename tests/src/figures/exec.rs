//! The figures named `exec`: a process that is added to a running container, beside runc.

use std::{collections::BTreeMap, path::Path, time::Instant};

use super::{
    measure::{deadline, unique_name},
    report::Report,
    running::{RunningContainer, sleeping},
    samples::Samples,
    show,
};
use crate::{
    failure::Failure, machine::Runtime, oci_config::default_spec, process, task_client::TaskClient,
};

/// What is measured of each runtime.
#[derive(Default)]
struct Times {
    /// From the request `Exec` to the answer of `Start`, asked of the shim itself.
    shim: Samples,
    /// The whole of `ctr task exec`.
    ctr: Samples,
}

const RUNTIMES: [Runtime; 2] = [Runtime::Runc, Runtime::Forkvm];

/// Measures and writes the report `exec` into `folder`. `mode` says how the machine keeps time.
///
/// # Errors
/// When anything at all goes wrong: there are no figures of half a run.
pub fn run(runs: usize, mode: &str, folder: &Path) -> Result<(), Failure> {
    let mut times: BTreeMap<Runtime, Times> = BTreeMap::new();
    let process = process_that_ends()?;
    show::progress(&format!("\nexec of /bin/true: {runs} runs each "));
    let containers = RUNTIMES.map(|runtime| {
        Ok((
            runtime,
            RunningContainer::start(&sleeping(), runtime, mode)?,
        ))
    });
    let containers: Vec<_> = containers.into_iter().collect::<Result<_, Failure>>()?;
    for run in 0..=runs {
        for (runtime, container) in &containers {
            let client = TaskClient::of(container.id())?;
            let shim = of_shim(&client, &process)?;
            let ctr = of_ctr(container.id())?;
            // The first of each finds caches cold.
            if run > 0 {
                let times = times.entry(*runtime).or_default();
                times.shim.add(shim);
                times.ctr.add(ctr);
            }
        }
        show::progress(".");
    }
    show::progress("\n");
    for (_, container) in containers {
        container.remove()?;
    }
    let mut report = Report::default();
    let [runc, forkvm] = RUNTIMES.map(|runtime| times.remove(&runtime).unwrap_or_default());
    let what = "the shim's own time from Exec to the process started";
    add(&mut report, mode, what, &runc.shim, &forkvm.shim);
    let what = "ctr task exec of /bin/true";
    add(&mut report, mode, what, &runc.ctr, &forkvm.ctr);
    Ok(report.write(folder, "exec")?)
}

fn add(report: &mut Report, mode: &str, what: &str, runc: &Samples, forkvm: &Samples) {
    let mut table = show::table([what, "p50, ms", "worst"]);
    for (runtime, samples) in [("runc", runc), ("forkvm", forkvm)] {
        let [p50, worst] = show::p50_and_worst(samples);
        table.add_row([runtime.to_owned(), p50, worst]);
        report
            .samples
            .insert(format!("{what}, {runtime} ({mode})"), samples.clone());
    }
    println!("{table}");
    for percent in [50.0, 99.0] {
        let (own, against) = (forkvm.percentile(percent), runc.percentile(percent));
        let name = format!("{what}, forkvm against runc, p{percent:.0} ({mode})");
        report.add(&name, own, "ms", Some(against));
        if percent < 99.0 {
            report.aim("at most half of runc's", own <= against / 2.0);
        }
    }
}

/// The process of containerd's own spec, executing something that ends at once.
fn process_that_ends() -> Result<serde_json::Value, Failure> {
    let mut spec = default_spec(deadline())?;
    let mut process = spec["process"].take();
    process["args"] = serde_json::json!(["/bin/true"]);
    Ok(process)
}

/// Milliseconds.
fn of_shim(client: &TaskClient, process: &serde_json::Value) -> Result<f64, Failure> {
    let exec_id = unique_name();
    let began = Instant::now();
    client.exec(&exec_id, process, ["", ""])?;
    client.start(&exec_id)?;
    let took = began.elapsed();
    match client.finish(&exec_id)? {
        0 => Ok(took.as_secs_f64() * 1e3),
        status => Err(Failure::new(format!("/bin/true returned {status}"))),
    }
}

/// Milliseconds.
fn of_ctr(id: &str) -> Result<f64, Failure> {
    let words = [
        "ctr",
        "task",
        "exec",
        "--exec-id",
        &unique_name(),
        id,
        "/bin/true",
    ]
    .map(String::from);
    let output = process::run(&words, b"", deadline())?.exits(0)?;
    Ok(output.took.as_secs_f64() * 1e3)
}
