//! `ultraep compare`: every policy on the same loads, as a frontier of imbalance against replicas, traffic and time.

use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;
use ultraep_baselines::{HistoryParams, PolicyKind};
use ultraep_load::LoadMatrix;
use ultraep_plan::{FULL_SPEED, Topology};
use ultraep_replay::{Evaluator, LeastQuota, Scenario, quotient};

use super::recordings::LoadArgs;
use super::{PerRank, finer, quota_words, write_json};
use crate::error::CliError;
use crate::input::{GroupArgs, HardwareArgs, PolicyArgs, policy_list};
use crate::options;
use crate::output::Output;
use crate::table::{Cell, Column, Table};
use crate::timing::now_ns;

/// Arguments of `ultraep compare`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Policies:\n{}\n{EXAMPLES}", policy_list()))]
pub(crate) struct Args {
    /// Loads of one layer's microbatches, in order: matrices (rows = source ranks, columns = experts) as .csv, .json, .npy or
    /// .npz, or recordings; - for standard input
    #[arg(required = true)]
    loads: Vec<PathBuf>,
    #[command(flatten)]
    which: LoadArgs,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    rank_speeds: Option<Vec<u32>>,
    least_quota: LeastQuota,
    microbatches: usize,
    total_tokens: u64,
    policies: Vec<Line>,
    skipped: Vec<Skipped>,
    /// What would do better.
    hints: Vec<String>,
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
    /// Smallest and largest least quota that its plans kept to, in tokens; `None` for policies without one.
    min_quota: Option<[u32; 2]>,
}

#[derive(Debug, Serialize)]
struct Skipped {
    policy: &'static str,
    reason: String,
}

pub(crate) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    let mut loads: Vec<LoadMatrix> = Vec::new();
    for path in &args.loads {
        let of_file = args.which.read(path)?.loads;
        let shape = |loads: &[LoadMatrix]| loads.first().map_or((0, 0), |load| (load.ranks(), load.experts()));
        let ((ranks, experts), got) = (shape(&loads), shape(&of_file));
        if !loads.is_empty() && got != (ranks, experts) {
            return Err(CliError::Input(format!(
                "{}: {} ranks and {} experts: allowed are {ranks} and {experts}, as in the first file",
                path.display(),
                got.0,
                got.1
            )));
        }
        loads.extend(of_file);
    }
    let (ranks, experts) = loads.first().map_or((0, 0), |load| (load.ranks(), load.experts()));
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
        rank_speeds: topology.speeds().iter().any(|&s| s != FULL_SPEED).then(|| topology.speeds().to_vec()),
        least_quota: args.params.min_quota,
        microbatches: loads.len(),
        total_tokens: loads.iter().map(|l| u64::from(l.total())).sum(),
        policies: Vec::new(),
        skipped: Vec::new(),
        hints: Vec::new(),
    };
    for kind in asked {
        let scenario = Scenario { kind, topology: topology.clone(), params, least_quota: args.params.min_quota };
        match line(&scenario, loads, &mut comparison.hints) {
            Ok(line) => comparison.policies.push(line),
            Err(CliError::Input(reason)) => comparison.skipped.push(Skipped { policy: kind.name(), reason }),
            Err(other) => return Err(other),
        }
    }
    Ok(comparison)
}

fn line(scenario: &Scenario, loads: &[LoadMatrix], hints: &mut Vec<String>) -> Result<Line, CliError> {
    let kind = scenario.kind;
    let mut evaluator = Evaluator::new(scenario, now_ns)?;
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
        min_quota: None,
    };
    let (mut times, mut digests, mut remote, mut total) = (Vec::new(), Vec::new(), 0, 0);
    let (mut predicted_ps, mut best_finer) = (0_u128, None);
    for load in loads {
        let counts = evaluator.met_counts(load.counts());
        let outcome = evaluator.microbatch(&counts, REPEATS)?;
        let report = &outcome.report;
        let imbalance = quotient(outcome.imbalance_after);
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
        if kind.has_min_quota() {
            let [least, most] = line.min_quota.unwrap_or([outcome.min_quota; 2]);
            line.min_quota = Some([least.min(outcome.min_quota), most.max(outcome.min_quota)]);
        }
        if kind == PolicyKind::Ultraep && best_finer.is_none() {
            best_finer = finer(&mut evaluator, &counts, &outcome)?;
        }
        predicted_ps += u128::from(evaluator.predict().total_ps());
        digests.extend([outcome.digest as u32, (outcome.digest >> 32) as u32]);
    }
    hints.extend(best_finer);
    times.sort_unstable();
    line.remote_share = quotient((remote, total));
    line.predicted_ns_mean = (predicted_ps / loads.len() as u128 / 1000) as u64;
    line.solve_ns_p50 = times[times.len() / 2];
    line.digest = format!("{:016x}", ultraep_plan::digest_counts(&digests));
    Ok(line)
}

/// The least quota that the plans kept to.
fn quota_line(comparison: &Comparison) -> String {
    let all = comparison.policies.iter().filter_map(|line| line.min_quota);
    let range = all.reduce(|a, b| [a[0].min(b[0]), a[1].max(b[1])]);
    match (range, comparison.least_quota) {
        (None, _) => "no policy here has a least quota".to_owned(),
        (Some([least, most]), asked) => {
            let tokens = if least == most { least.to_string() } else { format!("{least} to {most}") };
            format!("least quota of a replica: {}", quota_words(asked, &tokens))
        }
    }
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
    let at_speeds = if comparison.rank_speeds.is_some() { " at the ranks' speeds" } else { "" };
    let mut table = Table::new([
        Column::text("policy", "* plans from earlier microbatches; its first has none (masters only)"),
        Column::number("imbalance", format!("largest over mean rank load{at_speeds}, mean over microbatches")),
        Column::number("worst", "the same, worst of all microbatches"),
        Column::number("replicas", "replicas of a plan, mean").minor(1),
        Column::number("fan-out", "most replicas of one expert").minor(4),
        Column::number("sends", "most copies that one rank sends").minor(3),
        Column::number("remote", "tokens processed away from their source").minor(2),
        Column::number("fullest rank", "most foreign experts on one rank").minor(5),
        Column::time("solve time", "median time to plan").minor(2),
        Column::time("predicted", "forward of a layer by the hardware model, with planned transfers, mean"),
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
    writeln!(out, "{}", quota_line(comparison))?;
    comparison.hints.iter().try_for_each(|hint| writeln!(out, "hint: {hint}"))?;
    for skipped in &comparison.skipped {
        writeln!(out, "{} skipped: {}", skipped.policy, skipped.reason)?;
    }
    Ok(())
}
