//! The agent's log: the kernel's message buffer, which the console shows, or standard error.
//!
//! The level is the word `forkvm.log=LEVEL` of the kernel's command line (error, warn, info, debug,
//! trace); `info` without it.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
};

use log::{Level, LevelFilter, Log, Metadata, Record};

enum Sink {
    Kernel(File),
    Stderr,
}

impl Log for Sink {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // A log line that cannot be written has nowhere to be reported.
        let _ = match self {
            Sink::Kernel(kmsg) => {
                let line = format!(
                    "<{}>forkvm-agent: {}\n",
                    priority(record.level()),
                    record.args()
                );
                (&mut &*kmsg).write(line.as_bytes()).map(|_| ())
            }
            Sink::Stderr => {
                let line = format!("forkvm-agent: {}: {}\n", record.level(), record.args());
                std::io::stderr().write_all(line.as_bytes())
            }
        };
    }

    fn flush(&self) {}
}

/// syslog(3) severity, which /dev/kmsg takes as a prefix (Documentation/ABI/testing/dev-kmsg).
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// The level that a kernel command line asks for.
fn level(command_line: &str) -> LevelFilter {
    command_line
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix("forkvm.log="))
        .next_back()
        .and_then(|level| level.parse().ok())
        .unwrap_or(LevelFilter::Info)
}

/// Logs to /dev/kmsg from now on. Needs /dev and /proc.
pub(crate) fn to_kernel() {
    // The default allows ten lines in five seconds: the tail of an error would be lost.
    let _ = fs::write("/proc/sys/kernel/printk_devkmsg", "on");
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    match OpenOptions::new().write(true).open("/dev/kmsg") {
        Ok(kmsg) => install(Sink::Kernel(kmsg), level(&command_line)),
        Err(_) => install(Sink::Stderr, level(&command_line)),
    }
}

/// Logs to standard error from now on; `FORKVM_LOG` sets the level.
pub(crate) fn to_stderr() {
    let level = std::env::var("FORKVM_LOG")
        .ok()
        .and_then(|level| level.parse().ok());
    install(Sink::Stderr, level.unwrap_or(LevelFilter::Info));
}

fn install(sink: Sink, level: LevelFilter) {
    if log::set_boxed_logger(Box::new(sink)).is_ok() {
        log::set_max_level(level);
    }
    std::panic::set_hook(Box::new(|panic| {
        log::error!("{panic}");
        eprintln!("forkvm-agent: {panic}");
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_level_on_the_command_line_counts() {
        assert_eq!(
            level("console=hvc0 forkvm.log=debug quiet"),
            LevelFilter::Debug
        );
        assert_eq!(level("forkvm.log=debug forkvm.log=warn"), LevelFilter::Warn);
        assert_eq!(level("forkvm.log=loud"), LevelFilter::Info);
        assert_eq!(level(""), LevelFilter::Info);
    }
}
