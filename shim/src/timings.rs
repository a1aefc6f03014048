//! The named time points of a start (`forkvm_api::points`).

use std::{fs::OpenOptions, io::Write as _, path::Path, time::Duration};

use forkvm_api::points;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::fault::Fault;

/// Nanoseconds of the host's CLOCK_MONOTONIC.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = Duration::from_secs(now.tv_sec.unsigned_abs());
    points::nanoseconds(seconds + Duration::from_nanos(now.tv_nsec.unsigned_abs()))
}

/// Points in the order in which they were taken.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(transparent)]
pub(crate) struct Points {
    taken: Vec<Point>,
    #[serde(skip)]
    fault: Fault,
}

#[derive(Clone, Debug, Serialize)]
struct Point {
    name: String,
    at_ns: u64,
}

impl Points {
    /// No points yet. `fault` comes to pass at its own.
    pub(crate) fn with(fault: Fault) -> Self {
        Self {
            taken: Vec::new(),
            fault,
        }
    }

    /// Takes a point now.
    pub(crate) fn take(&mut self, name: &str) {
        self.take_at(name, now());
    }

    /// Takes a point of the shim's own that was passed at another moment.
    pub(crate) fn take_at(&mut self, name: &str, at_ns: u64) {
        self.add(name, at_ns);
        self.fault.passed(name);
    }

    /// Adds a point that was taken elsewhere.
    pub(crate) fn add(&mut self, name: &str, at_ns: u64) {
        self.taken.push(Point {
            name: name.to_owned(),
            at_ns,
        });
    }

    /// Appends them as one line of JSON to `file`. A failure is logged: figures are not worth a
    /// container.
    pub(crate) fn append(&self, file: &Path, namespace: &str, id: &str, mode: &str) {
        #[derive(Serialize)]
        struct Line<'a> {
            namespace: &'a str,
            id: &'a str,
            mode: &'a str,
            points: &'a Points,
        }
        let appended = serde_json::to_string(&Line {
            namespace,
            id,
            mode,
            points: self,
        })
        .map_err(std::io::Error::other)
        .and_then(|mut line| {
            line.push('\n');
            // One write: lines of several shims do not mix (O_APPEND, open(2)).
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(file)?
                .write_all(line.as_bytes())
        });
        if let Err(error) = appended {
            log::warn!("cannot append time points to {}: {error}", file.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_what_a_reader_needs() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("timings");
        let mut points = Points::default();
        points.take(points::CREATE_RECEIVED);
        points.add(points::VCPU_ENTERED, 7);
        points.append(&file, "default", "c1", "fork");
        points.append(&file, "default", "c2", "boot");
        let text = std::fs::read_to_string(&file).unwrap();
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1]["id"], "c2");
        assert_eq!(lines[0]["points"][1]["name"], "vcpu.entered");
        assert_eq!(lines[0]["points"][1]["at_ns"], 7);
        assert!(lines[0]["points"][0]["at_ns"].as_u64().unwrap() > 0);
    }
}
