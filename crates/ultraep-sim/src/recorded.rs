//! Recorded counts in place of generated ones.

use crate::SimError;
use crate::error::within;

/// Counts of a recording, layer by layer and microbatch by microbatch. Where a simulation needs more, it starts over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedLoads {
    ranks: usize,
    experts: usize,
    microbatches_per_step: u32,
    /// `[layers][microbatches]`, each `[N, E]` row-major.
    layers: Vec<Vec<Vec<u32>>>,
}

impl RecordedLoads {
    /// Checks that there is something and that every matrix is `[N, E]`.
    pub fn new(
        (ranks, experts): (usize, usize),
        microbatches_per_step: u32,
        layers: Vec<Vec<Vec<u32>>>,
    ) -> Result<Self, SimError> {
        within("recorded layers", layers.len() as u64, 1, 1024)?;
        within("microbatches of a step", u64::from(microbatches_per_step), 1, 4096)?;
        for layer in &layers {
            within("recorded microbatches of a layer", layer.len() as u64, 1, u64::from(u32::MAX))?;
            if let Some(wrong) = layer.iter().find(|counts| counts.len() != ranks * experts) {
                let (got, expected) = (wrong.len(), ranks * experts);
                return Err(SimError::Length { what: "counts of a recorded microbatch", got, expected });
            }
        }
        Ok(Self { ranks, experts, microbatches_per_step, layers })
    }

    /// `N`.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// `E`.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Counts `[N, E]` of a moment.
    pub(crate) fn counts(&self, layer: u32, step: u32, microbatch: u32) -> &[u32] {
        let layer = &self.layers[layer as usize % self.layers.len()];
        let moment = u64::from(step) * u64::from(self.microbatches_per_step) + u64::from(microbatch);
        &layer[(moment % layer.len() as u64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_go_on_and_start_over() {
        let matrix = |value| vec![value; 4];
        let loads = RecordedLoads::new((2, 2), 2, vec![vec![matrix(0), matrix(1), matrix(2)]]).unwrap();
        let seen: Vec<u32> = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(s, m)| loads.counts(5, s, m)[0]).to_vec();
        assert_eq!(seen, [0, 1, 2, 0]);
    }

    #[test]
    fn shapes_are_checked() {
        assert!(RecordedLoads::new((2, 2), 2, Vec::new()).is_err());
        assert!(RecordedLoads::new((2, 2), 2, vec![Vec::new()]).is_err());
        let error = RecordedLoads::new((2, 2), 2, vec![vec![vec![0; 3]]]).unwrap_err().to_string();
        assert_eq!(error, "counts of a recorded microbatch: 3 values where 4 belong");
    }
}
