//! The machine's constants from published figures.

use std::io::Write;

use serde::Serialize;
use ultraep_sim::Calibrated;
use ultraep_sim::calibrate::{Breakdown, Target, calibrate};

use super::plan_file::{Calibration, Plan};
use super::training::prepare;
use crate::commands::write_json;
use crate::error::CliError;
use crate::output::Output;

/// The constants that a calibration plan leads to.
pub(super) fn constants(plan: &Plan) -> Result<Calibrated, CliError> {
    let Some(calibration) = plan.calibration else {
        return Err(CliError::Input(format!("{}: no [calibration]: experiment \"calibration\" needs it", plan.title)));
    };
    let Some(case) = plan.case.first() else {
        return Err(CliError::Input(format!("{}: no [[case]]", plan.title)));
    };
    let ready = prepare(case, &plan.machine, plan.seed)?;
    let machine = calibrate(&ready.spec, &target(&calibration)).map_err(CliError::input)?;
    Ok(machine.calibrated)
}

fn target(from: &Calibration) -> Target {
    let us = |ms: [f64; 3]| ms.map(|ms| (ms * 1000.0).round() as u64);
    Target {
        ideal: Breakdown { forward_us: us(from.ideal_forward_ms), backward_us: us(from.ideal_backward_ms) },
        none: Breakdown { forward_us: us(from.none_forward_ms), backward_us: us(from.none_backward_ms) },
        ideal_gflops: (from.ideal_tflops * 1000.0).round() as u64,
    }
}

/// `ultraep.sim-calibration/1`.
#[derive(Debug, Serialize)]
struct Json<'a> {
    schema: &'static str,
    title: &'a str,
    machine: &'a str,
    /// As `[calibrated]` of a machine file has them.
    calibrated: Calibrated,
}

/// Prints the section of the machine file, or JSON.
pub(super) fn run(plan: &Plan, json: bool, out: &mut Output<'_>) -> Result<(), CliError> {
    let calibrated = constants(plan)?;
    if json {
        let (title, machine) = (plan.title.as_str(), plan.machine.as_str());
        return write_json(out, &Json { schema: "ultraep.sim-calibration/1", title, machine, calibrated });
    }
    let c = calibrated;
    writeln!(out, "[calibrated]")?;
    for (name, value) in [
        ("forward_flops_per_s", c.forward_flops_per_s),
        ("backward_flops_per_s", c.backward_flops_per_s),
        ("backward_fixed_permille", u64::from(c.backward_fixed_permille)),
        ("forward_a2a_bytes_per_s", c.forward_a2a_bytes_per_s),
        ("backward_a2a_bytes_per_s", c.backward_a2a_bytes_per_s),
        ("forward_incast_permille", u64::from(c.forward_incast_permille)),
        ("backward_incast_permille", u64::from(c.backward_incast_permille)),
        ("forward_element_fs", c.forward_element_fs),
        ("backward_element_fs", c.backward_element_fs),
        ("outside_permille", u64::from(c.outside_permille)),
    ] {
        writeln!(out, "{name} = {value}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::files;

    #[test]
    fn the_machine_file_has_what_calibration_gives() {
        let plan = files::plan("calibrate").unwrap();
        let machine = files::machine(&plan.machine).unwrap();
        assert_eq!(super::constants(&plan).unwrap(), machine.calibrated, "run `ultraep sim calibrate`");
    }
}
