//! A rank that is lost: its experts get new homes.

use ultraep_plan::time::at_rate_ps;

use crate::machine::Machine;
use crate::model::ModelSpec;

/// Time until the experts of one lost rank (of `ranks`) are at new homes: weights and optimizer state (16 bytes a parameter)
/// of all layers, read over the scale-out links of the ranks that take them in, evenly.
pub fn recovery_ps(machine: &Machine, model: &ModelSpec, ranks: u32) -> u64 {
    let each = u64::from(model.experts).div_ceil(u64::from(ranks.max(1)));
    let bytes = (16 * model.expert_parameters() * each).saturating_mul(u64::from(model.moe_layers()));
    // One expert of one layer is the least that a rank takes in.
    let takers = u64::from(ranks.saturating_sub(1)).clamp(1, each * u64::from(model.moe_layers()).max(1));
    at_rate_ps(bytes.div_ceil(takers), machine.scale_out_bytes_per_s)
}
