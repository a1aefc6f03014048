//! The free memory of a guest that is about to become a template: in large pieces, and all of it
//! reported to the balloon device.
//!
//! Each page that a child writes to becomes its own. Where free memory is in many small pieces, what
//! the child allocates lies in many places, and so do the kernel's notes about it. And what the
//! template's kernel has not reported yet, each child would report anew: notes in a page of its own
//! for each piece.

use std::{fs, io, thread::sleep, time::Duration};

/// The kernel waits two seconds before it reports, and again if more is to be done
/// (`PAGE_REPORTING_DELAY`, mm/page_reporting.c): when nothing has come for longer, it has done.
const QUIET: Duration = Duration::from_millis(2500);

/// Rounds of [`QUIET`] at most. A round reports a sixteenth of what is free or 256 MiB, whichever
/// is more.
const ROUNDS: u32 = 40;

/// Keeps the kernel from hoarding free pages of its own: for each processor it may hold back an eighth of the memory
/// (`pcp->high`, mm/page_alloc.c), which neither a report nor a neighbour's allocation finds. 2048 makes that the least
/// there can be, four batches (half a megabyte).
pub(crate) fn do_not_hoard() -> io::Result<()> {
    fs::write("/proc/sys/vm/percpu_pagelist_high_fraction", "2048")
}

/// Called when nothing else goes on. What fails costs the children memory, and is logged.
pub(crate) fn tidy_up() {
    if let Err(error) = fs::write("/proc/sys/vm/compact_memory", "1") {
        log::warn!("memory cannot be compacted: {error}");
    }
    if let Err(error) = reported() {
        log::warn!("free memory is not reported: {error}");
    }
}

/// Waits until all free memory has been reported. Each report ends with the device's interrupt; the kernel
/// tells nobody else.
fn reported() -> io::Result<()> {
    let device = fs::read_dir("/sys/bus/virtio/drivers/virtio_balloon")?
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().into_string().ok())
        .find(|name| name.starts_with("virtio"))
        .ok_or(io::ErrorKind::NotFound)?;
    let mut before = None;
    for _ in 0..ROUNDS {
        let count = interrupts(&fs::read_to_string("/proc/interrupts")?, &device);
        if before == Some(count) {
            return Ok(());
        }
        before = Some(count);
        sleep(QUIET);
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// How often `device` has interrupted, on all processors (proc_interrupts(5)).
fn interrupts(table: &str, device: &str) -> u64 {
    table
        .lines()
        .filter(|line| line.split_ascii_whitespace().next_back() == Some(device))
        .flat_map(|line| {
            let numbers = line.split_ascii_whitespace().skip(1);
            numbers.map_while(|number| number.parse::<u64>().ok())
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_of_one_device_are_summed() {
        let table = "           CPU0       CPU1\n\
                      10:          3          4   IO-APIC  10-edge      virtio5\n\
                      11:         20          1   IO-APIC  11-edge      virtio6\n\
                     LOC:       1000       1000   Local timer interrupts\n";
        assert_eq!(interrupts(table, "virtio6"), 21);
        assert_eq!(interrupts(table, "virtio7"), 0);
    }
}
