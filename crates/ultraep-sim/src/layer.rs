//! What one MoE layer is made of, and the trait behind which both fidelities stand.
//!
//! ```text
//! forward:  rest ─ all-gather of counts, plan ─ max(reroute, weight sync) ─ dispatch ─ experts ─ combine
//! backward: dispatch of gradients ─ experts ─ combine ─ rest   (weights restored and gradients reduced behind the rest)
//! ```
//!
//! Source: paper, section on the critical path. The rest is attention, router, norms, permutation, shared experts.

use serde::{Deserialize, Serialize};
use ultraep_plan::Topology;
use ultraep_plan::time::{GemmTime, at_rate_ps, at_speed_ps};

use crate::balancer::{LayerLoad, SyncRule, System};
use crate::machine::Machine;
use crate::model::ModelSpec;

/// Which way a pass goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From input to loss.
    Forward,
    /// From loss to input.
    Backward,
}

/// How finely a layer is simulated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fidelity {
    /// The largest of each part over all ranks, added up.
    #[default]
    ClosedForm,
    /// Chunks over links, instance by instance.
    Events,
}

/// Grad reduce runs with few workers, at this fraction of a link. v1.0.0 published 1.9 to 2.4 ms for 4 to 6 copies of
/// 176 MB, about half of what a link of 900 GB/s carries.
const REDUCE_LINK_FRACTION: u64 = 2;

/// Times of one direction at full speed, for any load of one (machine, model, batch, system).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassWork {
    /// Rest of the layer.
    pub rest_ps: u64,
    /// One row through an expert.
    pub row_ps: u64,
    /// Experts' time on every rank, whatever its load.
    pub fixed_ps: u64,
    /// One row over a scale-up link.
    pub link_row_ps: u64,
    /// Added to it for a row above its pair's even share.
    pub incast_row_ps: u64,
    /// One row over a scale-out link.
    pub far_row_ps: u64,
}

/// One layer's work for one (machine, model, batch, system).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerWork {
    /// Forward.
    pub forward: PassWork,
    /// Backward.
    pub backward: PassWork,
    /// All-gather of the counts and plan.
    pub plan_ps: u64,
    /// Reroute.
    pub reroute_ps: u64,
    /// Start of a weight sync.
    pub sync_start_ps: u64,
    /// Start of a collective that syncs weights or reduces gradients.
    pub collective_start_ps: u64,
    /// Weight sync by collectives, for each copy received; 0 where transfers do it.
    pub collective_ps: u64,
    /// Grad reduce of one copy.
    pub reduce_ps: u64,
    /// Start of an instance's GEMMs.
    pub gemm_ps: u64,
    /// Rows of a tile.
    pub tile_rows: u32,
    /// Latency of a hop.
    pub hop_ps: u64,
    /// Rows of a chunk of the all-to-all.
    pub chunk_rows: u32,
    /// Ranks in a domain.
    pub domain_ranks: usize,
    /// Speed weights, `[N]`.
    pub speeds: Vec<u32>,
    /// Whether weights are synced by transfers in every microbatch.
    pub transfers: bool,
}

/// What a microbatch asks of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Tokens of a source rank.
    pub tokens_per_rank: u32,
    /// Tokens of a sequence, for attention.
    pub sequence: u32,
}

impl LayerWork {
    /// Prepares the constants.
    pub fn new(machine: &Machine, model: &ModelSpec, batch: Batch, system: &System, topology: &Topology) -> Self {
        let c = &machine.calibrated;
        let pass = |flops, row_times: u64, element_fs: u64, fixed_permille: u32, a2a: u64, incast: u32| {
            let (tokens, row_bytes) = (u64::from(batch.tokens_per_rank), 2 * u64::from(model.hidden));
            let elements = u128::from(tokens) * u128::from(model.hidden) * u128::from(element_fs) / 1000;
            let row_ps = at_rate_ps(row_times * model.row_flops(), flops);
            let link_row_ps = at_rate_ps(row_bytes, a2a);
            PassWork {
                rest_ps: at_rate_ps(row_times * tokens * model.rest_flops(batch.sequence), flops)
                    .saturating_add(u64::try_from(elements).unwrap_or(u64::MAX)),
                row_ps,
                fixed_ps: row_ps.saturating_mul(tokens * u64::from(model.top_k) * u64::from(fixed_permille) / 1000),
                link_row_ps,
                incast_row_ps: link_row_ps.saturating_mul(u64::from(incast)) / 1000,
                far_row_ps: at_rate_ps(row_bytes, machine.scale_out_bytes_per_s),
            }
        };
        let plans = system.plan_ns > 0;
        let (collective_start_ps, collective_ps) = match system.sync {
            SyncRule::Collectives { start_ns, bytes_per_s } => {
                (start_ns.saturating_mul(1000), at_rate_ps(model.expert_bytes(), bytes_per_s))
            }
            _ => (0, 0),
        };
        Self {
            forward: pass(
                c.forward_flops_per_s,
                1,
                c.forward_element_fs,
                0,
                c.forward_a2a_bytes_per_s,
                c.forward_incast_permille,
            ),
            backward: pass(
                c.backward_flops_per_s,
                2,
                c.backward_element_fs,
                c.backward_fixed_permille,
                c.backward_a2a_bytes_per_s,
                c.backward_incast_permille,
            ),
            plan_ps: if plans { (machine.count_ns + system.plan_ns) * 1000 } else { 0 },
            reroute_ps: machine.reroute_ns * 1000,
            sync_start_ps: machine.sync_start_ns * 1000,
            collective_start_ps,
            collective_ps,
            reduce_ps: at_rate_ps(2 * REDUCE_LINK_FRACTION * model.expert_bytes(), machine.link_bytes_per_s),
            gemm_ps: machine.gemm_ns * 1000,
            tile_rows: machine.tile_rows,
            hop_ps: machine.hop_ns * 1000,
            chunk_rows: machine.chunk_tokens.max(1),
            domain_ranks: topology.domain_ranks(),
            speeds: topology.speeds().to_vec(),
            transfers: matches!(system.sync, SyncRule::Transfers(_)),
        }
    }

    /// One direction's constants.
    pub fn pass(&self, direction: Direction) -> &PassWork {
        match direction {
            Direction::Forward => &self.forward,
            Direction::Backward => &self.backward,
        }
    }

    /// The rest of the layer on a rank.
    pub fn rest_ps(&self, rank: usize, direction: Direction) -> u64 {
        at_speed_ps(self.pass(direction).rest_ps, self.speeds[rank])
    }

    /// An instance with `rows` rows, whole tiles, at full speed.
    pub fn instance_ps(&self, rows: u32, direction: Direction) -> u64 {
        let row_ps = self.pass(direction).row_ps;
        GemmTime { start_ps: self.gemm_ps, row_ps, tile_rows: self.tile_rows }.of(rows.into())
    }

    /// All experts of a rank.
    pub fn experts_ps(&self, load: &LayerLoad, rank: usize, direction: Direction) -> u64 {
        let full: u64 =
            load.rows_of(rank).iter().map(|&rows| self.instance_ps(rows, direction)).fold(0, u64::saturating_add);
        at_speed_ps(full.saturating_add(self.pass(direction).fixed_ps), self.speeds[rank])
    }

    /// Between the plan and dispatch, on a rank: reroute and weight sync side by side.
    pub fn sync_ps(&self, load: &LayerLoad, rank: usize) -> u64 {
        if self.plan_ps == 0 && load.replicas == 0 {
            return 0;
        }
        let weights = match (load.sync_ns[rank], self.collective_ps) {
            (0, 0) => 0,
            (0, _) => self.collective_ps(load, 1),
            (ns, _) => self.sync_start_ps.saturating_add(ns.saturating_mul(1000)),
        };
        self.reroute_ps.max(weights)
    }

    /// What of restoring weights and of grad reduce the backward of the rest does not hide.
    pub fn exposed_backward_ps(&self, load: &LayerLoad) -> u64 {
        if load.replicas == 0 {
            return 0;
        }
        if self.transfers {
            let restored = load.sync_ns.iter().copied().max().unwrap_or(0).saturating_mul(1000);
            let reduced = self.reduce_ps.saturating_mul(u64::from(load.most_copies));
            return restored.saturating_add(reduced).saturating_sub(self.backward.rest_ps);
        }
        // Gradients are twice as wide as weights.
        self.collective_ps(load, 2)
    }

    /// A collective over the replicas, for data so many times as wide as weights.
    fn collective_ps(&self, load: &LayerLoad, times: u64) -> u64 {
        if self.collective_ps == 0 || load.most_received == 0 {
            return 0;
        }
        let copies = times * u64::from(load.most_received);
        self.collective_start_ps.saturating_add(self.collective_ps.saturating_mul(copies))
    }
}

/// Where the time of a layer's pass went, on the critical path. Parts add up to the pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LayerTimes {
    /// Attention, router and the rest.
    pub rest_ps: u64,
    /// All-gather of counts and plan.
    pub plan_ps: u64,
    /// Reroute and weight sync; in backward what of sync and reduce was not hidden.
    pub sync_ps: u64,
    /// Dispatch and combine.
    pub all_to_all_ps: u64,
    /// Experts.
    pub experts_ps: u64,
}

impl LayerTimes {
    /// All of it.
    pub fn total_ps(&self) -> u64 {
        [self.plan_ps, self.sync_ps, self.all_to_all_ps, self.experts_ps]
            .into_iter()
            .fold(self.rest_ps, u64::saturating_add)
    }

    /// Adds another pass's parts.
    pub fn add(&mut self, other: &Self) {
        self.rest_ps = self.rest_ps.saturating_add(other.rest_ps);
        self.plan_ps = self.plan_ps.saturating_add(other.plan_ps);
        self.sync_ps = self.sync_ps.saturating_add(other.sync_ps);
        self.all_to_all_ps = self.all_to_all_ps.saturating_add(other.all_to_all_ps);
        self.experts_ps = self.experts_ps.saturating_add(other.experts_ps);
    }

    /// The mean of `count` added ones.
    pub fn over(&self, count: u64) -> Self {
        let count = count.max(1);
        Self {
            rest_ps: self.rest_ps / count,
            plan_ps: self.plan_ps / count,
            sync_ps: self.sync_ps / count,
            all_to_all_ps: self.all_to_all_ps / count,
            experts_ps: self.experts_ps / count,
        }
    }
}

/// A way to simulate a layer.
pub trait LayerModel {
    /// Runs a pass. `ready` are the times at which ranks may start, `[N]`; on return, those at which they have finished. The
    /// parts of the pass are those of the rank that finishes last.
    fn pass(&mut self, work: &LayerWork, load: &LayerLoad, direction: Direction, ready: &mut [u64]) -> LayerTimes;

    /// Digest of everything that happened.
    fn digest(&self) -> u64;
}
