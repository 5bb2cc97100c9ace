//! Predicted time of one MoE layer's forward under a plan, from a hardware model, in integers.
//!
//! Source: paper, section on the critical path:
//!
//! ```text
//! T = T_plan + max(T_reroute, T_weight_sync) + T_all_to_all + T_experts
//! T_experts     = max over ranks t of the sum over t's instances with tokens of (gemm + rows * row), at t's speed;
//!                 rows = tokens rounded up to whole tiles
//! T_all_to_all  = max over ranks r of max(tokens r sends to others, tokens r receives from others) * token bytes / link
//! T_weight_sync = what the planned transfers take, relays included (module transfer)
//! T_plan        = what this project's planner takes for a group of this size ([`HardwareModel::plan_ps_of`])
//! ```
//!
//! Tokens are those of the split ([`crate::measure`]). Units: times are picoseconds in `u64` (`_ps`), sizes bytes, rates bytes
//! a second. Each product and quotient is taken in 128 bits and rounded up once; sums saturate. Deviations from the paper:
//! its `T_weight_sync` is the home ranks' fan-out, without relays; its `T_all_to_all` also counts tokens that stay on their
//! rank; instances cost a fixed GEMM time and whole tiles.

use alloc::vec;

use crate::measure::Measure;
use crate::time::{GemmTime, at_rate_ps, at_speed_ps};
use crate::{
    MAX_CHUNKS, Plan, PlannedTransfers, Problem, Rank, SplitError, SplitWorkspace, SyncPlanner, Topology,
    TransferModel, TransferModelError, TransferParams,
};

/// Bytes of a chunk of weights: 8 tiles of 32 KiB, the paper's unit of relays. Larger where an expert has too many of them.
const CHUNK_BYTES: u64 = 8 * 32 * 1024;

/// Time of the planner for one count of the matrix.
const PLAN_COUNT_PS: u64 = 120;
/// Time of the planner for a rank or an expert: solve and own split.
const PLAN_PLACE_PS: u64 = 15_000;
/// Time of the transfer planner for a replica.
const PLAN_REPLICA_PS: u64 = 300_000;

/// What the hardware takes for the parts of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HardwareModel {
    /// Bytes of one expert's weights that a replica needs copied.
    pub expert_bytes: u64,
    /// Bytes that one routed token moves through a rank's link, dispatch and combine together.
    pub token_bytes: u64,
    /// What one rank's link carries in one direction, bytes a second; at least 1.
    pub link_bytes_per_s: u64,
    /// Experts' time for one row (a token through one expert) at full speed.
    pub row_ps: u64,
    /// Fixed time of an instance that has tokens (its grouped GEMMs' start and tail).
    pub gemm_ps: u64,
    /// Rows of a GEMM tile: each instance's rows are rounded up to whole tiles; at least 1.
    pub tile_rows: u32,
    /// Time of a hop of a copy, beside its bytes.
    pub replica_ps: u64,
    /// Time to plan; `None` for this project's planner on a host core ([`HardwareModel::plan_ps_of`]).
    pub plan_ps: Option<u64>,
    /// Time to reroute; weight sync runs in parallel with it.
    pub reroute_ps: u64,
}

impl Default for HardwareModel {
    /// One layer of Qwen3-235B (hidden 4096, expert width 1536, bf16) on a scale-up fabric of 900 GB/s a direction with
    /// accelerators that reach 800 TFLOPS in grouped GEMMs: 36 MiB an expert, 16 KiB a token for dispatch and combine,
    /// 47 ns a row; reroute as published for v1.0.0 (0.037 ms), planning by this project's planner.
    fn default() -> Self {
        Self {
            expert_bytes: 3 * 4096 * 1536 * 2,
            token_bytes: 2 * 4096 * 2,
            link_bytes_per_s: 900_000_000_000,
            row_ps: 47_000,
            gemm_ps: 3_000_000,
            tile_rows: 128,
            replica_ps: 2_000_000,
            plan_ps: None,
            reroute_ps: 37_000_000,
        }
    }
}

/// What balancing costs a forward on its critical path, beside what it changes in experts and all-to-all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overhead {
    /// Time to plan.
    pub plan_ps: u64,
    /// Time to reroute.
    pub reroute_ps: u64,
    /// Time of the weight sync by its planned transfers.
    pub sync_ns: u64,
}

/// Predicted times of a layer's parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prediction {
    /// `T_plan`.
    pub plan_ps: u64,
    /// `T_reroute`.
    pub reroute_ps: u64,
    /// `T_weight_sync`.
    pub weight_sync_ps: u64,
    /// `T_all_to_all`.
    pub all_to_all_ps: u64,
    /// `T_experts`.
    pub experts_ps: u64,
}

impl Prediction {
    /// The critical path: `T_plan + max(T_reroute, T_weight_sync) + T_all_to_all + T_experts`.
    pub fn total_ps(&self) -> u64 {
        let sync = self.reroute_ps.max(self.weight_sync_ps);
        self.plan_ps.saturating_add(sync).saturating_add(self.all_to_all_ps).saturating_add(self.experts_ps)
    }
}

impl HardwareModel {
    /// The fabric as the transfer planner sees it: chunks of 256 KiB, more where an expert has over [`MAX_CHUNKS`] of them.
    pub fn transfer_model(&self) -> TransferModel {
        let chunk_bytes = CHUNK_BYTES.max(self.expert_bytes.div_ceil(MAX_CHUNKS));
        TransferModel::of_link(self.expert_bytes, chunk_bytes, self.link_bytes_per_s, self.replica_ps / 1000)
    }

    /// Time to plan in a group of this size: as given, or what this project's planner and transfer planner take on one core of
    /// a host.
    ///
    /// ```text
    /// T_plan = N E * 0.12 ns + (N + E) * 15 ns + replicas * 0.3 us
    /// ```
    ///
    /// Source: fitted to this project's own measurements (2026-11-24, one core of an AMD EPYC with AVX-512; RESULTS.md and the
    /// table in README.md): plan and own split in 7 us at 64 ranks and 256 experts and 0.61 ms at 1024 and 4096 (the model:
    /// 6.8 us and 0.58 ms), transfers of 20 to 110 replicas in 1 to 33 us. Left out: bringing the counts to the host.
    pub fn plan_ps_of(&self, topology: &Topology, replicas: usize) -> u64 {
        if let Some(given) = self.plan_ps {
            return given;
        }
        let (ranks, experts) = (topology.ranks() as u64, topology.experts() as u64);
        ranks * experts * PLAN_COUNT_PS + (ranks + experts) * PLAN_PLACE_PS + replicas as u64 * PLAN_REPLICA_PS
    }

    /// What planning `replicas` replicas in this microbatch costs, when their weight sync takes `sync_ns`.
    pub fn overhead(&self, topology: &Topology, replicas: usize, sync_ns: u64) -> Overhead {
        Overhead { plan_ps: self.plan_ps_of(topology, replicas), reroute_ps: self.reroute_ps, sync_ns }
    }

    /// `T_all_to_all` when the busiest link carries `tokens`.
    pub fn all_to_all_ps(&self, tokens: u64) -> u64 {
        at_rate_ps(u128::from(tokens) * u128::from(self.token_bytes), self.link_bytes_per_s)
    }

    /// Time of an instance with `tokens` tokens at full speed.
    #[inline]
    pub fn instance_ps(&self, tokens: u64) -> u64 {
        GemmTime { start_ps: self.gemm_ps, row_ps: self.row_ps, tile_rows: self.tile_rows }.of(tokens)
    }

    /// Predicts the layer under `plan`, which comes to `measure`, with what balancing costs.
    pub fn predict(&self, topology: &Topology, plan: &Plan, measure: &Measure, overhead: Overhead) -> Prediction {
        let mut work = vec![0_u64; topology.ranks()];
        for (instance, &tokens) in plan.instances().iter().zip(measure.instances()) {
            let work = &mut work[instance.rank.index()];
            *work = work.saturating_add(self.instance_ps(tokens));
        }
        let at_speed = |(rank, &work): (usize, &u64)| at_speed_ps(work, topology.speed(Rank::new(rank)));
        Prediction {
            plan_ps: overhead.plan_ps,
            reroute_ps: overhead.reroute_ps,
            weight_sync_ps: overhead.sync_ns.saturating_mul(1000),
            all_to_all_ps: self.all_to_all_ps(measure.busiest_link()),
            experts_ps: work.iter().enumerate().map(at_speed).max().unwrap_or(0),
        }
    }
}

/// Which costs of balancing fall on a forward's critical path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Charge {
    /// None: masters only, nothing is planned or rerouted.
    Nothing,
    /// Plan, reroute and weight sync: planned from this microbatch.
    Planned,
    /// Reroute and weight sync: placed from earlier microbatches, beside other work, and new.
    Placed,
    /// Reroute: placed from earlier microbatches, and there since.
    Kept,
}

/// Predicts one layer after another, with the transfers that would really be planned. Memory is reused.
#[derive(Clone, Debug)]
pub struct Predictor {
    topology: Topology,
    hardware: HardwareModel,
    workspace: SplitWorkspace,
    measure: Measure,
    sync: SyncPlanner,
    transfers: PlannedTransfers,
}

impl Predictor {
    /// For a group on this hardware.
    ///
    /// # Errors
    /// [`TransferModelError`] when an expert has no size or takes longer than transfers may.
    pub fn new(topology: &Topology, hardware: HardwareModel) -> Result<Self, TransferModelError> {
        Ok(Self {
            topology: topology.clone(),
            hardware,
            workspace: SplitWorkspace::new(topology),
            measure: Measure::default(),
            sync: SyncPlanner::new(topology, hardware.transfer_model(), TransferParams::default())?,
            transfers: PlannedTransfers::new(topology),
        })
    }

    /// Takes in `plan` for `problem`, split by the plan's rule: what it comes to.
    ///
    /// # Errors
    /// [`SplitError`] when plan and problem do not belong together.
    pub fn take_plan(&mut self, problem: &Problem<'_>, plan: &Plan) -> Result<&Measure, SplitError> {
        self.measure.take_plan(problem, plan, &mut self.workspace)?;
        Ok(&self.measure)
    }

    /// Takes in `plan` and this split, `[N, instances]` row-major: what it comes to.
    pub fn take_split(&mut self, plan: &Plan, split: &[u32]) -> &Measure {
        self.measure.take_split(self.topology.ranks(), plan.instances(), split);
        &self.measure
    }

    /// Predicts the layer under the plan taken in last. Planning its transfers and running their clock takes most of the time.
    pub fn predict(&mut self, plan: &Plan, charge: Charge) -> Prediction {
        let sync_ns = match charge {
            Charge::Planned | Charge::Placed => {
                self.sync.plan(plan, &mut self.transfers);
                self.sync.measure(&mut self.transfers)
            }
            Charge::Nothing | Charge::Kept => 0,
        };
        let overhead = match charge {
            Charge::Nothing => Overhead::default(),
            Charge::Planned => self.hardware.overhead(&self.topology, plan.replicas(), sync_ns),
            Charge::Placed | Charge::Kept => Overhead { plan_ps: 0, reroute_ps: self.hardware.reroute_ps, sync_ns },
        };
        self.hardware.predict(&self.topology, plan, &self.measure, overhead)
    }

    /// What the plan taken in last comes to.
    pub fn measure(&self) -> &Measure {
        &self.measure
    }
}
