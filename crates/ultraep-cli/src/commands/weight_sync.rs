//! `ultraep bench weight-sync`: how long weight sync takes, per initial imbalance and mode of transfer.
//!
//! With `--model` times are predicted by the transfer planner's model of a fabric, beside the bound that no plan of
//! transfers beats. They are numbers of a model, not measurements.

use std::io::Write;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use ultraep_baselines::{HistoryParams, PolicyKind, build, plan_for};
use ultraep_load::{LoadParams, Workload, generate};
use ultraep_plan::{
    BoundTables, MAX_STRIPES, Problem, Ratio, Topology, TransferClock, TransferMode, TransferModel, TransferParams,
    TransferPlan, TransferPlanner, Transfers,
};

use super::write_json;
use crate::error::CliError;
use crate::input::{GroupArgs, PolicyArgs};
use crate::timing::{measure, pretty};

pub(crate) const EXAMPLES: &str = "Examples:
  ultraep bench weight-sync --model
  ultraep bench weight-sync --model --ratio 2,8 --mode direct,adaptive --expert-bytes 37748736 --json";

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

/// The loads, the group and the fabric.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Predict by a model of the fabric
    #[arg(long)]
    model: bool,
    /// Ranks in the group
    #[arg(long, default_value_t = 64, value_name = "N")]
    ranks: usize,
    /// Logical experts
    #[arg(long, default_value_t = 128, value_name = "E")]
    experts: usize,
    /// Slots for replicas on each rank
    #[arg(long, default_value_t = 2, value_name = "R")]
    slots: usize,
    /// Ranks in a domain [default: all ranks]
    #[arg(long, value_name = "G")]
    domain: Option<usize>,
    /// Imbalances before balancing
    #[arg(long, default_value = "1.5,2,4,6,8", value_name = "RATIO,...", value_delimiter = ',')]
    ratio: Vec<Ratio>,
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
    /// Bytes of one expert's weights
    #[arg(long, default_value_t = TransferModel::default().expert_bytes, value_name = "BYTES")]
    expert_bytes: u64,
    /// Bytes of a chunk, the unit that a relay forwards
    #[arg(long, default_value_t = TransferModel::default().chunk_bytes, value_name = "BYTES")]
    chunk_bytes: u64,
    /// What one rank's link carries in each direction, bytes a second
    #[arg(long, default_value_t = 900_000_000_000, value_name = "RATE",
          value_parser = clap::value_parser!(u64).range(1..))]
    link_bytes_per_s: u64,
    /// Latency of a hop, nanoseconds
    #[arg(long, default_value_t = TransferModel::default().hop_ns, value_name = "NS")]
    hop_ns: u64,
    /// Which load is generated
    #[arg(long, default_value_t = Workload::HotRankZipf, value_name = "NAME")]
    workload: Workload,
    /// Tokens of each source rank
    #[arg(long, default_value_t = 4096, value_name = "TOKENS")]
    tokens: u32,
    /// Experts that a token chooses
    #[arg(long, default_value_t = 8, value_name = "K")]
    top_k: u32,
    /// Equal seeds give equal loads on every machine
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Which policy plans
    #[arg(long, default_value_t, value_name = "NAME")]
    policy: PolicyKind,
    #[command(flatten)]
    params: PolicyArgs,
    /// JSON (schema ultraep.weight-sync/1) instead of a table
    #[arg(long)]
    json: bool,
}

/// `ultraep.weight-sync/1`.
#[derive(Debug, Serialize)]
struct Record {
    schema: &'static str,
    bench: &'static str,
    /// Where the times come from.
    source: &'static str,
    policy: &'static str,
    workload: &'static str,
    ranks: usize,
    experts: usize,
    slots_per_rank: usize,
    domain: usize,
    tokens_per_rank: u32,
    top_k: u32,
    seed: u64,
    expert_bytes: u64,
    chunk_bytes: u64,
    send_ns: u64,
    receive_ns: u64,
    hop_ns: u64,
    lines: Vec<Line>,
}

/// One initial imbalance.
#[derive(Debug, Serialize)]
struct Line {
    imbalance_before: f64,
    replicas: usize,
    busiest_receiver_copies: u32,
    bound_ns: u64,
    bound_receiver_ns: u64,
    bound_links_ns: u64,
    bound_chain_ns: u64,
    modes: Vec<OfMode>,
}

/// What one mode makes of it.
#[derive(Debug, Serialize)]
struct OfMode {
    mode: &'static str,
    predicted_ns: u64,
    /// `predicted_ns` over `bound_ns`; 1 where nothing is moved.
    ratio_to_bound: f64,
    relayed_experts: u32,
    /// The most copies that one rank sends.
    fanout_copies: f64,
    /// Stripes of a copy, each with a tree of its own.
    stripes: u32,
    /// The most hops from a home rank to a replica.
    hops: u32,
    /// Time to plan the transfers, measured here.
    plan_p50_ns: u64,
}

pub(crate) fn run(args: &Args, out: &mut dyn Write) -> Result<(), CliError> {
    if !args.model {
        return Err(CliError::input("bench weight-sync: measuring is not built yet: add --model for predicted times"));
    }
    let topology = GroupArgs::uniform(args.slots, args.domain).topology(args.ranks, args.experts)?;
    let model = TransferModel::of_link(args.expert_bytes, args.chunk_bytes, args.link_bytes_per_s, args.hop_ns);
    model.check().map_err(CliError::input)?;
    let lines = args.ratio.iter().map(|&ratio| line(args, &topology, model, ratio)).collect::<Result<_, _>>()?;
    let record = Record {
        schema: "ultraep.weight-sync/1",
        bench: "weight-sync",
        source: "model",
        policy: args.policy.name(),
        workload: args.workload.name(),
        ranks: args.ranks,
        experts: args.experts,
        slots_per_rank: args.slots,
        domain: topology.domain_ranks(),
        tokens_per_rank: args.tokens,
        top_k: args.top_k,
        seed: args.seed,
        expert_bytes: model.expert_bytes,
        chunk_bytes: model.chunk_bytes,
        send_ns: model.send_ns,
        receive_ns: model.receive_ns,
        hop_ns: model.hop_ns,
        lines,
    };
    if args.json { write_json(out, &record) } else { print(&record, out) }
}

fn line(args: &Args, topology: &Topology, model: TransferModel, ratio: Ratio) -> Result<Line, CliError> {
    let &Args { tokens: tokens_per_rank, top_k, seed, .. } = args;
    let load = generate(args.workload, topology, &LoadParams { tokens_per_rank, top_k, ratio, seed, microbatch: 7 })
        .map_err(CliError::input)?;
    let problem = Problem::new(topology, load.counts()).map_err(CliError::input)?;
    let mut params = args.params.params();
    params.eplb.history = HistoryParams { window: 1, interval: 1 };
    params.lplb.history = params.eplb.history;
    let mut policy = build(args.policy, topology, &params).map_err(CliError::input)?;
    policy.observe(&problem);
    let mut plan = plan_for(args.policy, topology);
    policy.solve(&problem, &mut plan).map_err(CliError::input)?;
    let mut transfers = Transfers::new(topology);
    transfers.list(topology, &plan);
    let bound = BoundTables::new(topology, model).map_err(CliError::input)?.bound(&transfers);
    let bound_ns = bound.ns();
    let subject = Subject { topology, model, transfers: &transfers, bound_ns, max_stripes: args.max_stripes };
    let largest = load.rank_loads(topology).into_iter().max().unwrap_or(0);
    Ok(Line {
        imbalance_before: f64::from(largest) * topology.ranks() as f64 / f64::from(load.total().max(1)),
        replicas: plan.replicas(),
        busiest_receiver_copies: transfers.receives().iter().copied().max().unwrap_or(0),
        bound_ns: bound.ns(),
        bound_receiver_ns: bound.receiver_ns,
        bound_links_ns: bound.links_ns,
        bound_chain_ns: bound.chain_ns,
        modes: args.mode.iter().map(|&mode| subject.of_mode(mode)).collect::<Result<_, _>>()?,
    })
}

/// What is to be transferred, and over what.
struct Subject<'a> {
    topology: &'a Topology,
    model: TransferModel,
    transfers: &'a Transfers,
    bound_ns: u64,
    max_stripes: u32,
}

impl Subject<'_> {
    fn of_mode(&self, mode: Mode) -> Result<OfMode, CliError> {
        const ITERATIONS: usize = 20;
        let &Self { topology, model, transfers, bound_ns, max_stripes } = self;
        let mut planner = TransferPlanner::new(topology, model, mode.params(max_stripes)).map_err(CliError::input)?;
        let mut clock = TransferClock::new(topology, model).map_err(CliError::input)?;
        let mut plan = TransferPlan::new(topology);
        let times = measure(ITERATIONS, || planner.plan(transfers, &mut plan));
        let predicted_ns = clock.run(&plan);
        Ok(OfMode {
            mode: mode.name(),
            predicted_ns,
            ratio_to_bound: if bound_ns == 0 { 1.0 } else { predicted_ns as f64 / bound_ns as f64 },
            relayed_experts: plan.relayed_experts(),
            fanout_copies: f64::from(plan.fanout()) / f64::from(plan.stripes().max(1)),
            stripes: plan.stripes(),
            hops: plan.depth(),
            plan_p50_ns: times.p50_ns,
        })
    }
}

fn print(record: &Record, out: &mut dyn Write) -> Result<(), CliError> {
    writeln!(
        out,
        "weight-sync of {}, predicted by a model: {} experts on {} ranks, {} slots, {}, {} tokens a rank, top-{}",
        record.policy,
        record.experts,
        record.ranks,
        record.slots_per_rank,
        record.workload,
        record.tokens_per_rank,
        record.top_k
    )?;
    writeln!(
        out,
        "{} bytes an expert in chunks of {}, {} a chunk on a link, {} a hop",
        record.expert_bytes,
        record.chunk_bytes,
        pretty(record.send_ns),
        pretty(record.hop_ns)
    )?;
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    let heads = [
        "imbalance",
        "replicas",
        "bound",
        "mode",
        "predicted",
        "of bound",
        "relayed",
        "fan-out",
        "stripes",
        "hops",
        "planned in",
    ];
    table.set_header(heads);
    for line in &record.lines {
        for (index, of_mode) in line.modes.iter().enumerate() {
            let once = |text: String| if index == 0 { text } else { String::new() };
            table.add_row([
                once(format!("{:.2}", line.imbalance_before)),
                once(line.replicas.to_string()),
                once(pretty(line.bound_ns)),
                of_mode.mode.to_owned(),
                pretty(of_mode.predicted_ns),
                format!("{:.2}", of_mode.ratio_to_bound),
                of_mode.relayed_experts.to_string(),
                of_mode.fanout_copies.to_string(),
                of_mode.stripes.to_string(),
                of_mode.hops.to_string(),
                pretty(of_mode.plan_p50_ns),
            ]);
        }
    }
    for column in (0..heads.len()).filter(|&c| c != 3) {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    writeln!(out, "{table}")?;
    Ok(())
}
