//! What if: one microbatch planned anew, with any policy, group and parameters.

use crate::anatomy::Planned;
use crate::{Anatomy, AnatomyError, EvaluateError, Evaluator, Scenario, untimed};

/// A microbatch planned by a scenario.
#[derive(Clone, Debug)]
pub struct Replan {
    /// All about it.
    pub anatomy: Anatomy,
    /// Canonical digest of the plan.
    pub digest: u64,
    /// Largest `|H(e)| - 1`.
    pub max_fanout: usize,
    /// Least quota that the plan kept to, in tokens.
    pub min_quota: u32,
}

/// Why a microbatch was not planned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReplanError {
    /// The policy refused, or broke a rule.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// What followed from the plan could not be worked out.
    #[error(transparent)]
    Anatomy(#[from] AnatomyError),
}

impl ReplanError {
    /// Whether the input is at fault, rather than the program.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Evaluate(error) => error.is_input(),
            Self::Anatomy(_) => true,
        }
    }
}

/// Plans `counts`, `[N, E]` of the scenario's group. `history` is what came before in the same layer, oldest first: a
/// historical policy plans from it, and an exact one does not look at it.
pub fn replan(scenario: &Scenario, counts: &[u32], history: &[Vec<u32>]) -> Result<Replan, ReplanError> {
    let Scenario { kind, topology, params, .. } = scenario;
    let mut evaluator = Evaluator::new(scenario, untimed)?;
    if kind.is_historical() {
        for earlier in history {
            // Solving too: some policies place anew only every few microbatches.
            evaluator.microbatch(earlier, 1)?;
        }
    }
    let met = evaluator.met_counts(counts);
    let evaluated = evaluator.microbatch(&met, 1)?;
    let (charge, plan) = (evaluated.charge, evaluator.into_plan());
    let anatomy = Anatomy::of(topology, &params.hardware, Planned { counts: met, plan, split: None, charge })?;
    Ok(Replan {
        anatomy,
        digest: evaluated.digest,
        max_fanout: evaluated.report.max_fanout,
        min_quota: evaluated.min_quota,
    })
}
