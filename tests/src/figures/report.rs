//! The reports that figures are kept in: `target/report/NAME.json`, an array of figures, and
//! `NAME.samples.json`, every single measurement behind them.

use std::{collections::BTreeMap, fs, path::Path};

use serde::{Deserialize, Serialize};

use super::samples::Samples;
use crate::failure::Failure;

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// What was measured, and how.
    pub figure: String,
    /// The value.
    pub value: f64,
    /// Its unit.
    pub unit: String,
    /// The value, in the same unit, of what it is compared with, measured in the same run.
    pub against: Option<f64>,
    /// What is aimed at, in words.
    pub aim: Option<String>,
    /// Whether the aim is reached; true where there is none.
    pub holds: bool,
}

/// A report in the making.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The figures, in the order in which they are shown.
    pub figures: Vec<Figure>,
    /// Every measurement, by what was measured.
    pub samples: BTreeMap<String, Samples>,
}

impl Report {
    /// Adds a figure without an aim.
    pub fn add(&mut self, figure: &str, value: f64, unit: &str, against: Option<f64>) {
        self.figures.push(Figure {
            figure: figure.into(),
            value: rounded(value),
            unit: unit.into(),
            against: against.map(rounded),
            aim: None,
            holds: value.is_finite(),
        });
    }

    /// Gives the figure that was added last an aim.
    pub fn aim(&mut self, aim: &str, holds: bool) {
        if let Some(figure) = self.figures.last_mut() {
            figure.aim = Some(aim.into());
            figure.holds &= holds;
        }
    }

    /// Writes `NAME.json` and `NAME.samples.json` into `folder`.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn write(&self, folder: &Path, name: &str) -> Result<(), Failure> {
        fs::create_dir_all(folder).map_err(Failure::io(folder.display()))?;
        put(&folder.join(format!("{name}.json")), &self.figures)?;
        put(&folder.join(format!("{name}.samples.json")), &self.samples)
    }
}

fn put(path: &Path, content: &impl Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(content)
        .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
    text.push('\n');
    fs::write(path, text).map_err(Failure::io(path.display()))
}

/// Reads the figures of one report.
///
/// # Errors
/// A file that cannot be read or is no report.
pub fn read(path: &Path) -> Result<Vec<Figure>, Failure> {
    let text = fs::read_to_string(path).map_err(Failure::io(path.display()))?;
    serde_json::from_str(&text)
        .map_err(|error| Failure::new(format!("{} is no report: {error}", path.display())))
}

/// Four significant digits are all that any measurement here is good for.
fn rounded(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_as_it_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let mut report = Report::default();
        report.add("start", 12.345_67, "ms", Some(1234.567));
        report.aim("under 5 ms", false);
        report
            .samples
            .insert("start".into(), Samples::from_iter([12.345_67]));
        report.write(folder.path(), "demo").unwrap();
        let figures = read(&folder.path().join("demo.json")).unwrap();
        assert_eq!(figures, report.figures);
        assert_eq!(
            (figures[0].value, figures[0].against),
            (12.35, Some(1235.0))
        );
        assert!(!figures[0].holds);
        assert!(folder.path().join("demo.samples.json").exists());
    }

    #[test]
    fn a_figure_that_was_not_measured_does_not_hold() {
        let mut report = Report::default();
        report.add("start", f64::NAN, "ms", None);
        report.aim("any", true);
        assert!(!report.figures[0].holds);
    }

    #[test]
    fn what_is_no_report_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        fs::write(&path, "{}").unwrap();
        assert!(read(&path).unwrap_err().message().contains("x.json"));
    }
}
