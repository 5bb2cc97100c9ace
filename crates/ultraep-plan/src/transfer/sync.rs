//! Weight sync of a plan: its transfers planned, and what they take.

use super::{
    Choice, TransferClock, TransferModel, TransferModelError, TransferParams, TransferPlan, TransferPlanner, Transfers,
};
use crate::{Plan, Topology};

/// Transfers of one plan, as planned.
#[derive(Clone, Debug, Default)]
pub struct PlannedTransfers {
    direct: Transfers,
    plan: TransferPlan,
    choice: Choice,
    sync_ns: u64,
}

impl PlannedTransfers {
    /// Room for the transfers of one plan of `topology`.
    pub fn new(topology: &Topology) -> Self {
        let (direct, plan) = (Transfers::new(topology), TransferPlan::new(topology));
        Self { direct, plan, ..Self::default() }
    }

    /// Lists every replica from its home rank, where nobody asks who really sends it: nothing is planned.
    pub fn list(&mut self, topology: &Topology, plan: &Plan) {
        self.direct.list(topology, plan);
        (self.choice, self.sync_ns) = (Choice::default(), 0);
    }

    /// Every replica, from its home rank.
    pub fn direct(&self) -> &Transfers {
        &self.direct
    }

    /// Who really sends what to whom.
    pub fn plan(&self) -> &TransferPlan {
        &self.plan
    }

    /// What the planner chose.
    pub fn choice(&self) -> Choice {
        self.choice
    }

    /// From the start of the weight sync until the last replica is complete, in nanoseconds; 0 until
    /// [`SyncPlanner::measure`] was asked.
    pub fn sync_ns(&self) -> u64 {
        self.sync_ns
    }
}

/// Plans the transfers of weight syncs, and says what they take. Whoever runs, replays, simulates or predicts a weight sync
/// asks this one.
#[derive(Clone, Debug)]
pub struct SyncPlanner {
    topology: Topology,
    planner: TransferPlanner,
    clock: TransferClock,
}

impl SyncPlanner {
    /// For a group, a fabric and a rule.
    ///
    /// # Errors
    /// [`TransferModelError`] when an expert has no size or more chunks than a transfer may have.
    pub fn new(topology: &Topology, model: TransferModel, params: TransferParams) -> Result<Self, TransferModelError> {
        let planner = TransferPlanner::new(topology, model, params)?;
        Ok(Self { topology: topology.clone(), planner, clock: TransferClock::new(topology, model)? })
    }

    /// Plans the transfers of `plan`: every rank gets the same. This is on the critical path (`T_plan`).
    pub fn plan(&mut self, plan: &Plan, planned: &mut PlannedTransfers) {
        planned.direct.list(&self.topology, plan);
        planned.choice = self.planner.plan(&planned.direct, &mut planned.plan);
        planned.sync_ns = 0;
    }

    /// Runs the clock over what was planned: sets and gives [`PlannedTransfers::sync_ns`].
    pub fn measure(&mut self, planned: &mut PlannedTransfers) -> u64 {
        planned.sync_ns = if planned.direct.all().is_empty() { 0 } else { self.clock.run(&planned.plan) };
        planned.sync_ns
    }

    /// When each rank had all its replicas in the last [`SyncPlanner::measure`] of a plan with transfers, `[N]`.
    pub fn complete_ns(&self) -> impl ExactSizeIterator<Item = u64> {
        self.clock.complete_ns()
    }
}
