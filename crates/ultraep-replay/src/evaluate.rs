//! Runs a policy on a load and checks what it returns.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use ultraep_baselines::{BuildError, PolicyKind, PolicyParams, build, ideal, plan_for};
use ultraep_plan::measure::{imbalance_at_speeds, master_loads};
use ultraep_plan::{
    Charge, Expert, Plan, PlanReport, PlanViolation, Policy, Prediction, Predictor, Problem, ProblemError, Rank,
    SolveError, SplitError, StopReason, Topology, TransferModelError, check_plan, digest_plan,
};

use crate::Scenario;

/// Nanoseconds since some moment that stays the same: how a caller lends its clock.
pub type NowNs = fn() -> u64;

/// A clock that stands still: solve times come out as 0.
pub fn untimed() -> u64 {
    0
}

/// Why a policy was not evaluated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// The group cannot have the policy.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The counts were refused.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// The policy cannot serve the load.
    #[error(transparent)]
    Solve(#[from] SolveError),
    /// The hardware has no model of transfers.
    #[error(transparent)]
    Transfers(#[from] TransferModelError),
    /// A plan of a policy that cannot be split: a bug of the policy, not of the input.
    #[error("{policy}: the plan cannot be split: {reason}")]
    Split {
        /// Whose plan.
        policy: PolicyKind,
        /// Why.
        reason: SplitError,
    },
    /// A plan breaks a rule: a bug of the policy, not of the input.
    #[error("{policy}: the plan breaks a rule: {violation}")]
    Rule {
        /// Whose plan.
        policy: PolicyKind,
        /// Which rule.
        violation: PlanViolation,
    },
}

impl EvaluateError {
    /// Whether the input is at fault, rather than the program.
    pub fn is_input(&self) -> bool {
        !matches!(self, Self::Rule { .. } | Self::Split { .. })
    }
}

/// A policy at work on one layer.
pub struct Evaluator {
    scenario: Scenario,
    predictor: Predictor,
    /// By least quota: powers of two where it is relative to the load.
    policies: BTreeMap<u32, Box<dyn Policy>>,
    now_ns: NowNs,
    plan: Plan,
    trial: Plan,
    /// Of the plan made last.
    charge: Charge,
    min_quota: u32,
    imbalance: (u64, u64),
    /// Where the instances of a historical policy's last plan were.
    placement: Vec<(Expert, Rank)>,
}

/// What came out for one microbatch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evaluated {
    /// What the checker says about the plan.
    pub report: PlanReport,
    /// Canonical digest of the plan.
    pub digest: u64,
    /// Median time of a solve, by the caller's clock.
    pub solve_ns: u64,
    /// Largest over mean rank load with masters only, at the ranks' speeds, as `(numerator, denominator)`.
    pub imbalance_before: (u64, u64),
    /// The same after balancing, by the quotas.
    pub imbalance_after: (u64, u64),
    /// Which costs of balancing the prediction has.
    pub charge: Charge,
    /// Least quota that the plan kept to, in tokens; 1 for policies without one.
    pub min_quota: u32,
}

/// A plan with a smaller least quota that is more even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finer {
    /// The least quota, in tokens.
    pub min_quota: u32,
    /// Largest over mean rank load, at the ranks' speeds, as `(numerator, denominator)`.
    pub imbalance: (u64, u64),
    /// Replicas.
    pub replicas: usize,
    /// Whether it reaches the target, or what is proven to be the best at this least quota.
    pub is_settled: bool,
}

impl Evaluator {
    /// For a policy in a group. A policy that the group cannot have is bad input.
    pub fn new(scenario: &Scenario, now_ns: NowNs) -> Result<Self, EvaluateError> {
        let Scenario { kind, topology, params, .. } = scenario;
        let mut evaluator = Self {
            scenario: scenario.clone(),
            predictor: Predictor::new(topology, params.hardware)?,
            policies: BTreeMap::new(),
            now_ns,
            plan: plan_for(*kind, topology),
            trial: Plan::default(),
            charge: Charge::Nothing,
            min_quota: 1,
            imbalance: (1, 1),
            placement: Vec::new(),
        };
        // A policy that cannot be had is refused here, not at the first microbatch.
        let min_quota = evaluator.min_quota_of(0);
        policy_with(scenario, min_quota, &mut evaluator.policies)?;
        Ok(evaluator)
    }

    fn min_quota_of(&self, total_tokens: u64) -> u32 {
        match self.scenario.kind.has_min_quota() {
            true => self.scenario.least_quota.tokens(self.scenario.topology.ranks(), total_tokens),
            false => 1,
        }
    }

    /// The counts that the policy meets when the load is `counts`, `[N, E]`: balanced ones where it forces the routing.
    pub fn met_counts(&self, counts: &[u32]) -> Vec<u32> {
        match self.scenario.kind.forces_routing() {
            true => balanced(&self.scenario.topology, counts),
            false => counts.to_vec(),
        }
    }

    /// Plans `repeats` times (at least once) for `counts`, checks the plan, and shows the policy the microbatch.
    pub fn microbatch(&mut self, counts: &[u32], repeats: usize) -> Result<Evaluated, EvaluateError> {
        let total = counts.iter().map(|&count| u64::from(count)).sum();
        self.min_quota = self.min_quota_of(total);
        let Scenario { kind, topology, .. } = &self.scenario;
        let problem = Problem::new(topology, counts)?;
        let policy = policy_with(&self.scenario, self.min_quota, &mut self.policies)?;
        let mut times = Vec::with_capacity(repeats.max(1));
        for _ in 0..repeats.max(1) {
            let start = (self.now_ns)();
            policy.solve(&problem, &mut self.plan)?;
            times.push((self.now_ns)().saturating_sub(start));
        }
        times.sort_unstable();
        let report = check_plan(&problem, &self.plan, &policy.rules())
            .map_err(|violation| EvaluateError::Rule { policy: *kind, violation })?;
        policy.observe(&problem);
        let is_new = kind.is_historical() && moves_in(&self.plan, &mut self.placement);
        self.charge = kind.charge(is_new);
        let measured = self.predictor.take_plan(&problem, &self.plan);
        measured.map_err(|reason| EvaluateError::Split { policy: *kind, reason })?;
        self.imbalance = imbalance_of(topology, &report);
        Ok(Evaluated {
            report,
            digest: digest_plan(&self.plan),
            solve_ns: times[times.len() / 2],
            imbalance_before: imbalance_at_speeds(topology, &master_loads(topology, counts)),
            imbalance_after: self.imbalance,
            charge: self.charge,
            min_quota: self.min_quota,
        })
    }

    /// What the policy makes of the microbatch planned last with a smaller least quota, `min_quota` tokens: `None` where that
    /// is not smaller, the target is reached without, or the plan is no more even.
    pub fn finer(&mut self, counts: &[u32], min_quota: u32) -> Result<Option<Finer>, EvaluateError> {
        let beta = self.scenario.params.beta;
        let (num, den) = self.imbalance;
        let is_met = u128::from(num) * u128::from(beta.den()) <= u128::from(den) * u128::from(beta.num());
        let kind = self.scenario.kind;
        let is_searching = kind.has_min_quota() && kind != PolicyKind::UltraepCost;
        if is_met || !is_searching || min_quota >= self.min_quota {
            return Ok(None);
        }
        let topology = &self.scenario.topology;
        let problem = Problem::new(topology, counts)?;
        let policy = policy_with(&self.scenario, min_quota, &mut self.policies)?;
        policy.solve(&problem, &mut self.trial)?;
        let report = check_plan(&problem, &self.trial, &policy.rules())
            .map_err(|violation| EvaluateError::Rule { policy: kind, violation })?;
        let imbalance = imbalance_of(topology, &report);
        let is_better = u128::from(imbalance.0) * u128::from(den) < u128::from(num) * u128::from(imbalance.1);
        let settled = |stop| matches!(stop, StopReason::TargetReached | StopReason::LowerBound);
        let is_settled = self.trial.domains().iter().all(|domain| settled(domain.stop));
        Ok(is_better.then_some(Finer { min_quota, imbalance, replicas: report.replicas, is_settled }))
    }

    /// Predicts the forward of the microbatch planned last, with the transfers that would be planned. Takes longer than planning.
    pub fn predict(&mut self) -> Prediction {
        self.predictor.predict(&self.plan, self.charge)
    }

    /// The plan made last.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// As [`Evaluator::plan`], to keep.
    pub fn into_plan(self) -> Plan {
        self.plan
    }
}

/// The scenario's policy with this least quota, built where it is not there yet.
fn policy_with<'a>(
    scenario: &Scenario,
    min_quota: u32,
    policies: &'a mut BTreeMap<u32, Box<dyn Policy>>,
) -> Result<&'a mut Box<dyn Policy>, BuildError> {
    match policies.entry(min_quota) {
        Entry::Occupied(entry) => Ok(entry.into_mut()),
        Entry::Vacant(entry) => {
            let params = PolicyParams { min_quota, ..scenario.params };
            Ok(entry.insert(build(scenario.kind, &scenario.topology, &params)?))
        }
    }
}

/// Largest over mean rank load by the plan's quotas, at the ranks' speeds.
fn imbalance_of(topology: &Topology, report: &PlanReport) -> (u64, u64) {
    let loads: Vec<u64> = report.rank_load_after.iter().map(|&load| load.into()).collect();
    imbalance_at_speeds(topology, &loads)
}

/// Keeps in `placement` where the plan's instances are; whether they were elsewhere before.
fn moves_in(plan: &Plan, placement: &mut Vec<(Expert, Rank)>) -> bool {
    let of = |expert| plan.of(expert).iter().map(move |instance| (expert, instance.rank));
    let now: Vec<_> = (0..plan.experts()).map(Expert::new).flat_map(of).collect();
    let is_new = now != *placement;
    *placement = now;
    is_new
}

/// Counts of the same row sums, spread evenly over ranks and experts.
pub(crate) fn balanced(topology: &Topology, counts: &[u32]) -> Vec<u32> {
    let sums: Vec<u32> = counts.chunks(topology.experts()).map(|row| row.iter().sum()).collect();
    ideal::balanced_counts(topology, &sums)
}

/// A quotient for reports; 0 over 0 is 0.
pub fn quotient((num, den): (u64, u64)) -> f64 {
    if den == 0 { 0.0 } else { num as f64 / den as f64 }
}
