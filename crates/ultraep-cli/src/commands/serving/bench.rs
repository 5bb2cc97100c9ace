//! `ultraep prefill-bench`: prefill under load on the virtual clock, policies over the same recorded routing.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use ultraep_baselines::PolicyKind;
use ultraep_plan::{Topology, TopologySpec};
use ultraep_run::write_atomically;
use ultraep_schedule::{Lengths, Limits};
use ultraep_serve::ServedModel;
use ultraep_serve::bench::{
    BENCH_SCHEMA, Bound, Costs, PolicyResult, PolicySettings, PoolSummary, PrefillBench, Prompt, PromptSpec,
    RecordedPrompt, SweepSpec, World, prompts, record, sample_loads, spot_check, sweep,
};
use ultraep_serve::plot::{Line, ttft_plot};

use super::{GroupArgs, MixArg, ms, parse_lengths, progress, serve_error};
use crate::commands::{train, write_json};
use crate::error::CliError;
use crate::options;
use crate::output::Output;
use crate::table::{Cell, Column, Table};

/// Arguments of `ultraep prefill-bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    group: GroupArgs,
    #[arg(long, default_value_t = 16, value_name = "N", help_heading = "Ranks", value_parser = options::ranks(), help = options::RANKS)]
    ranks: usize,
    #[arg(long, value_delimiter = ',', default_values_t = COMPARED, value_name = "NAME,...", help_heading = "Balancing", help = options::POLICIES)]
    policies: Vec<PolicyKind>,
    #[arg(long, default_value = "mixed", value_name = "stem|mixed|PATH", help_heading = "Load", help = options::MIX)]
    mix: MixArg,
    #[arg(long, default_value_t = 96, value_name = "N", help_heading = "Load", help = format!("{}; their routing is recorded once", options::PROMPTS), value_parser = clap::value_parser!(u32).range(1..=100_000))]
    prompts: u32,
    #[arg(long, default_value = "128..16384", value_parser = parse_lengths, value_name = "LEAST..MOST", help_heading = "Load", help = options::PROMPT_TOKENS)]
    prompt_tokens: Lengths,
    /// Requests that arrive at every rate
    #[arg(long, default_value_t = 600, value_name = "N", help_heading = "Load", value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    requests: u32,
    /// Rates of the curves, in percent of the ideal's capacity
    #[arg(long, value_delimiter = ',', default_values_t = RATES, value_name = "PERCENT,...", help_heading = "Load")]
    rates: Vec<u32>,
    /// Time to first token that is good enough: throughputs are compared where its p95 is so long [default: twice the
    /// ideal's with little load]
    #[arg(long, value_name = "MS", help_heading = "Load")]
    ttft_limit_ms: Option<u64>,
    #[arg(long, default_value_t = 1, value_name = "SEED", help_heading = "Load", help = options::SEED)]
    seed: u64,
    /// Costs of work from a result of this command, instead of measuring them: the same result again
    #[arg(long, value_name = "FILE", help_heading = "Costs")]
    costs: Option<PathBuf>,
    /// Also run this many batches on the real engine: counts must be equal, times are compared
    #[arg(long, default_value_t = 0, value_name = "BATCHES", help_heading = "Costs")]
    spot_check: usize,
    #[arg(long, value_name = "FILE", help_heading = "Output", help = options::SVG)]
    svg: Option<PathBuf>,
    /// File to write, the whole result with its costs as JSON
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    output: Option<PathBuf>,
    /// JSON (the whole result, as --output writes it) instead of tables
    #[arg(long, help_heading = "Output")]
    json: bool,
}

const COMPARED: [PolicyKind; 5] =
    [PolicyKind::None, PolicyKind::Eplb, PolicyKind::EplbExact, PolicyKind::Ultraep, PolicyKind::Ideal];
const RATES: [u32; 9] = [10, 25, 40, 50, 60, 70, 80, 90, 100];

const EXAMPLES: &str = "Examples:
  ultraep prefill-bench --checkpoint runs/2026-11-24T15-00-00Z --svg ttft.svg --output prefill.json
  ultraep prefill-bench --checkpoint runs/2026-11-24T15-00-00Z --mix stem --ranks 8 --spot-check 40
  ultraep prefill-bench --checkpoint runs/2026-11-24T15-00-00Z --costs prefill.json --json";

pub(crate) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    train::keep_tensors_on_one_thread()?;
    let context = args.prompt_tokens.most as usize + 1;
    let model = ServedModel::load(&args.group.checkpoint, context).map_err(CliError::input)?;
    // Room for several of the longest: the load, not the memory, is to be the limit.
    let limits =
        args.group.limits(&model, args.ranks, args.prompt_tokens.most.saturating_mul(4), args.requests as usize)?;
    let settings = settings(args, &model)?;
    let spec =
        PromptSpec { mix: args.mix.mix(), lengths: args.prompt_tokens, count: args.prompts as usize, seed: args.seed };
    let corpus = Arc::new(args.mix.read_text()?);
    let pool = prompts(&corpus, &spec).map_err(serve_error)?;
    let recorded = record_routing(&model, &pool)?;
    let costs = costs(args, &model, &limits, &settings, &recorded)?;
    let world = World::new(settings, costs.clone(), Arc::new(recorded), &model).map_err(serve_error)?;
    let check = match args.spot_check {
        0 => None,
        batches => Some(spot_check(&world, &model, &pool, limits, batches, train::cores()).map_err(serve_error)?),
    };
    let spec_of_sweep = SweepSpec {
        requests: args.requests as usize,
        seed: args.seed,
        rates_percent: args.rates.clone(),
        ttft_limit_ns: args.ttft_limit_ms.map(|ms| ms.saturating_mul(1_000_000)),
    };
    let bar = progress("simulating", 2 * args.policies.len() as u64);
    let swept = sweep(&world, limits, &spec_of_sweep, &mut |done| bar.set_position(done as u64));
    bar.finish_and_clear();
    let (ttft_limit_ns, policies) = swept.map_err(serve_error)?;
    let result = PrefillBench {
        schema: BENCH_SCHEMA.into(),
        model: model.name().into(),
        slots: args.group.slots,
        link: args.group.link()?.to_string(),
        limits,
        prompts: spec,
        pool: PoolSummary::of(&pool),
        sweep: spec_of_sweep,
        ttft_limit_ns,
        policies,
        spot_check: check,
        costs,
    };
    write_files(args, &result)?;
    if args.json { write_json(out, &result) } else { print(out, &result) }
}

fn settings(args: &Args, model: &ServedModel) -> Result<PolicySettings, CliError> {
    let topology = Topology::new(TopologySpec {
        ranks: args.ranks,
        experts: model.config().experts,
        domain_ranks: args.ranks,
        slots_per_rank: args.group.slots,
    });
    Ok(PolicySettings {
        topology: topology.map_err(CliError::input)?,
        policies: args.policies.clone(),
        params: args.group.params(),
        link: args.group.link()?,
    })
}

fn record_routing(model: &ServedModel, pool: &[Prompt]) -> Result<Vec<RecordedPrompt>, CliError> {
    let bar = progress("recording routing, tokens", pool.iter().map(|p| p.tokens.len() as u64).sum());
    let recorded = record(model, pool, train::cores(), &|tokens| bar.set_position(tokens));
    bar.finish_and_clear();
    recorded.map_err(serve_error)
}

fn costs(
    args: &Args,
    model: &ServedModel,
    limits: &Limits,
    settings: &PolicySettings,
    recorded: &[RecordedPrompt],
) -> Result<Costs, CliError> {
    if let Some(path) = &args.costs {
        let refuse = |reason: String| CliError::Input(format!("{}: {reason}", path.display()));
        let text = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
        let mut value: serde_json::Value = serde_json::from_slice(&text).map_err(|error| refuse(error.to_string()))?;
        // A result of this command has them inside.
        let inner = value.get_mut("costs").map(serde_json::Value::take).unwrap_or(value);
        let costs: Costs = serde_json::from_value(inner).map_err(|error| refuse(error.to_string()))?;
        costs.check(model).map_err(CliError::input)?;
        if let Some(kind) = settings.policies.iter().find(|k| !costs.plan_ns.contains_key(k.name())) {
            return Err(refuse(format!("it has no planning time of policy {kind}")));
        }
        if costs.plan_ranks != args.ranks {
            return Err(refuse(format!("plans were measured at {} ranks, not {}", costs.plan_ranks, args.ranks)));
        }
        return Ok(costs);
    }
    let bar = progress("measuring kernels", 2);
    let tokens = limits.chunk_tokens_per_rank() as usize;
    let context = args.prompt_tokens.most as usize;
    let measured = Costs::measure(model, tokens, context, super::machine()).map_err(serve_error);
    bar.set_position(1);
    let costs = measured.and_then(|mut costs| {
        let loads = sample_loads(recorded, limits, &settings.topology, model);
        costs.measure_plans(settings, model, &loads.map_err(serve_error)?).map_err(serve_error)?;
        Ok(costs)
    });
    bar.finish_and_clear();
    costs
}

fn write_files(args: &Args, result: &PrefillBench) -> Result<(), CliError> {
    if let Some(path) = &args.svg {
        let line = |policy: &PolicyResult| Line {
            name: policy.policy.clone(),
            points: policy.points.iter().map(|p| (p.rps, seconds(p.ttft.p95_ns))).collect(),
        };
        let lines: Vec<_> = result.policies.iter().map(line).collect();
        let title = format!("Prefill at {} ranks: TTFT against load", result.limits.ranks);
        let svg = ttft_plot(&title, &lines, Some(seconds(result.ttft_limit_ns))).map_err(CliError::failure)?;
        write_atomically(path, svg.as_bytes()).map_err(CliError::failure)?;
    }
    if let Some(path) = &args.output {
        let mut json = serde_json::to_vec_pretty(result)?;
        json.push(b'\n');
        write_atomically(path, &json).map_err(CliError::failure)?;
    }
    Ok(())
}

fn seconds(ns: u64) -> f64 {
    ns as f64 * 1e-9
}

fn print(out: &mut Output<'_>, result: &PrefillBench) -> Result<(), CliError> {
    let PrefillBench { limits, pool, .. } = result;
    writeln!(
        out,
        "{} ranks, {} slots a rank, batches of up to {} tokens; {} prompts of {} to {} tokens from {} domains",
        limits.ranks,
        result.slots,
        limits.chunk_tokens,
        pool.prompts,
        pool.shortest_tokens,
        pool.longest_tokens,
        pool.domains.len()
    )?;
    let mut table = Table::new([
        Column::text("policy", "who planned"),
        Column::number("imbalance\nas routed", "largest over mean rank load before balancing, weighted by tokens")
            .minor(1),
        Column::number("imbalance\nmean", "after balancing, weighted by tokens"),
        Column::number("imbalance\nworst", "worst of batches that are not small"),
        Column::number("replicas\na layer", "copies of experts, mean over layers").minor(2),
        Column::number("peak tokens\non a rank", "most tokens on one rank in a layer").minor(5),
        Column::number("over\neven", "that peak over an even share of the same batch").minor(4),
        Column::number("peak, all\nat once", "peak tokens with all requests at once").minor(6),
        Column::number("requests/s\nat the limit", "most arrivals a second within the limit of TTFT"),
        Column::number("tokens/s\nat the limit", "the same in tokens").minor(3),
        Column::number("over\nnone", "requests/s over those of none"),
        Column::number("of\nideal", "share of ideal routing's throughput"),
    ]);
    let none = result.policies.iter().find(|p| p.policy == PolicyKind::None.name()).and_then(found);
    for p in &result.policies {
        let over_none = found(p).zip(none).map(|(rps, none)| rps / none);
        table.row([
            Cell::text(p.policy.clone()),
            Cell::number(p.imbalance_before, 2),
            Cell::number(p.imbalance_after, 3),
            Cell::number(p.imbalance_worst, 3),
            Cell::number(p.replicas_per_layer, 1),
            Cell::count(p.peak_tokens),
            Cell::number(p.peak_tokens as f64 / p.even_peak_tokens.max(1) as f64, 2),
            Cell::count(p.saturated_peak_tokens),
            bounded(p.bound, p.throughput_rps, 2),
            bounded(p.bound, p.throughput_tokens_per_s, 0),
            Cell::maybe(over_none, |over| Cell::shown(format!("{over:.2}x"), over)),
            Cell::maybe(p.share_of_ideal, Cell::share),
        ]);
    }
    writeln!(out)?;
    out.table(&table)?;
    writeln!(
        out,
        "limit: p95 of the time to the first token (TTFT) {} ms. Imbalance weighted by tokens, worst of batches of {} tokens and more; both, replicas \
         and peak at {:.2} requests/s.\nThere each policy has its own batches: over even is against an even share of the same \
         batch. With all requests at once all have the same.",
        ms(result.ttft_limit_ns),
        limits.chunk_tokens / 8,
        result.policies.first().map_or(0.0, |p| p.knee.rps)
    )?;
    print_bounds(out, result)?;
    print_curves(out, result)?;
    if let Some(check) = &result.spot_check {
        writeln!(out, "\n{} batches on the real engine: counts of {} layers equal", check.batches, check.layers)?;
        for (policy, replayed, real) in &check.times_ns {
            let ratio = *replayed as f64 / *real as f64;
            writeln!(
                out,
                "  {policy}: {} ms replayed, {} ms on its virtual clock ({ratio:.2})",
                ms(*replayed),
                ms(*real)
            )?;
        }
    }
    Ok(())
}

/// The throughput, where the search found it.
fn found(policy: &PolicyResult) -> Option<f64> {
    (policy.bound == Bound::Found).then_some(policy.throughput_rps)
}

/// A figure of a search, or the bound that it has.
fn bounded(bound: Bound, value: f64, digits: usize) -> Cell {
    let sign = match bound {
        Bound::Found => "",
        Bound::AtLeast => ">=",
        Bound::AtMost => "<",
    };
    Cell::shown(format!("{sign}{value:.digits$}"), value)
}

/// Says of which policies no throughput was found, and why.
fn print_bounds(out: &mut Output<'_>, result: &PrefillBench) -> Result<(), CliError> {
    for policy in &result.policies {
        let (name, rps) = (&policy.policy, policy.throughput_rps);
        match policy.bound {
            Bound::Found => {}
            Bound::AtLeast => writeln!(out, "{name}: not saturated: at least {rps:.2} requests/s")?,
            Bound::AtMost => writeln!(out, "{name}: over the limit at every rate: less than {rps:.3} requests/s")?,
        }
    }
    if result.policies.iter().any(|p| p.bound == Bound::AtLeast) {
        let requests = result.sweep.requests;
        writeln!(
            out,
            "{requests} requests are too few to fill the queue: no share is made of a bound; take more with --requests, or a \
             lower --ttft-limit-ms"
        )?;
    }
    Ok(())
}

fn print_curves(out: &mut Output<'_>, result: &PrefillBench) -> Result<(), CliError> {
    let mut columns = vec![Column::number("requests/s", "arrivals a second")];
    let help = |at: usize| if at == 0 { "TTFT, ms of parallel time: median, 95th and 99th percentile" } else { "" };
    columns.extend(
        result
            .policies
            .iter()
            .enumerate()
            .map(|(at, p)| Column::number(format!("{}\np50 / p95 / p99", p.policy), help(at))),
    );
    let mut table = Table::new(columns);
    let rates = result.policies.first().map_or(0, |p| p.points.len());
    for rate in 0..rates {
        let mut row = vec![Cell::number(result.policies[0].points[rate].rps, 2)];
        for policy in &result.policies {
            let ttft = &policy.points[rate].ttft;
            row.push(Cell::text(format!(
                "{:.0} / {:.0} / {:.0}",
                ttft.p50_ns as f64 * 1e-6,
                ttft.p95_ns as f64 * 1e-6,
                ttft.p99_ns as f64 * 1e-6
            )));
        }
        table.row(row);
    }
    writeln!(out)?;
    out.table(&table)
}
