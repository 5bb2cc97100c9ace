//! SVG plots of a record: bars of the paper beside bars of the simulation, one file a metric; lines where a case was run along an
//! axis, one file a case and metric, the paper's points as circles.

use std::path::{Path, PathBuf};

use plotters::coord::Shift;
use plotters::prelude::*;
use ultraep_run::write_atomically;

use super::plan_file::Metric;
use super::record::{CaseRecord, Record};
use crate::error::CliError;
use crate::svg::{GRID, LINES, legend, text};

const SIZE: (u32, u32) = (1100, 480);
const PAPER: RGBColor = RGBColor(0xb8, 0xbe, 0xc6);
const SIMULATED: RGBColor = RGBColor(0x1f, 0x6f, 0xb2);
/// A bar: case, system, the paper's value, the simulated one.
type Bar<'a> = (&'a str, &'a str, Option<f64>, f64);

/// A system's line: points `(x, the paper's value, the simulated one)`.
type Line<'a> = (&'a str, Vec<(f64, Option<f64>, f64)>);

/// Writes the plots into a folder and says where.
pub(super) fn write(folder: &Path, stem: &str, record: &Record) -> Result<Vec<PathBuf>, CliError> {
    std::fs::create_dir_all(folder).map_err(|error| CliError::Failure(format!("{}: {error}", folder.display())))?;
    let mut written = Vec::new();
    let mut save = |name: String, drawn: Result<String, String>| {
        let path = folder.join(format!("{stem}-{name}.svg"));
        let svg = drawn.map_err(|error| CliError::Failure(format!("{}: {error}", path.display())))?;
        write_atomically(&path, svg.as_bytes()).map_err(CliError::failure)?;
        written.push(path);
        Ok::<_, CliError>(())
    };
    for metric in metrics(&record.cases) {
        let plain = record.cases.iter().filter(|case| case.along.is_none());
        let bars: Vec<Bar<'_>> = plain.flat_map(|case| bars_of(case, metric)).collect();
        if !bars.is_empty() {
            save(file_name(metric.name()), bar_plot(&record.title, metric, &bars))?;
        }
        let mut cases: Vec<&str> = record.cases.iter().filter_map(|c| Some(c.along.as_ref()?.case.as_str())).collect();
        cases.dedup();
        for case in cases {
            let (axis, lines) = lines_of(&record.cases, case, metric);
            if lines.iter().any(|(_, points)| points.len() > 1) {
                let name = format!("{}-{}", file_name(case), file_name(metric.name()));
                save(name, line_plot(&format!("{}: {case}", record.title), (axis, metric), &lines))?;
            }
        }
    }
    Ok(written)
}

fn metrics(cases: &[CaseRecord]) -> Vec<Metric> {
    let mut metrics: Vec<Metric> = cases.iter().flat_map(|c| c.rows.iter().map(|row| row.metric)).collect();
    metrics.sort_unstable();
    metrics.dedup();
    metrics
}

/// Letters and digits, the rest as single dashes.
fn file_name(text: &str) -> String {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect::<Vec<_>>().join("-")
}

fn bars_of(case: &CaseRecord, metric: Metric) -> impl Iterator<Item = Bar<'_>> {
    let rows = case.rows.iter().filter(move |row| row.metric == metric);
    rows.map(|row| (case.name.as_str(), row.system.as_str(), row.paper, row.simulated))
}

/// The axis of a case, and a line for each system.
fn lines_of<'a>(cases: &'a [CaseRecord], case: &str, metric: Metric) -> (&'static str, Vec<Line<'a>>) {
    let mut lines: Vec<Line<'a>> = Vec::new();
    let mut axis = "";
    for record in cases {
        let Some(along) = record.along.as_ref().filter(|along| along.case == case) else { continue };
        axis = along.axis;
        for row in record.rows.iter().filter(|row| row.metric == metric) {
            let point = (along.at, row.paper, row.simulated);
            match lines.iter_mut().find(|(system, _)| *system == row.system) {
                Some((_, points)) => points.push(point),
                None => lines.push((row.system.as_str(), vec![point])),
            }
        }
    }
    (axis, lines)
}

fn tallest(values: impl Iterator<Item = f64>) -> f64 {
    (values.fold(0.0, f64::max) * 1.15).max(1e-9)
}

fn bar_plot(title: &str, metric: Metric, bars: &[Bar<'_>]) -> Result<String, String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(text)?;
        let top = tallest(bars.iter().flat_map(|&(_, _, paper, simulated)| [paper.unwrap_or(0.0), simulated]));
        let mut chart = ChartBuilder::on(&area)
            .caption(format!("{title}: {}", metric.name()), ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(108)
            .y_label_area_size(64)
            .build_cartesian_2d(0.0..bars.len() as f64, 0.0..top)
            .map_err(text)?;
        let mut mesh = chart.configure_mesh();
        mesh.disable_x_mesh().disable_x_axis().bold_line_style(GRID).light_line_style(WHITE).y_desc(metric.name());
        mesh.draw().map_err(text)?;
        for (index, (paper, color)) in [(true, PAPER), (false, SIMULATED)].into_iter().enumerate() {
            let boxes = bars.iter().enumerate().filter_map(|(place, bar)| {
                let height = if paper { bar.2? } else { bar.3 };
                let left = place as f64 + 0.12 + 0.38 * index as f64;
                Some(Rectangle::new([(left, 0.0), (left + 0.38, height)], color.filled()))
            });
            chart
                .draw_series(boxes)
                .map_err(text)?
                .label(if paper { "paper" } else { "simulated" })
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled()));
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)?;
        names(&area, |place| chart.backend_coord(&(place, 0.0)), bars)?;
        area.present().map_err(text)?;
    }
    Ok(svg)
}

/// The system under each bar, in one of two lines so that neighbours do not touch; the case under the first of its bars.
fn names(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    coordinates: impl Fn(f64) -> (i32, i32),
    bars: &[Bar<'_>],
) -> Result<(), String> {
    // Letters are about this wide at this size; slots narrower than the name take turns over more lines.
    let width = coordinates(1.0).0 - coordinates(0.0).0;
    let longest = bars.iter().map(|bar| bar.1.len()).max().unwrap_or(0) as i32 * 6 + 6;
    let turns = ((longest + width - 1) / width.max(1)).clamp(1, 5);
    let mut last = None;
    for (place, &(case, system, ..)) in (0..).zip(bars) {
        let (x, y) = coordinates(f64::from(place) + 0.12);
        let line = place % turns;
        area.draw(&Text::new(system.to_string(), (x, y + 6 + 14 * line), ("sans-serif", 12))).map_err(text)?;
        if last != Some(case) {
            area.draw(&Text::new(case.to_string(), (x, y + 90), ("sans-serif", 15))).map_err(text)?;
            last = Some(case);
        }
    }
    Ok(())
}

fn line_plot(title: &str, (axis, metric): (&str, Metric), lines: &[Line<'_>]) -> Result<String, String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(text)?;
        let points = || lines.iter().flat_map(|(_, points)| points);
        let top = tallest(points().flat_map(|&(_, paper, simulated)| [paper.unwrap_or(0.0), simulated]));
        let least = points().map(|p| p.0).fold(f64::INFINITY, f64::min);
        let most = points().map(|p| p.0).fold(f64::NEG_INFINITY, f64::max);
        let room = (most - least) * 0.03;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(least - room..most + room, 0.0..top)
            .map_err(text)?;
        let mut mesh = chart.configure_mesh();
        mesh.bold_line_style(GRID).light_line_style(WHITE).x_desc(axis).y_desc(metric.name());
        mesh.draw().map_err(text)?;
        for (&(system, ref points), color) in lines.iter().zip(LINES.into_iter().cycle()) {
            let simulated = points.iter().map(|&(x, _, simulated)| (x, simulated));
            chart
                .draw_series(LineSeries::new(simulated, color.stroke_width(2)))
                .map_err(text)?
                .label(system)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 14, y)], color.stroke_width(2)));
            let paper =
                points.iter().filter_map(|&(x, paper, _)| Some(Circle::new((x, paper?), 5, color.stroke_width(2))));
            chart.draw_series(paper).map_err(text)?;
        }
        legend(&mut chart, SeriesLabelPosition::UpperLeft)?;
        area.present().map_err(text)?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_are_plain() {
        assert_eq!(file_name("Qwen3-235B, EP64 (STEM)"), "qwen3-235b-ep64-stem");
    }
}
