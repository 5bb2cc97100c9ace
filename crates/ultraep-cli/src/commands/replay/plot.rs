//! The SVG of a replay: imbalance over microbatches and by layer, a line for each policy, a row of two charts for each group.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use ultraep_baselines::PolicyKind;
use ultraep_run::write_atomically;

use crate::error::CliError;
use crate::svg::{GRID, LINES, text};

/// Width of the picture and height of a row of it, pixels.
const ROW: (u32, u32) = (1200, 360);
/// Height of the headline and the names of the policies.
const HEAD: u32 = 72;
/// Most rows; further groups are left out.
const MOST_ROWS: usize = 8;

/// One policy in one group.
#[derive(Debug)]
pub(super) struct Curve {
    pub(super) policy: PolicyKind,
    /// First microbatch that a point stands for, and the mean imbalance over layers.
    pub(super) microbatches: Vec<(f64, f64)>,
    /// Layer and mean imbalance.
    pub(super) layers: Vec<(f64, f64)>,
}

/// Curves of one group.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) title: String,
    /// Microbatches that a point stands for.
    pub(super) width: u64,
    pub(super) curves: Vec<Curve>,
}

/// Writes the picture, and says what it leaves out.
pub(super) fn write(path: &Path, title: &str, groups: &[Group]) -> Result<Option<String>, CliError> {
    let shown = &groups[..groups.len().min(MOST_ROWS)];
    let svg = draw(title, shown).map_err(|error| CliError::Failure(format!("{}: {error}", path.display())))?;
    write_atomically(path, svg.as_bytes()).map_err(CliError::failure)?;
    let left_out = groups.len() - shown.len();
    Ok((left_out > 0).then(|| format!("{}: {left_out} groups are left out, {MOST_ROWS} are shown", path.display())))
}

fn draw(title: &str, groups: &[Group]) -> Result<String, String> {
    // A policy has one color in all charts.
    let mut policies: Vec<PolicyKind> = groups.iter().flat_map(|g| g.curves.iter().map(|c| c.policy)).collect();
    policies.sort_unstable();
    policies.dedup();
    let color = |policy: PolicyKind| LINES[policies.iter().position(|&p| p == policy).unwrap_or(0) % LINES.len()];
    let mut svg = String::new();
    {
        let size = (ROW.0, HEAD + ROW.1 * groups.len() as u32);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE).map_err(text)?;
        let (head, body) = area.split_vertically(HEAD);
        head.draw(&Text::new(title.to_owned(), (16, 12), ("sans-serif", 20))).map_err(text)?;
        let mut left = 16;
        for &policy in &policies {
            head.draw(&PathElement::new([(left, 52), (left + 22, 52)], color(policy).stroke_width(3))).map_err(text)?;
            head.draw(&Text::new(policy.name(), (left + 28, 45), ("sans-serif", 14))).map_err(text)?;
            left += 28 + 9 * policy.name().len() as i32 + 22;
        }
        for (group, row) in groups.iter().zip(body.split_evenly((groups.len().max(1), 1))) {
            let (left, right) = row.split_horizontally(ROW.0 * 3 / 5);
            let axis = match group.width {
                1 => "microbatch, in the order of the recording".to_owned(),
                width => format!("microbatch, in the order of the recording (means of {width})"),
            };
            let caption = format!("{}: over microbatches, mean of layers", group.title);
            chart(&left, (&caption, &axis), group, color, |curve| &curve.microbatches)?;
            chart(&right, ("by layer, mean of microbatches", "layer"), group, color, |curve| &curve.layers)?;
        }
        area.present().map_err(text)?;
    }
    Ok(svg)
}

/// A line for each policy; imbalance starts at 1, which is even.
fn chart(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    (caption, axis): (&str, &str),
    group: &Group,
    color: impl Fn(PolicyKind) -> RGBColor,
    points: impl Fn(&Curve) -> &Vec<(f64, f64)>,
) -> Result<(), String> {
    let all = || group.curves.iter().flat_map(&points);
    let least = all().map(|p| p.0).fold(f64::INFINITY, f64::min).min(0.0);
    let most = all().map(|p| p.0).fold(1.0, f64::max);
    let top = all().map(|p| p.1).fold(1.1, f64::max);
    let (room, below) = ((most - least) * 0.02, (top - 1.0) * 0.04);
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(least - room..most + room, 1.0 - below..top + below)
        .map_err(text)?;
    let mut mesh = chart.configure_mesh();
    mesh.bold_line_style(GRID).light_line_style(WHITE).x_desc(axis).y_desc("imbalance (largest / mean rank load)");
    mesh.x_label_formatter(&|x| format!("{x:.0}")).y_label_formatter(&|y| format!("{y:.2}"));
    mesh.x_labels(10.min(most as usize + 1)).draw().map_err(text)?;
    for curve in &group.curves {
        let color = color(curve.policy);
        match points(curve).as_slice() {
            // A line of one point is not seen.
            [one] => chart.draw_series([Circle::new(*one, 4, color.filled())]).map_err(text)?,
            many => chart.draw_series(LineSeries::new(many.iter().copied(), color.stroke_width(2))).map_err(text)?,
        };
    }
    Ok(())
}
