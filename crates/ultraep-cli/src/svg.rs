//! What all plots share: colors, grid, legend.

use std::fmt::Display;

use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

/// Lines of the grid.
pub(crate) const GRID: RGBColor = RGBColor(0xe3, 0xe6, 0xea);
/// Lines of systems and policies, in order; distinguishable without color vision by their order at the right end.
pub(crate) const LINES: [RGBColor; 8] = [
    RGBColor(0x4d, 0x4d, 0x4d),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0x99, 0x99, 0x33),
];

/// A chart over two axes of numbers.
pub(crate) type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Any error of drawing, in words.
pub(crate) fn text(error: impl Display) -> String {
    error.to_string()
}

/// Draws the names of the series.
pub(crate) fn legend<'a, 'b: 'a>(chart: &mut Chart<'a, 'b>, position: SeriesLabelPosition) -> Result<(), String> {
    let mut labels = chart.configure_series_labels();
    labels.position(position).background_style(WHITE.mix(0.85)).border_style(GRID);
    labels.draw().map_err(text)
}
