//! Memory of processes and of the machine, in bytes.

use std::{fs, path::Path};

use super::Error;

/// Memory that this process alone holds and has written to: what goes when it ends.
///
/// # Errors
/// A process that is gone.
pub fn private_dirty(pid: u32) -> Result<u64, Error> {
    let path = format!("/proc/{pid}/smaps_rollup");
    field(Path::new(&path), "Private_Dirty:")
}

/// Memory that new programs can have without swapping (proc_meminfo(5), MemAvailable).
///
/// # Errors
/// When /proc cannot be read.
pub fn available() -> Result<u64, Error> {
    field(Path::new("/proc/meminfo"), "MemAvailable:")
}

fn field(path: &Path, name: &str) -> Result<u64, Error> {
    let text = fs::read_to_string(path).map_err(Error::io(path.display()))?;
    kilobytes(&text, name)
        .map(|kilobytes| kilobytes * 1024)
        .ok_or_else(|| Error::new(format!("{} has no {name}", path.display())))
}

fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix(" kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "Private_Clean:       12 kB\nPrivate_Dirty:      345 kB\n";
        assert_eq!(kilobytes(text, "Private_Dirty:"), Some(345));
        assert_eq!(kilobytes(text, "Shared_Dirty:"), None);
    }

    #[test]
    fn the_own_process_has_memory() {
        assert!(private_dirty(std::process::id()).unwrap() > 4096);
        assert!(available().unwrap() > 1 << 20);
    }
}
