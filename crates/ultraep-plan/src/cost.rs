//! Predicted time of one MoE layer's forward under a plan, from a hardware model, in integers.
//!
//! Source: paper, section on the critical path:
//!
//! ```text
//! T = T_plan + max(T_reroute, T_weight_sync) + T_all_to_all + T_experts
//! T_experts     = max over ranks t of the sum over t's instances with tokens of (gemm + rows * row), at t's speed;
//!                 rows = quota rounded up to whole tiles
//! T_all_to_all  = max over ranks r of max(tokens sent by source r, tokens processed on r) * token bytes / link
//! T_weight_sync = max over ranks r of max(copies sent, copies received) * (replica + expert bytes / link)
//! ```
//!
//! Units: times are picoseconds in `u64` (`_ps`), sizes bytes, rates bytes a second. Each product and quotient is taken in
//! 128 bits and rounded up once; sums saturate. Deviations from the paper: weight sync counts receiving too (a rank with
//! many slots can be the bottleneck), and instances cost a fixed GEMM time and whole tiles.

use crate::{Expert, FULL_SPEED, Plan, Problem, Rank};

const PS_PER_S: u128 = 1_000_000_000_000;

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
    /// Fixed time of one copy, beside its bytes.
    pub replica_ps: u64,
    /// Time to plan.
    pub plan_ps: u64,
    /// Time to reroute; weight sync runs in parallel with it.
    pub reroute_ps: u64,
}

impl Default for HardwareModel {
    /// One layer of Qwen3-235B (hidden 4096, expert width 1536, bf16) on a scale-up fabric of 900 GB/s a direction with
    /// accelerators that reach 800 TFLOPS in grouped GEMMs: 36 MiB an expert, 16 KiB a token for dispatch and combine,
    /// 47 ns a row; plan and reroute as published for v1.0.0 (0.072 and 0.037 ms).
    fn default() -> Self {
        Self {
            expert_bytes: 3 * 4096 * 1536 * 2,
            token_bytes: 2 * 4096 * 2,
            link_bytes_per_s: 900_000_000_000,
            row_ps: 47_000,
            gemm_ps: 3_000_000,
            tile_rows: 128,
            replica_ps: 2_000_000,
            plan_ps: 72_000_000,
            reroute_ps: 37_000_000,
        }
    }
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
    fn carried_ps(&self, bytes: u128) -> u64 {
        let time = (bytes * PS_PER_S).div_ceil(u128::from(self.link_bytes_per_s.max(1)));
        u64::try_from(time).unwrap_or(u64::MAX)
    }

    /// Time of one copy of an expert.
    pub fn copy_ps(&self) -> u64 {
        self.replica_ps.saturating_add(self.carried_ps(u128::from(self.expert_bytes)))
    }

    /// `T_weight_sync` when the busiest rank sends or receives `copies`.
    pub fn weight_sync_ps(&self, copies: u32) -> u64 {
        self.copy_ps().saturating_mul(u64::from(copies))
    }

    /// `T_all_to_all` when the busiest rank sends or processes `tokens`.
    pub fn all_to_all_ps(&self, tokens: u32) -> u64 {
        self.carried_ps(u128::from(tokens) * u128::from(self.token_bytes))
    }

    /// Time of an instance with `quota` tokens at full speed.
    #[inline]
    pub fn instance_ps(&self, quota: u32) -> u64 {
        if quota == 0 {
            return 0;
        }
        let tile = u64::from(self.tile_rows.max(1));
        let rows = u64::from(quota).div_ceil(tile) * tile;
        self.gemm_ps.saturating_add(rows.saturating_mul(self.row_ps))
    }

    /// `full_ps` of work at full speed on a rank with speed weight `speed` (weight 0 counts as full speed).
    pub fn at_speed_ps(&self, full_ps: u64, speed: u32) -> u64 {
        let speed = if speed == 0 { FULL_SPEED } else { speed };
        if speed == FULL_SPEED {
            return full_ps;
        }
        let slowed = (u128::from(full_ps) * u128::from(FULL_SPEED)).div_ceil(u128::from(speed));
        u64::try_from(slowed).unwrap_or(u64::MAX)
    }

    /// Predicts the layer under `plan`, from its quotas.
    pub fn predict(&self, problem: &Problem<'_>, plan: &Plan) -> Prediction {
        let topology = problem.topology();
        let (mut copies, mut tokens, mut experts_ps) = (0, 0, 0);
        for rank in (0..topology.ranks()).map(Rank::new) {
            let (mut received, mut processed, mut work) = (0, 0, 0u64);
            for instance in plan.instances().iter().filter(|i| i.rank == rank) {
                processed += instance.quota;
                work = work.saturating_add(self.instance_ps(instance.quota));
            }
            for (expert, instances) in (0..plan.experts()).map(|e| (e, plan.of(Expert::new(e)))) {
                let home = topology.home(Expert::new(expert)) == rank;
                received += u32::from(!home && instances.iter().any(|i| i.rank == rank));
            }
            let sent: usize = topology.masters(rank).map(|e| plan.of(Expert::new(e)).len() - 1).sum();
            let source: u32 = problem.row(rank.index()).iter().sum();
            copies = copies.max(received).max(sent as u32);
            tokens = tokens.max(processed).max(source);
            experts_ps = experts_ps.max(self.at_speed_ps(work, topology.speed(rank)));
        }
        Prediction {
            plan_ps: self.plan_ps,
            reroute_ps: self.reroute_ps,
            weight_sync_ps: self.weight_sync_ps(copies),
            all_to_all_ps: self.all_to_all_ps(tokens),
            experts_ps,
        }
    }
}
