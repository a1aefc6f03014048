//! forkvm's monitor as a library: the control protocol, the template store, guest memory, the
//! devices, and the virtual machine itself.

mod boot;
pub use boot::cpuid::on_software_processor;
pub mod control;
pub mod devices;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod jail;
mod launch;
pub mod memory;
pub mod monitor;
mod page_cache;
mod process;
pub mod snapshot;
pub mod template;
mod vcpu;
mod vm;
pub mod written;

/// The host's CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Both are not negative: the clock counts from the boot.
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

struct Stderr;

impl log::Log for Stderr {
    /// Not what fuse-backend-rs says: a hostile guest could make it say so without end.
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        !metadata.target().starts_with("fuse_backend_rs")
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        eprintln!("forkvm-vmm: {}: {}", record.level(), record.args());
    }

    fn flush(&self) {}
}

/// Sends the log, from level info on, to standard error; for the monitor's process.
pub fn log_to_stderr() {
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(log::LevelFilter::Info);
    }
}
