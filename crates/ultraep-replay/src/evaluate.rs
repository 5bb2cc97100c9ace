//! Runs a policy on a load and checks what it returns.

use ultraep_baselines::{BuildError, PolicyKind, PolicyParams, build, ideal, plan_for};
use ultraep_plan::{
    HardwareModel, Plan, PlanReport, PlanViolation, Policy, Problem, ProblemError, SolveError, Topology, check_plan,
    digest_plan,
};

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
        !matches!(self, Self::Rule { .. })
    }
}

/// A policy at work on one layer.
pub struct Evaluator {
    kind: PolicyKind,
    topology: Topology,
    hardware: HardwareModel,
    policy: Box<dyn Policy>,
    now_ns: NowNs,
    plan: Plan,
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
    /// Critical path of the layer's forward as the hardware model predicts it.
    pub predicted_ps: u64,
}

impl Evaluator {
    /// For a policy in a group. A policy that the group cannot have is bad input.
    pub fn new(
        kind: PolicyKind,
        topology: &Topology,
        params: &PolicyParams,
        now_ns: NowNs,
    ) -> Result<Self, EvaluateError> {
        let policy = build(kind, topology, params)?;
        let (hardware, plan) = (params.hardware, plan_for(kind, topology));
        Ok(Self { kind, topology: topology.clone(), hardware, policy, now_ns, plan })
    }

    /// The counts that the policy meets when the load is `counts`, `[N, E]`: balanced ones where it forces the routing.
    pub fn met_counts(&self, counts: &[u32]) -> Vec<u32> {
        if self.kind.forces_routing() { balanced(&self.topology, counts) } else { counts.to_vec() }
    }

    /// Plans `repeats` times (at least once) for `counts`, checks the plan, and shows the policy the microbatch.
    pub fn microbatch(&mut self, counts: &[u32], repeats: usize) -> Result<Evaluated, EvaluateError> {
        let problem = Problem::new(&self.topology, counts)?;
        let mut times = Vec::with_capacity(repeats.max(1));
        for _ in 0..repeats.max(1) {
            let start = (self.now_ns)();
            self.policy.solve(&problem, &mut self.plan)?;
            times.push((self.now_ns)().saturating_sub(start));
        }
        times.sort_unstable();
        let report = check_plan(&problem, &self.plan, &self.policy.rules())
            .map_err(|violation| EvaluateError::Rule { policy: self.kind, violation })?;
        self.policy.observe(&problem);
        Ok(Evaluated {
            report,
            digest: digest_plan(&self.plan),
            solve_ns: times[times.len() / 2],
            predicted_ps: self.hardware.predict(&problem, &self.plan).total_ps(),
        })
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

/// Counts of the same row sums, spread evenly over ranks and experts.
pub(crate) fn balanced(topology: &Topology, counts: &[u32]) -> Vec<u32> {
    let sums: Vec<u32> = counts.chunks(topology.experts()).map(|row| row.iter().sum()).collect();
    ideal::balanced_counts(topology, &sums)
}

/// A quotient for reports; 0 over 0 is 0.
pub fn quotient((num, den): (u64, u64)) -> f64 {
    if den == 0 { 0.0 } else { num as f64 / den as f64 }
}
