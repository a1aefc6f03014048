//! The reports that figures are kept in: `target/report/NAME.json`, an array of figures, and
//! `NAME.samples.json`, every single measurement behind them.

use std::{collections::BTreeMap, fs, path::Path};

use serde::{Deserialize, Serialize};

use super::Error;
use super::samples::Samples;

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

/// What became of the aim of a figure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is reached.
    Reached,
    /// It is missed by the figure of this name.
    Missed(String),
}

impl Report {
    /// The report `name` in a folder as it was left; empty if there is none.
    ///
    /// # Errors
    /// Files that cannot be read or are no report.
    pub fn read(folder: &Path, name: &str) -> Result<Self, Error> {
        let path = folder.join(format!("{name}.json"));
        if !path.exists() {
            return Ok(Self::default());
        }
        let samples = folder.join(format!("{name}.samples.json"));
        let text = fs::read_to_string(&samples).map_err(Error::io(samples.display()))?;
        Ok(Self {
            figures: read(&path)?,
            samples: serde_json::from_str(&text)
                .map_err(|error| Error::new(format!("{}: {error}", samples.display())))?,
        })
    }

    /// What became of the aim of the figure that was added last, if it has one.
    pub fn verdict(&self) -> Option<Verdict> {
        let last = self.figures.last().filter(|last| last.aim.is_some())?;
        Some(match last.holds {
            true => Verdict::Reached,
            false => Verdict::Missed(last.figure.clone()),
        })
    }

    /// Adds a figure without an aim, in place of one of the same name.
    pub fn add(&mut self, figure: &str, value: f64, unit: &str, against: Option<f64>) {
        self.figures.retain(|known| known.figure != figure);
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
    pub fn write(&self, folder: &Path, name: &str) -> Result<(), Error> {
        fs::create_dir_all(folder).map_err(Error::io(folder.display()))?;
        put(&folder.join(format!("{name}.json")), &self.figures)?;
        put(&folder.join(format!("{name}.samples.json")), &self.samples)
    }
}

fn put(path: &Path, content: &impl Serialize) -> Result<(), Error> {
    let mut text = serde_json::to_string_pretty(content)
        .map_err(|error| Error::new(format!("{}: {error}", path.display())))?;
    text.push('\n');
    fs::write(path, text).map_err(Error::io(path.display()))
}

/// Reads the figures of one report.
///
/// # Errors
/// A file that cannot be read or is no report.
pub fn read(path: &Path) -> Result<Vec<Figure>, Error> {
    let text = fs::read_to_string(path).map_err(Error::io(path.display()))?;
    serde_json::from_str(&text)
        .map_err(|error| Error::new(format!("{} is no report: {error}", path.display())))
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
        let again = Report::read(folder.path(), "demo").unwrap();
        assert_eq!(
            (again.figures, again.samples),
            (report.figures, report.samples)
        );
        assert!(
            Report::read(folder.path(), "none")
                .unwrap()
                .figures
                .is_empty()
        );
    }

    #[test]
    fn a_figure_that_was_not_measured_does_not_hold() {
        let mut report = Report::default();
        report.add("start", f64::NAN, "ms", None);
        assert_eq!(report.verdict(), None);
        report.aim("any", true);
        assert!(!report.figures[0].holds);
        assert_eq!(report.verdict(), Some(Verdict::Missed("start".into())));
        report.add("start", 2.0, "ms", None);
        assert_eq!((report.figures.len(), report.figures[0].value), (1, 2.0));
    }

    #[test]
    fn what_is_no_report_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        fs::write(&path, "{}").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("x.json"));
    }
}
