//! The time points of starts, as the shim appends them to the file `log.timings`: a line of JSON
//! for each start.

use std::{collections::BTreeMap, fs, path::Path};

use forkvm_api::points;
use serde::Deserialize;

use super::Error;
use super::samples::Samples;

/// The points of one start.
#[derive(Clone, Debug, Deserialize)]
pub struct Start {
    /// The container.
    pub id: String,
    /// `fork` or `boot`.
    pub mode: String,
    points: Vec<Point>,
}

#[derive(Clone, Debug, Deserialize)]
struct Point {
    name: String,
    at_ns: u64,
}

impl Start {
    /// A start without points yet, of a machine without a container.
    pub fn new(mode: &str) -> Self {
        Start {
            id: "a machine".into(),
            mode: mode.into(),
            points: Vec::new(),
        }
    }

    /// The start of a running container, from what its shim keeps of it: a JSON array of points.
    ///
    /// # Errors
    /// Text that is something else.
    pub fn parse(id: &str, mode: &str, text: &str) -> Result<Self, Error> {
        let points = serde_json::from_str(text)
            .map_err(|error| Error::new(format!("the time points of {id}: {error}")))?;
        Ok(Start {
            id: id.into(),
            mode: mode.into(),
            points,
        })
    }

    /// Adds a point at this time in nanoseconds of CLOCK_MONOTONIC.
    pub fn pass(&mut self, name: &str, at_ns: u64) {
        self.points.push(Point {
            name: name.into(),
            at_ns,
        });
    }

    /// When a point was passed, in nanoseconds of CLOCK_MONOTONIC.
    ///
    /// # Errors
    /// A point that this start did not record.
    pub fn at(&self, name: &str) -> Result<u64, Error> {
        let point = self.points.iter().find(|point| point.name == name);
        point.map(|point| point.at_ns).ok_or_else(|| {
            Error::new(format!(
                "the start of {} has no time point '{name}'",
                self.id
            ))
        })
    }

    /// Milliseconds from one point to another.
    ///
    /// # Errors
    /// A point that this start did not record.
    pub fn between(&self, from: &str, to: &str) -> Result<f64, Error> {
        // Both are readings of one clock within a minute: exact in a double.
        Ok((self.at(to)? as f64 - self.at(from)? as f64) / 1e6)
    }
}

/// Reads every start of a file of time points.
///
/// # Errors
/// A file that cannot be read or has a line that is no start.
pub fn read(path: &Path) -> Result<Vec<Start>, Error> {
    let text = fs::read_to_string(path).map_err(Error::io(path.display()))?;
    let lines = text.lines().enumerate();
    lines
        .map(|(number, line)| {
            serde_json::from_str(line).map_err(|error| {
                Error::new(format!("{} line {}: {error}", path.display(), number + 1))
            })
        })
        .collect()
}

/// Milliseconds from one point to another in each of several starts.
///
/// # Errors
/// A point that one of them did not record.
pub fn spans(starts: &[Start], from: &str, to: &str) -> Result<Samples, Error> {
    starts.iter().map(|start| start.between(from, to)).collect()
}

/// The phases of a start: the name of the point that ends each, and the milliseconds since the
/// point before it.
///
/// # Errors
/// A point that one of the starts did not record.
pub fn phases(starts: &[Start]) -> Result<Vec<(&'static str, Samples)>, Error> {
    let recorded: BTreeMap<&str, ()> = starts
        .iter()
        .flat_map(|start| start.points.iter().map(|point| (&*point.name, ())))
        .collect();
    let names: Vec<&'static str> = std::iter::once(points::REQUESTED)
        .chain(points::ALL.iter().copied())
        .filter(|name| recorded.contains_key(name))
        .collect();
    let ends = names.iter().skip(1);
    names
        .iter()
        .zip(ends)
        .map(|(from, to)| Ok((*to, spans(starts, from, to)?)))
        .collect()
}

/// The phase with the largest median up to a point, but for those that end at one of `without`.
///
/// # Errors
/// A point that one of the starts did not record.
pub fn longest(
    starts: &[Start],
    until: &str,
    without: &[&str],
) -> Result<Option<(&'static str, Samples)>, Error> {
    let phases = phases(starts)?;
    let last = phases.iter().position(|(point, _)| *point == until);
    let phases = phases.into_iter().take(last.map_or(0, |last| last + 1));
    let phases = phases.filter(|(point, _)| !without.contains(point));
    Ok(phases.max_by(|(_, a), (_, b)| a.p50().total_cmp(&b.p50())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = concat!(
        r#"{"namespace":"default","id":"a","mode":"fork","points":[{"name":"create.received","at_ns":1000000},"#,
        r#"{"name":"vmm.spawned","at_ns":3000000},{"name":"agent.answered","at_ns":9000000}]}"#,
        "\n",
        r#"{"namespace":"default","id":"b","mode":"fork","points":[{"name":"create.received","at_ns":0},"#,
        r#"{"name":"vmm.spawned","at_ns":500000},{"name":"agent.answered","at_ns":1500000}]}"#,
        "\n"
    );

    fn starts() -> Vec<Start> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), LINES).unwrap();
        read(file.path()).unwrap()
    }

    #[test]
    fn spans_are_milliseconds() {
        let samples = spans(&starts(), points::CREATE_RECEIVED, points::AGENT_ANSWERED).unwrap();
        assert_eq!(samples, Samples::from_iter([8.0, 1.5]));
    }

    #[test]
    fn phases_follow_each_other() {
        let phases = phases(&starts()).unwrap();
        let names: Vec<&str> = phases.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["vmm.spawned", "agent.answered"]);
        assert_eq!(phases[1].1, Samples::from_iter([6.0, 1.0]));
        let longest = |until, without: &[&str]| {
            let found = longest(&starts(), until, without).unwrap();
            found.map(|(point, _)| point)
        };
        let [spawned, answered] = [points::VMM_SPAWNED, points::AGENT_ANSWERED];
        assert_eq!(longest(answered, &[]), Some(answered));
        assert_eq!(longest(answered, &[answered]), Some(spawned));
        assert_eq!(longest(spawned, &[]), Some(spawned));
        assert_eq!(longest(points::CREATE_DONE, &[]), None);
    }

    #[test]
    fn a_point_that_is_missing_is_named() {
        let failure = starts()[0].at("vcpu.entered").unwrap_err().to_string();
        assert!(failure.contains("vcpu.entered"), "{failure}");
    }
}
