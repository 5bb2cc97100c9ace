//! Everything that a picture of one planned microbatch shows: loads, split, copies, and predicted times.

use ultraep_plan::{
    Choice, HardwareModel, Instance, MAX_TOKENS, Plan, Prediction, Problem, ProblemError, Rank, SplitError,
    SplitWorkspace, Topology, TransferClock, TransferMode, TransferModel, TransferModelError, TransferParams,
    TransferPlan, TransferPlanner, Transfers, split_all,
};
use ultraep_trace::PlanRecord;

/// Bytes of a chunk of weights: 8 tiles of 32 KiB, the paper's unit of relays. Larger where an expert has too many of them.
const CHUNK_BYTES: u64 = 8 * 32 * 1024;

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
    /// Predicted times of the layer's parts, weight sync without relays.
    pub prediction: Prediction,
    /// Who sends which expert to whom.
    pub transfers: TransferPlan,
    /// What the planner of transfers chose.
    pub choice: Choice,
    /// Weight sync under [`Anatomy::transfers`], by the clock of chunks.
    pub sync_ns: u64,
    /// The same if home ranks sent everything.
    pub direct_sync_ns: u64,
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
    /// Of a plan for `counts` in `topology`; `split` as recorded, or `None` to make it by the plan's rule.
    pub fn of(
        topology: &Topology,
        hardware: &HardwareModel,
        counts: Vec<u32>,
        plan: Plan,
        split: Option<Vec<u32>>,
    ) -> Result<Self, AnatomyError> {
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
        let prediction = hardware.predict(&problem, &plan);
        let (rank_load_after, remote_tokens) = processed(topology.ranks(), &plan, &split);
        let mut anatomy = Self {
            rank_load_before: loads_of_masters(topology, &counts),
            rank_load_after,
            remote_tokens,
            prediction,
            transfers: TransferPlan::new(topology),
            choice: Choice::default(),
            sync_ns: 0,
            direct_sync_ns: 0,
            counts,
            plan,
            split,
        };
        anatomy.plan_transfers(topology, hardware)?;
        Ok(anatomy)
    }

    fn plan_transfers(&mut self, topology: &Topology, hardware: &HardwareModel) -> Result<(), AnatomyError> {
        let model = transfer_model(hardware);
        let mut list = Transfers::new(topology);
        list.list(topology, &self.plan);
        let mut clock = TransferClock::new(topology, model)?;
        let direct = TransferParams { mode: TransferMode::Direct, ..TransferParams::default() };
        TransferPlanner::new(topology, model, direct)?.plan(&list, &mut self.transfers);
        self.direct_sync_ns = clock.run(&self.transfers);
        let mut planner = TransferPlanner::new(topology, model, TransferParams::default())?;
        self.choice = planner.plan(&list, &mut self.transfers);
        self.sync_ns = clock.run(&self.transfers);
        Ok(())
    }

    /// Largest over mean rank load before balancing; 1 without tokens.
    pub fn imbalance_before(&self) -> f64 {
        imbalance(&self.rank_load_before)
    }

    /// Largest over mean rank load after balancing; 1 without tokens.
    pub fn imbalance_after(&self) -> f64 {
        imbalance(&self.rank_load_after)
    }

    /// Tokens in all.
    pub fn total_tokens(&self) -> u64 {
        self.rank_load_before.iter().sum()
    }
}

/// The model of transfers over a machine's links.
pub fn transfer_model(hardware: &HardwareModel) -> TransferModel {
    let chunk_bytes = CHUNK_BYTES.max(hardware.expert_bytes.div_ceil(ultraep_plan::MAX_CHUNKS));
    let hop_ns = hardware.replica_ps / 1000;
    TransferModel::of_link(hardware.expert_bytes, chunk_bytes, hardware.link_bytes_per_s, hop_ns)
}

/// Largest over mean; 1 without tokens.
pub fn imbalance(loads: &[u64]) -> f64 {
    let total: u64 = loads.iter().sum();
    let most = loads.iter().copied().max().unwrap_or(0);
    if total == 0 { 1.0 } else { most as f64 * loads.len() as f64 / total as f64 }
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

fn loads_of_masters(topology: &Topology, counts: &[u32]) -> Vec<u64> {
    let mut loads = vec![0; topology.ranks()];
    for row in counts.chunks_exact(topology.experts()) {
        for (&count, home) in row.iter().zip(topology.homes()) {
            loads[home.index()] += u64::from(count);
        }
    }
    loads
}

/// Tokens that each rank processes, and those that it processes for others.
fn processed(ranks: usize, plan: &Plan, split: &[u32]) -> (Vec<u64>, u64) {
    let (mut loads, mut remote) = (vec![0; ranks], 0);
    for (source, row) in split.chunks_exact(plan.instances().len().max(1)).enumerate() {
        for (instance, &share) in plan.instances().iter().zip(row) {
            loads[instance.rank.index()] += u64::from(share);
            remote += u64::from(share) * u64::from(instance.rank != Rank::new(source));
        }
    }
    (loads, remote)
}
