//! `ultraep advise`: what balancing is worth for a recording, on one page that can be forwarded.

use std::collections::BTreeMap;
use std::io::Write;

use serde::Serialize;
use ultraep_advise::{Advice, Offer, Page, Question, Subject, Typical};
use ultraep_baselines::{HistoryParams, PolicyKind, PolicyParams};
use ultraep_import::Microbatch;
use ultraep_replay::{ExpertShape, Hardware, LeastQuota, Scenario, break_even};

use super::pass::{Pass, Passed, progress_bar};
use super::recordings::{RecordingArgs, SourceArgs};
use super::train::cores;
use crate::error::CliError;
use crate::options;
use crate::output::Output;
use crate::table::{Cell, Column, Table};

/// Arguments of `ultraep advise`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    recording: RecordingArgs,
    #[command(flatten)]
    sources: SourceArgs,
    /// Model that the load is of: a file, or one that comes with the program (sim --list)
    #[arg(long, value_name = "NAME|FILE")]
    model: String,
    #[arg(long, value_name = "NAME|FILE",
          help = format!("Hardware to predict times for: a file or one of {}", Hardware::built_in_names().join(", ")))]
    hardware: String,
    /// Share of ideal throughput that is wanted, as 97%
    #[arg(long, default_value = "97%", value_name = "PERCENT", value_parser = percent)]
    within: f64,
    #[arg(long, value_name = "N", value_parser = options::ranks(),
          help = format!("{} [default: as recorded, else those of one domain of the hardware]", options::RANKS))]
    ranks: Option<usize>,
    #[arg(long, value_delimiter = ',', default_value = "1,2,3,4,6,8", value_name = "R,...",
          value_parser = options::slots(), help = options::SLOTS)]
    slots: Vec<usize>,
    #[arg(long, value_delimiter = ',', value_name = "G,...", value_parser = options::ranks(),
          help = options::DOMAIN.replace("all ranks", "all that the hardware joins, halved down to 4"))]
    domain: Vec<usize>,
    #[arg(long, value_name = "N", value_parser = options::threads(), help = options::THREADS)]
    threads: Option<usize>,
    /// JSON (schema ultraep.advise/1) instead of a page
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "Examples:
  ultraep advise runs/2026-11-24T14-39-16Z --model qwen3-235b-a22b --hardware gb200-nvl72
  ultraep advise log.jsonl.gz --drop-dummy-run --model my-model.toml --hardware h100x8 --ranks 8 --within 95%
  ultraep advise traces/ --model qwen3-235b-a22b --hardware h100x8 --format md > advice.md";

fn percent(text: &str) -> Result<f64, String> {
    let number: f64 = text.trim_end_matches('%').parse().unwrap_or(f64::NAN);
    let share = if text.ends_with('%') || number > 1.0 { number / 100.0 } else { number };
    match (0.01..=1.0).contains(&share) {
        true => Ok(share),
        false => Err("allowed are 1% to 100%".to_owned()),
    }
}

/// `ultraep.advise/1`.
#[derive(Debug, Serialize)]
struct Json<'a> {
    schema: &'static str,
    recording: String,
    model: &'a str,
    hardware: &'a str,
    #[serde(flatten)]
    advice: &'a Advice,
    typical: Typical,
    paragraphs: &'a [String],
    commands: Vec<JsonCommand<'a>>,
    notes: &'a [String],
}

#[derive(Debug, Serialize)]
struct JsonCommand<'a> {
    of: &'a str,
    command: &'a str,
}

pub(crate) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    let model = super::sim::model(&args.model)?;
    let hardware = Hardware::find(&args.hardware).map_err(CliError::input)?;
    let (info, experts) = args.recording.describe()?;
    if experts != model.experts as usize {
        let (title, name, of_model) = (args.recording.title(), &model.name, model.experts);
        return Err(CliError::Input(format!(
            "{title}: {experts} experts; {name} has {of_model}: it is of another model"
        )));
    }
    let domain_ranks = hardware.domain_ranks as usize;
    let ranks = args.ranks.or(info.ranks.filter(|&ranks| ranks > 1)).unwrap_or(domain_ranks.min(experts));
    let shape = ExpertShape { hidden: model.hidden, width: model.expert_width };
    let history = HistoryParams { window: 1, interval: 1 };
    let mut params = PolicyParams { hardware: hardware.model(shape), ..PolicyParams::default() };
    (params.eplb.history, params.lplb.history) = (history, history);
    let question = Question {
        ranks,
        experts,
        slots: sorted(args.slots.clone()),
        domains: if args.domain.is_empty() { domains(ranks, domain_ranks) } else { sorted(args.domain.clone()) },
        within: args.within,
        params,
        least_quota: LeastQuota::OfLoad,
    };
    let scenarios = question.scenarios().map_err(CliError::input)?;
    let bar = progress_bar(args.recording.bytes());
    let threads = args.threads.unwrap_or_else(cores);
    let pass = Pass { recording: &args.recording, sources: &args.sources, threads, bar: &bar };
    let mut first: BTreeMap<u32, Microbatch> = BTreeMap::new();
    let Passed { outcomes, notes: passed } = pass.run((ranks, experts), &scenarios, |microbatch| {
        first.entry(microbatch.layer).or_insert_with(|| microbatch.clone());
        Ok(())
    })?;
    bar.finish_and_clear();
    let advice = question.answer(&scenarios, &outcomes).map_err(CliError::input)?;
    let typical = typical(&advice, &scenarios, &first)?;
    let list = |numbers: &[usize]| numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let subject = Subject {
        recording: format!("{}{}", args.recording.as_typed(), args.sources.as_typed()),
        model: model.name.clone(),
        layers: u64::from(model.moe_layers()),
        hardware: hardware.name.clone(),
        options: format!(
            "--hardware {} --hidden {} --expert-width {}",
            args.hardware, model.hidden, model.expert_width
        ),
        slots: list(&question.slots),
        domains: list(&question.domains),
        typical,
    };
    let page = Page::of(&advice, &subject);
    let mut notes = info.notes.clone();
    notes.extend(args.sources.grouping(ranks, experts).describe_sources(info.sources));
    notes.extend(passed);
    if args.json {
        let command = |(of, command): &'_ (&'static str, String)| (*of, command.clone());
        let commands: Vec<(&str, String)> = page.commands.iter().map(command).collect();
        return out.json(&Json {
            schema: "ultraep.advise/1",
            recording: args.recording.title(),
            model: &model.name,
            hardware: &hardware.name,
            advice: &advice,
            typical,
            paragraphs: &page.paragraphs,
            commands: commands.iter().map(|(of, command)| JsonCommand { of, command }).collect(),
            notes: &notes,
        });
    }
    print(&page, &advice, &notes, out)
}

/// The first microbatch of the layer in the middle, and from which size on balancing pays for a load of its form.
fn typical(advice: &Advice, scenarios: &[Scenario], first: &BTreeMap<u32, Microbatch>) -> Result<Typical, CliError> {
    let layer = advice.typical_layer();
    let offer = advice.offer();
    let is_chosen = |scenario: &&Scenario| {
        let same = scenario.topology.domain_ranks() == offer.domain;
        let slots = scenario.topology.slots(ultraep_plan::Rank::new(0)) == offer.slots_per_rank;
        scenario.kind == PolicyKind::Ultraep && same && slots
    };
    let (Some(microbatch), Some(scenario)) = (first.get(&layer), scenarios.iter().find(is_chosen)) else {
        return Err(CliError::Failure("the recommended group was not replayed".to_owned()));
    };
    let tokens: u64 = microbatch.counts.iter().map(|&count| u64::from(count)).sum();
    Ok(Typical {
        step: microbatch.step,
        microbatch: microbatch.microbatch,
        layer,
        tokens_per_rank: tokens / advice.ranks as u64,
        pays_from: break_even(scenario, &microbatch.counts)?,
    })
}

fn sorted(mut numbers: Vec<usize>) -> Vec<usize> {
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// The largest domain that the hardware joins and that divides the ranks, and its halves down to 4 ranks.
fn domains(ranks: usize, joined: usize) -> Vec<usize> {
    let largest = (1..=ranks.min(joined)).rev().find(|&size| ranks.is_multiple_of(size)).unwrap_or(ranks);
    let halves = std::iter::successors(Some(largest), |&size| (size % 2 == 0 && size / 2 >= 4).then_some(size / 2));
    sorted(halves.take(4).collect())
}

fn print(page: &Page, advice: &Advice, notes: &[String], out: &mut Output<'_>) -> Result<(), CliError> {
    out.wrapped(&page.title)?;
    for paragraph in &page.paragraphs {
        writeln!(out)?;
        out.wrapped(paragraph)?;
    }
    writeln!(out)?;
    let mut table = Table::new([
        Column::text("policy", "ultraep plans each microbatch anew; eplb from the one before; > is recommended"),
        Column::number("slots", "slots for replicas on each rank"),
        Column::number("domain", "ranks in a domain"),
        Column::number("imbalance", "largest over mean rank load, mean over layers and microbatches"),
        Column::number("worst", "the same, worst").minor(1),
        Column::number("replicas", "copies of experts a plan, mean").minor(2),
        Column::bytes("memory", "what the slots of a rank hold: bf16 weights, once for all layers"),
        Column::time("predicted", "forward of a layer on the hardware, mean"),
        Column::number("of ideal", "predicted time of ideal routing over this one's"),
        Column::number("speedup", "predicted time of no balancing over this one's"),
    ]);
    let mut row = |offer: &Offer, mark: &str| {
        table.row([
            Cell::shown(format!("{mark}{}", offer.policy), offer.policy),
            Cell::count(offer.slots_per_rank),
            Cell::count(offer.domain),
            Cell::number(offer.imbalance_mean, 3),
            Cell::number(offer.imbalance_worst, 3),
            Cell::number(offer.replicas_mean, 1),
            Cell::bytes(offer.slot_bytes_per_rank),
            Cell::ns(offer.predicted_ns_mean as u64),
            Cell::share(offer.share_of_ideal),
            Cell::shown(format!("{:.2}x", offer.speedup), offer.speedup),
        ]);
    };
    row(&advice.none, "");
    row(&advice.history, "");
    for (at, offer) in advice.offers.iter().enumerate() {
        row(offer, if at == advice.chosen { "> " } else { "" });
    }
    row(&advice.ideal, "");
    out.table(&table)?;
    for note in notes {
        out.wrapped(&format!("note: {note}"))?;
    }
    writeln!(out, "\nThe same numbers again:")?;
    for (of, command) in &page.commands {
        writeln!(out, "  {of}:\n    {command}")?;
    }
    Ok(())
}
