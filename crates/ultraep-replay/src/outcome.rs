//! What a policy came to over a whole recording, in memory that does not grow with it.

use std::collections::BTreeMap;

use ultraep_plan::StopReason;

use crate::{Evaluated, quotient};

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
    /// Plans that reach the target or a proven lower bound in every domain.
    pub proven: u64,
    /// Microbatches that the policy cannot serve.
    pub refused: u64,
    /// Why the first.
    pub refusal: Option<String>,
    /// The worst cases, the worst first.
    pub worst: Vec<Worst>,
}

impl Outcomes {
    /// Adds a plan; the imbalance of `place` is not looked at.
    pub fn add(&mut self, place: Worst, evaluated: &Evaluated, plan: &ultraep_plan::Plan) {
        let report = &evaluated.report;
        let imbalance = quotient(report.imbalance_after());
        self.imbalance.add(imbalance);
        self.solve_ns.add(evaluated.solve_ns as f64);
        self.layers.entry(place.layer).or_default().add(imbalance);
        self.replicas += report.replicas as u64;
        self.max_fanout = self.max_fanout.max(report.max_fanout);
        self.max_sends = self.max_sends.max(report.max_sends);
        self.max_copies = self.max_copies.max(report.max_copies);
        self.wasted_copies += plan.wasted_copies() as u64;
        self.remote_tokens += report.remote_tokens;
        self.total_tokens += report.total_tokens;
        self.predicted_ps += u128::from(evaluated.predicted_ps);
        let is_proven =
            |stop| matches!(stop, StopReason::AlreadyBalanced | StopReason::TargetReached | StopReason::LowerBound);
        self.proven += u64::from(plan.domains().iter().all(|d| is_proven(d.stop)));
        self.keep_worst(Worst { imbalance, ..place });
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
        self.replicas += other.replicas;
        self.max_fanout = self.max_fanout.max(other.max_fanout);
        self.max_sends = self.max_sends.max(other.max_sends);
        self.max_copies = self.max_copies.max(other.max_copies);
        self.wasted_copies += other.wasted_copies;
        self.remote_tokens += other.remote_tokens;
        self.total_tokens += other.total_tokens;
        self.predicted_ps += other.predicted_ps;
        self.proven += other.proven;
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
    fn the_worst_come_first_whatever_their_order() {
        let case = |step, imbalance| Worst { step, microbatch: 0, layer: 0, imbalance };
        let mut outcomes = Outcomes::default();
        for (step, imbalance) in [(0, 1.5), (1, 3.0), (2, 1.1), (3, 3.0), (4, 2.0), (5, 1.2), (6, 9.0)] {
            outcomes.keep_worst(case(step, imbalance));
        }
        assert_eq!(outcomes.worst.iter().map(|w| w.step).collect::<Vec<_>>(), [6, 1, 3, 4, 0]);
    }
}
