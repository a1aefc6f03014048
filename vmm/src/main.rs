//! `forkvm-vmm`: the monitor of one microVM. It is started by forkvm's shim or by
//! `forkvm template build`, with its control socket as standard input.

use std::{io::IsTerminal, process::ExitCode};

const HELP: &str = "\
forkvm-vmm runs one microVM. It is started by containerd-shim-forkvm-v2 and by
`forkvm template build`, with a control socket as its standard input; there is no use for it on a
command line.

Usage: forkvm-vmm [--help | --version]
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match (arguments.next().as_deref(), arguments.next()) {
        (None, None) => {}
        (Some("--help" | "-h"), None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        (Some("--version" | "-V"), None) => {
            println!("forkvm-vmm {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    }
    if std::io::stdin().is_terminal() {
        eprint!("forkvm-vmm: standard input is a terminal, not a control socket\n\n{HELP}");
        return ExitCode::from(2);
    }
    forkvm_vmm::log_to_stderr();
    let status = forkvm_vmm::monitor::run();
    // Not by returning: a vCPU that hangs in the guest must not keep the process.
    std::process::exit(status.into());
}
