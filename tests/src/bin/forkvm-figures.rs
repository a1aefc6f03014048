//! Measures on this machine, and shows what was measured.

use std::{
    fs,
    io::stdin,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};
use forkvm_tests::{
    conformance::report as conformance,
    failure::Failure,
    figures::{
        calibration::Calibration, demo, density, exec, gate, measure, memory, report,
        report::Report, show, stdout,
    },
    machine::{Containerd, Machine, Runtime},
};

/// Measures forkvm beside runc on this machine, and shows what was measured.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Containers beside runc, cold boot beside fork, and the memory of each.
    Demo {
        /// How many measured runs of each.
        #[arg(long, default_value_t = 20, value_name = "N")]
        runs: usize,
        #[command(flatten)]
        set: Set,
    },
    /// What a container's machine takes of the host's memory, at rest and after work.
    Density {
        #[command(flatten)]
        set: Set,
    },
    /// A process that is added to a running container, beside runc.
    Exec {
        /// How many measured runs of each.
        #[arg(long, default_value_t = 30, value_name = "N")]
        runs: usize,
        #[command(flatten)]
        set: Set,
    },
    /// A container that writes much, beside runc.
    Stdout {
        /// How many measured runs of each.
        #[arg(long, default_value_t = 3, value_name = "N")]
        runs: usize,
        #[command(flatten)]
        set: Set,
    },
    /// Write the counts of the suites of others that a folder has as figures, counts.json, into it.
    Counts {
        /// The folder.
        folder: PathBuf,
    },
    /// Run the calibration loops and print what they took.
    Calibrate,
    /// Show the reports in a folder as one table.
    Show {
        /// The folder.
        folder: PathBuf,
    },
    /// Hold the figures of a report against what is recorded of them; fail if one has grown.
    Gate {
        /// The report.
        report: PathBuf,
        /// The record.
        record: PathBuf,
        /// Write the report's values into the record in place of failing.
        #[arg(long = "record")]
        write: bool,
    },
    /// As an OCI hook: write down the private memory of the container's process.
    #[command(hide = true)]
    Hook {
        /// The file to write to.
        answer: PathBuf,
    },
}

/// Where a set of figures is measured, and where it goes.
#[derive(Debug, Args)]
struct Set {
    /// How this machine keeps time: counted, parallel or hardware.
    #[arg(long, value_name = "MODE")]
    mode: String,
    /// Leave out the memory of many containers.
    #[arg(long)]
    no_crowd: bool,
    /// Folder for the report.
    #[arg(long, default_value = "/var/lib/forkvm-figures", value_name = "FOLDER")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("forkvm-figures: error: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Demo { runs, set } => {
            let runtimes = [Runtime::Runc, Runtime::Forkvm];
            let machine =
                Machine::look(Containerd::OF_THE_MACHINE, &runtimes, measure::deadline())?;
            demo::run(&machine, runs, &set.mode, !set.no_crowd, &set.out)
        }
        Command::Density { set } => density::run(&set.mode, !set.no_crowd, &set.out),
        Command::Exec { runs, set } => exec::run(runs, &set.mode, &set.out),
        Command::Stdout { runs, set } => stdout::run(runs, &set.mode, &set.out),
        Command::Counts { folder } => counts(&folder),
        Command::Calibrate => {
            let taken = serde_json::to_string(&Calibration::take()?);
            let text = taken.map_err(|error| Failure::new(error.to_string()))?;
            println!("{text}");
            Ok(())
        }
        Command::Show { folder } => show_reports(&folder),
        Command::Gate {
            report,
            record,
            write,
        } => {
            let figures = report::read(&report)?;
            if write {
                gate::record(&figures, &record)?;
            }
            gate::check(&figures, &record)
        }
        Command::Hook { answer } => hook(&answer),
    }
}

/// Of each suite: how many of the tests that runc passes forkvm passes too.
fn counts(folder: &Path) -> Result<(), Failure> {
    let mut report = Report::default();
    for entry in conformance::read(folder)? {
        let name = format!(
            "{} {}, containerd {}: tests that forkvm passes, of those that runc passes",
            entry.suite, entry.suite_version, entry.containerd
        );
        let against = Some(entry.runc_passed as f64);
        report.add(&name, entry.forkvm_passed as f64, "tests", against);
        report.aim("no unexpected failure", entry.unexpected.is_empty());
    }
    Ok(report.write(folder, "counts")?)
}

fn show_reports(folder: &Path) -> Result<(), Failure> {
    let entries = fs::read_dir(folder)
        .map_err(|_| Failure::new("nothing has been measured yet; run: make figures NAME=demo"))?;
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            Some(
                entry
                    .file_name()
                    .to_str()?
                    .strip_suffix(".json")?
                    .to_owned(),
            )
        })
        .filter(|name| !name.ends_with(".samples") && name != conformance::NAME)
        .collect();
    names.sort();
    let mut reports = Vec::new();
    for name in names {
        let figures = report::read(&folder.join(format!("{name}.json")))?;
        reports.push((name, figures));
    }
    println!("{}", show::reports(&reports));
    for entry in conformance::read(folder)? {
        println!("{entry}");
    }
    Ok(())
}

/// The state of the container comes on standard input (OCI runtime specification, "Hooks").
fn hook(answer: &Path) -> Result<(), Failure> {
    let state: serde_json::Value = serde_json::from_reader(stdin())
        .map_err(|error| Failure::new(format!("the container's state is not JSON: {error}")))?;
    let pid = state["pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok());
    let pid = pid.ok_or_else(|| Failure::new("the container's state names no process"))?;
    let bytes = memory::private_dirty(pid)?;
    fs::write(answer, bytes.to_string()).map_err(Failure::io(answer.display()))
}
