//! Warnings of the libraries go to standard error, in the form of this tool's own messages.

use log::{Level, LevelFilter, Log, Metadata, Record};

struct StandardError;

impl Log for StandardError {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = match record.level() {
                Level::Error => "error",
                _ => "warning",
            };
            eprintln!("forkvm: {level}: {}", record.args());
        }
    }

    fn flush(&self) {}
}

/// Installs it; called once, at the start.
pub(crate) fn install() {
    if log::set_logger(&StandardError).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}
