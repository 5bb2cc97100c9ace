//! From weights to counts, source by source.

use rand_chacha::rand_core::Rng;
use ultraep_plan::Topology;

use super::shapes::{MEAN_WEIGHT, Shape, below};
use super::workload::Workload;
use super::{FULL_SKEW, LoadParams, random};

const TOKENS: u32 = 4;
const NOISE: u32 = 5;

/// The sources of a workload: how many tokens each has.
#[derive(Clone, Debug)]
pub(super) struct Sources {
    tokens: Vec<u32>,
    experts: usize,
    top_k: u32,
    seed: u64,
    microbatch: u32,
}

impl Sources {
    pub(super) fn new(workload: Workload, topology: &Topology, params: &LoadParams) -> Self {
        let (ranks, mean) = (topology.ranks(), params.tokens_per_rank);
        let mut rng = random(params.seed, TOKENS, 0);
        let mut tokens = vec![mean; ranks];
        match workload {
            Workload::RaggedSources => {
                // A quarter to seven quarters of the mean.
                let mut spread = || (u64::from(below(&mut rng, 1 << 16)) * 3 * u64::from(mean)) >> 17;
                tokens.fill_with(|| mean / 4 + spread() as u32);
            }
            Workload::SilentRank if ranks > 1 => tokens[below(&mut rng, ranks as u32) as usize] = 0,
            _ => {}
        }
        Self {
            tokens,
            experts: topology.experts(),
            top_k: params.top_k,
            seed: params.seed,
            microbatch: params.microbatch,
        }
    }

    /// Counts `[N, E]` when `skew / FULL_SKEW` of the weight follows `shape` and the rest is even; every source's weights
    /// vary by up to `noise` 1024ths.
    pub(super) fn counts(&self, shape: &Shape, skew: u32, noise: u32) -> Vec<u32> {
        let mut rng = random(self.seed, NOISE, self.microbatch);
        let mut counts = vec![0; self.tokens.len() * self.experts];
        let mut weights = vec![0; self.experts];
        for (row, &tokens) in counts.chunks_mut(self.experts).zip(&self.tokens) {
            for (weight, &shaped) in weights.iter_mut().zip(&shape.weights) {
                let mixed = u64::from(FULL_SKEW - skew) * MEAN_WEIGHT + u64::from(skew) * shaped;
                let varied = if noise == 0 { 1024 } else { 1024 - noise + below(&mut rng, 2 * noise + 1) };
                *weight = ((mixed >> 8) * u64::from(varied)) >> 18;
            }
            let mut choices = u64::from(tokens) * u64::from(self.top_k);
            if let Some(everyones) = shape.everyones {
                row[everyones] = tokens;
                choices -= u64::from(tokens);
            }
            let phase = rng.next_u64();
            Share { cap: tokens, phase, taken: shape.everyones }.deal(choices, &mut weights, row);
        }
        counts
    }
}

/// How one source shares its choices.
struct Share {
    /// No expert gets more.
    cap: u32,
    /// Where the rounding starts, so that it does not favour the same experts in every source.
    phase: u64,
    /// An expert that has its tokens already.
    taken: Option<usize>,
}

impl Share {
    /// Adds `choices` to `row` in proportion to `weights`, at most `cap` each. Exact: the shares sum to `choices`, which
    /// is at most the cap times the open experts. Experts over the cap get it, and the others share the rest.
    fn deal(&self, mut choices: u64, weights: &mut [u64], row: &mut [u32]) {
        let cap = u64::from(self.cap);
        let mut open: Vec<usize> = (0..row.len()).filter(|&e| Some(e) != self.taken).collect();
        loop {
            if open.iter().all(|&e| weights[e] == 0) {
                // Only experts with no weight are left: even over them.
                open.iter().for_each(|&e| weights[e] = 1);
            }
            let sum: u64 = open.iter().map(|&e| weights[e]).sum();
            let left = choices;
            open.retain(|&e| {
                let full = left * weights[e] > cap * sum;
                if full {
                    row[e] = self.cap;
                    choices -= cap;
                }
                !full
            });
            if choices == left {
                break;
            }
        }
        let sum: u64 = open.iter().map(|&e| weights[e]).sum();
        let mut before = self.phase % sum.max(1);
        for &expert in &open {
            let after = before + choices * weights[expert];
            row[expert] = (after / sum - before / sum) as u32;
            before = after;
        }
    }
}
