//! Masters only: the plan under which nothing moves. What `ideal` plans, since its balance comes from the routing.

use ultraep_plan::{Plan, PlanRules, Policy, Problem, SlotRule, SolveError, SplitRule, Topology};

use crate::draft::{Amounts, Bound, Draft};

/// Every expert's master takes all of its load.
#[derive(Clone, Debug)]
pub struct MastersOnly {
    name: &'static str,
    topology: Topology,
    draft: Draft,
    totals: Vec<u32>,
}

impl MastersOnly {
    /// For `topology`, under the name `name`.
    pub fn new(name: &'static str, topology: &Topology) -> Self {
        Self {
            name,
            topology: topology.clone(),
            draft: Draft::with_capacity(topology, topology.experts()),
            totals: vec![0; topology.experts()],
        }
    }
}

impl Policy for MastersOnly {
    fn name(&self) -> &'static str {
        self.name
    }

    fn rules(&self) -> PlanRules {
        PlanRules { slots: SlotRule::Replicas, min_quota: 1, empty_replicas: false, within_domain: true, speeds: false }
    }

    fn solve(&mut self, problem: &Problem<'_>, plan: &mut Plan) -> Result<(), SolveError> {
        SolveError::check_topology(&self.topology, problem)?;
        problem.expert_loads(&mut self.totals);
        self.draft.clear();
        self.draft.push_masters(&self.topology, &self.totals);
        self.draft.finish(problem, Amounts::Quotas(SplitRule::LocalFirstExact), Bound::DomainMean, plan);
        Ok(())
    }
}
