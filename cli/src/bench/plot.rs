//! Plots of figures as SVG files, which every browser shows.

use std::path::Path;

use plotters::{
    chart::{ChartBuilder, SeriesLabelPosition},
    drawing::IntoDrawingArea as _,
    element::{Circle, PathElement},
    series::LineSeries,
    style::{BLACK, Color as _, Palette, Palette99, ShapeStyle, WHITE},
};
use plotters_svg::SVGBackend;

use super::{Error, samples::Samples};

const SIZE: (u32, u32) = (900, 500);

/// A line of a plot.
struct Curve {
    name: String,
    points: Vec<(f64, f64)>,
    /// Whether each point is drawn: where they are measurements, not steps.
    dots: bool,
}

/// The distribution of latencies in milliseconds: for each time, the share of the measurements that took no longer.
///
/// # Errors
/// A file that cannot be written.
pub fn distribution(path: &Path, title: &str, series: &[(String, Samples)]) -> Result<(), Error> {
    let curves: Vec<_> = series
        .iter()
        .map(|(name, samples)| Curve {
            name: name.clone(),
            points: steps(&samples.sorted()),
            dots: false,
        })
        .collect();
    draw(path, title, ("milliseconds", "share"), &curves)
}

/// One value over another: latency by memory, private memory over time. `axes` names x and y.
///
/// # Errors
/// A file that cannot be written.
pub fn line(
    path: &Path,
    title: &str,
    axes: (&str, &str),
    points: &[(f64, f64)],
) -> Result<(), Error> {
    let curve = Curve {
        name: String::new(),
        points: points.to_vec(),
        dots: true,
    };
    draw(path, title, axes, &[curve])
}

/// The steps of an empirical distribution.
fn steps(sorted: &[f64]) -> Vec<(f64, f64)> {
    let count = sorted.len() as f64;
    let mut steps = Vec::new();
    for (index, value) in sorted.iter().enumerate() {
        steps.push((*value, index as f64 / count));
        steps.push((*value, (index + 1) as f64 / count));
    }
    steps
}

fn draw(path: &Path, title: &str, axes: (&str, &str), curves: &[Curve]) -> Result<(), Error> {
    let mut text = String::new();
    render(&mut text, title, axes, curves)
        .map_err(|error| Error::new(format!("the plot {}: {error}", path.display())))?;
    std::fs::write(path, text).map_err(Error::io(path.display()))
}

fn render(
    text: &mut String,
    title: &str,
    axes: (&str, &str),
    curves: &[Curve],
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let largest = |of: fn(&(f64, f64)) -> f64| {
        let points = curves.iter().flat_map(|curve| &curve.points);
        // From zero, so that nobody takes a small difference for a large one.
        points.map(of).fold(f64::MIN_POSITIVE, f64::max) * 1.05
    };
    let (width, height) = (largest(|point| point.0), largest(|point| point.1));
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..width, 0.0..height)?;
    chart
        .configure_mesh()
        .x_desc(axes.0)
        .y_desc(axes.1)
        .light_line_style(WHITE)
        .draw()?;
    for (index, curve) in curves.iter().enumerate() {
        let style = ShapeStyle::from(Palette99::pick(index)).stroke_width(2);
        let drawn = chart.draw_series(LineSeries::new(curve.points.iter().copied(), style))?;
        if !curve.name.is_empty() {
            drawn
                .label(&*curve.name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
        }
        if curve.dots {
            let dots = curve.points.iter();
            chart.draw_series(dots.map(|point| Circle::new(*point, 4, style.filled())))?;
        }
    }
    if curves.iter().any(|curve| !curve.name.is_empty()) {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK)
            .draw()?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_goes_from_none_to_all() {
        let steps = steps(&[1.0, 2.0]);
        assert_eq!(steps, [(1.0, 0.0), (1.0, 0.5), (2.0, 0.5), (2.0, 1.0)]);
    }

    #[test]
    fn a_plot_names_what_it_shows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("latency.svg");
        let series = ["runc", "forkvm"].map(|name| {
            let samples = Samples::from_iter([1.0, 2.0, 4.0]);
            (name.to_owned(), samples)
        });
        distribution(&path, "ctr run", &series).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        for word in ["<svg", "ctr run", "runc", "forkvm", "milliseconds"] {
            assert!(text.contains(word), "{word}");
        }
    }

    #[test]
    fn an_empty_plot_is_a_plot() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("empty.svg");
        line(&path, "nothing", ("x", "y"), &[]).unwrap();
        assert!(path.exists());
    }
}
