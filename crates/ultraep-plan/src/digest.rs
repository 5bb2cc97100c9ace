//! Canonical 64-bit digests, by which ranks compare counts and plans. Not cryptographic.
//!
//! XXH64 with seed 0 over little-endian `u32` words, so that the value is the same on every machine.

use xxhash_rust::xxh64::Xxh64;

use crate::{Expert, Plan, Problem, SplitRule, StopReason, Topology};

/// Digest of counts `lambda`, `[N, E]` row-major.
pub fn digest_counts(counts: &[u32]) -> u64 {
    let mut words = Words::new();
    counts.iter().for_each(|&c| words.push(c));
    words.finish()
}

/// Digest of a problem: its group and its counts.
pub fn digest_problem(problem: &Problem<'_>) -> u64 {
    let mut words = Words::new();
    words.topology(problem.topology());
    problem.counts().iter().for_each(|&c| words.push(c));
    words.finish()
}

/// Digest of a plan: its instances in order (with the copies that they stand for, where the split rule looks at them), its outcomes, its
/// split rule.
pub fn digest_plan(plan: &Plan) -> u64 {
    let mut words = Words::new();
    words.push(plan.split_rule().code());
    words.push(plan.experts() as u32);
    for expert in (0..plan.experts()).map(Expert::new) {
        words.push(plan.of(expert).len() as u32);
        for (index, instance) in plan.range(expert).zip(plan.of(expert)) {
            words.push((instance.rank.index() as u32) << 16 | instance.physical.index() as u32);
            words.push(instance.quota);
            if plan.split_rule() == SplitRule::RoundRobin {
                words.push(plan.copies(index));
            }
        }
    }
    for outcome in plan.domains() {
        words.push(outcome.threshold);
        words.push(outcome.lower_bound);
        words.push(match outcome.stop {
            StopReason::AlreadyBalanced => 0,
            StopReason::TargetReached => 1,
            StopReason::LowerBound => 2,
            StopReason::SearchExhausted => 3,
            StopReason::NotASearch => 4,
            StopReason::LeastCost => 5,
        });
    }
    words.finish()
}

/// Words gathered into blocks before they are hashed.
struct Words {
    hash: Xxh64,
    block: [u8; 256],
    used: usize,
}

impl Words {
    fn new() -> Self {
        Self { hash: Xxh64::new(0), block: [0; 256], used: 0 }
    }

    fn push(&mut self, word: u32) {
        if self.used == self.block.len() {
            self.hash.update(&self.block);
            self.used = 0;
        }
        self.block[self.used..self.used + 4].copy_from_slice(&word.to_le_bytes());
        self.used += 4;
    }

    fn topology(&mut self, topology: &Topology) {
        for number in [topology.ranks(), topology.experts(), topology.domain_ranks()] {
            self.push(number as u32);
        }
        for rank in (0..topology.ranks()).map(crate::Rank::new) {
            self.push(topology.slots(rank) as u32);
            self.push(topology.speed(rank));
        }
    }

    fn finish(mut self) -> u64 {
        self.hash.update(&self.block[..self.used]);
        self.hash.digest()
    }
}
