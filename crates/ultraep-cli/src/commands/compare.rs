//! `ultraep compare`: every policy on the same loads, as a frontier of imbalance against replicas, traffic and time.

use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;
use ultraep_baselines::{HistoryParams, PolicyKind, PolicyParams};
use ultraep_load::LoadMatrix;
use ultraep_plan::Topology;
use ultraep_replay::{Evaluator, quotient};

use super::{PerRank, write_json};
use crate::error::CliError;
use crate::input::{GroupArgs, HardwareArgs, PolicyArgs, policy_list, read_loads};
use crate::options;
use crate::output::Output;
use crate::table::{Cell, Column, Table};
use crate::timing::now_ns;

/// Arguments of `ultraep compare`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Policies:\n{}\n{EXAMPLES}", policy_list()))]
pub(crate) struct Args {
    /// Counts of one layer's microbatches, in order: .json, .csv or .npy; rows = source ranks, columns = experts
    #[arg(required = true)]
    loads: Vec<PathBuf>,
    #[command(flatten)]
    group: GroupArgs,
    #[command(flatten)]
    params: PolicyArgs,
    #[command(flatten)]
    hardware: HardwareArgs,
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', help = format!("{} [default: all]", options::POLICIES))]
    policies: Vec<PolicyKind>,
    #[arg(long, default_value_t = 1, value_name = "MICROBATCHES", value_parser = options::history(), help = options::WINDOW)]
    window: usize,
    #[arg(long, default_value_t = 1, value_name = "MICROBATCHES", value_parser = options::history(), help = options::INTERVAL)]
    interval: usize,
    /// JSON (schema ultraep.compare/1) instead of a table
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "Examples:
  ultraep compare loads.csv --slots 2
  ultraep compare step*.npy --slots 2 --domain 32 --window 3 --interval 3
  ultraep compare loads.json --slots 1 --min-quota 1 --policies none,eplb-exact,greedy --json";

/// Solves whose median is the solve time of a microbatch.
const REPEATS: usize = 5;

/// `ultraep.compare/1`.
#[derive(Debug, Serialize)]
struct Comparison {
    schema: &'static str,
    ranks: usize,
    experts: usize,
    slots_per_rank: PerRank,
    domain: usize,
    microbatches: usize,
    total_tokens: u64,
    policies: Vec<Line>,
    skipped: Vec<Skipped>,
}

/// One policy over all microbatches.
#[derive(Debug, Serialize)]
struct Line {
    policy: &'static str,
    historical: bool,
    imbalance_mean: f64,
    imbalance_worst: f64,
    replicas_mean: f64,
    max_fanout: usize,
    max_sends: usize,
    /// Tokens processed away from their source, of all.
    remote_share: f64,
    /// Foreign experts on the fullest rank.
    max_copies: usize,
    /// Copies beside another copy of the same expert on the same rank.
    wasted_copies: usize,
    solve_ns_p50: u64,
    /// Critical path of a layer's forward as the hardware model predicts it.
    predicted_ns_mean: u64,
    /// Of the plans of all microbatches.
    digest: String,
}

#[derive(Debug, Serialize)]
struct Skipped {
    policy: &'static str,
    reason: String,
}

pub(crate) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    let loads = args.loads.iter().map(|path| read_loads(path)).collect::<Result<Vec<_>, _>>()?;
    let shape = |load: &LoadMatrix| (load.ranks(), load.experts());
    let (ranks, experts) = loads.first().map_or((0, 0), shape);
    if let Some((path, other)) = args.loads.iter().zip(&loads).find(|(_, load)| shape(load) != (ranks, experts)) {
        return Err(CliError::Input(format!(
            "{}: {} ranks and {} experts: allowed are {ranks} and {experts}, as in the first file",
            path.display(),
            other.ranks(),
            other.experts()
        )));
    }
    let topology = args.group.topology(ranks, experts)?;
    let comparison = compare(args, &topology, &loads)?;
    if args.json { write_json(out, &comparison) } else { print(&comparison, out) }
}

fn compare(args: &Args, topology: &Topology, loads: &[LoadMatrix]) -> Result<Comparison, CliError> {
    let history = HistoryParams { window: args.window, interval: args.interval };
    let mut params = args.params.params();
    params.eplb.history = history;
    params.lplb.history = history;
    params.hardware = args.hardware.model();
    let asked = if args.policies.is_empty() { PolicyKind::ALL.to_vec() } else { args.policies.clone() };
    let mut comparison = Comparison {
        schema: "ultraep.compare/1",
        ranks: topology.ranks(),
        experts: topology.experts(),
        slots_per_rank: PerRank::slots(topology),
        domain: topology.domain_ranks(),
        microbatches: loads.len(),
        total_tokens: loads.iter().map(|l| u64::from(l.total())).sum(),
        policies: Vec::new(),
        skipped: Vec::new(),
    };
    for kind in asked {
        match line(kind, topology, &params, loads) {
            Ok(line) => comparison.policies.push(line),
            Err(CliError::Input(reason)) => comparison.skipped.push(Skipped { policy: kind.name(), reason }),
            Err(other) => return Err(other),
        }
    }
    Ok(comparison)
}

fn line(kind: PolicyKind, topology: &Topology, params: &PolicyParams, loads: &[LoadMatrix]) -> Result<Line, CliError> {
    let mut evaluator = Evaluator::new(kind, topology, params, now_ns)?;
    let mut line = Line {
        policy: kind.name(),
        historical: kind.is_historical(),
        imbalance_mean: 0.0,
        imbalance_worst: 0.0,
        replicas_mean: 0.0,
        max_fanout: 0,
        max_sends: 0,
        remote_share: 0.0,
        max_copies: 0,
        wasted_copies: 0,
        solve_ns_p50: 0,
        predicted_ns_mean: 0,
        digest: String::new(),
    };
    let (mut times, mut digests, mut remote, mut total) = (Vec::new(), Vec::new(), 0, 0);
    let mut predicted_ps = 0_u128;
    for load in loads {
        let counts = evaluator.met_counts(load.counts());
        let outcome = evaluator.microbatch(&counts, REPEATS)?;
        let report = &outcome.report;
        let imbalance = quotient(report.imbalance_after());
        line.imbalance_mean += imbalance / loads.len() as f64;
        line.imbalance_worst = line.imbalance_worst.max(imbalance);
        line.replicas_mean += report.replicas as f64 / loads.len() as f64;
        line.max_fanout = line.max_fanout.max(report.max_fanout);
        line.max_sends = line.max_sends.max(report.max_sends);
        line.max_copies = line.max_copies.max(report.max_copies);
        line.wasted_copies += evaluator.plan().wasted_copies();
        remote += report.remote_tokens;
        total += report.total_tokens;
        times.push(outcome.solve_ns);
        predicted_ps += u128::from(outcome.predicted_ps);
        digests.extend([outcome.digest as u32, (outcome.digest >> 32) as u32]);
    }
    times.sort_unstable();
    line.remote_share = quotient((remote, total));
    line.predicted_ns_mean = (predicted_ps / loads.len() as u128 / 1000) as u64;
    line.solve_ns_p50 = times[times.len() / 2];
    line.digest = format!("{:016x}", ultraep_plan::digest_counts(&digests));
    Ok(line)
}

fn print(comparison: &Comparison, out: &mut Output<'_>) -> Result<(), CliError> {
    writeln!(
        out,
        "{} experts on {} ranks, {} slots a rank, domains of {}; {} microbatches, {} tokens",
        comparison.experts,
        comparison.ranks,
        comparison.slots_per_rank,
        comparison.domain,
        comparison.microbatches,
        comparison.total_tokens
    )?;
    let mut table = Table::new([
        Column::text("policy", "* plans from earlier microbatches; its first has none (masters only)"),
        Column::number("imbalance", "largest over mean rank load, mean over microbatches"),
        Column::number("worst", "the same, worst of all microbatches"),
        Column::number("replicas", "replicas of a plan, mean").minor(1),
        Column::number("fan-out", "most replicas of one expert").minor(4),
        Column::number("sends", "most copies that one rank sends").minor(3),
        Column::number("remote", "tokens processed away from their source").minor(2),
        Column::number("fullest rank", "most foreign experts on one rank").minor(5),
        Column::time("solve time", "median time to plan").minor(2),
        Column::time("predicted", "forward of a layer by the hardware model, mean"),
    ]);
    for line in &comparison.policies {
        table.row([
            Cell::text(format!("{}{}", line.policy, if line.historical { " *" } else { "" })),
            Cell::number(line.imbalance_mean, 4),
            Cell::number(line.imbalance_worst, 4),
            Cell::number(line.replicas_mean, 1),
            Cell::count(line.max_fanout),
            Cell::count(line.max_sends),
            Cell::share(line.remote_share),
            Cell::count(line.max_copies),
            Cell::ns(line.solve_ns_p50),
            Cell::ns(line.predicted_ns_mean),
        ]);
    }
    out.table(&table)?;
    for line in comparison.policies.iter().filter(|l| l.wasted_copies > 0) {
        writeln!(
            out,
            "{}: {} copies beside another copy of their expert on the same rank",
            line.policy, line.wasted_copies
        )?;
    }
    for skipped in &comparison.skipped {
        writeln!(out, "{} skipped: {}", skipped.policy, skipped.reason)?;
    }
    Ok(())
}
