//! `ultraep bench weight-sync` and `ultraep bench grad-reduce`: how long moving expert state takes, per initial imbalance,
//! size of experts and mode of transfer: measured on this machine's memory, or predicted by a model of a fabric.

mod group;
mod limit;
mod measured;
mod model;

use serde::Serialize;
use ultraep_baselines::{HistoryParams, PolicyKind, build, plan_for};
use ultraep_fabric::stream::{EngineSpec, TileSizes, WeightFormat};
use ultraep_load::{LoadParams, Workload, generate};
use ultraep_plan::{MAX_STRIPES, Problem, Ratio, Topology, TransferMode, TransferModel, TransferParams, Transfers};
use ultraep_replay::quotient;

use crate::error::CliError;
use crate::input::{GroupArgs, PolicyArgs};
use crate::options;
use crate::output::Output;

pub(crate) const SYNC_HELP: &str =
    "What is measured: ranks are threads with symmetric windows in this machine's memory. Latency is from the
moment when every rank has its plan to the moment when every rank can use its slots.
The limit is that of the machine in the same run, the runs interleaved: the same reads and writes by the
same threads (what a rank sends is read once and written to each receiver's place by as many threads as
the rank has, all ranks at a time), in plain loops without plan, flags or windows; of four loops (the
standard copy whole and by tiles, cached and streaming stores by tiles) the one with the best median.
\"of limit\" is limit over latency, run by run, its median and quartiles. \"busiest\" is how far the plan
is from even: the bytes that the busiest rank's threads move over the mean, which slows both alike.
Critical rate is what the busiest rank sends or receives, over latency.

Examples:
  ultraep bench weight-sync
  ultraep bench weight-sync --expert-bytes 1048576,67108864 --ratio 3 --mode adaptive --workers 1 --weight-format fp8-f32
  ultraep bench weight-sync --model
  ultraep bench weight-sync --model --ratio 2,8 --mode direct,adaptive --expert-bytes 37748736 --json";

pub(crate) const REDUCE_HELP: &str =
    "What is measured: ranks are threads with symmetric windows in this machine's memory. Latency is from the
moment when every rank has its gradients to the moment when every rank has its sums and its slots are
zero. The limit is that of the machine in the same run, the runs interleaved: the same reads and
writes by the same threads (a home rank reads master and replicas once and writes sum and zeros), in plain
loops without plan or windows; of three loops (one pass a replica, fused by blocks, the engine's
instructions by blocks) the one with the best median. \"of limit\" is limit over latency, run by run, its
median and quartiles; \"busiest\" is the bytes that the busiest rank's threads move over the mean.

Examples:
  ultraep bench grad-reduce
  ultraep bench grad-reduce --expert-bytes 16777216 --ratio 2,3 --workers 1 --json";

/// How copies are planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    /// Home ranks send everything
    Direct,
    /// Adaptive by the rule of v1.0.0: two levels, about sqrt(replicas) relays
    V1,
    /// Relay trees where the model says that they are faster
    Adaptive,
    /// Relay trees for every expert with 2 replicas and more
    Relay,
}

impl Mode {
    const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::V1 => "v1",
            Self::Adaptive => "adaptive",
            Self::Relay => "relay",
        }
    }

    fn params(self, max_stripes: u32) -> TransferParams {
        let ours = |mode| TransferParams { mode, max_stripes, ..TransferParams::default() };
        match self {
            Self::Direct => ours(TransferMode::Direct),
            Self::V1 => TransferParams::v1(),
            Self::Adaptive => ours(TransferMode::Adaptive),
            Self::Relay => ours(TransferMode::Relay),
        }
    }
}

/// The group and its loads.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct LoadArgs {
    #[arg(long, value_name = "N", value_parser = options::ranks(),
          help = format!("{} [default: 64 with --model, 4 measured]", options::RANKS))]
    ranks: Option<usize>,
    #[arg(long, value_name = "E", value_parser = options::experts(),
          help = format!("{} [default: 2 a rank]", options::EXPERTS))]
    experts: Option<usize>,
    #[arg(long, default_value_t = 2, value_name = "R", value_parser = options::slots(), help = options::SLOTS)]
    slots: usize,
    #[arg(long, value_name = "G", value_parser = options::ranks(), help = options::DOMAIN)]
    domain: Option<usize>,
    #[arg(long, value_name = "RATIO,...", value_delimiter = ',', value_parser = options::imbalance,
          help = format!("{} [default: 1.5,2,4,6,8 with --model, 1.5,2,3 measured]", options::RATIO))]
    ratio: Vec<Ratio>,
    #[arg(long, default_value_t = Workload::HotRankZipf, value_name = "NAME", help = options::WORKLOAD)]
    workload: Workload,
    #[arg(long, default_value_t = 4096, value_name = "TOKENS", value_parser = options::tokens(), help = options::TOKENS)]
    tokens: u32,
    #[arg(long, value_name = "K", value_parser = options::top_k::<u32>(),
          help = format!("{} [default: 8 with --model, 2 measured]", options::TOP_K))]
    top_k: Option<u32>,
    #[arg(long, default_value_t = 1, value_name = "SEED", help = options::SEED)]
    seed: u64,
    #[arg(long, default_value_t, value_name = "NAME", help = options::POLICY)]
    policy: PolicyKind,
    #[command(flatten)]
    params: PolicyArgs,
}

/// The group and its loads, as both records give them.
#[derive(Debug, Serialize)]
struct LoadRecord {
    policy: &'static str,
    workload: &'static str,
    ranks: usize,
    experts: usize,
    slots_per_rank: usize,
    domain: usize,
    tokens_per_rank: u32,
    top_k: u32,
    seed: u64,
}

/// What is to be moved at one initial imbalance.
struct Planned {
    imbalance_before: f64,
    transfers: Transfers,
}

impl LoadArgs {
    /// The group asked for: without a word about it `ranks` ranks with two experts each.
    fn topology(&self, ranks: usize) -> Result<Topology, CliError> {
        let ranks = self.ranks.unwrap_or(ranks);
        let experts = self.experts.unwrap_or(ranks.saturating_mul(2));
        GroupArgs::uniform(self.slots, self.domain).topology(ranks, experts)
    }

    fn record(&self, topology: &Topology, top_k: u32) -> LoadRecord {
        LoadRecord {
            policy: self.policy.name(),
            workload: self.workload.name(),
            ranks: topology.ranks(),
            experts: topology.experts(),
            slots_per_rank: self.slots,
            domain: topology.domain_ranks(),
            tokens_per_rank: self.tokens,
            top_k,
            seed: self.seed,
        }
    }

    /// The imbalances asked for, or these.
    fn ratios(&self, ratios: &[&str]) -> Result<Vec<Ratio>, CliError> {
        if !self.ratio.is_empty() {
            return Ok(self.ratio.clone());
        }
        ratios.iter().map(|ratio| ratio.parse().map_err(CliError::input)).collect()
    }

    /// Generates the load, plans it, and lists the replicas.
    fn planned(&self, topology: &Topology, ratio: Ratio, top_k: u32) -> Result<Planned, CliError> {
        let &Self { tokens: tokens_per_rank, seed, .. } = self;
        let params = LoadParams { tokens_per_rank, top_k, ratio, seed, microbatch: 7 };
        let load = generate(self.workload, topology, &params).map_err(CliError::input)?;
        let problem = Problem::new(topology, load.counts()).map_err(CliError::input)?;
        let mut params = self.params.params_for(&load);
        params.eplb.history = HistoryParams { window: 1, interval: 1 };
        params.lplb.history = params.eplb.history;
        let mut policy = build(self.policy, topology, &params).map_err(CliError::input)?;
        policy.observe(&problem);
        let mut plan = plan_for(self.policy, topology);
        policy.solve(&problem, &mut plan).map_err(CliError::input)?;
        let mut transfers = Transfers::new(topology);
        transfers.list(topology, &plan);
        let imbalance_before = quotient(ultraep_plan::measure::imbalance(load.rank_loads(topology)));
        Ok(Planned { imbalance_before, transfers })
    }
}

/// How a measurement is made.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct MeasureArgs {
    /// Worker threads of each rank beside its own
    #[arg(long, default_value_t = 0, value_name = "THREADS", value_parser = clap::value_parser!(u64).range(0..=64))]
    workers: u64,
    #[arg(long, default_value_t = 15, value_name = "RUNS", value_parser = options::iterations::<u64>(),
          help = format!("{}, after 3 that do not count", options::ITERATIONS))]
    iterations: u64,
}

/// Weight sync.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Predict by a model of the fabric instead of measuring
    #[arg(long)]
    model: bool,
    #[command(flatten)]
    load: LoadArgs,
    /// Who sends
    #[arg(
        long,
        value_enum,
        default_value = "direct,v1,adaptive,relay",
        value_name = "MODE,...",
        value_delimiter = ','
    )]
    mode: Vec<Mode>,
    /// Most stripes of a copy, each with a tree of its own (adaptive and relay)
    #[arg(long, default_value_t = TransferParams::default().max_stripes, value_name = "STRIPES",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_STRIPES)))]
    max_stripes: u32,
    /// Bytes of one expert, its weights [default: 37748736 with --model, 1, 4, 16 and 64 MiB measured]
    #[arg(long, value_name = "BYTES,...", value_delimiter = ',', value_parser = options::bytes::<u64>())]
    expert_bytes: Vec<u64>,
    /// Elements of the weights that are measured
    #[arg(long = "weight-format", default_value_t, value_name = "FORMAT")]
    format: WeightFormat,
    /// Bytes of a tile, what a worker moves at a time
    #[arg(long, default_value_t = TileSizes::WEIGHTS.tile_bytes, value_name = "BYTES")]
    tile_bytes: usize,
    /// Bytes of a chunk, the unit that a relay forwards
    #[arg(long, default_value_t = TransferModel::default().chunk_bytes, value_name = "BYTES")]
    chunk_bytes: u64,
    /// A sync that reads and writes at least so many bytes stores past the caches
    #[arg(long, default_value_t = EngineSpec::STREAMING_FROM_BYTES, value_name = "BYTES")]
    streaming_from_bytes: u64,
    #[arg(long, default_value_t = 900_000_000_000, value_name = "RATE",
          value_parser = options::bytes::<u64>(), help = options::LINK_BYTES)]
    link_bytes_per_s: u64,
    /// Latency of a hop in the model, nanoseconds
    #[arg(long, default_value_t = TransferModel::default().hop_ns, value_name = "NS")]
    hop_ns: u64,
    #[command(flatten)]
    measure: MeasureArgs,
    /// JSON (schema ultraep.weight-sync/1 with --model, ultraep.moved/2 measured) instead of a table
    #[arg(long)]
    json: bool,
}

/// Grad reduce.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ReduceArgs {
    #[command(flatten)]
    load: LoadArgs,
    /// Bytes of one expert, its gradients, which are f32 [default: 1, 4, 16 and 64 MiB]
    #[arg(long, value_name = "BYTES,...", value_delimiter = ',', value_parser = options::bytes::<u64>())]
    expert_bytes: Vec<u64>,
    /// Bytes of a tile, what a worker adds at a time
    #[arg(long, default_value_t = TileSizes::GRADIENTS.tile_bytes, value_name = "BYTES")]
    tile_bytes: usize,
    #[command(flatten)]
    measure: MeasureArgs,
    /// JSON (schema ultraep.moved/2) instead of a table
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    if args.model { model::run(args, out) } else { measured::weight_sync(args, out) }
}

pub(crate) fn run_reduce(args: &ReduceArgs, out: &mut Output<'_>) -> Result<(), CliError> {
    measured::grad_reduce(args, out)
}
