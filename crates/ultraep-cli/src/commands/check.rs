//! `ultraep check`: how good is the placement that runs now, and what would ours be.

use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;
use ultraep_advise::{Judge, Judged, Totals, same_room};
use ultraep_baselines::{PolicyKind, PolicyParams};
use ultraep_placement::{Findings, Method, PlacementMap, ReadHints};
use ultraep_replay::{LeastQuota, Outcomes, Scenario};

use super::pass::{Pass, Passed, progress_bar};
use super::placement::read_map;
use super::recordings::{LoadPaths, RecordingArgs, SourceArgs};
use super::train::cores;
use crate::error::CliError;
use crate::options;
use crate::output::Output;
use crate::table::{Cell, Column, Table};

/// Arguments of `ultraep check`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The placement: a file for SGLang, vLLM, vLLM-Ascend or TensorRT-LLM; which, its content says
    #[arg(value_name = "MAP")]
    map: PathBuf,
    #[command(flatten)]
    load: LoadPaths,
    #[command(flatten)]
    sources: SourceArgs,
    #[arg(long, value_name = "N", value_parser = options::ranks(),
          help = format!("{} [default: as in the map, else as recorded]", options::RANKS))]
    ranks: Option<usize>,
    #[arg(long, value_name = "G", value_parser = options::ranks(), help = options::DOMAIN)]
    domain: Option<usize>,
    #[arg(long, value_name = "N", value_parser = options::threads(), help = options::THREADS)]
    threads: Option<usize>,
    /// JSON (schema ultraep.check/1) instead of a table
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "Examples:
  ultraep check placement.json --load runs/2026-11-24T14-39-16Z
  ultraep check expert_map.json --load log.jsonl.gz --drop-dummy-run --microbatch-tokens 4096
  ultraep check eplb.yaml --load loads.npy --ranks 16 --json | jq .now.imbalance_mean

Exit code 1 for a map in which an expert is on no rank.";

/// `ultraep.check/1`.
#[derive(Debug, Serialize)]
struct Check {
    schema: &'static str,
    map: String,
    format: &'static str,
    load: String,
    valid: bool,
    ranks: usize,
    experts: usize,
    slots_per_rank: usize,
    rows: usize,
    /// (row, expert) that no rank holds.
    missing: Vec<(usize, usize)>,
    /// Pairs of a rank and an expert that it holds twice or more, over all rows.
    twice: usize,
    empty_slots: usize,
    unequal_rows: usize,
    notes: Vec<String>,
    /// `None` for an invalid map.
    now: Option<Figures>,
    /// One static placement for the whole load, in as many slots.
    static_ours: Option<Figures>,
    /// Planned for every microbatch's exact load, in as many slots.
    exact_ours: Option<Figures>,
    layers: Vec<LayerFigures>,
}

/// Of one way to place.
#[derive(Clone, Copy, Debug, Serialize)]
struct Figures {
    imbalance_mean: f64,
    imbalance_worst: f64,
    remote_share: f64,
}

#[derive(Debug, Serialize)]
struct LayerFigures {
    layer: u32,
    row: usize,
    imbalance_mean: f64,
    imbalance_worst: f64,
    remote_share: f64,
    twice: usize,
    empty_slots: usize,
    static_imbalance_mean: f64,
    exact_imbalance_mean: f64,
}

impl Figures {
    fn of_judged(judged: &Judged) -> Self {
        let (imbalance_mean, imbalance_worst) = (judged.imbalance.mean(), judged.imbalance.largest);
        Self { imbalance_mean, imbalance_worst, remote_share: judged.remote_share() }
    }

    fn of_outcomes(outcomes: &Outcomes) -> Self {
        let (imbalance_mean, imbalance_worst) = (outcomes.imbalance.mean(), outcomes.imbalance.largest);
        Self { imbalance_mean, imbalance_worst, remote_share: outcomes.remote_share() }
    }
}

pub(crate) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    let recording = args.load.recording();
    let (info, experts) = recording.describe()?;
    let hints = |ranks| ReadHints { ranks, experts: Some(experts) };
    let (map, format) = match read_map(&args.map, hints(args.ranks)) {
        // The load knows its ranks where the map does not.
        Err(_) if args.ranks.is_none() && info.ranks.is_some_and(|ranks| ranks > 1) => {
            read_map(&args.map, hints(info.ranks))?
        }
        read => read?,
    };
    let (shape, findings) = (map.shape(), map.findings());
    let mut check = Check {
        schema: "ultraep.check/1",
        map: args.map.display().to_string(),
        format: format.name(),
        load: recording.title(),
        valid: findings.is_valid(),
        ranks: shape.ranks,
        experts,
        slots_per_rank: shape.slots_per_rank,
        rows: shape.layers,
        missing: findings.missing.clone(),
        twice: findings.twice.len(),
        empty_slots: findings.empty_slots,
        unequal_rows: findings.unequal_rows,
        notes: info.notes.clone(),
        now: None,
        static_ours: None,
        exact_ours: None,
        layers: Vec::new(),
    };
    if check.valid {
        check.notes.extend(args.sources.grouping(shape.ranks, experts).describe_sources(info.sources));
        measure(args, &recording, map, &findings, &mut check)?;
    }
    if args.json {
        out.json(&check)?
    } else {
        check.print(out)?
    }
    match check.missing.first() {
        None => Ok(()),
        Some((row, expert)) => Err(CliError::Failure(format!(
            "{}: invalid: {} without a rank, the first is expert {expert} of row {row}",
            check.map,
            super::trace::plural(check.missing.len(), "expert")
        ))),
    }
}

/// The map, one static placement, and a plan for every microbatch, over the same load.
fn measure(
    args: &Args,
    recording: &RecordingArgs,
    map: PlacementMap,
    findings: &Findings,
    check: &mut Check,
) -> Result<(), CliError> {
    let (_, survey, _) = recording.survey()?;
    let layers: Vec<u32> = survey.layers.keys().copied().collect();
    let topology = same_room(&map, args.domain.unwrap_or(check.ranks)).map_err(CliError::input)?;
    let scenario = Scenario {
        kind: PolicyKind::Ultraep,
        topology: topology.clone(),
        params: PolicyParams::default(),
        least_quota: LeastQuota::OfLoad,
    };
    let bar = progress_bar(recording.bytes().saturating_mul(2));
    let threads = args.threads.unwrap_or_else(cores);
    let pass = Pass { recording, sources: &args.sources, threads, bar: &bar };
    let (size, mut totals) = ((check.ranks, check.experts), Totals::default());
    let mut now = Judge::new(map, &layers).map_err(CliError::input)?;
    let Passed { outcomes, notes } = pass.run(size, &[scenario], |microbatch| {
        totals.add(microbatch, check.experts);
        now.add(microbatch).map_err(CliError::input)
    })?;
    check.notes.extend(notes);
    let ours = totals.place(&topology, Method::Search).map_err(CliError::input)?;
    let mut ours = Judge::new(ours, &totals.layers().collect::<Vec<_>>()).map_err(CliError::input)?;
    pass.run(size, &[], |microbatch| ours.add(microbatch).map_err(CliError::input))?;
    bar.finish_and_clear();
    check.now = Some(Figures::of_judged(now.all()));
    check.static_ours = Some(Figures::of_judged(ours.all()));
    check.exact_ours = outcomes.first().map(Figures::of_outcomes);
    for (&layer, judged) in now.layers() {
        let row = now.row(layer).unwrap_or_default();
        let exact = outcomes.first().and_then(|o| o.layers.get(&layer)).map_or(0.0, |of_layer| of_layer.mean());
        check.layers.push(LayerFigures {
            layer,
            row,
            imbalance_mean: judged.imbalance.mean(),
            imbalance_worst: judged.imbalance.largest,
            remote_share: judged.remote_share(),
            twice: findings.twice.iter().filter(|(of_row, _, _)| *of_row == row).count(),
            empty_slots: now.map().row(row).iter().filter(|&&entry| entry == ultraep_placement::EMPTY).count(),
            static_imbalance_mean: ours.layers().get(&layer).map_or(0.0, |of_layer| of_layer.imbalance.mean()),
            exact_imbalance_mean: exact,
        });
    }
    Ok(())
}

impl Check {
    fn print(&self, out: &mut Output<'_>) -> Result<(), CliError> {
        let Self { map, format, ranks, experts, slots_per_rank, rows, load, .. } = self;
        out.wrapped(&format!(
            "{map} ({format}): {rows} layers, {experts} experts on {ranks} ranks of {slots_per_rank} slots; load {load}"
        ))?;
        for (row, expert) in self.missing.iter().take(20) {
            writeln!(out, "row {row}: expert {expert} is on no rank")?;
        }
        if let (Some(now), Some(static_ours), Some(exact_ours)) = (self.now, self.static_ours, self.exact_ours) {
            let mut table = Table::new([
                Column::text(
                    "placement",
                    "now: the map; static: one of ours for the whole load; exact: planned each time",
                ),
                Column::number("imbalance", "largest over mean rank load, mean over layers and microbatches"),
                Column::number("worst", "the same, worst"),
                Column::number("remote", "tokens processed away from their source"),
                Column::text("experts", "who shares: evenly over copies, or as planned (and local first)"),
            ]);
            let even = "all may move, tokens shared evenly";
            for (name, figures, how) in [
                ("now", now, "tokens shared evenly"),
                ("static", static_ours, even),
                ("exact", exact_ours, "masters stay, tokens as planned"),
            ] {
                table.row([
                    Cell::text(name),
                    Cell::number(figures.imbalance_mean, 4),
                    Cell::number(figures.imbalance_worst, 3),
                    Cell::share(figures.remote_share),
                    Cell::text(how),
                ]);
            }
            out.table(&table)?;
            out.table(&self.layer_table())?;
        }
        out.wrapped(&format!(
            "two copies of one expert on a rank: {}; empty slots: {}; layers whose ranks hold different numbers: {}",
            self.twice, self.empty_slots, self.unequal_rows
        ))?;
        for note in &self.notes {
            out.wrapped(&format!("note: {note}"))?;
        }
        Ok(())
    }

    fn layer_table(&self) -> Table {
        let mut table = Table::new([
            Column::number("layer", "MoE layer, by the load's own number"),
            Column::number("row", "row of the map").minor(2),
            Column::number("now", "imbalance under the map, mean over microbatches"),
            Column::number("worst", "the same, worst"),
            Column::number("static", "mean imbalance of our static placement"),
            Column::number("exact", "mean imbalance planned for the exact load"),
            Column::number("remote", "tokens processed away from their source under the map").minor(1),
            Column::number("twice", "experts that a rank holds twice"),
            Column::number("empty", "slots that hold nothing"),
        ]);
        for layer in &self.layers {
            table.row([
                Cell::count(layer.layer),
                Cell::count(layer.row),
                Cell::number(layer.imbalance_mean, 3),
                Cell::number(layer.imbalance_worst, 3),
                Cell::number(layer.static_imbalance_mean, 3),
                Cell::number(layer.exact_imbalance_mean, 3),
                Cell::share(layer.remote_share),
                Cell::count(layer.twice),
                Cell::count(layer.empty_slots),
            ]);
        }
        table
    }
}
