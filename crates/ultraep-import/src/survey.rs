//! One pass over a recording for what only reading it tells: experts, layers, steps, tokens.

use std::collections::BTreeMap;

use ultraep_trace::NO_EXPERT;

use crate::{ImportError, Load, Piece, Recording};

/// What a recording holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Pieces read.
    pub pieces: u64,
    /// Highest expert that occurs, plus one; where counts are recorded, their columns.
    pub experts: usize,
    /// First and last step.
    pub steps: Option<(u64, u64)>,
    /// By layer.
    pub layers: BTreeMap<u32, LayerSurvey>,
}

/// One layer of a [`Survey`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerSurvey {
    /// Microbatches recorded as counts.
    pub microbatches: u64,
    /// Tokens recorded one by one; 0 where counts are recorded.
    pub tokens: u64,
    /// Choices of experts: tokens times top-k, the sum of all counts.
    pub choices: u64,
    /// Choices of every expert, `[E]` or shorter.
    pub expert_loads: Vec<u64>,
}

impl LayerSurvey {
    /// Largest over mean load of the experts, over the whole recording.
    pub fn expert_imbalance(&self, experts: usize) -> f64 {
        let idle = experts.saturating_sub(self.expert_loads.len());
        let loads = self.expert_loads.iter().copied().chain(std::iter::repeat_n(0, idle));
        let (num, den) = ultraep_plan::measure::imbalance(loads);
        num as f64 / den as f64
    }
}

/// Reads a recording to its end. Memory: `8 E` bytes a layer.
pub fn survey(recording: &mut dyn Recording) -> Result<Survey, ImportError> {
    let mut survey = Survey::default();
    let mut piece = Piece::default();
    while recording.next(&mut piece)? {
        survey.pieces += 1;
        let (first, last) = survey.steps.unwrap_or((piece.step, piece.step));
        survey.steps = Some((first.min(piece.step), last.max(piece.step)));
        let layer = survey.layers.entry(piece.layer).or_default();
        match &piece.load {
            Load::Choices { per_token, ids } => {
                layer.tokens += (ids.len() / per_token) as u64;
                for &id in ids.iter().filter(|&&id| id != NO_EXPERT) {
                    layer.add(usize::from(id), 1);
                    survey.experts = survey.experts.max(usize::from(id) + 1);
                }
            }
            Load::Counts { sources, counts } => {
                let experts = counts.len() / sources.max(&1);
                survey.experts = survey.experts.max(experts);
                layer.microbatches += 1;
                for row in counts.chunks(experts.max(1)) {
                    row.iter().enumerate().for_each(|(expert, &count)| layer.add(expert, u64::from(count)));
                }
            }
        }
    }
    Ok(survey)
}

impl LayerSurvey {
    fn add(&mut self, expert: usize, tokens: u64) {
        if expert >= self.expert_loads.len() {
            self.expert_loads.resize(expert + 1, 0);
        }
        self.expert_loads[expert] += tokens;
        self.choices += tokens;
    }
}
