//! SVG plots of a record: one file a metric, bars of the paper beside bars of the simulation.

use std::path::{Path, PathBuf};

use plotters::coord::Shift;
use plotters::prelude::*;
use ultraep_run::write_atomically;

use super::files::Metric;
use super::record::Record;
use crate::error::CliError;

const SIZE: (u32, u32) = (1100, 460);
const PAPER: RGBColor = RGBColor(0xb8, 0xbe, 0xc6);
const SIMULATED: RGBColor = RGBColor(0x1f, 0x6f, 0xb2);

/// A bar: case, system, the paper's value, the simulated one.
type Bar<'a> = (&'a str, &'a str, Option<f64>, f64);

/// Writes one plot for each metric into a folder and says where.
pub(super) fn write(folder: &Path, stem: &str, record: &Record) -> Result<Vec<PathBuf>, CliError> {
    std::fs::create_dir_all(folder).map_err(|error| CliError::Failure(format!("{}: {error}", folder.display())))?;
    let mut metrics: Vec<Metric> = record.cases.iter().flat_map(|c| c.rows.iter().map(|row| row.metric)).collect();
    metrics.sort_unstable();
    metrics.dedup();
    let mut written = Vec::new();
    for metric in metrics {
        let of = |case: usize| {
            let case = &record.cases[case];
            let rows = case.rows.iter().filter(move |row| row.metric == metric);
            rows.map(move |row| (case.name.as_str(), row.system.as_str(), row.paper, row.simulated))
        };
        let bars: Vec<Bar<'_>> = (0..record.cases.len()).flat_map(of).collect();
        let mut svg = String::new();
        draw(&mut svg, &record.title, metric, &bars).map_err(CliError::Failure)?;
        let name = metric.name().replace([' ', '/'], "-").to_lowercase();
        let path = folder.join(format!("{stem}-{name}.svg"));
        write_atomically(&path, svg.as_bytes()).map_err(CliError::failure)?;
        written.push(path);
    }
    Ok(written)
}

fn draw(svg: &mut String, title: &str, metric: Metric, bars: &[Bar<'_>]) -> Result<(), String> {
    let text = |error: DrawingAreaErrorKind<_>| error.to_string();
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(text)?;
    let tallest =
        bars.iter().flat_map(|&(_, _, paper, simulated)| [paper.unwrap_or(0.0), simulated]).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(&area)
        .caption(format!("{title}: {}", metric.name()), ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(96)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..bars.len() as f64, 0.0..(tallest * 1.15).max(1e-9))
        .map_err(text)?;
    chart.configure_mesh().disable_x_mesh().disable_x_axis().y_desc(metric.name()).draw().map_err(text)?;
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
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(text)?;
    names(&area, &chart, bars).map_err(text)?;
    area.present().map_err(text)
}

type Chart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

/// System under each bar, slanted; the case under the first of its bars.
fn names<'b>(
    area: &DrawingArea<SVGBackend<'b>, Shift>,
    chart: &Chart<'_, 'b>,
    bars: &[Bar<'_>],
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    let style = ("sans-serif", 13).into_font();
    let mut last = None;
    for (place, &(case, system, ..)) in bars.iter().enumerate() {
        let (x, y) = chart.backend_coord(&(place as f64 + 0.3, 0.0));
        let slanted = style.clone().transform(FontTransform::Rotate90);
        area.draw(&Text::new(system.to_string(), (x + 8, y + 4), slanted))?;
        if last != Some(case) {
            area.draw(&Text::new(case.to_string(), (x - 4, y + 84), ("sans-serif", 15).into_font()))?;
            last = Some(case);
        }
    }
    Ok(())
}
