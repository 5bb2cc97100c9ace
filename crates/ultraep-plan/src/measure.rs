//! What a plan comes to, in integers: tokens that ranks process and links carry, and the imbalance of loads.
//!
//! The one home of these figures. Whoever predicts a time, draws a picture, records a layer or charges a clock takes them
//! from here, so that no two of them can differ. (The checker sums for itself: it is the oracle.)

use alloc::vec;
use alloc::vec::Vec;

use crate::{
    Expert, FULL_SPEED, Instance, Plan, Problem, Rank, SplitError, SplitRule, SplitWorkspace, Topology, split_source,
};

/// Largest over mean of `loads` as `(numerator, denominator)`: the largest times their number, and their sum; 1/1 without
/// any load.
pub fn imbalance(loads: impl IntoIterator<Item = impl Into<u64>>) -> (u64, u64) {
    let (mut largest, mut total, mut count) = (0_u64, 0_u64, 0_u64);
    for load in loads {
        let load = load.into();
        largest = largest.max(load);
        total = total.saturating_add(load);
        count += 1;
    }
    if total == 0 { (1, 1) } else { (largest.saturating_mul(count), total) }
}

/// As [`imbalance`], of rank loads `[N]` on ranks with the speed weights of `topology`: what the planner minimises. A rank's
/// load counts by the time it takes, `load / speed`, and the mean is what all take together, `sum of loads / sum of speeds`.
/// A rank of weight 0 counts at full speed, as for the planner.
pub fn imbalance_at_speeds(topology: &Topology, loads: &[u64]) -> (u64, u64) {
    if topology.speeds().iter().all(|&speed| speed == FULL_SPEED || speed == 0) {
        return imbalance(loads.iter().copied());
    }
    let speeds = || topology.speeds().iter().map(|&speed| u64::from(if speed == 0 { FULL_SPEED } else { speed }));
    // Of two ranks the one with the larger quotient, by cross-multiplication.
    let longer = |(a, of_a): (u64, u64), (b, of_b): (u64, u64)| {
        if u128::from(b) * u128::from(of_a) > u128::from(a) * u128::from(of_b) { (b, of_b) } else { (a, of_a) }
    };
    let (most, speed) = loads.iter().copied().zip(speeds()).fold((0, u64::from(FULL_SPEED)), longer);
    let total: u64 = loads.iter().sum();
    if total == 0 { (1, 1) } else { (most.saturating_mul(speeds().sum()), total.saturating_mul(speed)) }
}

/// Load of each rank if every token went to its master, `[N]`; `counts` `[N, E]` row-major.
pub fn master_loads(topology: &Topology, counts: &[u32]) -> Vec<u64> {
    let mut loads = vec![0; topology.ranks()];
    for row in counts.chunks_exact(topology.experts()) {
        for (&count, home) in row.iter().zip(topology.homes()) {
            loads[home.index()] += u64::from(count);
        }
    }
    loads
}

/// All shares of `split` (`[N, instances]` row-major): source, index of the instance, the instance, tokens.
pub fn shares<'a>(
    instances: &'a [Instance],
    split: &'a [u32],
) -> impl Iterator<Item = (Rank, usize, &'a Instance, u32)> + 'a {
    let rows = split.chunks_exact(instances.len().max(1)).enumerate();
    let of_row = |(source, row): (usize, &'a [u32])| {
        let shares = instances.iter().zip(row).enumerate();
        shares.map(move |(index, (instance, &tokens))| (Rank::new(source), index, instance, tokens))
    };
    rows.flat_map(of_row)
}

/// Tokens of every instance, rank and link under one plan and split. Memory is reused from plan to plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Measure {
    instances: Vec<u64>,
    processed: Vec<u64>,
    sent: Vec<u64>,
    received: Vec<u64>,
    shares: Vec<u32>,
}

impl Measure {
    /// Of a plan's instances and their split, `[ranks, instances]` row-major.
    pub fn of_split(ranks: usize, instances: &[Instance], split: &[u32]) -> Self {
        let mut measure = Self::default();
        measure.take_split(ranks, instances, split);
        measure
    }

    /// Takes in a plan's instances and their split, `[ranks, instances]` row-major.
    pub fn take_split(&mut self, ranks: usize, instances: &[Instance], split: &[u32]) {
        self.begin(ranks, instances);
        for (source, row) in split.chunks_exact(instances.len().max(1)).enumerate() {
            self.add_source(Rank::new(source), instances, row);
        }
        self.finish(instances);
    }

    /// Takes in a plan for `problem` under its own split rule. What stays at home is known in closed form under the default
    /// rule, so the split itself is not made: `O(N E + instances)` instead of `O(N instances)`.
    ///
    /// # Errors
    /// [`SplitError`] when plan and problem do not belong together.
    pub fn take_plan(
        &mut self,
        problem: &Problem<'_>,
        plan: &Plan,
        workspace: &mut SplitWorkspace,
    ) -> Result<(), SplitError> {
        let ranks = problem.topology().ranks();
        self.begin(ranks, plan.instances());
        if plan.split_rule() != SplitRule::LocalFirstExact {
            let mut row = core::mem::take(&mut self.shares);
            row.clear();
            row.resize(plan.instances().len(), 0);
            for source in (0..ranks).map(Rank::new) {
                split_source(problem, plan, source, workspace, &mut row)?;
                self.add_source(source, plan.instances(), &row);
            }
            self.shares = row;
            self.finish(plan.instances());
            return Ok(());
        }
        if plan.experts() != problem.topology().experts() {
            let (plan, problem) = (plan.experts(), problem.topology().experts());
            return Err(SplitError::Experts { plan, problem });
        }
        for (rank, sent) in self.sent.iter_mut().enumerate() {
            *sent = problem.row(rank).iter().map(|&count| u64::from(count)).sum();
        }
        for expert in (0..plan.experts()).map(Expert::new) {
            for index in plan.range(expert) {
                let instance = plan.instances()[index];
                let rank = instance.rank.index();
                let local = u64::from(instance.quota.min(problem.row(rank)[expert.index()]));
                self.instances[index] = u64::from(instance.quota);
                self.sent[rank] -= local;
                self.received[rank] += u64::from(instance.quota) - local;
            }
        }
        self.finish(plan.instances());
        Ok(())
    }

    fn begin(&mut self, ranks: usize, instances: &[Instance]) {
        let lists = [
            (&mut self.instances, instances.len()),
            (&mut self.processed, ranks),
            (&mut self.sent, ranks),
            (&mut self.received, ranks),
        ];
        for (list, len) in lists {
            list.clear();
            list.resize(len, 0);
        }
    }

    fn add_source(&mut self, source: Rank, instances: &[Instance], row: &[u32]) {
        for ((instance, &tokens), sum) in instances.iter().zip(row).zip(&mut self.instances) {
            *sum += u64::from(tokens);
            if instance.rank != source {
                self.sent[source.index()] += u64::from(tokens);
                self.received[instance.rank.index()] += u64::from(tokens);
            }
        }
    }

    fn finish(&mut self, instances: &[Instance]) {
        for (instance, &tokens) in instances.iter().zip(&self.instances) {
            self.processed[instance.rank.index()] += tokens;
        }
    }

    /// Tokens of each instance, in the order of [`Plan::instances`].
    pub fn instances(&self) -> &[u64] {
        &self.instances
    }

    /// Tokens that each rank processes, `[N]`.
    pub fn processed(&self) -> &[u64] {
        &self.processed
    }

    /// Tokens that each rank sends to others, `[N]`.
    pub fn sent(&self) -> &[u64] {
        &self.sent
    }

    /// Tokens that each rank receives from others, `[N]`.
    pub fn received(&self) -> &[u64] {
        &self.received
    }

    /// Tokens processed away from their source rank.
    pub fn remote_tokens(&self) -> u64 {
        self.sent.iter().sum()
    }

    /// Tokens in all.
    pub fn total_tokens(&self) -> u64 {
        self.processed.iter().sum()
    }

    /// Tokens of the fullest rank: the activation peak.
    pub fn largest(&self) -> u64 {
        self.processed.iter().copied().max().unwrap_or(0)
    }

    /// Tokens on the busiest link, sent or received.
    pub fn busiest_link(&self) -> u64 {
        self.sent.iter().chain(&self.received).copied().max().unwrap_or(0)
    }

    /// Largest over mean rank load, see [`imbalance`].
    pub fn imbalance(&self) -> (u64, u64) {
        imbalance(self.processed.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TopologySpec;

    #[test]
    fn imbalance_is_largest_over_mean() {
        assert_eq!(imbalance([3_u32, 1, 2]), (9, 6));
        assert_eq!(imbalance([0_u64; 4]), (1, 1));
        assert_eq!(imbalance(core::iter::empty::<u64>()), (1, 1));
    }

    #[test]
    fn a_slow_rank_with_the_mean_load_is_not_balanced() {
        let spec = TopologySpec { ranks: 4, experts: 4, domain_ranks: 4, slots_per_rank: 0 };
        let topology = Topology::new(spec).expect("valid").with_speeds(&[1024, 512, 1024, 1024]).expect("valid");
        // All have 70: the slow one takes twice as long. The mean is 280 over speeds of 3.5.
        let (num, den) = imbalance_at_speeds(&topology, &[70; 4]);
        assert_eq!(num * 280, den * 490, "140 over 80");
        let (num, den) = imbalance_at_speeds(&topology, &[80, 40, 80, 80]);
        assert_eq!(num, den, "loads by speed are even");
        assert_eq!(imbalance_at_speeds(&topology, &[0; 4]), (1, 1));
    }
}
