//! Runs forkvm's end-to-end cases through containerd and Docker on this machine, each on runc
//! first and then on forkvm.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use forkvm_tests::{
    case::Case,
    failure::Failure,
    figures::report::Report,
    machine::{Containerd, Machine, Runtime},
    runner::{self, Plan, Summary},
    scene::Repeats,
    table,
};

/// Runs forkvm's end-to-end cases through containerd and Docker, each on runc first.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Run only cases whose name contains one of these.
    names: Vec<String>,
    /// Leave out cases whose name contains one of these.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    except: Vec<String>,
    /// List the cases and run none.
    #[arg(long)]
    list: bool,
    /// The runtimes to run on, in this order.
    #[arg(long, value_delimiter = ',', default_value = "runc,forkvm")]
    runtime: Vec<RuntimeName>,
    /// The service of the containerd that `ctr` asks; of another one than the machine's own Docker knows nothing.
    #[arg(long, default_value = Containerd::OF_THE_MACHINE, value_name = "UNIT")]
    containerd: String,
    /// How many cases run side by side.
    #[arg(long, default_value_t = 2, value_name = "N")]
    jobs: usize,
    /// How long one case may take on one runtime.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    limit: u64,
    /// How often the cases named soak/ go round.
    #[arg(long, default_value_t = 100, value_name = "N")]
    cycles: u32,
    /// How many containers the case soak/many-at-once-three-times has at once.
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    crowd: u32,
    /// Write the counts into FOLDER as a report, table.json.
    #[arg(long, value_name = "FOLDER")]
    report: Option<PathBuf>,
    /// Folder for the logs of failed cases.
    #[arg(long, default_value = "/var/log/forkvm-e2e", value_name = "FOLDER")]
    logs: PathBuf,
    /// The folder to name in messages, when the logs will be copied to another one.
    #[arg(long, value_name = "FOLDER")]
    logs_shown_as: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RuntimeName {
    Runc,
    Forkvm,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(Summary { failed: 0, .. }) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("forkvm-e2e: error: {failure}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &Arguments) -> Result<Summary, Failure> {
    let cases = selected(&arguments.names, &arguments.except)?;
    if arguments.list {
        for case in &cases {
            match case.why_forkvm_only() {
                None => println!("{}", case.name()),
                Some(reason) => println!("{}  (forkvm only: {reason})", case.name()),
            }
        }
        return Ok(Summary::default());
    }
    let runtimes: Vec<Runtime> = arguments
        .runtime
        .iter()
        .map(|name| match name {
            RuntimeName::Runc => Runtime::Runc,
            RuntimeName::Forkvm => Runtime::Forkvm,
        })
        .collect();
    let plan = Plan {
        runtimes,
        jobs: arguments.jobs,
        case_limit: Duration::from_secs(arguments.limit),
        repeats: Repeats {
            cycles: arguments.cycles,
            crowd: arguments.crowd,
        },
        logs: arguments.logs.clone(),
        logs_shown: arguments
            .logs_shown_as
            .clone()
            .unwrap_or_else(|| arguments.logs.clone()),
    };
    let deadline = Instant::now() + plan.case_limit;
    let machine = Machine::look(&arguments.containerd, &plan.runtimes, deadline)?;
    let summary = runner::run(&plan, &machine, &cases)?;
    if summary.again > 0 {
        println!("{} were run a second time, see above", summary.again);
    }
    if let Some(folder) = &arguments.report {
        report(&summary, arguments.crowd).write(folder, "table")?;
    }
    println!("{} passed, {} failed", summary.passed, summary.failed);
    Ok(summary)
}

/// How many cases held on each runtime, and what became of those that are figures of their own.
fn report(summary: &Summary, crowd: u32) -> Report {
    let mut report = Report::default();
    for (runtime, cases) in &summary.on {
        let held = cases.values().filter(|held| **held).count();
        let name = format!("end-to-end cases that hold on {}, of all", runtime.name());
        report.add(&name, held as f64, "cases", Some(cases.len() as f64));
        report.aim("all", held == cases.len());
    }
    report.add(
        "end-to-end cases that were run on forkvm a second time",
        summary.again as f64,
        "cases",
        None,
    );
    for (case, what) in table::FIGURES {
        let held = summary
            .on
            .get(&Runtime::Forkvm)
            .and_then(|on| on.get(*case));
        if let Some(held) = held {
            let what = what.replace("{crowd}", &crowd.to_string());
            let failures = if *held { 0.0 } else { 1.0 };
            report.add(
                &format!("{what}: failures, or something left"),
                failures,
                "",
                None,
            );
            report.aim("none", *held);
        }
    }
    report
}

fn selected(names: &[String], except: &[String]) -> Result<Vec<Case>, Failure> {
    let mut cases = table::cases();
    if let Some(unknown) = names
        .iter()
        .chain(except)
        .find(|name| !cases.iter().any(|case| case.name().contains(*name)))
    {
        return Err(Failure::new(format!(
            "no case has '{unknown}' in its name; see --list"
        )));
    }
    let one_of =
        |names: &[String], case: &Case| names.iter().any(|name| case.name().contains(name));
    cases.retain(|case| (names.is_empty() || one_of(names, case)) && !one_of(except, case));
    Ok(cases)
}
