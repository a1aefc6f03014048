//! Tables for people.

use std::io::Write as _;

use comfy_table::{CellAlignment, Table, presets::UTF8_HORIZONTAL_ONLY};

use super::{report::Figure, samples::Samples};

/// A part of a line about what goes on; to standard output, where the tables come too, and in order with them.
pub fn progress(text: &str) {
    print!("{text}");
    // Nobody may be reading: the figures are written all the same.
    let _ = std::io::stdout().flush();
}

/// An empty table with these headings; all columns but the first hold numbers.
pub fn table<const N: usize>(headings: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY).set_header(headings);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A number with three significant digits, never in powers of ten.
pub fn number(value: f64) -> String {
    if !value.is_finite() {
        return "-".into();
    }
    let digits = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        0.0 => 0,
        _ => 3,
    };
    format!("{value:.digits$}")
}

/// The median and the worst of samples, as two cells.
pub fn p50_and_worst(samples: &Samples) -> [String; 2] {
    [number(samples.p50()), number(samples.worst())]
}

/// The figures that have an aim, as one table.
pub fn verdicts(figures: &[Figure]) -> Table {
    let aimed = figures.iter().filter(|figure| figure.aim.is_some());
    let mut table = table(["figure", "value", "unit", "against", "aim", "holds"]);
    rows(&mut table, "", aimed);
    table
}

/// Reports as one table.
pub fn reports(reports: &[(String, Vec<Figure>)]) -> Table {
    let mut table = table(["figure", "value", "unit", "against", "aim", "holds"]);
    for (name, figures) in reports {
        rows(&mut table, &format!("{name}: "), figures.iter());
    }
    table
}

fn rows<'a>(table: &mut Table, prefix: &str, figures: impl Iterator<Item = &'a Figure>) {
    for column in [2, 4, 5] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Left);
        }
    }
    for figure in figures {
        let holds = match (&figure.aim, figure.holds) {
            (None, true) => "",
            (Some(_), true) => "yes",
            (_, false) => "NO",
        };
        table.add_row([
            format!("{prefix}{}", figure.figure),
            number(figure.value),
            figure.unit.clone(),
            figure.against.map_or_else(String::new, number),
            figure.aim.clone().unwrap_or_default(),
            holds.into(),
        ]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let shown = [0.0, 0.0123, 2.114, 31.06, 1533.2, f64::NAN].map(number);
        assert_eq!(shown, ["0", "0.012", "2.11", "31.1", "1533", "-"]);
    }

    #[test]
    fn what_does_not_hold_is_seen() {
        let figure = Figure {
            figure: "start".into(),
            value: 9.0,
            unit: "ms".into(),
            against: None,
            aim: Some("under 5 ms".into()),
            holds: false,
        };
        let text = reports(&[("demo".into(), vec![figure])]).to_string();
        assert!(text.contains("demo: start"), "{text}");
        assert!(text.contains("NO"), "{text}");
    }
}
