//! Runs a policy on a load and checks what it returns.

use std::time::Instant;

use ultraep_baselines::{PolicyKind, PolicyParams, build, ideal, plan_for};
use ultraep_load::LoadMatrix;
use ultraep_plan::{HardwareModel, Plan, PlanReport, Policy, Problem, Topology, check_plan, digest_plan};

use crate::error::CliError;

/// A policy at work on one layer.
pub(crate) struct Evaluator {
    kind: PolicyKind,
    topology: Topology,
    hardware: HardwareModel,
    policy: Box<dyn Policy>,
    pub(crate) plan: Plan,
}

/// What came out for one microbatch.
pub(crate) struct Outcome {
    pub(crate) report: PlanReport,
    pub(crate) digest: u64,
    /// Median time of a solve.
    pub(crate) solve_ns: u64,
    /// Critical path of the layer's forward as the hardware model predicts it.
    pub(crate) predicted_ps: u64,
}

impl Evaluator {
    /// A policy that the group cannot have is bad input.
    pub(crate) fn new(kind: PolicyKind, topology: &Topology, params: &PolicyParams) -> Result<Self, CliError> {
        let policy = build(kind, topology, params).map_err(CliError::input)?;
        Ok(Self { kind, topology: topology.clone(), hardware: params.hardware, policy, plan: plan_for(kind, topology) })
    }

    /// The counts that the policy meets: the load's, or balanced ones where it forces the routing.
    pub(crate) fn counts(&self, load: &LoadMatrix) -> Vec<u32> {
        if !self.kind.forces_routing() {
            return load.counts().to_vec();
        }
        let sums: Vec<u32> = (0..load.ranks()).map(|r| load.row(r).iter().sum()).collect();
        ideal::balanced_counts(&self.topology, &sums)
    }

    /// Plans `repeats` times (at least once) for `counts`, checks the plan, and shows the policy the microbatch.
    pub(crate) fn microbatch(&mut self, counts: &[u32], repeats: usize) -> Result<Outcome, CliError> {
        let problem = Problem::new(&self.topology, counts).map_err(CliError::input)?;
        let mut times = Vec::with_capacity(repeats.max(1));
        for _ in 0..repeats.max(1) {
            let start = Instant::now();
            self.policy.solve(&problem, &mut self.plan).map_err(CliError::input)?;
            times.push(start.elapsed().as_nanos() as u64);
        }
        times.sort_unstable();
        // A plan that breaks a rule is a bug of ours, not of the input.
        let report = check_plan(&problem, &self.plan, &self.policy.rules())
            .map_err(|error| CliError::Failure(format!("{}: the plan breaks a rule: {error}", self.kind)))?;
        self.policy.observe(&problem);
        Ok(Outcome {
            report,
            digest: digest_plan(&self.plan),
            solve_ns: times[times.len() / 2],
            predicted_ps: self.hardware.predict(&problem, &self.plan).total_ps(),
        })
    }
}

/// A quotient for reports.
pub(crate) fn quotient((num, den): (u64, u64)) -> f64 {
    if den == 0 { 0.0 } else { num as f64 / den as f64 }
}
