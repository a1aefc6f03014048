//! `forkvm`, the operator's tool: `check`, `template`, `ps`, `bench`.

mod args;
mod check;
mod generate;
mod log_output;
mod output;
mod ps;
mod template;
mod tiny_guest;

use std::process::ExitCode;

use clap::Parser as _;
use forkvm_config::Config;
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::args::{Args, Command};

/// What a command can fail with; the message goes to standard error.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Config(#[from] forkvm_config::Error),
    #[error(transparent)]
    Template(#[from] template::Error),
    #[error(transparent)]
    Ps(#[from] ps::Error),
    #[error(transparent)]
    Bench(#[from] forkvm::bench::Error),
    #[error(transparent)]
    Generate(#[from] generate::Error),
}

fn main() -> ExitCode {
    // SAFETY: no handler is installed, the signal's default action comes back: a reader that went
    // away (`| head`) ends this program silently, as it does others.
    if let Err(error) = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) } {
        eprintln!("forkvm: warning: SIGPIPE cannot be reset: {error}");
    }
    log_output::install();
    match run(Args::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("forkvm: error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode, Error> {
    match command {
        Command::Check { json } => return Ok(check::run(json)),
        Command::Template(command) => template::run(command, &Config::load()?)?,
        Command::Ps { timings, json } => ps::run(&Config::load()?.paths.run, timings, json)?,
        Command::Bench(bench) => {
            let (sets, options) = bench.into_parts();
            forkvm::bench::run(&sets, options, &Config::load()?)?;
        }
        Command::Man { folder } => generate::man(&folder)?,
        Command::Completions { shell } => generate::completions(shell),
    }
    Ok(ExitCode::SUCCESS)
}
