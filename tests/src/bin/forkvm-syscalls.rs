//! Runs the monitor and notes which entries of its list of system calls it uses; tells which ones
//! no monitor has used.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use forkvm_tests::{failure::Failure, syscalls};

/// Without a command: becomes the monitor that FORKVM_SYSCALLS_MONITOR names, while a process of
/// its own traces it and adds what it uses to the folder FORKVM_SYSCALLS_FOLDER.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Holds what monitors have used against the list; fails for an entry that none has.
    Report {
        /// Where it was noted.
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("forkvm-syscalls: error: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let Some(Command::Report { folder }) = &arguments.command else {
        let variable = |name| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .ok_or_else(|| Failure::new(format!("{name} is not set")))
        };
        let monitor = variable("FORKVM_SYSCALLS_MONITOR")?;
        return syscalls::record(&monitor, &variable("FORKVM_SYSCALLS_FOLDER")?);
    };
    println!("{}", syscalls::report(folder)?);
    Ok(())
}
