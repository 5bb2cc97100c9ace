//! What a policy came to over a whole recording, in memory that does not grow with it.

use std::collections::BTreeMap;

use ultraep_plan::{Prediction, StopReason};

use crate::{Evaluated, Finer, quotient};

/// Worst cases that are kept.
const WORST_KEPT: usize = 5;

/// Values from 1 up, by bins of a thousandth: quantiles are at most that much too low; sum and largest are exact.
#[derive(Clone, Debug, Default)]
pub struct Distribution {
    bins: BTreeMap<u16, u64>,
    /// Values added.
    pub count: u64,
    sum: f64,
    /// The largest of them, 0 where there is none.
    pub largest: f64,
}

/// Ratio of a bin's bounds.
const BIN: f64 = 1.001;

impl Distribution {
    /// Adds a value; below 1 counts as 1 in quantiles.
    pub fn add(&mut self, value: f64) {
        let bin = (value.max(1.0).ln() / BIN.ln() + 1e-6) as u16; // saturates
        *self.bins.entry(bin).or_default() += 1;
        self.count += 1;
        self.sum += value;
        self.largest = self.largest.max(value);
    }

    /// Adds all values of another.
    pub fn merge(&mut self, other: &Self) {
        for (&bin, &count) in &other.bins {
            *self.bins.entry(bin).or_default() += count;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.largest = self.largest.max(other.largest);
    }

    /// Values by bins of a thousandth, the lowest first: a bin's lower bound and how many lie in it.
    pub fn bins(&self) -> impl Iterator<Item = (f64, u64)> {
        self.bins.iter().map(|(&bin, &count)| (BIN.powi(i32::from(bin)), count))
    }

    /// Their mean, 0 where there is none.
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum / self.count as f64 }
    }

    /// The least value that at least `percent` of all do not exceed.
    pub fn quantile(&self, percent: u64) -> f64 {
        let needed = (self.count * percent).div_ceil(100).max(1);
        let mut below = 0;
        for (&bin, &count) in &self.bins {
            below += count;
            if below >= needed {
                return BIN.powi(i32::from(bin)).min(self.largest);
            }
        }
        0.0
    }
}

/// Points of a [`Series`], at most.
const POINTS: usize = 1024;

/// Means along an axis of unknown length, in bounded memory: when there are too many points, two become one.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// `log2` of the microbatches that a point stands for.
    width_log: u32,
    /// Sum and number of values.
    points: Vec<(f64, u64)>,
}

impl Series {
    /// Adds a value at a place, from 0.
    pub fn add(&mut self, place: u64, value: f64) {
        while place >> self.width_log >= POINTS as u64 {
            self.halve();
        }
        self.add_point((place >> self.width_log) as usize, (value, 1));
    }

    fn add_point(&mut self, at: usize, (sum, count): (f64, u64)) {
        if self.points.len() <= at {
            self.points.resize(at + 1, (0.0, 0));
        }
        self.points[at] = (self.points[at].0 + sum, self.points[at].1 + count);
    }

    fn halve(&mut self) {
        let sum = |pair: &[(f64, u64)]| pair.iter().fold((0.0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
        self.points = self.points.chunks(2).map(sum).collect();
        self.width_log += 1;
    }

    /// Adds all values of another, place by place.
    pub fn merge(&mut self, other: &Self) {
        while self.width_log < other.width_log {
            self.halve();
        }
        let finer = self.width_log - other.width_log;
        for (at, &point) in other.points.iter().enumerate() {
            self.add_point(at >> finer, point);
        }
    }

    /// Places that a point stands for.
    pub fn width(&self) -> u64 {
        1 << self.width_log
    }

    /// First place and mean of every point that has values.
    pub fn means(&self) -> impl Iterator<Item = (u64, f64)> {
        let width = self.width();
        let points = self.points.iter().zip(0_u64..).filter(|((_, count), _)| *count > 0);
        points.map(move |(&(sum, count), at)| (at * width, sum / count as f64))
    }
}

/// A microbatch that stands out.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Worst {
    /// Its step.
    pub step: u64,
    /// Its microbatch within the step.
    pub microbatch: u32,
    /// Its layer.
    pub layer: u32,
    /// Largest over mean rank load after balancing.
    pub imbalance: f64,
}

/// One scenario's plans.
#[derive(Clone, Debug, Default)]
pub struct Outcomes {
    /// Imbalance after balancing.
    pub imbalance: Distribution,
    /// Times of solves.
    pub solve_ns: Distribution,
    /// Imbalance after balancing, by layer.
    pub layers: BTreeMap<u32, Distribution>,
    /// Imbalance after balancing, by microbatch: the n-th of each layer together.
    pub series: Series,
    /// Replicas of all plans.
    pub replicas: u64,
    /// Most replicas of one expert.
    pub max_fanout: usize,
    /// Most copies that one rank sends.
    pub max_sends: usize,
    /// Most foreign experts on one rank.
    pub max_copies: usize,
    /// Copies beside another copy of the same expert on the same rank.
    pub wasted_copies: u64,
    /// Tokens processed away from their source.
    pub remote_tokens: u64,
    /// Tokens in all.
    pub total_tokens: u64,
    /// Predicted time of all layers' forwards.
    pub predicted_ps: u128,
    /// Smallest and largest least quota of the plans, in tokens.
    pub min_quotas: Option<(u32, u32)>,
    /// Plans that a least quota of one token would have made more even, and by how much in imbalance, all together.
    pub finer: (u64, f64),
    /// Plans that reach the target or a proven lower bound in every domain.
    pub proven: u64,
    /// Of those, plans that a proven lower bound above the target keeps from it in some domain.
    pub at_bound: u64,
    /// Microbatches that the policy cannot serve.
    pub refused: u64,
    /// Why the first.
    pub refusal: Option<String>,
    /// The worst cases, the worst first.
    pub worst: Vec<Worst>,
}

impl Outcomes {
    /// Adds a plan; the imbalance of `place` is not looked at.
    pub fn add(&mut self, place: Worst, evaluated: &Evaluated, plan: &ultraep_plan::Plan, predicted: &Prediction) {
        let report = &evaluated.report;
        let imbalance = quotient(evaluated.imbalance_after);
        self.imbalance.add(imbalance);
        self.solve_ns.add(evaluated.solve_ns as f64);
        let of_layer = self.layers.entry(place.layer).or_default();
        self.series.add(of_layer.count, imbalance);
        of_layer.add(imbalance);
        self.replicas += report.replicas as u64;
        self.max_fanout = self.max_fanout.max(report.max_fanout);
        self.max_sends = self.max_sends.max(report.max_sends);
        self.max_copies = self.max_copies.max(report.max_copies);
        self.wasted_copies += plan.wasted_copies() as u64;
        self.remote_tokens += report.remote_tokens;
        self.total_tokens += report.total_tokens;
        self.predicted_ps += u128::from(predicted.total_ps());
        self.min_quotas = joined(self.min_quotas, Some((evaluated.min_quota, evaluated.min_quota)));
        let is_proven =
            |stop| matches!(stop, StopReason::AlreadyBalanced | StopReason::TargetReached | StopReason::LowerBound);
        let is_all_proven = plan.domains().iter().all(|d| is_proven(d.stop));
        self.proven += u64::from(is_all_proven);
        let is_at_bound = plan.domains().iter().any(|d| d.stop == StopReason::LowerBound);
        self.at_bound += u64::from(is_all_proven && is_at_bound);
        self.keep_worst(Worst { imbalance, ..place });
    }

    /// Counts a plan that is more even with a least quota of one token.
    pub fn add_finer(&mut self, evaluated: &Evaluated, finer: &Finer) {
        let gain = quotient(evaluated.imbalance_after) - quotient(finer.imbalance);
        self.finer = (self.finer.0 + 1, self.finer.1 + gain);
    }

    /// Mean imbalance with a least quota of one token in every plan that it makes more even.
    pub fn finer_mean(&self) -> f64 {
        self.imbalance.mean() - self.finer.1 / self.plans().max(1) as f64
    }

    /// Counts a microbatch that the policy cannot serve.
    pub fn refuse(&mut self, reason: String) {
        self.refused += 1;
        self.refusal.get_or_insert(reason);
    }

    /// Adds all plans of another.
    pub fn merge(&mut self, other: Self) {
        self.imbalance.merge(&other.imbalance);
        self.solve_ns.merge(&other.solve_ns);
        for (layer, of_layer) in &other.layers {
            self.layers.entry(*layer).or_default().merge(of_layer);
        }
        self.series.merge(&other.series);
        self.replicas += other.replicas;
        self.max_fanout = self.max_fanout.max(other.max_fanout);
        self.max_sends = self.max_sends.max(other.max_sends);
        self.max_copies = self.max_copies.max(other.max_copies);
        self.wasted_copies += other.wasted_copies;
        self.remote_tokens += other.remote_tokens;
        self.total_tokens += other.total_tokens;
        self.predicted_ps += other.predicted_ps;
        self.min_quotas = joined(self.min_quotas, other.min_quotas);
        self.finer = (self.finer.0 + other.finer.0, self.finer.1 + other.finer.1);
        self.proven += other.proven;
        self.at_bound += other.at_bound;
        self.refused += other.refused;
        self.refusal = self.refusal.take().or(other.refusal);
        other.worst.into_iter().for_each(|worst| self.keep_worst(worst));
    }

    /// Largest imbalance first, ties by step, microbatch and layer: the same list whatever thread saw a case.
    fn keep_worst(&mut self, case: Worst) {
        let order = |w: &Worst| (w.step, w.microbatch, w.layer);
        let before =
            |a: &Worst| a.imbalance > case.imbalance || a.imbalance == case.imbalance && order(a) < order(&case);
        let at = self.worst.iter().take_while(|w| before(w)).count();
        if at < WORST_KEPT {
            self.worst.insert(at, case);
            self.worst.truncate(WORST_KEPT);
        }
    }

    /// Plans made.
    pub fn plans(&self) -> u64 {
        self.imbalance.count
    }

    /// Replicas a plan.
    pub fn replicas_mean(&self) -> f64 {
        quotient((self.replicas, self.plans()))
    }

    /// Share of tokens processed away from their source.
    pub fn remote_share(&self) -> f64 {
        quotient((self.remote_tokens, self.total_tokens))
    }

    /// Predicted time of a layer's forward.
    pub fn predicted_ns_mean(&self) -> f64 {
        if self.plans() == 0 { 0.0 } else { self.predicted_ps as f64 / self.plans() as f64 / 1e3 }
    }
}

/// The range that covers both.
fn joined(a: Option<(u32, u32)>, b: Option<(u32, u32)>) -> Option<(u32, u32)> {
    match (a, b) {
        (Some(a), Some(b)) => Some((a.0.min(b.0), a.1.max(b.1))),
        (a, b) => a.or(b),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_thousandth_and_merging_changes_nothing() {
        let (mut all, mut halves) = (Distribution::default(), [Distribution::default(), Distribution::default()]);
        for i in 0..1000 {
            let value = 1.0 + f64::from(i * 7 % 1000) / 100.0;
            all.add(value);
            halves[i as usize % 2].add(value);
        }
        for (percent, exact) in [(50, 5.99), (95, 10.49), (100, 10.99)] {
            let got = all.quantile(percent);
            assert!(got <= exact * 1.0001 && got * 1.0011 >= exact, "{percent}: {got} {exact}");
        }
        let [mut merged, other] = halves;
        merged.merge(&other);
        assert_eq!((merged.quantile(95), merged.count, merged.largest), (all.quantile(95), 1000, all.largest));
        assert!((merged.mean() - all.mean()).abs() < 1e-9);
    }

    #[test]
    fn a_long_series_keeps_its_means_in_bounded_memory() {
        let (mut all, mut even, mut odd) = (Series::default(), Series::default(), Series::default());
        for place in 0..5000 {
            let value = (place % 100) as f64;
            all.add(place, value);
            if place % 2 == 0 { even.add(place, value) } else { odd.add(place, value) }
        }
        even.merge(&odd);
        let means: Vec<_> = all.means().collect();
        assert_eq!((all.width(), means.len()), (8, 625));
        assert_eq!(means[..2], [(0, 3.5), (8, 11.5)]);
        assert_eq!(even.means().collect::<Vec<_>>(), means);
    }

    #[test]
    fn the_worst_come_first_whatever_their_order() {
        let case = |step, imbalance| Worst { step, microbatch: 0, layer: 0, imbalance };
        let mut outcomes = Outcomes::default();
        for (step, imbalance) in [(0, 1.5), (1, 3.0), (2, 1.1), (3, 3.0), (4, 2.0), (5, 1.2), (6, 9.0)] {
            outcomes.keep_worst(case(step, imbalance));
        }
        assert_eq!(outcomes.worst.iter().map(|w| w.step).collect::<Vec<_>>(), [6, 1, 3, 4, 0]);
    }
}
