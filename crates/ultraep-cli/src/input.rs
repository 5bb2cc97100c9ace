//! Arguments that several commands share.

use ultraep_baselines::{PolicyKind, PolicyParams};
use ultraep_load::{LoadMatrix, LoadParams, Workload, generate};
use ultraep_plan::{HardwareModel, Ratio, Topology, TopologySpec};
use ultraep_replay::LeastQuota;

use crate::error::CliError;
use crate::options;

/// The group beside what the loads say.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct GroupArgs {
    #[arg(long, value_name = "R", value_parser = options::slots(), help = options::SLOTS, required_unless_present = "rank_slots")]
    slots: Option<usize>,
    #[arg(long, value_name = "G", value_parser = options::ranks(), help = options::DOMAIN)]
    pub(crate) domain: Option<usize>,
    /// Slots of every rank, where ranks differ; replaces --slots
    #[arg(long, value_name = "R,...", value_delimiter = ',', value_parser = options::slots())]
    pub(crate) rank_slots: Vec<usize>,
    /// Speed of every rank: 1024 is full speed, 0 gets no replica [default: all 1024]
    #[arg(long, value_name = "S,...", value_delimiter = ',')]
    pub(crate) rank_speeds: Vec<u32>,
}

impl GroupArgs {
    /// A group with the same slots on every rank, one domain, all ranks at full speed.
    pub(crate) fn uniform(slots: usize, domain: Option<usize>) -> Self {
        Self { slots: Some(slots), domain, rank_slots: Vec::new(), rank_speeds: Vec::new() }
    }

    pub(crate) fn topology(&self, ranks: usize, experts: usize) -> Result<Topology, CliError> {
        let domain_ranks = self.domain.unwrap_or(ranks);
        let spec = TopologySpec { ranks, experts, domain_ranks, slots_per_rank: self.slots.unwrap_or(0) };
        let mut topology = Topology::new(spec).map_err(CliError::input)?;
        if !self.rank_slots.is_empty() {
            topology = topology.with_slots(&self.rank_slots).map_err(CliError::input)?;
        }
        if !self.rank_speeds.is_empty() {
            topology = topology.with_speeds(&self.rank_speeds).map_err(CliError::input)?;
        }
        Ok(topology)
    }
}

/// Parameters of policies.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct PolicyArgs {
    #[arg(long, default_value = "1.01", value_name = "RATIO", value_parser = options::imbalance, help = options::BETA)]
    pub(crate) beta: Ratio,
    #[arg(long, default_value_t, value_name = "TOKENS", value_parser = options::least_quota, help = options::LEAST_QUOTA)]
    pub(crate) min_quota: LeastQuota,
}

impl PolicyArgs {
    /// The parameters but for the least quota, which a scenario has beside them.
    pub(crate) fn params(&self) -> PolicyParams {
        PolicyParams { beta: self.beta, ..PolicyParams::default() }
    }

    /// All parameters, for this load.
    pub(crate) fn params_for(&self, load: &LoadMatrix) -> PolicyParams {
        let min_quota = self.min_quota.tokens(load.ranks(), load.total().into());
        PolicyParams { min_quota, ..self.params() }
    }
}

/// The hardware model by which times are predicted.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(next_help_heading = "Hardware model (defaults: Qwen3-235B in bf16 on a 900 GB/s fabric)")]
pub(crate) struct HardwareArgs {
    /// Bytes of one expert, what a replica needs copied of its weights
    #[arg(long, default_value_t = HardwareModel::default().expert_bytes, value_name = "BYTES",
          value_parser = options::bytes::<u64>())]
    expert_bytes: u64,
    /// Bytes that one routed token moves through a rank's link, dispatch and combine together
    #[arg(long, default_value_t = HardwareModel::default().token_bytes, value_name = "BYTES")]
    token_bytes: u64,
    #[arg(long, default_value_t = HardwareModel::default().link_bytes_per_s, value_name = "RATE",
          value_parser = options::bytes::<u64>(), help = options::LINK_BYTES)]
    link_bytes_per_s: u64,
    /// Experts' time for one row (a token through one expert), picoseconds
    #[arg(long, default_value_t = HardwareModel::default().row_ps, value_name = "PS")]
    row_ps: u64,
    /// Fixed time of an instance that has tokens, picoseconds
    #[arg(long, default_value_t = HardwareModel::default().gemm_ps, value_name = "PS")]
    gemm_ps: u64,
    /// Rows of a GEMM tile
    #[arg(long, default_value_t = HardwareModel::default().tile_rows, value_name = "ROWS",
          value_parser = clap::value_parser!(u32).range(1..))]
    tile_rows: u32,
    /// Time of a hop of a copy, beside its bytes, picoseconds
    #[arg(long, default_value_t = HardwareModel::default().replica_ps, value_name = "PS")]
    replica_ps: u64,
    /// Time to plan, picoseconds [default: what this project's planner takes on a host core, by the size of the group]
    #[arg(long, value_name = "PS")]
    plan_ps: Option<u64>,
    /// Time to reroute, picoseconds
    #[arg(long, default_value_t = HardwareModel::default().reroute_ps, value_name = "PS")]
    reroute_ps: u64,
}

impl HardwareArgs {
    pub(crate) fn model(&self) -> HardwareModel {
        let &Self { expert_bytes, token_bytes, link_bytes_per_s, row_ps, gemm_ps, tile_rows, .. } = self;
        let &Self { replica_ps, plan_ps, reroute_ps, .. } = self;
        HardwareModel {
            expert_bytes,
            token_bytes,
            link_bytes_per_s,
            row_ps,
            gemm_ps,
            tile_rows,
            replica_ps,
            plan_ps,
            reroute_ps,
        }
    }
}

/// A synthetic load.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct WorkloadArgs {
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = options::ranks(), help = options::RANKS)]
    pub(crate) ranks: usize,
    #[arg(long, default_value_t = 256, value_name = "E", value_parser = options::experts(), help = options::EXPERTS)]
    pub(crate) experts: usize,
    #[arg(long, default_value = "2", value_name = "RATIO", value_parser = options::imbalance,
          help = format!("{}, where the workload takes a target", options::RATIO))]
    pub(crate) ratio: Ratio,
    #[arg(long, default_value_t = Workload::HotRankZipf, value_name = "NAME", help = options::WORKLOAD)]
    pub(crate) workload: Workload,
    #[arg(long, default_value_t = 4096, value_name = "TOKENS", value_parser = options::tokens(), help = options::TOKENS)]
    pub(crate) tokens: u32,
    #[arg(long, default_value_t = 8, value_name = "K", value_parser = options::top_k::<u32>(), help = options::TOP_K)]
    pub(crate) top_k: u32,
    #[arg(long, default_value_t = 1, value_name = "SEED", help = options::SEED)]
    pub(crate) seed: u64,
    /// Microbatch, for workloads that move with time
    #[arg(long, default_value_t = 7, value_name = "INDEX")]
    pub(crate) microbatch: u32,
}

impl WorkloadArgs {
    pub(crate) fn generate(&self, topology: &Topology) -> Result<LoadMatrix, CliError> {
        let &Self { ratio, tokens: tokens_per_rank, top_k, seed, microbatch, .. } = self;
        let params = LoadParams { tokens_per_rank, top_k, ratio, seed, microbatch };
        generate(self.workload, topology, &params).map_err(CliError::input)
    }
}

/// All workloads, one a line, for `--help`.
pub(crate) fn workload_list() -> String {
    let line = |workload: Workload| format!("  {workload:<16} {}\n", workload.description());
    Workload::ALL.map(line).concat()
}

/// All policies, one a line, for `--help`.
pub(crate) fn policy_list() -> String {
    let line = |kind: PolicyKind| format!("  {kind:<12} {}\n", kind.description());
    PolicyKind::ALL.map(line).concat()
}
