//! Load processes: counts of every (layer, step, microbatch), from a seed.
//!
//! ```text
//! log2 weight(layer, step, microbatch, source r, expert e) =
//!     heat (skew z[layer, e] + drift w[layer, step, microbatch, e]) + spread s[layer, step, microbatch, r, e]
//! heat = 2^(layer_spread h[layer]) 2^(microbatch_spread m[step, microbatch])
//! ```
//!
//! with z, w of deviation 1 and heavy tails (a normal number times its own size: a few experts are very hot), s, h, m standard
//! normal. `skew` is what history can see, `drift` is what it cannot (new in every microbatch),
//! `spread` is how much sources differ. A source's choices are shared in proportion to its weights, exactly `tokens top_k` in
//! all and at most `tokens` for one expert (a token's experts are distinct). Integers throughout.

use std::sync::Arc;

use crate::SimError;
use crate::error::within;
use crate::random::{ONE, exp2, heavy, normal, random};
use crate::recorded::RecordedLoads;

/// What a [`LoadProcess`] is made from. Deviations are in thousandths of an octave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessParams {
    /// `N`, source ranks.
    pub ranks: u32,
    /// `E`.
    pub experts: u32,
    /// Tokens of a source in a microbatch.
    pub tokens_per_rank: u32,
    /// Experts that each token chooses.
    pub top_k: u32,
    /// Lasting difference of experts.
    pub skew_milli: u32,
    /// Difference that is new in every microbatch.
    pub drift_milli: u32,
    /// Difference of sources.
    pub spread_milli: u32,
    /// Difference of layers.
    pub layer_spread_milli: u32,
    /// Difference of microbatches: in one that is hot, all layers are.
    pub microbatch_spread_milli: u32,
    /// Equal seeds give equal loads.
    pub seed: u64,
}

/// Largest deviation, octaves times a thousand.
pub(crate) const MAX_DEVIATION: u64 = 6_000;

/// Generates counts.
#[derive(Clone, Debug)]
pub struct LoadProcess {
    params: ProcessParams,
    /// `[E]`, of the microbatch at hand.
    exponents: Vec<i64>,
    weights: Vec<u64>,
    capped: Vec<bool>,
    recorded: Option<Arc<RecordedLoads>>,
}

const SKEW: u32 = 1;
const DRIFT: u32 = 2;
const SPREAD: u32 = 3;
const HEAT: u32 = 4;
const MICROBATCH_HEAT: u32 = 6;

impl LoadProcess {
    /// Checks the limits.
    pub fn new(params: ProcessParams) -> Result<Self, SimError> {
        within("ranks of a load process", u64::from(params.ranks), 1, 1024)?;
        within("experts of a load process", u64::from(params.experts), 1, 65_535)?;
        within("top-k", u64::from(params.top_k), 1, u64::from(params.experts))?;
        let total = u64::from(params.ranks) * u64::from(params.tokens_per_rank) * u64::from(params.top_k);
        within("tokens of a microbatch in all", total, 1, u64::from(ultraep_plan::MAX_TOKENS))?;
        for (what, got) in [
            ("skew", params.skew_milli),
            ("drift", params.drift_milli),
            ("spread", params.spread_milli),
            ("layer spread", params.layer_spread_milli),
            ("microbatch spread", params.microbatch_spread_milli),
        ] {
            within(what, u64::from(got), 0, MAX_DEVIATION)?;
        }
        let experts = params.experts as usize;
        Ok(Self {
            params,
            exponents: vec![0; experts],
            weights: vec![0; experts],
            capped: vec![false; experts],
            recorded: None,
        })
    }

    /// One that gives recorded choices, scaled to the tokens of a rank; of `params` only the shape and the tokens matter.
    pub fn recorded(params: ProcessParams, loads: Arc<RecordedLoads>) -> Result<Self, SimError> {
        let (ranks, experts) = (loads.ranks() as u64, loads.experts() as u64);
        within("ranks of a load process", u64::from(params.ranks), ranks, ranks)?;
        within("experts of a load process", u64::from(params.experts), experts, experts)?;
        Ok(Self { recorded: Some(loads), ..Self::new(params)? })
    }

    /// What it was made from.
    pub fn params(&self) -> &ProcessParams {
        &self.params
    }

    /// Counts `lambda[r,e]`, `[N, E]` row-major, into `out`.
    pub fn counts(&mut self, layer: u32, step: u32, microbatch: u32, out: &mut Vec<u32>) {
        self.counts_of(layer, (step, microbatch), |_| None, out);
    }

    /// As [`LoadProcess::counts`], at a moment `(step, microbatch)`, for sources with `tokens` of their own (where that is
    /// `Some`).
    pub fn counts_of(
        &mut self,
        layer: u32,
        (step, microbatch): (u32, u32),
        tokens: impl Fn(usize) -> Option<u32>,
        out: &mut Vec<u32>,
    ) {
        let ProcessParams { ranks, experts, seed, skew_milli, drift_milli, spread_milli, .. } = self.params;
        if let Some(recorded) = self.recorded.clone() {
            let tokens_per_rank = self.params.tokens_per_rank;
            let tokens = |source| tokens(source).unwrap_or(tokens_per_rank);
            return self.as_recorded(recorded.counts(layer, step, microbatch), tokens, out);
        }
        let moment = u64::from(step) << 32 | u64::from(microbatch);
        let of_layer = self.heat(HEAT, self.params.layer_spread_milli, u64::from(layer));
        let heat = of_layer * self.heat(MICROBATCH_HEAT, self.params.microbatch_spread_milli, moment) / ONE;
        let mut lasting = random(seed, SKEW, u64::from(layer), 0);
        let mut fresh = random(seed, DRIFT, u64::from(layer), moment);
        for exponent in &mut self.exponents {
            let sum = scaled(heavy(&mut lasting), skew_milli) + scaled(heavy(&mut fresh), drift_milli);
            *exponent = sum * heat / ONE;
        }
        out.clear();
        out.resize(ranks as usize * experts as usize, 0);
        let mut own = random(seed, SPREAD, u64::from(layer), moment);
        self.weigh(|exponent| exponent);
        for (source, row) in out.chunks_mut(experts as usize).enumerate() {
            if spread_milli > 0 {
                self.weigh(|exponent| exponent + scaled(normal(&mut own), spread_milli));
            }
            self.fill(source, tokens(source).unwrap_or(self.params.tokens_per_rank), row);
        }
    }

    /// Every source shares the choices of its tokens as the recorded ones are shared, those of all sources where it has none
    /// recorded: what is simulated is the recorded routing at the size of the case, not the size of the recording.
    fn as_recorded(&mut self, recorded: &[u32], tokens: impl Fn(usize) -> u32, out: &mut Vec<u32>) {
        let experts = self.params.experts as usize;
        out.clear();
        out.extend_from_slice(recorded);
        let mut all = Vec::new();
        expert_loads(recorded, experts, &mut all);
        for (source, row) in out.chunks_mut(experts).enumerate() {
            let own = row.iter().any(|&count| count > 0);
            let of = |(&count, &sum): (&u32, &u64)| if own { u64::from(count) } else { sum };
            self.weights.clear();
            self.weights.extend(row.iter().zip(&all).map(of));
            let chosen = self.weights.iter().filter(|&&weight| weight > 0).count();
            if chosen < self.params.top_k as usize {
                // Too few for a token's distinct choices: the others get a trace.
                self.weights.iter_mut().for_each(|weight| *weight = (*weight << 20).max(1));
            }
            row.fill(0);
            self.fill(source, tokens(source), row);
        }
    }

    /// Counts of a layer's first microbatch after the steps that history sees, as fits and steps count them.
    pub fn sample(&mut self, layer: u32) -> Vec<u32> {
        let mut counts = Vec::new();
        self.counts(layer, crate::fit::HISTORY_STEPS, 0, &mut counts);
        counts
    }

    /// In `ONE`ths.
    fn heat(&self, purpose: u32, spread_milli: u32, of: u64) -> i64 {
        if spread_milli == 0 {
            return ONE;
        }
        let mut rng = random(self.params.seed, purpose, of, 0);
        (exp2(scaled(normal(&mut rng), spread_milli)) >> 8) as i64
    }

    fn weigh(&mut self, mut exponent: impl FnMut(i64) -> i64) {
        for (weight, &base) in self.weights.iter_mut().zip(&self.exponents) {
            *weight = exp2(exponent(base)).max(1);
        }
    }

    /// Shares the choices of one source over the experts.
    fn fill(&mut self, source: usize, tokens_per_rank: u32, row: &mut [u32]) {
        let ProcessParams { ranks, top_k, .. } = self.params;
        self.capped.fill(false);
        let mut choices = u128::from(tokens_per_rank) * u128::from(top_k);
        let mut sum: u128 = self.weights.iter().map(|&w| u128::from(w)).sum();
        loop {
            let (round, weights) = (choices, sum);
            for ((capped, &weight), cell) in self.capped.iter_mut().zip(&self.weights).zip(row.iter_mut()) {
                if !*capped && u128::from(weight) * round > u128::from(tokens_per_rank) * weights {
                    (*capped, *cell) = (true, tokens_per_rank);
                    choices -= u128::from(tokens_per_rank);
                    sum -= u128::from(weight);
                }
            }
            if round == choices {
                break;
            }
        }
        // Rounded along the line of experts, from another phase for each source.
        let mut before = sum * source as u128 / u128::from(ranks);
        let mut dealt = 0;
        for ((&capped, &weight), cell) in self.capped.iter().zip(&self.weights).zip(row.iter_mut()) {
            if !capped {
                before += u128::from(weight) * choices;
                let upto = before / sum.max(1);
                *cell = (upto - dealt) as u32;
                dealt = upto;
            }
        }
    }
}

/// `deviations` standard normal, times `milli` thousandths of an octave, in `ONE`ths of an octave.
fn scaled(deviations: i64, milli: u32) -> i64 {
    deviations * i64::from(milli) / 1000
}

/// Tokens of every expert over all sources.
pub(crate) fn expert_loads(counts: &[u32], experts: usize, loads: &mut Vec<u64>) {
    loads.clear();
    loads.resize(experts, 0);
    for row in counts.chunks(experts) {
        loads.iter_mut().zip(row).for_each(|(load, &count)| *load += u64::from(count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params() -> ProcessParams {
        ProcessParams {
            ranks: 8,
            experts: 32,
            tokens_per_rank: 500,
            top_k: 4,
            skew_milli: 1500,
            drift_milli: 500,
            spread_milli: 300,
            layer_spread_milli: 200,
            microbatch_spread_milli: 100,
            seed: 3,
        }
    }

    #[test]
    fn every_source_routes_its_tokens_and_no_expert_gets_a_token_twice() {
        for (skew_milli, top_k) in [(0, 1), (1500, 4), (6000, 4), (6000, 32)] {
            let mut process = LoadProcess::new(ProcessParams { skew_milli, top_k, ..params() }).unwrap();
            let mut counts = Vec::new();
            process.counts(3, 1, 2, &mut counts);
            for row in counts.chunks(32) {
                assert_eq!(row.iter().sum::<u32>(), 500 * top_k);
                assert!(row.iter().all(|&c| c <= 500), "{row:?}");
            }
        }
    }

    #[test]
    fn recorded_choices_are_shared_as_they_were() {
        let recorded = vec![30, 10, 0, 0, 0, 0, 0, 0];
        let loads = Arc::new(RecordedLoads::new((2, 4), 1, vec![vec![recorded.clone()]]).unwrap());
        let shape = ProcessParams { ranks: 2, experts: 4, tokens_per_rank: 40, top_k: 1, ..params() };
        let mut process = LoadProcess::recorded(shape, loads).unwrap();
        let mut counts = Vec::new();
        process.counts(0, 0, 0, &mut counts);
        assert_eq!(counts, [30, 10, 0, 0, 30, 10, 0, 0], "the second source has none recorded, but 40 tokens like all");
        let small = Arc::new(RecordedLoads::new((2, 4), 1, vec![vec![vec![3, 1, 0, 0, 0, 0, 2, 2]]]).unwrap());
        let mut scaled = LoadProcess::recorded(shape, small).unwrap();
        scaled.counts(0, 0, 0, &mut counts);
        assert_eq!(counts, [30, 10, 0, 0, 0, 0, 20, 20], "a tenth of the tokens recorded is the same load");
        process.counts_of(0, (0, 0), |_| Some(8), &mut counts);
        assert_eq!(counts, [6, 2, 0, 0, 6, 2, 0, 0], "batches of other sizes");
        let both = ProcessParams { top_k: 2, ..shape };
        process.params = both;
        process.counts_of(0, (0, 0), |source| Some(10 * source as u32), &mut counts);
        assert_eq!(counts, [0, 0, 0, 0, 10, 10, 0, 0], "no token chooses an expert twice");
    }

    #[test]
    fn without_deviation_experts_are_even() {
        let even = ProcessParams { skew_milli: 0, drift_milli: 0, spread_milli: 0, ..params() };
        let mut process = LoadProcess::new(even).unwrap();
        let (mut counts, mut loads) = (Vec::new(), Vec::new());
        process.counts(0, 0, 0, &mut counts);
        expert_loads(&counts, 32, &mut loads);
        assert!(loads.iter().all(|&l| l.abs_diff(500) <= 8), "{loads:?}");
    }

    #[test]
    fn equal_seeds_give_equal_loads_and_moments_differ() {
        let (mut a, mut b) = (LoadProcess::new(params()).unwrap(), LoadProcess::new(params()).unwrap());
        let (mut x, mut y) = (Vec::new(), Vec::new());
        a.counts(5, 0, 1, &mut x);
        b.counts(1, 1, 1, &mut y);
        b.counts(5, 0, 1, &mut y);
        assert_eq!(x, y);
        a.counts(5, 0, 2, &mut x);
        assert_ne!(x, y);
    }

    #[test]
    fn a_hot_microbatch_is_hot_in_all_layers() {
        let spread = ProcessParams { microbatch_spread_milli: 1000, layer_spread_milli: 0, ..params() };
        let mut process = LoadProcess::new(spread).unwrap();
        let mut largest = |layer, microbatch| {
            let (mut counts, mut loads) = (Vec::new(), Vec::new());
            process.counts(layer, 0, microbatch, &mut counts);
            expert_loads(&counts, 32, &mut loads);
            loads.into_iter().max().unwrap()
        };
        let mut means: Vec<u64> = (0..8).map(|m| (0..16).map(|layer| largest(layer, m)).sum::<u64>() / 16).collect();
        means.sort_unstable();
        assert!(means[7] > 2 * means[0], "16 layers would average out what differs between them: {means:?}");
    }

    #[test]
    fn limits_are_checked() {
        let refused = |change: fn(&mut ProcessParams)| {
            let mut params = params();
            change(&mut params);
            LoadProcess::new(params).unwrap_err().to_string()
        };
        assert_eq!(refused(|p| p.top_k = 33), "top-k 33: allowed are 1 to 32");
        assert!(refused(|p| p.skew_milli = 7000).contains("skew 7000"));
        assert!(refused(|p| p.ranks = 0).contains("ranks"));
    }
}
