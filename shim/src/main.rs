//! `containerd-shim-forkvm-v2`: containerd's runtime shim that runs each container in a microVM of
//! its own. `docs/shim.md` tells what each call does.
//!
//! The same program is five: `start` makes the listening socket and leaves a daemon behind,
//! `delete` cleans up after a shim that died, `-info` describes the runtime, the daemon serves
//! containerd's Task API, and a builder makes a template that a daemon has found missing.

use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
};

mod any;
mod bootstrap;
mod bundle;
mod cgroup;
mod container;
mod daemon;
mod delete;
mod error;
mod events;
mod fault;
mod hooks;
mod info;
mod machine;
mod reaper;
mod rootfs;
mod run_state;
mod service;
mod spec;
mod stats;
mod streams;
mod timings;
mod vm;

const HELP: &str = "\
containerd-shim-forkvm-v2: containerd's shim for forkvm, one microVM for each container

containerd starts it; to run a container, name it as the runtime:
    ctr run --rm --runtime io.containerd.forkvm.v2 IMAGE ID COMMAND
    docker run --rm --runtime io.forkvm IMAGE COMMAND

Usage: containerd-shim-forkvm-v2 [FLAGS] [start|delete]
    start             make the task's socket, leave a daemon behind, print the address
    delete            clean up after a shim that died, print a DeleteResponse
    -info             print what this runtime is (containerd.types.RuntimeInfo)
    -v, -version      print the version
    -namespace NAME   containerd's namespace
    -id ID            the container's id
    -bundle FOLDER    the OCI bundle (default: the working folder)
    -address SOCKET   containerd's socket
    -publish-binary P taken and not needed: events go over ttrpc
    -debug            log at level debug
    -h, --help        this text

Configuration: /etc/forkvm/config.toml, or the file that FORKVM_CONFIG names.
";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if arguments
        .iter()
        .any(|a| a == "-h" || a == "-help" || a == "--help")
    {
        return print(HELP.as_bytes());
    }
    let flags = match containerd_shim::parse(&arguments) {
        Ok(flags) => flags,
        Err(error) => return fail(&error),
    };
    if flags.version {
        return print(
            concat!(
                "containerd-shim-forkvm-v2 ",
                env!("CARGO_PKG_VERSION"),
                "\n"
            )
            .as_bytes(),
        );
    }
    if flags.info {
        return answer(info::run());
    }
    match flags.action.as_str() {
        "start" => answer(bootstrap::start(&flags)),
        "delete" => answer(delete::run(&flags)),
        daemon::ACTION => match daemon::run(&flags) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                log::error!("{error}");
                fail(&error)
            }
        },
        // Its answer is for the shim that has called it.
        vm::builder::ACTION => match vm::builder::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                print(error.to_string().as_bytes());
                ExitCode::FAILURE
            }
        },
        "" => fail(
            &"no action given: containerd calls this program with start or delete (see --help)",
        ),
        other => fail(&format_args!(
            "unknown action {other:?}: it is start or delete (see --help)"
        )),
    }
}

/// Prints the bytes that containerd waits for, or the error in their place.
fn answer<E: std::fmt::Display>(result: Result<Vec<u8>, E>) -> ExitCode {
    match result {
        Ok(bytes) => print(&bytes),
        Err(error) => fail(&error),
    }
}

fn print(bytes: &[u8]) -> ExitCode {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// containerd shows what a failed `start` or `delete` wrote to stderr.
fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    // Nothing is left to do if even stderr is gone.
    let mut stderr = std::io::stderr();
    let _ = write!(stderr, "forkvm: {error}");
    // containerd puts the text into a line of its own.
    if stderr.is_terminal() {
        let _ = writeln!(stderr);
    }
    ExitCode::FAILURE
}
