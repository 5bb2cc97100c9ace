//! From which size on balancing pays.

use ultraep_baselines::PolicyKind;
use ultraep_plan::MAX_TOKENS;

use crate::{EvaluateError, Evaluator, Scenario, untimed};

/// Routed tokens a rank from which on the scenario's plan is predicted to take less time than masters only, for a load of the
/// form of `counts`, `[N, E]`: the size is halved or doubled until the answer changes. `None` when no size up to the limits
/// pays.
pub fn break_even(scenario: &Scenario, counts: &[u32]) -> Result<Option<u64>, EvaluateError> {
    let mut ours = Evaluator::new(scenario, untimed)?;
    let mut none = Evaluator::new(&Scenario { kind: PolicyKind::None, ..scenario.clone() }, untimed)?;
    let total: u64 = counts.iter().map(|&c| u64::from(c)).sum();
    // Sizes are powers of two over and under this one.
    let tokens = |size: i32| if size < 0 { total >> -size } else { total << size };
    let mut pays = |size: i32| -> Result<bool, EvaluateError> {
        let scaled = |&c: &u32| if size < 0 { c >> -size } else { c << size };
        let counts: Vec<u32> = counts.iter().map(scaled).collect();
        ours.microbatch(&counts, 1)?;
        none.microbatch(&counts, 1)?;
        Ok(ours.predict().total_ps() < none.predict().total_ps())
    };
    let mut size = 0;
    if pays(size)? {
        while tokens(size - 1) > 0 && pays(size - 1)? {
            size -= 1;
        }
    } else {
        while !pays(size)? {
            size += 1;
            if total == 0 || tokens(size) > u64::from(MAX_TOKENS) {
                return Ok(None);
            }
        }
    }
    Ok(Some(tokens(size) / scenario.topology.ranks() as u64))
}
