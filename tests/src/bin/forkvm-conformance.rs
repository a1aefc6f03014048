//! Runs suites that others wrote on this machine, on runc first and then on forkvm.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Args, Parser, Subcommand};
use forkvm_tests::{
    conformance::{client::Client, expected::Expected, report::Entry, runtimetest::RuntimeTest},
    failure::Failure,
    machine::{Containerd, Machine, Runtime},
};

/// Runs suites that others wrote on this machine, on runc first and then on forkvm.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Debug, Subcommand)]
enum Suite {
    /// containerd's tests of its client.
    Client {
        /// The folder of the containerd to run them with, in place of the machine's own.
        #[arg(long, value_name = "FOLDER")]
        containerd: Option<PathBuf>,
        /// The program that serves their images.
        #[arg(long, value_name = "FILE")]
        registry: PathBuf,
        /// The OCI layout that it serves.
        #[arg(long, value_name = "FOLDER")]
        layout: PathBuf,
        #[command(flatten)]
        common: Common,
        /// Run only tests whose name contains one of these, and write no report.
        names: Vec<String>,
    },
    /// The OCI's check of what a container finds around it.
    Runtimetest {
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, Args)]
struct Common {
    /// The program of the suite.
    #[arg(long, value_name = "FILE")]
    binary: PathBuf,
    /// The version that it was built from.
    #[arg(long = "suite-version", value_name = "VERSION")]
    version: String,
    /// What is known beforehand of the tests.
    #[arg(long, value_name = "FILE")]
    expected: PathBuf,
    /// Folder for the report, and for the logs.
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
}

fn main() -> ExitCode {
    match run(Arguments::parse().suite) {
        Ok(entry) if entry.unexpected.is_empty() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("forkvm-conformance: error: {failure}");
            ExitCode::from(2)
        }
    }
}

fn run(suite: Suite) -> Result<Entry, Failure> {
    let (entry, out) = match suite {
        Suite::Client {
            containerd,
            registry,
            layout,
            common,
            names,
        } => {
            let known = Expected::read(&common.expected)?.client;
            let part = !names.is_empty();
            let client = Client {
                binary: common.binary,
                version: common.version,
                containerd,
                registry,
                layout,
                logs: common.out.join("conformance-logs"),
                names,
            };
            (client.run(&known)?, (!part).then_some(common.out))
        }
        Suite::Runtimetest { common } => {
            let known = Expected::read(&common.expected)?.runtimetest;
            let deadline = Instant::now() + Duration::from_secs(60);
            let runtimes = [Runtime::Runc, Runtime::Forkvm];
            let machine = Machine::look(Containerd::OF_THE_MACHINE, &runtimes, deadline)?;
            let suite = RuntimeTest {
                binary: common.binary,
                version: common.version,
            };
            (suite.run(&machine, &known)?, Some(common.out))
        }
    };
    if let Some(out) = out {
        entry.write(&out)?;
    }
    println!("{entry}");
    for test in &entry.unexpected {
        println!("  unexpected: {test}");
    }
    Ok(entry)
}
