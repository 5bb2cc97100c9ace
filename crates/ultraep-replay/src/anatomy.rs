//! Everything that a picture of one planned microbatch shows: loads, split, copies, and predicted times.

use ultraep_plan::measure::{imbalance_at_speeds, master_loads};
use ultraep_plan::{
    Charge, Choice, HardwareModel, Instance, MAX_TOKENS, Plan, PlannedTransfers, Prediction, Predictor, Problem,
    ProblemError, SplitError, SplitWorkspace, SyncPlanner, Topology, TransferMode, TransferModelError, TransferParams,
    TransferPlan, split_all,
};
use ultraep_trace::PlanRecord;

use crate::quotient;

/// One microbatch and what a plan makes of it.
#[derive(Clone, Debug)]
pub struct Anatomy {
    /// The counts that the plan met, `lambda[r,e]`, `[N, E]` row-major.
    pub counts: Vec<u32>,
    /// The plan.
    pub plan: Plan,
    /// `q[r,e,t]`: tokens of source r for each instance, `[N, instances]` row-major.
    pub split: Vec<u32>,
    /// Tokens of each rank's masters, `[N]`, before balancing.
    pub rank_load_before: Vec<u64>,
    /// Tokens that each rank processes by the split, `[N]`.
    pub rank_load_after: Vec<u64>,
    /// Tokens processed on another rank than their source.
    pub remote_tokens: u64,
    /// Predicted times of the layer's parts, weight sync as its transfers are planned.
    pub prediction: Prediction,
    /// Who sends which expert to whom.
    pub transfers: TransferPlan,
    /// What the planner of transfers chose.
    pub choice: Choice,
    /// Weight sync under [`Anatomy::transfers`], by the clock of chunks, charged or not.
    pub sync_ns: u64,
    /// The same if home ranks sent everything.
    pub direct_sync_ns: u64,
    imbalance_before: (u64, u64),
    imbalance_after: (u64, u64),
}

/// A microbatch and the plan for it.
#[derive(Clone, Debug)]
pub struct Planned {
    /// The counts that the plan met, `[N, E]` row-major.
    pub counts: Vec<u32>,
    /// The plan.
    pub plan: Plan,
    /// Its split as recorded, `[N, instances]` row-major; `None` to make it by the plan's rule.
    pub split: Option<Vec<u32>>,
    /// Which costs of balancing the prediction has.
    pub charge: Charge,
}

/// Why there is no picture.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AnatomyError {
    /// The counts were refused.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// The split was not made.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// The hardware has no model of transfers.
    #[error(transparent)]
    Transfers(#[from] TransferModelError),
    /// A split of another size than the plan.
    #[error("a split of {got} shares: this plan has {expected}")]
    Shares {
        /// As given.
        got: usize,
        /// `N` times instances.
        expected: usize,
    },
    /// Quotas that do not add up to the load: of all experts over the most there can be, or of one other than it has.
    #[error("{what}: quotas of {got} tokens, {expected} expected")]
    Quotas {
        /// Of what.
        what: &'static str,
        /// Their sum.
        got: u64,
        /// The load, or the most.
        expected: u64,
    },
    /// A plan whose instances the group does not have.
    #[error("the plan is for another group: {0}")]
    Group(&'static str),
}

impl Anatomy {
    /// Of a plan in `topology` on this hardware.
    pub fn of(topology: &Topology, hardware: &HardwareModel, planned: Planned) -> Result<Self, AnatomyError> {
        let Planned { counts, plan, split, charge } = planned;
        check_group(topology, &plan)?;
        let problem = Problem::new(topology, &counts)?;
        check_quotas(&problem, &plan, split.is_some())?;
        let expected = topology.ranks() * plan.instances().len();
        let split = match split {
            Some(split) if split.len() == expected => split,
            Some(split) => return Err(AnatomyError::Shares { got: split.len(), expected }),
            None => {
                let mut split = vec![0; expected];
                split_all(&problem, &plan, &mut SplitWorkspace::new(topology), &mut split)?;
                split
            }
        };
        let mut predictor = Predictor::new(topology, *hardware)?;
        predictor.take_split(&plan, &split);
        let prediction = predictor.predict(&plan, charge);
        let measure = predictor.measure();
        let before = master_loads(topology, &counts);
        let transfers = synced(topology, hardware, &plan, TransferMode::default())?;
        let direct = synced(topology, hardware, &plan, TransferMode::Direct)?;
        Ok(Self {
            imbalance_before: imbalance_at_speeds(topology, &before),
            imbalance_after: imbalance_at_speeds(topology, measure.processed()),
            rank_load_before: before,
            rank_load_after: measure.processed().to_vec(),
            remote_tokens: measure.remote_tokens(),
            prediction,
            transfers: transfers.plan().clone(),
            choice: transfers.choice(),
            sync_ns: transfers.sync_ns(),
            direct_sync_ns: direct.sync_ns(),
            counts,
            plan,
            split,
        })
    }

    /// Largest over mean rank load before balancing, at the ranks' speeds; 1 without tokens.
    pub fn imbalance_before(&self) -> f64 {
        quotient(self.imbalance_before)
    }

    /// Largest over mean rank load after balancing, at the ranks' speeds; 1 without tokens.
    pub fn imbalance_after(&self) -> f64 {
        quotient(self.imbalance_after)
    }

    /// Tokens in all.
    pub fn total_tokens(&self) -> u64 {
        self.rank_load_before.iter().sum()
    }
}

/// The weight sync of `plan` in a mode, planned and timed.
fn synced(
    topology: &Topology,
    hardware: &HardwareModel,
    plan: &Plan,
    mode: TransferMode,
) -> Result<PlannedTransfers, TransferModelError> {
    let params = TransferParams { mode, ..TransferParams::default() };
    let mut planner = SyncPlanner::new(topology, hardware.transfer_model(), params)?;
    let mut planned = PlannedTransfers::new(topology);
    planner.plan(plan, &mut planned);
    planner.measure(&mut planned);
    Ok(planned)
}

/// Largest over mean; 1 without tokens.
pub fn imbalance(loads: &[u64]) -> f64 {
    quotient(ultraep_plan::measure::imbalance(loads.iter().copied()))
}

/// A recorded plan as a plan. What it reached in its domains was not recorded, and its split rule neither: take the
/// recorded split where there is one.
pub fn plan_of_record(record: &PlanRecord, topology: &Topology) -> Plan {
    let mut plan = Plan::with_capacity(topology, record.instances.len().saturating_sub(topology.experts()));
    plan.begin(ultraep_plan::SplitRule::default());
    for expert in 0..record.offsets.len().saturating_sub(1) {
        record.instances[record.range(expert)].iter().for_each(|&instance| plan.push_instance(instance));
        plan.end_expert();
    }
    plan
}

/// Whether the plan's experts and ranks are those of the group.
fn check_group(topology: &Topology, plan: &Plan) -> Result<(), AnatomyError> {
    if plan.experts() != topology.experts() {
        return Err(AnatomyError::Group("other experts"));
    }
    if plan.instances().iter().any(|i| i.rank.index() >= topology.ranks()) {
        return Err(AnatomyError::Group("an instance on a rank that it does not have"));
    }
    let experts = || (0..plan.experts()).map(ultraep_plan::Expert::new);
    if experts().any(|expert| plan.of(expert).is_empty()) {
        return Err(AnatomyError::Group("an expert without an instance"));
    }
    Ok(())
}

/// A recorded plan may say anything; the model of times and the split rely on quotas.
fn check_quotas(problem: &Problem<'_>, plan: &Plan, has_split: bool) -> Result<(), AnatomyError> {
    let sum = |instances: &[Instance]| instances.iter().map(|i| u64::from(i.quota)).sum::<u64>();
    let (got, expected) = (sum(plan.instances()), u64::from(MAX_TOKENS));
    if got > expected {
        return Err(AnatomyError::Quotas { what: "all experts", got, expected });
    }
    if has_split {
        return Ok(());
    }
    let mut loads = vec![0; plan.experts()];
    problem.expert_loads(&mut loads);
    for (expert, load) in loads.into_iter().enumerate() {
        let (got, expected) = (sum(plan.of(ultraep_plan::Expert::new(expert))), u64::from(load));
        if got != expected {
            return Err(AnatomyError::Quotas { what: "an expert", got, expected });
        }
    }
    Ok(())
}
