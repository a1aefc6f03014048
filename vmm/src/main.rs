//! `forkvm-vmm`: the monitor of one microVM. It is started by forkvm's shim or by
//! `forkvm template build`, with its control socket as standard input.

// Without the standard library's start-up, which reads /proc/self/maps for its message about an overflown stack: a third
// of what it takes from the process's start to its first request.
#![no_main]

use std::io::IsTerminal;

const HELP: &str = "\
forkvm-vmm runs one microVM. It is started by containerd-shim-forkvm-v2 and by
`forkvm template build`, with a control socket as its standard input; there is no use for it on a
command line.

Usage: forkvm-vmm [--help | --version]
";

/// The process's entry, called by the C library. Answers the exit status.
#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    ignore_broken_pipes();
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (None, None) => {}
        (Some("--help" | "-h"), None) => {
            print!("{HELP}");
            return 0;
        }
        (Some("--version" | "-V"), None) => {
            println!("forkvm-vmm {}", env!("CARGO_PKG_VERSION"));
            return 0;
        }
        _ => {
            eprint!("{HELP}");
            return 2;
        }
    }
    if std::io::stdin().is_terminal() {
        eprint!("forkvm-vmm: standard input is a terminal, not a control socket\n\n{HELP}");
        return 2;
    }
    forkvm_vmm::log_to_stderr();
    let status = forkvm_vmm::monitor::run();
    // Not by returning: a vCPU that hangs in the guest must not keep the process.
    std::process::exit(status.into());
}

/// A launcher or a log that is gone is an error of its write, not the end of the process: what the standard library's
/// start-up does.
fn ignore_broken_pipes() {
    // SAFETY: needed because no safe interface sets a disposition; SIG_IGN runs no code, and there is one thread.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
