//! What the host's kernel counts: system calls by its tracing, exits of virtual machines by KVM.

use std::{collections::BTreeSet, fs, path::Path};

use rustix::mount::{MountFlags, mount as mount_at};

use crate::failure::Failure;

const TRACING: &str = "/sys/kernel/tracing";
const DEBUG: &str = "/sys/kernel/debug";

/// Calls that move bytes, by their numbers on x86-64: read, write, pread64, pwrite64, readv, writev, sendfile, sendto,
/// recvfrom, sendmsg, recvmsg, splice, preadv, pwritev. What splice moves between pipes is not copied, but nobody here does that.
const MOVING: [u32; 14] = [0, 1, 17, 18, 19, 20, 40, 44, 45, 46, 47, 275, 295, 296];

/// Makes both file systems visible if they are not.
///
/// # Errors
/// They cannot be mounted.
pub(super) fn mount() -> Result<(), Failure> {
    for (kind, folder, inside) in [("tracefs", TRACING, "events"), ("debugfs", DEBUG, "kvm")] {
        if !Path::new(folder).join(inside).exists() {
            mount_at(kind, folder, kind, MountFlags::empty(), None)
                .map_err(|errno| Failure::new(format!("cannot mount {kind}: {errno}")))?;
        }
    }
    Ok(())
}

/// How often the machine of this monitor has left its guest (KVM's `exits`, summed over its vCPUs).
///
/// # Errors
/// KVM does not know it.
pub(super) fn exits(monitor: u32) -> Result<u64, Failure> {
    let folder = Path::new(DEBUG).join("kvm");
    let entries = fs::read_dir(&folder).map_err(Failure::io(folder.display()))?;
    // A machine's folder is called PID-DESCRIPTOR.
    let prefix = format!("{monitor}-");
    let machine = entries
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    let machine =
        machine.ok_or_else(|| Failure::new(format!("KVM has no machine of process {monitor}")))?;
    let file = machine.path().join("exits");
    let text = fs::read_to_string(&file).map_err(Failure::io(file.display()))?;
    text.trim()
        .parse()
        .map_err(|_| Failure::new(format!("{} is {text:?}", file.display())))
}

/// The histogram of the results of all system calls by thread and call, from now on until this is dropped
/// (the kernel's documentation of tracing, "Event Histograms").
pub(super) struct Calls;

impl Calls {
    const EVENT: &str = "events/raw_syscalls/sys_exit";
    const TRIGGER: &str = "hist:keys=common_pid,id:vals=ret:size=16384 if ret > 0";

    /// Begins to count.
    ///
    /// # Errors
    /// The kernel cannot.
    pub(super) fn count() -> Result<Self, Failure> {
        set(Self::TRIGGER)?;
        Ok(Calls)
    }

    /// How many bytes these threads have moved.
    ///
    /// # Errors
    /// The histogram cannot be read, or has overflowed.
    pub(super) fn moved(&self, threads: &BTreeSet<u32>) -> Result<u64, Failure> {
        let file = Path::new(TRACING).join(Self::EVENT).join("hist");
        let text = fs::read_to_string(&file).map_err(Failure::io(file.display()))?;
        if !text.lines().any(|line| line.trim() == "Dropped: 0") {
            return Err(Failure::new("the histogram of system calls has overflowed"));
        }
        Ok(text
            .lines()
            .filter_map(entry)
            .filter(|(thread, call, _)| threads.contains(thread) && MOVING.contains(call))
            .map(|(_, _, bytes)| bytes)
            .sum())
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        // It is this program's own; without it there is nothing to take away.
        let _ = set(&format!("!{}", Self::TRIGGER));
    }
}

fn set(trigger: &str) -> Result<(), Failure> {
    let file = Path::new(TRACING).join(Calls::EVENT).join("trigger");
    fs::write(&file, trigger).map_err(Failure::io(file.display()))
}

/// Thread, call and sum of results of one line: `{ common_pid: 7, id: 1 } hitcount: 3  ret: 4096`.
fn entry(line: &str) -> Option<(u32, u32, u64)> {
    let number = |name: &str| {
        let rest = line.split_once(name)?.1.trim_start();
        rest.split(|mark: char| !mark.is_ascii_digit()).next()
    };
    Some((
        number("common_pid:")?.parse().ok()?,
        number(" id:")?.parse().ok()?,
        number(" ret:")?.parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_histogram_are_read() {
        let line =
            "{ common_pid:        963, id:          1 } hitcount:       1257  ret:   41189376";
        assert_eq!(entry(line), Some((963, 1, 41_189_376)));
        assert_eq!(entry("    Hits: 95561"), None);
        assert_eq!(
            entry("# trigger info: hist:keys=common_pid,id:vals=hitcount,ret"),
            None
        );
    }
}
