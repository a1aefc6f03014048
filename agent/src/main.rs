//! PID 1 of the guest: serves the API of `forkvm_api` and runs containers with libcontainer.
//!
//! The order in which it comes up, and what it does on each request, is told in docs/agent.md.

use std::{env, path::PathBuf, process::ExitCode};

mod boot;
mod cgroup;
mod channel;
mod console;
mod container;
mod executor;
mod free_memory;
mod identity;
mod launch;
mod log;
mod mounts;
mod process;
mod ready;
mod reaper;
mod reclaim;
mod report;
mod sandbox;
mod serve;
mod service;
mod spec;
mod stats;
mod stdio;
mod streams;
mod tenant;
mod user_namespace;
mod warm_up;
mod worker;

const USAGE: &str = "\
forkvm-agent: PID 1 of a forkvm guest

usage: forkvm-agent                     as PID 1: bring the guest up and serve on vsock
       forkvm-agent warm-up [PROGRAM]   run one container and end, as PID 1 does before it is ready
       forkvm-agent serve --unix DIR    serve on DIR/agent.sock and DIR/streams.sock instead, without
                                        touching the clock (for tests, in namespaces of its own)
";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        [worker::COMMAND] => return worker::main(),
        [warm_up::COMMAND] => return warm_up::main(None),
        [warm_up::COMMAND, program] => return warm_up::main(Some(program)),
        ["serve", "--unix", dir] => serve::unix(&PathBuf::from(dir)),
        ["--help" | "-h"] => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        // The kernel hands init every word of its command line that it does not know itself.
        _ if std::process::id() == 1 => boot::bring_up().and_then(|()| serve::vsock()),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    if let Err(error) = outcome {
        ::log::error!("{error}");
        eprintln!("forkvm-agent: {error}");
    }
    // As PID 1 this makes the kernel panic, which ends the virtual machine: the monitor reports it.
    ExitCode::FAILURE
}
