//! What a long-running program holds, read again and again, and whether it grows.

use std::{collections::BTreeMap, fs};

use crate::failure::Failure;

/// Readings of several numbers, each with the most that it may grow by from one round to the next.
#[derive(Debug, Default)]
pub struct Slopes {
    readings: BTreeMap<String, Vec<f64>>,
    bounds: BTreeMap<String, f64>,
}

impl Slopes {
    /// Adds a reading of `what`, which may grow by `bound` a reading.
    pub fn add(&mut self, what: &str, value: f64, bound: f64) {
        self.readings
            .entry(what.to_owned())
            .or_default()
            .push(value);
        self.bounds.insert(what.to_owned(), bound);
    }

    /// Adds the open descriptors of a process, of which it may not gain any: less than one in two readings, as those of what
    /// is just ending come and go.
    ///
    /// # Errors
    /// It is gone.
    pub fn add_descriptors(&mut self, name: &str, pid: u32) -> Result<(), Failure> {
        let descriptors = descriptors(pid)?;
        self.add(&format!("descriptors of {name}"), descriptors, 0.5);
        Ok(())
    }

    /// Adds what a process holds: its descriptors, and memory of its own in KiB.
    ///
    /// # Errors
    /// It is gone.
    pub fn add_process(&mut self, name: &str, pid: u32, kib: f64) -> Result<(), Failure> {
        self.add_descriptors(name, pid)?;
        let memory = own_memory_kib(pid)?;
        self.add(&format!("memory of {name} in KiB"), memory, kib);
        Ok(())
    }

    /// One line for each number: from where to where, and its slope.
    ///
    /// # Errors
    /// The numbers that grow.
    pub fn judge(&self) -> Result<String, Failure> {
        let mut lines = Vec::new();
        let mut growing = Vec::new();
        for (what, readings) in &self.readings {
            let slope = median_slope(readings);
            let bound = self.bounds.get(what).copied().unwrap_or_default();
            let (first, last) = (readings.first(), readings.last());
            let line = format!(
                "{what}: {} to {}, {slope:+.3} a reading (at most {bound})",
                first.copied().unwrap_or(f64::NAN),
                last.copied().unwrap_or(f64::NAN)
            );
            // Also when there are too few readings to tell.
            if slope.is_nan() || slope > bound {
                growing.push(line.clone());
            }
            lines.push(line);
        }
        if growing.is_empty() {
            return Ok(lines.join("\n"));
        }
        Err(Failure::new(format!(
            "what grows:\n{}\nall readings: {:?}",
            growing.join("\n"),
            self.readings
        )))
    }
}

/// The median of the slopes between all pairs of readings (Theil and Sen), which a jump up and down, as a garbage
/// collector makes, does not move. NaN of fewer than two readings.
fn median_slope(readings: &[f64]) -> f64 {
    let mut slopes = Vec::new();
    for (later, value) in readings.iter().enumerate() {
        for (earlier, before) in readings[..later].iter().enumerate() {
            slopes.push((value - before) / (later - earlier) as f64);
        }
    }
    slopes.sort_by(f64::total_cmp);
    slopes.get(slopes.len() / 2).copied().unwrap_or(f64::NAN)
}

fn descriptors(pid: u32) -> Result<f64, Failure> {
    let folder = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&folder).map_err(Failure::io(&folder))?;
    Ok(entries.count() as f64)
}

/// What a process has written to in mappings that no file is behind (`Private_Dirty` of /proc/PID/smaps, proc(5)).
fn own_memory_kib(pid: u32) -> Result<f64, Failure> {
    let file = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&file).map_err(Failure::io(&file))?;
    own_memory(&text).ok_or_else(|| Failure::new(format!("{file} cannot be read: {text}")))
}

fn own_memory(smaps: &str) -> Option<f64> {
    let mut sum = 0.0;
    let mut counts = None;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match (words.next()?, words.next()) {
            ("Private_Dirty:", Some(kib)) if counts? => sum += kib.parse::<f64>().ok()?,
            (name, _) if name.ends_with(':') => {}
            // The first line of a mapping: addresses, rights, offset, device, inode, and a path if there is one.
            _ => counts = Some(words.nth(3).is_none_or(|path| path.starts_with('['))),
        }
    }
    counts.map(|_| sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slopes(values: &[f64]) -> Slopes {
        let mut slopes = Slopes::default();
        for &value in values {
            slopes.add("files", value, 0.0);
        }
        slopes
    }

    #[test]
    fn what_grows_is_found_and_what_jumps_is_not() {
        assert!(slopes(&[5.0, 5.0, 5.0, 5.0]).judge().is_ok());
        assert!(slopes(&[5.0, 9.0, 4.0, 8.0, 5.0, 3.0]).judge().is_ok());
        let failure = slopes(&[5.0, 6.0, 7.0, 8.0]).judge().unwrap_err();
        assert!(
            failure.message().contains("files: 5 to 8, +1.000"),
            "{failure}"
        );
        assert!(slopes(&[5.0, 6.0, 6.0, 7.0, 9.0]).judge().is_err());
    }

    #[test]
    fn one_reading_tells_nothing() {
        assert!(slopes(&[5.0]).judge().is_err());
    }

    #[test]
    fn memory_behind_which_is_a_file_does_not_count() {
        let smaps = "7f00-7f10 rw-p 00000000 00:00 0 \nSize: 64 kB\nPrivate_Dirty:        12 kB\n\
            7f10-7f20 rw-p 00000000 fe:00 77    /var/lib/template (deleted)\nPrivate_Dirty:      5000 kB\n\
            7f20-7f30 rw-p 00000000 00:00 0     [heap]\nPrivate_Dirty:         8 kB\nVmFlags: rd wr\n";
        assert_eq!(own_memory(smaps), Some(20.0));
        assert_eq!(own_memory(""), None);
    }

    #[test]
    fn a_process_is_read() {
        let mut slopes = Slopes::default();
        slopes.add_process("this", std::process::id(), 1e9).unwrap();
        slopes.add_process("this", std::process::id(), 1e9).unwrap();
        assert!(slopes.readings["memory of this in KiB"][0] > 0.0);
        assert!(slopes.readings["descriptors of this"][0] > 0.0);
        assert!(slopes.add_process("none", 0, 0.0).is_err());
    }
}
