//! `ultraep plan`: one load, one policy, the whole plan.

use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;
use ultraep_advise::Totals;
use ultraep_baselines::{PolicyKind, PolicyParams};
use ultraep_load::LoadMatrix;
use ultraep_placement::{Method, Sharing};
use ultraep_plan::{
    Expert, FULL_SPEED, Plan, PlanReport, Prediction, Problem, Rank, SplitWorkspace, StopReason, Topology, split_source,
};
use ultraep_replay::{Evaluated, Evaluator, LeastQuota, Scenario, break_even, quotient};

use super::placement::PlacementArgs;
use super::recordings::LoadArgs;
use super::{PerRank, finer, quota_words, write_json};
use crate::error::{CliError, note};
use crate::input::{GroupArgs, HardwareArgs, PolicyArgs, policy_list};
use crate::options;
use crate::output::Output;
use crate::picture;
use crate::table::{Cell, Column, Table};
use crate::timing::{now_ns, pretty};

/// Arguments of `ultraep plan`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Policies:\n{}\n{EXAMPLES}", policy_list()))]
pub(crate) struct Args {
    /// Loads: a matrix (rows = source ranks, columns = experts) as .csv, .json, .npy or .npz, or one layer of any recording;
    /// - for standard input
    loads: PathBuf,
    #[command(flatten)]
    which: LoadArgs,
    #[command(flatten)]
    group: GroupArgs,
    #[arg(long, default_value_t, value_name = "NAME", help = options::POLICY)]
    policy: PolicyKind,
    #[command(flatten)]
    params: PolicyArgs,
    #[command(flatten)]
    hardware: HardwareArgs,
    #[command(flatten)]
    placement: PlacementArgs,
    /// Say which source's tokens go to which instance
    #[arg(long)]
    split: bool,
    /// JSON (schema ultraep.plan/1) instead of a table
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "Examples:
  ultraep plan loads.csv --slots 2
  ultraep plan layers.npz --array loads --layer 7 --slots 2
  ultraep plan log.jsonl.gz --drop-dummy-run --ranks 8 --step 0 --slots 2
  ultraep plan loads.npy --slots 1 --domain 32 --min-quota 1 --json
  ultraep plan loads.json --slots 2 --policy greedy --split --json | jq .imbalance_after";

pub(crate) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    let load = one_load(args)?;
    let topology = args.group.topology(load.ranks(), load.experts())?;
    let params = PolicyParams { hardware: args.hardware.model(), ..args.params.params() };
    let (kind, least_quota) = (args.policy, args.params.min_quota);
    let scenario = Scenario { kind, topology: topology.clone(), params, least_quota };
    let mut evaluator = Evaluator::new(&scenario, now_ns)?;
    let counts = evaluator.met_counts(load.counts());
    let outcome = evaluator.microbatch(&counts, 1)?;
    let prediction = evaluator.predict();
    if args.policy.is_historical() {
        note(format_args!("{} plans from earlier microbatches; one load gives it none: masters only", args.policy));
    }
    if args.policy.forces_routing() {
        note(format_args!("{} changes the routing: the load it meets is balanced, not the file's", args.policy));
    }
    let pays_from = if args.json { None } else { break_even(&scenario, &counts)? };
    let hint = finer(&mut evaluator, &counts, &outcome)?;
    let plan = evaluator.plan();
    let answer =
        Answer { args, topology: &topology, counts: &counts, plan, outcome: &outcome, prediction, pays_from, hint };
    if args.json {
        write_json(out, &answer.json()?)?
    } else {
        answer.print(out)?
    }
    if args.placement.out.is_none() { Ok(()) } else { place(args, &topology, load.counts()) }
}

/// The one load that is planned.
fn one_load(args: &Args) -> Result<LoadMatrix, CliError> {
    let read = args.which.read(&args.loads)?;
    let (layer, count) = (read.layer, read.loads.len());
    let mut loads = read.loads.into_iter();
    match (loads.next(), loads.next()) {
        (Some(load), None) => Ok(load),
        _ => Err(CliError::Input(format!(
            "{}: {count} microbatches of layer {layer}: choose a step with --step, or use compare or replay",
            args.loads.display()
        ))),
    }
}

/// One static placement for the load, which engines share evenly.
fn place(args: &Args, topology: &Topology, counts: &[u32]) -> Result<(), CliError> {
    let mut totals = Totals::default();
    totals.add_counts(0, counts, topology.experts());
    let map = totals.place(topology, Method::Search).map_err(CliError::input)?;
    let imbalance = Sharing::of_counts(&map, 0, counts).map_or(0.0, |sharing| sharing.imbalance());
    args.placement.save(&map, &format!("imbalance on this load {imbalance:.4}"))
}

/// A plan and what it was made for.
struct Answer<'a> {
    args: &'a Args,
    topology: &'a Topology,
    counts: &'a [u32],
    plan: &'a Plan,
    outcome: &'a Evaluated,
    prediction: Prediction,
    /// The break-even size, in routed tokens a rank.
    pays_from: Option<u64>,
    /// What would do better.
    hint: Option<String>,
}

/// `ultraep.plan/1`.
#[derive(Debug, Serialize)]
struct Json<'a> {
    schema: &'static str,
    policy: &'static str,
    ranks: usize,
    experts: usize,
    masters_per_rank: PerRank,
    slots_per_rank: PerRank,
    domain: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    rank_speeds: Option<&'a [u32]>,
    /// As asked for: tokens or "auto".
    least_quota: LeastQuota,
    /// What the plan kept to, in tokens.
    min_quota: u32,
    threshold: Vec<u32>,
    /// No plan with this least quota has a smaller threshold.
    lower_bound: Vec<u32>,
    stop_reason: &'static str,
    instances: Vec<JsonInstance>,
    rank_load_before: &'a [u32],
    rank_load_after: &'a [u32],
    imbalance_before: f64,
    imbalance_after: f64,
    replicas: usize,
    max_fanout: usize,
    max_sends: usize,
    remote_tokens: u64,
    total_tokens: u64,
    digest: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    split: Option<Vec<JsonShare>>,
}

#[derive(Debug, Serialize)]
struct JsonInstance {
    expert: usize,
    rank: usize,
    slot: usize,
    quota: u32,
}

#[derive(Debug, Serialize)]
struct JsonShare {
    expert: usize,
    source: usize,
    tokens: Vec<u32>,
}

impl<'a> Answer<'a> {
    fn report(&self) -> &'a PlanReport {
        &self.outcome.report
    }

    /// The least favourable reason of all domains.
    fn stop(&self) -> StopReason {
        let order = [
            StopReason::SearchExhausted,
            StopReason::LeastCost,
            StopReason::LowerBound,
            StopReason::TargetReached,
            StopReason::AlreadyBalanced,
            StopReason::NotASearch,
        ];
        let found = order.into_iter().find(|reason| self.plan.domains().iter().any(|d| d.stop == *reason));
        found.unwrap_or_default()
    }

    fn json(&self) -> Result<Json<'_>, CliError> {
        let (topology, plan, report) = (self.topology, self.plan, self.report());
        let of = |e: usize| {
            let one = move |i: &ultraep_plan::Instance| JsonInstance {
                expert: e,
                rank: i.rank.index(),
                slot: i.physical.index(),
                quota: i.quota,
            };
            plan.of(Expert::new(e)).iter().map(one)
        };
        Ok(Json {
            schema: "ultraep.plan/1",
            policy: self.args.policy.name(),
            ranks: topology.ranks(),
            experts: topology.experts(),
            masters_per_rank: PerRank::masters(topology),
            slots_per_rank: PerRank::slots(topology),
            domain: topology.domain_ranks(),
            rank_speeds: topology.speeds().iter().any(|&s| s != FULL_SPEED).then(|| topology.speeds()),
            least_quota: self.args.params.min_quota,
            min_quota: self.outcome.min_quota,
            threshold: plan.domains().iter().map(|d| d.threshold).collect(),
            lower_bound: plan.domains().iter().map(|d| d.lower_bound).collect(),
            stop_reason: stop_name(self.stop()),
            instances: (0..topology.experts()).flat_map(of).collect(),
            rank_load_before: &report.rank_load_before,
            rank_load_after: &report.rank_load_after,
            imbalance_before: quotient(self.outcome.imbalance_before),
            imbalance_after: quotient(self.outcome.imbalance_after),
            replicas: report.replicas,
            max_fanout: report.max_fanout,
            max_sends: report.max_sends,
            remote_tokens: report.remote_tokens,
            total_tokens: report.total_tokens,
            digest: format!("{:016x}", self.outcome.digest),
            hint: self.hint.as_deref(),
            split: if self.args.split { Some(self.split()?) } else { None },
        })
    }

    /// Shares of every expert and source, experts first.
    fn split(&self) -> Result<Vec<JsonShare>, CliError> {
        let problem = Problem::new(self.topology, self.counts).map_err(CliError::input)?;
        let mut workspace = SplitWorkspace::new(self.topology);
        let mut shares = vec![0; self.plan.instances().len()];
        let mut all = Vec::with_capacity(self.counts.len());
        for source in 0..self.topology.ranks() {
            split_source(&problem, self.plan, Rank::new(source), &mut workspace, &mut shares)
                .map_err(|error| CliError::Failure(error.to_string()))?;
            let of = |expert: usize| shares[self.plan.range(Expert::new(expert))].to_vec();
            all.extend((0..self.topology.experts()).map(|expert| JsonShare { expert, source, tokens: of(expert) }));
        }
        all.sort_by_key(|share| (share.expert, share.source));
        Ok(all)
    }

    fn print(&self, out: &mut Output<'_>) -> Result<(), CliError> {
        let (topology, report) = (self.topology, self.report());
        writeln!(
            out,
            "{}: {} experts on {} ranks, {} slots a rank, domains of {}",
            self.args.policy,
            topology.experts(),
            topology.ranks(),
            PerRank::slots(topology),
            topology.domain_ranks()
        )?;
        out.table(&self.summary())?;
        if self.args.policy.has_min_quota() {
            let tokens = self.outcome.min_quota.to_string();
            writeln!(out, "least quota of a replica: {}", quota_words(self.args.params.min_quota, &tokens))?;
        }
        if let Some(hint) = &self.hint {
            writeln!(out, "hint: {hint}")?;
        }
        self.print_bars(out)?;
        if report.replicas > 0 {
            out.table(&self.replicas())?;
        }
        if self.args.split {
            self.print_split(out)?;
        }
        Ok(())
    }

    fn summary(&self) -> Table {
        let report = self.report();
        let largest = |loads: &[u32]| loads.iter().max().copied().unwrap_or(0).to_string();
        let domains = |of: fn(&ultraep_plan::DomainOutcome) -> u32| {
            let mut all: Vec<String> = self.plan.domains().iter().take(8).map(|d| of(d).to_string()).collect();
            if self.plan.domains().len() > 8 {
                all.push("...".to_owned());
            }
            all.join(" ")
        };
        let remote = 100.0 * quotient((report.remote_tokens, report.total_tokens));
        let here = report.total_tokens / self.topology.ranks() as u64;
        let pays = match self.pays_from {
            Some(tokens) => format!("from about {tokens} routed tokens a rank ({here} here)"),
            None => "at no size".to_owned(),
        };
        let has_quota = self.args.policy.has_min_quota();
        let quota = if has_quota { self.outcome.min_quota.to_string() } else { "none".to_owned() };
        let bound = if has_quota { "lower bound at this quota" } else { "lower bound" };
        let mut table = Table::new([
            Column::text("what", "loads in tokens; imbalance is the largest over the mean rank load"),
            Column::text("before", "with masters only"),
            Column::text("after", "as planned"),
        ]);
        let (before, after) = (quotient(self.outcome.imbalance_before), quotient(self.outcome.imbalance_after));
        table.row([Cell::text("imbalance"), Cell::number(before, 4), Cell::number(after, 4)]);
        table.row([
            "largest rank load".to_owned(),
            largest(&report.rank_load_before),
            largest(&report.rank_load_after),
        ]);
        for (name, value) in [
            ("least quota", quota),
            ("threshold", domains(|d| d.threshold)),
            (bound, domains(|d| d.lower_bound)),
            ("stop reason", stop_name(self.stop()).to_owned()),
            ("replicas", report.replicas.to_string()),
            ("largest fan-out", report.max_fanout.to_string()),
            ("most sends of a rank", report.max_sends.to_string()),
            ("remote tokens", format!("{} of {} ({remote:.1}%)", report.remote_tokens, report.total_tokens)),
            ("predicted time", pretty(self.prediction.total_ps() / 1000)),
            ("balancing pays", pays),
            ("digest", format!("{:016x}", self.outcome.digest)),
        ] {
            table.row([name.to_owned(), String::new(), value]);
        }
        table
    }

    fn print_bars(&self, out: &mut Output<'_>) -> Result<(), CliError> {
        let report = self.report();
        let full = report.rank_load_before.iter().chain(&report.rank_load_after).max().copied().unwrap_or(0);
        let per_column = picture::ranks_per_column(report.rank_load_before.len());
        let columns =
            if per_column == 1 { "one a rank".to_owned() } else { format!("the fullest of {per_column} ranks") };
        writeln!(out, "rank loads ({columns}; full height = {full} tokens)")?;
        for (name, loads) in [("before", &report.rank_load_before), ("after", &report.rank_load_after)] {
            for (i, line) in picture::bars(loads, full).into_iter().enumerate() {
                writeln!(out, "{:>7} |{line}|", if i == 0 { name } else { "" })?;
            }
        }
        Ok(())
    }

    /// Replicas by expert, most tokens first.
    fn replicas(&self) -> Table {
        const MOST: usize = 20;
        let mut table = Table::new([
            Column::text("expert", "those with replicas, the most loaded first"),
            Column::text("load", "its tokens"),
            Column::text("home keeps", "tokens that the master processes"),
            Column::text("replicas", "rank: tokens that the replica there processes"),
        ]);
        let mut replicated: Vec<_> = (0..self.plan.experts()).map(|e| (e, self.plan.of(Expert::new(e)))).collect();
        replicated.retain(|(_, instances)| instances.len() > 1);
        let load = |instances: &[ultraep_plan::Instance]| instances.iter().map(|i| u64::from(i.quota)).sum::<u64>();
        replicated.sort_by_key(|&(e, instances)| (std::cmp::Reverse(load(instances)), e));
        for (expert, instances) in replicated.iter().take(MOST) {
            let mut replicas: Vec<String> =
                instances[1..].iter().take(6).map(|i| format!("{}: {}", i.rank, i.quota)).collect();
            if instances.len() > 7 {
                replicas.push(format!("and {} more", instances.len() - 7));
            }
            table.row([
                expert.to_string(),
                load(instances).to_string(),
                instances[0].quota.to_string(),
                replicas.join(", "),
            ]);
        }
        if replicated.len() > MOST {
            let more = format!("and {} more", replicated.len() - MOST);
            table.row([more, String::new(), String::new(), String::new()]);
        }
        table
    }

    /// One line for each replicated expert and source with tokens.
    fn print_split(&self, out: &mut Output<'_>) -> Result<(), CliError> {
        writeln!(out, "split of replicated experts: expert, source: tokens for each instance (master first)")?;
        for share in self.split()?.iter().filter(|s| s.tokens.len() > 1 && s.tokens.iter().any(|&t| t > 0)) {
            let tokens: Vec<String> = share.tokens.iter().map(u32::to_string).collect();
            writeln!(out, "  {}, {}: {}", share.expert, share.source, tokens.join(" "))?;
        }
        Ok(())
    }
}

/// Name of a stop reason in JSON and tables.
fn stop_name(reason: StopReason) -> &'static str {
    match reason {
        StopReason::AlreadyBalanced => "already-balanced",
        StopReason::TargetReached => "target-reached",
        StopReason::LowerBound => "lower-bound",
        StopReason::LeastCost => "least-cost",
        StopReason::SearchExhausted => "search-exhausted",
        _ => "not-a-search",
    }
}
