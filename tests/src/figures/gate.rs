//! The gate of speed: figures that may not grow over what the tree has recorded of them.

use std::{collections::BTreeMap, fs, path::Path};

use serde::{Deserialize, Serialize};

use super::{report::Figure, show};
use crate::failure::Failure;

/// What is recorded of one figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recorded {
    /// Its value when it was recorded.
    value: f64,
    unit: String,
    /// How much more it may be, in per cent.
    may_grow_percent: f64,
}

impl Recorded {
    fn allows(&self, value: f64) -> bool {
        // Not a number is no measurement.
        value <= self.value * (1.0 + self.may_grow_percent / 100.0)
    }
}

/// All of it, by the figures' names.
type Record = BTreeMap<String, Recorded>;

/// Holds the figures against the record in a file, and prints both.
///
/// # Errors
/// A figure that has grown too much or was not measured; a record that cannot be read.
pub fn check(figures: &[Figure], path: &Path) -> Result<(), Failure> {
    let record = read(path)?;
    let mut table = show::table(["figure", "measured", "recorded", "limit"]);
    let mut failed = Vec::new();
    for (name, recorded) in &record {
        let value = value_of(figures, name)?;
        let limit = recorded.value * (1.0 + recorded.may_grow_percent / 100.0);
        table.add_row([
            format!("{name}, {}", recorded.unit),
            show::number(value),
            show::number(recorded.value),
            show::number(limit),
        ]);
        if !recorded.allows(value) {
            failed.push(format!(
                "'{name}' is {} {}, recorded are {} and {} per cent more are allowed",
                show::number(value),
                recorded.unit,
                show::number(recorded.value),
                recorded.may_grow_percent
            ));
        }
    }
    println!("{table}");
    if failed.is_empty() {
        return Ok(());
    }
    Err(Failure::new(format!(
        "{}; if that is meant, record it: tests/run speed --record",
        failed.join("; ")
    )))
}

/// Writes the values of the figures that the record names into it.
///
/// # Errors
/// A figure that was not measured; a record that cannot be read or written.
pub fn record(figures: &[Figure], path: &Path) -> Result<(), Failure> {
    let mut record = read(path)?;
    for (name, recorded) in &mut record {
        recorded.value = value_of(figures, name)?;
    }
    let mut text = serde_json::to_string_pretty(&record)
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
    text.push('\n');
    fs::write(path, text).map_err(Failure::io(path.display()))
}

fn read(path: &Path) -> Result<Record, Failure> {
    let text = fs::read_to_string(path).map_err(Failure::io(path.display()))?;
    serde_json::from_str(&text)
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn value_of(figures: &[Figure], name: &str) -> Result<f64, Failure> {
    let figure = figures.iter().find(|figure| figure.figure == name);
    figure
        .map(|figure| figure.value)
        .ok_or_else(|| Failure::new(format!("'{name}' was not measured")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(value: f64) -> Vec<Figure> {
        vec![Figure {
            figure: "fork".into(),
            value,
            unit: "ms".into(),
            against: None,
            aim: None,
            holds: true,
        }]
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        file
    }

    const RECORD: &str = r#"{"fork": {"value": 10.0, "unit": "ms", "may_grow_percent": 10.0}}"#;

    #[test]
    fn a_figure_may_grow_a_little() {
        let file = file(RECORD);
        for (value, right) in [(5.0, true), (11.0, true), (11.01, false), (f64::NAN, false)] {
            assert_eq!(check(&figure(value), file.path()).is_ok(), right, "{value}");
        }
    }

    #[test]
    fn what_was_not_measured_does_not_pass() {
        let failure = check(&[], file(RECORD).path()).unwrap_err();
        assert!(failure.message().contains("'fork' was not measured"));
    }

    #[test]
    fn a_new_record_keeps_the_limits() {
        let file = file(RECORD);
        record(&figure(20.0), file.path()).unwrap();
        let kept = read(file.path()).unwrap();
        assert_eq!(
            (kept["fork"].value, kept["fork"].may_grow_percent),
            (20.0, 10.0)
        );
        assert!(check(&figure(21.0), file.path()).is_ok());
    }
}
