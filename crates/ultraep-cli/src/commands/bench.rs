//! `ultraep bench`: how long planning, splitting and rerouting take, with the physical floor measured in the same run.
//! (`bench weight-sync` and `bench grad-reduce` are in `moved`.)

use std::hint::black_box;
use std::io::Write;

use serde::Serialize;
use ultraep_baselines::{HistoryParams, PolicyKind, build, plan_for};
use ultraep_load::LoadMatrix;
use ultraep_plan::{
    Cursor, Plan, Policy, Problem, Rank, RouteTable, SplitWorkspace, Tally, Topology, digest_counts, digest_plan,
    split_all, split_source,
};

use ultraep_replay::quotient;

use super::{moved, write_json};
use crate::error::CliError;
use crate::input::{GroupArgs, PolicyArgs, WorkloadArgs};
use crate::options;
use crate::output::Output;
use crate::table::{Cell, Column, Table};
use crate::timing::{Times, measure};

/// What is measured.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    /// From counts to a plan; floor: reading the count matrix once (historical policies have met the load before)
    #[command(after_help = EXAMPLES)]
    Plan(Args),
    /// From a plan to the shares of a source; floor: copying the source's row or the matrix once
    #[command(after_help = EXAMPLES)]
    Split(Args),
    /// From logical to physical routing of one rank's tokens; floor: copying inputs and outputs once, counting the ids once
    #[command(after_help = EXAMPLES)]
    Reroute(Args),
    /// Weight sync by mode of transfer, measured beside the machine's own limit, or predicted by a model of a fabric
    #[command(after_help = moved::SYNC_HELP)]
    WeightSync(moved::Args),
    /// Grad reduce, measured beside the machine's own limit
    #[command(after_help = moved::REDUCE_HELP)]
    GradReduce(moved::ReduceArgs),
}

const EXAMPLES: &str = "Examples:
  ultraep bench plan
  ultraep bench plan --ranks 64 --experts 128 --slots 1 --ratio 8 --min-quota 1
  ultraep bench split --ranks 1024 --experts 4096 --slots 8 --iterations 50 --json
  ultraep bench reroute --tokens 8192";

/// The problem and how often to solve it.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    workload: WorkloadArgs,
    #[arg(long, default_value_t = 2, value_name = "R", value_parser = options::slots(), help = options::SLOTS)]
    slots: usize,
    #[arg(long, value_name = "G", value_parser = options::ranks(), help = options::DOMAIN)]
    domain: Option<usize>,
    #[arg(long, default_value_t, value_name = "NAME", help = options::POLICY)]
    policy: PolicyKind,
    #[command(flatten)]
    params: PolicyArgs,
    #[arg(long, default_value_t = 1000, value_name = "RUNS", value_parser = options::iterations::<usize>(),
          help = format!("{}, after a tenth as many that do not count", options::ITERATIONS))]
    iterations: usize,
    /// JSON (schema ultraep.bench/1) instead of a table
    #[arg(long)]
    json: bool,
}

/// `ultraep.bench/1`.
#[derive(Debug, Serialize)]
struct Record {
    schema: &'static str,
    bench: &'static str,
    policy: &'static str,
    workload: &'static str,
    ranks: usize,
    experts: usize,
    slots_per_rank: usize,
    domain: usize,
    tokens_per_rank: u32,
    top_k: u32,
    imbalance_before: f64,
    iterations: usize,
    lines: Vec<Line>,
}

/// One measurement beside its floor.
#[derive(Debug, Serialize)]
struct Line {
    name: &'static str,
    #[serde(flatten)]
    times: Times,
    floor: &'static str,
    floor_p50_ns: u64,
    /// `p50_ns` over `floor_p50_ns`.
    ratio: f64,
    #[serde(flatten)]
    closer: Option<CloserFloor>,
    digest: String,
}

/// A second floor, nearer to what the work must do.
#[derive(Debug, Serialize)]
struct CloserFloor {
    closer_floor: &'static str,
    closer_floor_p50_ns: u64,
    closer_ratio: f64,
}

impl Line {
    fn new(name: &'static str, times: Times, (floor, least): (&'static str, Times), digest: u64) -> Self {
        let floor_p50_ns = least.p50_ns.max(1);
        let ratio = times.p50_ns as f64 / floor_p50_ns as f64;
        Self { name, times, floor, floor_p50_ns, ratio, closer: None, digest: format!("{digest:016x}") }
    }

    fn with_closer_floor(self, (closer_floor, least): (&'static str, Times)) -> Self {
        let closer_floor_p50_ns = least.p50_ns.max(1);
        let closer_ratio = self.times.p50_ns as f64 / closer_floor_p50_ns as f64;
        Self { closer: Some(CloserFloor { closer_floor, closer_floor_p50_ns, closer_ratio }), ..self }
    }
}

/// One kind of bench.
type Measurement = fn(&Subject<'_>) -> Result<Vec<Line>, CliError>;

impl Bench {
    pub(crate) fn run(&self, out: &mut Output<'_>) -> Result<(), CliError> {
        let (name, args, lines): (_, _, Measurement) = match self {
            Self::Plan(args) => ("plan", args, plan),
            Self::Split(args) => ("split", args, split),
            Self::Reroute(args) => ("reroute", args, reroute),
            Self::WeightSync(args) => return moved::run(args, out),
            Self::GradReduce(args) => return moved::run_reduce(args, out),
        };
        let group = GroupArgs::uniform(args.slots, args.domain);
        let topology = group.topology(args.workload.ranks, args.workload.experts)?;
        let load = args.workload.generate(&topology)?;
        let subject = Subject { args, topology: &topology, load: &load };
        let record = Record {
            schema: "ultraep.bench/1",
            bench: name,
            policy: args.policy.name(),
            workload: args.workload.workload.name(),
            ranks: args.workload.ranks,
            experts: args.workload.experts,
            slots_per_rank: args.slots,
            domain: topology.domain_ranks(),
            tokens_per_rank: args.workload.tokens,
            top_k: args.workload.top_k,
            imbalance_before: imbalance(&load, &topology),
            iterations: args.iterations,
            lines: lines(&subject)?,
        };
        if args.json { write_json(out, &record) } else { print(&record, out) }
    }
}

fn imbalance(load: &LoadMatrix, topology: &Topology) -> f64 {
    quotient(ultraep_plan::measure::imbalance(load.rank_loads(topology)))
}

/// What is measured on.
struct Subject<'a> {
    args: &'a Args,
    topology: &'a Topology,
    load: &'a LoadMatrix,
}

/// The rank whose own split and tokens are measured.
const OWN: Rank = Rank::new(0);

impl Subject<'_> {
    /// The policy, which has met this load before if it plans from history.
    fn policy(&self) -> Result<Box<dyn Policy>, CliError> {
        let mut params = self.args.params.params_for(self.load);
        params.eplb.history = HistoryParams { window: 1, interval: 1 };
        params.lplb.history = params.eplb.history;
        let mut policy = build(self.args.policy, self.topology, &params).map_err(CliError::input)?;
        policy.observe(&self.problem()?);
        Ok(policy)
    }

    fn problem(&self) -> Result<Problem<'_>, CliError> {
        Problem::new(self.topology, self.load.counts()).map_err(CliError::input)
    }

    fn plan(&self) -> Result<Plan, CliError> {
        let mut plan = plan_for(self.args.policy, self.topology);
        self.policy()?.solve(&self.problem()?, &mut plan).map_err(CliError::input)?;
        Ok(plan)
    }

    fn measure<T>(&self, work: impl FnMut() -> T) -> Times {
        measure(self.args.iterations, work)
    }
}

fn plan(subject: &Subject<'_>) -> Result<Vec<Line>, CliError> {
    let (topology, counts) = (subject.topology, subject.load.counts());
    let mut policy = subject.policy()?;
    let mut plan = subject.plan()?;
    let digest = digest_plan(&plan);
    let mut tally = Tally::new(topology);
    let mut workspace = SplitWorkspace::new(topology);
    let mut shares = vec![0; plan.instances().len()];
    let floor = ("read counts", subject.measure(|| read(black_box(counts))));
    let only = subject.measure(|| {
        let problem = Problem::tallied(topology, black_box(counts), OWN, &mut tally)?;
        policy.solve(&problem, &mut plan)
    });
    let both = subject.measure(|| {
        let problem = Problem::tallied(topology, black_box(counts), OWN, &mut tally).ok()?;
        policy.solve(&problem, &mut plan).ok()?;
        split_source(&problem, &plan, OWN, &mut workspace, &mut shares).ok()
    });
    if digest_plan(&plan) != digest {
        return Err(CliError::Failure("the same counts gave two different plans".to_owned()));
    }
    let of_both = digest_counts(&[digest as u32, (digest >> 32) as u32, digest_counts(&shares) as u32]);
    Ok(vec![Line::new("plan", only, floor, digest), Line::new("plan + own split", both, floor, of_both)])
}

/// Reads every count once, with the widest vectors of the processor.
fn read(counts: &[u32]) -> u32 {
    struct Read<'a>(&'a [u32]);
    impl pulp::NullaryFnOnce for Read<'_> {
        type Output = u32;

        #[inline(always)]
        fn call(self) -> u32 {
            self.0.iter().fold(0, |all, &count| all ^ count)
        }
    }
    pulp::Arch::new().dispatch(Read(counts))
}

fn split(subject: &Subject<'_>) -> Result<Vec<Line>, CliError> {
    let (topology, counts) = (subject.topology, subject.load.counts());
    let plan = subject.plan()?;
    let width = plan.instances().len();
    let mut workspace = SplitWorkspace::new(topology);
    let (mut own, mut all) = (vec![0; width], vec![0; width * topology.ranks()]);
    let mut copy = vec![0; counts.len()];
    let experts = topology.experts();
    let row_floor = subject.measure(|| copy[..experts].copy_from_slice(black_box(&counts[..experts])));
    let all_floor = subject.measure(|| copy.copy_from_slice(black_box(counts)));
    let mut tally = Tally::new(topology);
    let problem = Problem::tallied(topology, counts, OWN, &mut tally).map_err(CliError::input)?;
    let of_own = subject.measure(|| split_source(&problem, black_box(&plan), OWN, &mut workspace, &mut own));
    let of_all = subject.measure(|| split_all(&problem, black_box(&plan), &mut workspace, &mut all));
    Ok(vec![
        Line::new("own split", of_own, ("copy own row", row_floor), digest_counts(&own)),
        Line::new("splits of all sources", of_all, ("copy counts", all_floor), digest_counts(&all)),
    ])
}

/// The chosen experts of one source's tokens, `[tokens, k]`, so that they have the counts of `row`: the list of experts,
/// each as often as it is chosen, dealt to the tokens in turn. No expert has more choices than there are tokens, so no
/// token gets one twice. Then tokens are spread by a stride, so that neighbours differ.
fn choices(row: &[u32], top_k: usize) -> Vec<i32> {
    let dealt: Vec<i32> =
        row.iter().enumerate().flat_map(|(e, &c)| std::iter::repeat_n(e as i32, c as usize)).collect();
    let tokens = dealt.len() / top_k;
    let gcd = |mut a: usize, mut b: usize| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let stride = (tokens * 5 / 8 + 1..).find(|&s| gcd(s, tokens.max(1)) == 1).unwrap_or(1);
    let token_at = |place: usize| place * stride % tokens.max(1);
    (0..tokens)
        .flat_map(|place| (0..top_k).map(move |k| (place, k)))
        .map(|(place, k)| dealt[token_at(place) + k * tokens])
        .collect()
}

fn reroute(subject: &Subject<'_>) -> Result<Vec<Line>, CliError> {
    let topology = subject.topology;
    let internal = |error: &dyn std::fmt::Display| CliError::Failure(error.to_string());
    let plan = subject.plan()?;
    let mut shares = vec![0; plan.instances().len()];
    split_source(&subject.problem()?, &plan, OWN, &mut SplitWorkspace::new(topology), &mut shares)
        .map_err(|e| internal(&e))?;
    let physical_per_rank = plan.instances().iter().map(|i| i.physical.index() + 1).max().unwrap_or(1);
    let mut table = RouteTable::new(topology, physical_per_rank);
    let ids = choices(subject.load.row(OWN.index()), subject.args.workload.top_k as usize);
    let mut written = vec![0; ids.len()];
    let floor = ("write ids", subject.measure(|| black_box(&mut written[..]).fill(black_box(1))));
    let times = subject.measure(|| table.prepare(&plan, black_box(&shares)));
    table.prepare(&plan, &shares).map_err(|e| internal(&e))?;
    let prepare = Line::new("sparse prepare", times, floor, digest_counts(&shares));
    let sparse = sparse(subject, &table, &ids).map_err(|e| internal(&e))?;
    let (forward, backward) = dense(subject, &table, &ids).map_err(|e| internal(&e))?;
    Ok(vec![prepare, sparse, forward, backward])
}

fn sparse(subject: &Subject<'_>, table: &RouteTable, ids: &[i32]) -> Result<Line, ultraep_plan::AssignError> {
    let mut cursor = Cursor::new(subject.topology);
    let (mut physical, mut copy) = (vec![0; ids.len()], vec![0; ids.len()]);
    table.start(&mut cursor);
    table.assign(&mut cursor, ids, &mut physical)?;
    let floor = subject.measure(|| copy.copy_from_slice(black_box(ids)));
    let times = subject.measure(|| {
        table.start(&mut cursor);
        table.assign(&mut cursor, black_box(ids), &mut physical)
    });
    // A token's instance depends on how many of its expert came before: nothing does with less than counting.
    let mut counted = vec![0_u32; subject.topology.experts()];
    let counting = subject.measure(|| {
        counted.fill(0);
        for &id in black_box(ids) {
            if let Some(count) = counted.get_mut(id as u32 as usize) {
                *count += 1;
            }
        }
        black_box(&counted);
    });
    let words: Vec<u32> = physical.iter().map(|&p| p as u32).collect();
    let line = Line::new("sparse forward", times, ("copy ids", floor), digest_counts(&words));
    Ok(line.with_closer_floor(("count ids", counting)))
}

fn dense(subject: &Subject<'_>, table: &RouteTable, ids: &[i32]) -> Result<(Line, Line), ultraep_plan::AssignError> {
    let (experts, width) = (subject.topology.experts(), table.physical_experts());
    let tokens = ids.len() / subject.args.workload.top_k as usize;
    let (mut mask, mut values) = (vec![0_u8; tokens * experts], vec![0.0_f32; tokens * experts]);
    for (choice, &id) in ids.iter().enumerate() {
        let at = choice / subject.args.workload.top_k as usize * experts + id as usize;
        mask[at] = 1;
        values[at] = 1.0 + choice as f32;
    }
    let (mut physical_mask, mut physical_values) = (vec![0_u8; tokens * width], vec![0.0_f32; tokens * width]);
    let mut gradient = vec![0.0_f32; tokens * experts];
    let mut cursor = Cursor::new(subject.topology);
    table.start(&mut cursor);
    table.reroute_dense(&mut cursor, &mask, &values, &mut physical_mask, &mut physical_values)?;
    table.start(&mut cursor);
    table.reroute_dense_backward(&mut cursor, &mask, &physical_values, &mut gradient)?;
    let of_forward = digest_counts(&physical_values.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
    let of_backward = digest_counts(&gradient.iter().map(|v| v.to_bits()).collect::<Vec<_>>());

    let (mut mask_copy, mut values_copy) = (mask.clone(), values.clone());
    let (mut physical_mask_copy, mut physical_copy) = (physical_mask.clone(), physical_values.clone());
    let forward_floor = subject.measure(|| {
        mask_copy.copy_from_slice(black_box(&mask));
        values_copy.copy_from_slice(black_box(&values));
        physical_mask_copy.copy_from_slice(black_box(&physical_mask));
        physical_copy.copy_from_slice(black_box(&physical_values));
    });
    let backward_floor = subject.measure(|| {
        mask_copy.copy_from_slice(black_box(&mask));
        physical_copy.copy_from_slice(black_box(&physical_values));
        values_copy.copy_from_slice(black_box(&gradient));
    });
    let forward = subject.measure(|| {
        table.start(&mut cursor);
        table.reroute_dense(&mut cursor, black_box(&mask), &values, &mut physical_mask, &mut physical_values)
    });
    let backward = subject.measure(|| {
        table.start(&mut cursor);
        table.reroute_dense_backward(&mut cursor, black_box(&mask), &physical_values, &mut gradient)
    });
    let floor = "copy maps in and out";
    Ok((
        Line::new("dense forward", forward, (floor, forward_floor), of_forward),
        Line::new("dense backward", backward, (floor, backward_floor), of_backward),
    ))
}

fn print(record: &Record, out: &mut Output<'_>) -> Result<(), CliError> {
    writeln!(
        out,
        "{} of {}: {} experts on {} ranks, {} slots, {} at {:.2}, {} tokens a rank, top-{}; {} runs",
        record.bench,
        record.policy,
        record.experts,
        record.ranks,
        record.slots_per_rank,
        record.workload,
        record.imbalance_before,
        record.tokens_per_rank,
        record.top_k,
        record.iterations
    )?;
    let mut table = Table::new([
        Column::text("work", "what is measured"),
        Column::time("p50", "median time"),
        Column::time("p99", "99th percentile").minor(2),
        Column::time("max", "longest time").minor(3),
        Column::text("floor", "the least that any way of doing it must do"),
        Column::time("floor p50", "its median time"),
        Column::number("ratio", "p50 over floor p50"),
        Column::text("digest", "of the result: equal digests, equal work").minor(1),
    ])
    .grouped_by(1);
    for line in &record.lines {
        let mut row = |(floor, floor_p50_ns, ratio): (&'static str, u64, f64)| {
            table.row([
                Cell::text(line.name),
                Cell::ns(line.times.p50_ns),
                Cell::ns(line.times.p99_ns),
                Cell::ns(line.times.max_ns),
                Cell::text(floor),
                Cell::ns(floor_p50_ns),
                Cell::number(ratio, 2),
                Cell::text(line.digest.clone()),
            ]);
        };
        row((line.floor, line.floor_p50_ns, line.ratio));
        if let Some(closer) = &line.closer {
            row((closer.closer_floor, closer.closer_floor_p50_ns, closer.closer_ratio));
        }
    }
    out.table(&table)
}
