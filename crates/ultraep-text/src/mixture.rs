//! The schedule: which domain a sequence is drawn from, as a function of where it stands in the run.
//!
//! Why: with a constant mixture the router's load settles and a balancer that looks at history would do well. Real
//! pre-training data does not come like that: corpora are interleaved in shards, ranks read different shards, and packed
//! documents fill whole microbatches with one kind of text. The schedule copies these three, with integers only:
//!
//! ```text
//! turn    = 65536                                              one full circle
//! centre  = step * turn / turn_steps + fan(rank)               slow rotation; fan(rank) = (rank * 40503 mod turn) / 2
//! near(d) = max(0, turn/2 - 2 * circular distance(centre, d * turn / D))      peak turn/2, zero at a quarter turn
//! w(d)    = turn/16 + near(d)                                                 weight of domain d
//!
//! group burst: with chance 1/4 by (seed, step, microbatch), the same on all ranks, one domain gets weight 8 * sum of w
//! rank burst : else with chance 1/8 by (seed, step, microbatch, rank), one domain gets weight 8 * sum of w
//! ```
//!
//! `40503 = turn / golden ratio` spreads any number of ranks evenly; half a turn of fan makes ranks differ while the
//! group's mean mixture still drifts. In a burst 8/9 of the sequences or more come from one domain. With one domain all
//! of this is constant. Cost: O(D) a batch.

use crate::mix::Draws;
use crate::sampler::BatchPosition;

/// Steps after which the mixture has gone once round all domains, unless told otherwise.
pub const DEFAULT_TURN_STEPS: u64 = 64;

const TURN: u64 = 1 << 16;
/// `TURN / golden ratio`, rounded to an odd number.
const RANK_STRIDE: u64 = 40_503;
const FLOOR: u64 = TURN / 16;
const BURST_FACTOR: u64 = 8;
const GROUP_BURST_ONE_IN: u64 = 4;
const RANK_BURST_ONE_IN: u64 = 8;

/// Names the streams of draws apart.
const GROUP_STREAM: u64 = 1;
const RANK_STREAM: u64 = 2;

/// Weights of the domains at one position of the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mixture {
    /// `[D]`; the chance of domain `d` is `weights[d] / sum of weights`.
    pub weights: Vec<u64>,
    /// The domain that dominates this microbatch, if one does.
    pub burst: Option<usize>,
}

/// What the schedule depends on besides the position.
#[derive(Clone, Copy)]
pub(crate) struct Schedule {
    pub(crate) domains: usize,
    pub(crate) turn_steps: u64,
    pub(crate) seed: u64,
}

impl Schedule {
    pub(crate) fn at(&self, position: BatchPosition) -> Mixture {
        let BatchPosition { step, microbatch, rank } = position;
        let domains = self.domains as u64;
        let turned = (step % self.turn_steps) as u128 * u128::from(TURN) / u128::from(self.turn_steps); // rounded down
        let centre = (turned as u64 + u64::from(rank) * RANK_STRIDE % TURN / 2) % TURN;
        let mut weights: Vec<u64> = (0..domains)
            .map(|d| {
                let apart = centre.abs_diff(d * TURN / domains);
                let distance = apart.min(TURN - apart);
                FLOOR + (TURN / 2).saturating_sub(2 * distance)
            })
            .collect();
        let burst = self.burst(step, microbatch, rank);
        if let Some(domain) = burst {
            weights[domain] += BURST_FACTOR * weights.iter().sum::<u64>();
        }
        Mixture { weights, burst }
    }

    fn burst(&self, step: u64, microbatch: u32, rank: u32) -> Option<usize> {
        let domains = self.domains as u64;
        let mut group = Draws::keyed(&[self.seed, GROUP_STREAM, step, u64::from(microbatch)]);
        if group.below(GROUP_BURST_ONE_IN) == 0 {
            return Some(group.below(domains) as usize);
        }
        let mut own = Draws::keyed(&[self.seed, RANK_STREAM, step, u64::from(microbatch), u64::from(rank)]);
        (own.below(RANK_BURST_ONE_IN) == 0).then(|| own.below(domains) as usize)
    }
}

impl Mixture {
    /// The domain of one sequence.
    pub(crate) fn draw(&self, draws: &mut Draws) -> usize {
        let mut ticket = draws.below(self.weights.iter().sum());
        for (domain, &weight) in self.weights.iter().enumerate() {
            if ticket < weight {
                return domain;
            }
            ticket -= weight;
        }
        self.weights.len() - 1 // not reached: the ticket is below the sum
    }
}
