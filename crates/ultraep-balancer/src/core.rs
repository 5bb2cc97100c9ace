//! From gathered counts to a kept plan, its split and its transfers. No fabric, no memory of experts: every rank gets the same from the
//! same counts.

use std::sync::Arc;

use ultraep_plan::{
    Plan, PlannedTransfers, Policy, PolicyFactory, Problem, SplitWorkspace, SyncPlanner, Topology, check_plan,
    check_split, digest_plan, digest_problem, split_all,
};

use crate::observed::Observed;
use crate::{BalancerConfig, BalancerError, VirtualLayer};

/// Whether historical policies learn from the microbatches that are planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum History {
    /// Every forward's counts are shown to them.
    Record,
    /// They keep what they have seen: the pass is a comparison on a batch that training sees anyway.
    Frozen,
}

/// A plan in force for one virtual layer, with what was derived from it.
#[derive(Debug, Default)]
pub struct Planned {
    pub(crate) is_planned: bool,
    /// Tokens of this rank for every expert, `[E]`.
    pub(crate) own: Vec<u32>,
    pub(crate) plan: Plan,
    pub(crate) counts: Vec<u32>,
    pub(crate) split: Vec<u32>,
    pub(crate) transfers: PlannedTransfers,
    placement_is_new: bool,
    is_historical: bool,
}

impl Planned {
    /// Nothing planned, with room for `replicas`.
    pub(crate) fn new(topology: &Topology, replicas: usize) -> Self {
        Self {
            plan: Plan::with_capacity(topology, replicas),
            transfers: PlannedTransfers::new(topology),
            own: vec![0; topology.experts()],
            ..Self::default()
        }
    }

    /// Which instances exist and how many tokens each processes.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Tokens of every source for every expert, `[N, E]`.
    #[must_use]
    pub fn counts(&self) -> &[u32] {
        &self.counts
    }

    /// Tokens of every source for every instance, `[N, instances]`.
    #[must_use]
    pub fn split(&self) -> &[u32] {
        &self.split
    }

    /// Who sends which expert to whom.
    #[must_use]
    pub fn transfers(&self) -> &PlannedTransfers {
        &self.transfers
    }

    /// Whether instances lie elsewhere than in the last plan of this layer and policy.
    #[must_use]
    pub fn placement_is_new(&self) -> bool {
        self.placement_is_new
    }

    /// Whether the policy plans from earlier microbatches.
    #[must_use]
    pub fn is_historical(&self) -> bool {
        self.is_historical
    }

    /// Of plan and counts: tables that differ may give one plan, and different splits.
    pub(crate) fn digest(&self, problem: &Problem<'_>) -> u64 {
        digest_plan(&self.plan) ^ digest_problem(problem).rotate_left(32)
    }
}

struct PolicyState {
    factory: Arc<dyn PolicyFactory>,
    layers: Vec<Box<dyn Policy>>,
    /// Digest of each layer's last placement, quotas aside.
    placements: Vec<u64>,
}

pub(crate) struct Core {
    policies: Vec<PolicyState>,
    active: usize,
    pub(crate) history: History,
    split_workspace: SplitWorkspace,
    pub(crate) transfers: SyncPlanner,
    /// Tokens of every expert since [`Core::take_loads`], `[layers, E]`.
    loads: Vec<u64>,
    /// What historical policies have seen, by layer.
    observed: Vec<Observed>,
    /// Workspace, `[E]`.
    expert_loads: Vec<u32>,
}

impl Core {
    pub(crate) fn new(config: &BalancerConfig) -> Result<Self, BalancerError> {
        let (topology, experts) = (&config.topology, config.topology.experts());
        let mut policies = Vec::new();
        for factory in &config.policies {
            let layers = (0..config.layers).map(|_| factory.build(topology)).collect::<Result<Vec<_>, _>>()?;
            policies.push(PolicyState { factory: Arc::clone(factory), layers, placements: vec![0; config.layers] });
        }
        if policies.is_empty() {
            return Err(BalancerError::Size { what: "policies", got: 0, expected: 1 });
        }
        let historical = config.policies.iter().filter_map(|policy| policy.history());
        Ok(Self {
            policies,
            active: 0,
            history: History::Record,
            split_workspace: SplitWorkspace::new(topology),
            transfers: config.sync_planner()?,
            loads: vec![0; config.layers * experts],
            observed: vec![Observed::new(historical, experts); config.layers],
            expert_loads: vec![0; experts],
        })
    }

    pub(crate) fn policy(&self) -> &dyn PolicyFactory {
        &*self.policies[self.active].factory
    }

    pub(crate) fn set_policy(&mut self, name: &'static str) -> Result<(), BalancerError> {
        let found = self.policies.iter().position(|policy| policy.factory.name() == name);
        self.active = found.ok_or(BalancerError::UnknownPolicy(name))?;
        Ok(())
    }

    /// Plans for `problem`, whose counts are `planned.counts`.
    pub(crate) fn plan(
        &mut self,
        at: VirtualLayer,
        problem: &Problem<'_>,
        kept: Targets<'_>,
    ) -> Result<(), BalancerError> {
        let policy = &mut self.policies[self.active].layers[at.layer];
        policy.solve(problem, kept.plan).map_err(|source| BalancerError::Solve { at, source })?;
        self.derive(at, problem, kept)
    }

    /// The split and the transfers of `kept.plan`.
    pub(crate) fn derive(
        &mut self,
        at: VirtualLayer,
        problem: &Problem<'_>,
        kept: Targets<'_>,
    ) -> Result<(), BalancerError> {
        let Targets { plan, split, transfers } = kept;
        split.resize(problem.topology().ranks() * plan.instances().len(), 0);
        split_all(problem, plan, &mut self.split_workspace, split)
            .map_err(|source| BalancerError::Split { at, source })?;
        self.transfers.plan(plan, transfers);
        Ok(())
    }

    /// What is noted of a plan once it is made.
    pub(crate) fn note(&mut self, at: VirtualLayer, problem: &Problem<'_>, notes: Notes<'_>) {
        let policy = &mut self.policies[self.active];
        let placement = placement_digest(notes.plan);
        *notes.is_historical = policy.factory.history().is_some();
        *notes.placement_is_new = policy.placements[at.layer] != placement;
        policy.placements[at.layer] = placement;
        if self.history == History::Frozen {
            return;
        }
        problem.expert_loads(&mut self.expert_loads);
        let experts = self.expert_loads.len();
        let loads = &mut self.loads[at.layer * experts..(at.layer + 1) * experts];
        loads.iter_mut().zip(&self.expert_loads).for_each(|(load, &count)| *load += u64::from(count));
        self.observed[at.layer].push(&self.expert_loads);
        self.show(at.layer, problem);
    }

    pub(crate) fn take_loads(&mut self, layer: usize) -> Vec<u64> {
        let experts = self.expert_loads.len();
        self.loads[layer * experts..(layer + 1) * experts].iter_mut().map(std::mem::take).collect()
    }

    pub(crate) fn observed(&self, layer: usize) -> &[u32] {
        self.observed[layer].loads()
    }

    /// Shows a layer's policies that learn from them a microbatch of an earlier run.
    pub(crate) fn show_again(&mut self, layer: usize, problem: &Problem<'_>, loads: &[u32]) {
        self.show(layer, problem);
        self.observed[layer].push(loads);
    }

    fn show(&mut self, layer: usize, problem: &Problem<'_>) {
        for policy in self.policies.iter_mut().filter(|policy| policy.factory.history().is_some()) {
            policy.layers[layer].observe(problem);
        }
    }

    /// Checked mode: the plan keeps its policy's rules, and both sums of the split are exact.
    pub(crate) fn check(&self, at: VirtualLayer, problem: &Problem<'_>, kept: &Planned) -> Result<(), BalancerError> {
        let policy = &self.policies[self.active].layers[at.layer];
        let broken = |violation| BalancerError::Plan { at, policy: policy.name(), violation };
        check_plan(problem, &kept.plan, &policy.rules()).map_err(broken)?;
        check_split(problem, &kept.plan, &kept.split).map_err(broken)?;
        Ok(())
    }
}

/// Where a plan and what follows from it go.
pub(crate) struct Targets<'a> {
    pub(crate) plan: &'a mut Plan,
    pub(crate) split: &'a mut Vec<u32>,
    pub(crate) transfers: &'a mut PlannedTransfers,
}

/// What is noted of a plan.
pub(crate) struct Notes<'a> {
    pub(crate) plan: &'a Plan,
    placement_is_new: &'a mut bool,
    is_historical: &'a mut bool,
}

impl Planned {
    pub(crate) fn parts(&mut self) -> (&[u32], Targets<'_>) {
        let Self { counts, plan, split, transfers, .. } = self;
        (counts, Targets { plan, split, transfers })
    }

    pub(crate) fn notes(&mut self) -> (&[u32], Notes<'_>) {
        let Self { counts, plan, placement_is_new, is_historical, .. } = self;
        (counts, Notes { plan, placement_is_new, is_historical })
    }
}

/// A digest of where instances are, whatever their quotas (FNV-1a over ranks and physical indices).
fn placement_digest(plan: &Plan) -> u64 {
    let words = plan.instances().iter().flat_map(|i| [i.rank.index() as u64, i.physical.index() as u64]);
    words.fold(0xCBF2_9CE4_8422_2325, |hash, word| (hash ^ word).wrapping_mul(0x0000_0100_0000_01B3))
}
