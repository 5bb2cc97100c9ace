//! Plots of TTFT against requests per second, as SVG.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::RGBColor;

use crate::ServeError;

/// One line of a plot: a name and points (requests per second, seconds).
#[derive(Clone, Debug)]
pub struct Line {
    /// Shown beside the line.
    pub name: String,
    /// By increasing rate; those that are not positive are left out, as the scale is logarithmic.
    pub points: Vec<(f64, f64)>,
}

/// Colours told apart with any colour vision (Okabe and Ito, 2008), in the order of lines.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 0, 0),
    RGBColor(213, 94, 0),
    RGBColor(230, 159, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
];

/// Draws `lines` over each other, TTFT on a logarithmic scale, with a dashed line at `limit_s` if there is one.
pub fn ttft_plot(title: &str, lines: &[Line], limit_s: Option<f64>) -> Result<String, ServeError> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (860, 520)).into_drawing_area();
        draw(&area, title, lines, limit_s).map_err(|error| ServeError::Plot(error.to_string()))?;
        area.present().map_err(|error| ServeError::Plot(error.to_string()))?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw(area: &Area<'_>, title: &str, lines: &[Line], limit_s: Option<f64>) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let good = |&&(x, y): &&(f64, f64)| x.is_finite() && x > 0.0 && y.is_finite() && y > 0.0;
    let points = || lines.iter().flat_map(|line| line.points.iter().filter(good));
    let most_x = points().map(|p| p.0).fold(0.0, f64::max);
    let (least, most) = points().fold((f64::INFINITY, 0f64), |(l, m), p| (l.min(p.1), m.max(p.1)));
    if most_x <= 0.0 {
        return Err("there is no point to draw".into());
    }
    let (low, high) = (least.min(limit_s.unwrap_or(least)) / 1.3, most.max(limit_s.unwrap_or(most)) * 1.3);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..most_x * 1.02, (low..high).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("requests per second")
        .y_desc("p95 time to first token, s")
        .y_label_formatter(&|y| if *y >= 1.0 { format!("{y:.0}") } else { format!("{y:.2}") })
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (line, &colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let points: Vec<_> = line.points.iter().filter(good).copied().collect();
        let style = colour.stroke_width(2);
        let marks = points.clone();
        chart
            .draw_series(LineSeries::new(points, style))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 22, y)], style));
        chart.draw_series(marks.into_iter().map(|point| Circle::new(point, 3, colour.filled())))?;
    }
    if let Some(limit) = limit_s {
        let dashes =
            DashedLineSeries::new([(0.0, limit), (most_x * 1.02, limit)], 6, 4, BLACK.mix(0.5).stroke_width(1));
        chart.draw_series(dashes)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_has_every_line_and_nothing_is_an_error() {
        let line = |name: &str, scale| Line { name: name.into(), points: vec![(1.0, 0.1 * scale), (2.0, 3.0 * scale)] };
        let svg = ttft_plot("TTFT", &[line("none", 2.0), line("ultraep", 1.0)], Some(1.0)).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("ultraep") && svg.contains("requests per second"));
        assert!(svg.matches("<circle").count() >= 4);
        let empty = Line { name: "x".into(), points: vec![(1.0, 0.0)] };
        assert!(matches!(ttft_plot("TTFT", &[empty], None), Err(ServeError::Plot(_))));
    }
}
