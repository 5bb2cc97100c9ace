//! Measured times, beside the machine's own limit.

use std::io::Write;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use ultraep_fabric::WindowId;
use ultraep_fabric::stream::{EngineSpec, ExpertLayout, Shard, Slots, TileSizes, WeightFormat};
use ultraep_plan::{MAX_STRIPES, Ratio, Topology, TransferClock, TransferPlan, TransferPlanner, Transfers};

use super::group::{Case, Outcome, Work};
use super::{Args, LoadArgs, LoadRecord, MeasureArgs, Planned, ReduceArgs};
use crate::commands::write_json;
use crate::error::CliError;
use crate::output::Output;
use crate::table::{Cell, Column, Table};

/// Defaults of the group.
const RANKS: usize = 4;
const TOP_K: u32 = 2;
const RATIOS: [&str; 3] = ["1.5", "2", "3"];
const EXPERT_BYTES: [u64; 4] = [1 << 20, 4 << 20, 16 << 20, 64 << 20];
/// Elements of a row of fc1: experts have this width, and as many rows as their bytes allow.
const HIDDEN: usize = 1024;

/// `ultraep.moved/2`.
#[derive(Debug, Serialize)]
struct Record {
    schema: &'static str,
    bench: &'static str,
    source: &'static str,
    #[serde(flatten)]
    load: LoadRecord,
    format: &'static str,
    workers: u64,
    /// Threads of the group and of the limit.
    threads: usize,
    tile_bytes: usize,
    iterations: u64,
    lines: Vec<Line>,
}

/// One size of experts at one initial imbalance.
#[derive(Debug, Serialize)]
struct Line {
    imbalance_before: f64,
    expert_bytes: usize,
    replicas: usize,
    modes: Vec<OfMode>,
}

/// What one mode takes.
#[derive(Debug, Serialize)]
struct OfMode {
    mode: &'static str,
    p50_ns: u64,
    fastest_ns: u64,
    /// Of all ranks.
    read_bytes: u64,
    written_bytes: u64,
    /// Read and written, over the median.
    bytes_per_s: f64,
    /// What the busiest rank sends or receives, over the median.
    critical_bytes_per_s: f64,
    /// Bytes that the busiest rank reads and writes, over the mean of the ranks: the plan's unevenness, which the limit shares.
    busiest_over_mean: f64,
    /// What the machine does with the same bytes on the same threads in plain loops (median), and in which of them.
    limit_ns: u64,
    limit_loop: String,
    limit_bytes_per_s: f64,
    /// Limit over latency, run by run, median: 1 is the machine's own speed.
    of_limit: f64,
    /// Its quartiles.
    of_limit_low: f64,
    of_limit_high: f64,
    /// Under the model of the stated link; none for grad reduce.
    predicted_ns: Option<u64>,
}

pub(super) fn weight_sync(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    let chunk_bytes = usize::try_from(args.chunk_bytes).unwrap_or(usize::MAX);
    let tiles = TileSizes { tile_bytes: args.tile_bytes, chunk_bytes };
    let subject =
        Subject::new("weight-sync", &args.load, &args.measure, args.format, tiles, args.streaming_from_bytes)?;
    let names: Vec<&'static str> = args.mode.iter().map(|mode| mode.name()).collect();
    let lines = subject.lines(&args.expert_bytes, |slots, planned, progress| {
        let model = slots.model(args.link_bytes_per_s, args.hop_ns).map_err(CliError::input)?;
        let mut clock = TransferClock::new(&subject.topology, model).map_err(CliError::input)?;
        let mut plans = Vec::new();
        for mode in &args.mode {
            let params = mode.params(args.max_stripes);
            let mut planner = TransferPlanner::new(&subject.topology, model, params).map_err(CliError::input)?;
            let mut plan = TransferPlan::new(&subject.topology);
            planner.plan(&planned.transfers, &mut plan);
            plans.push(plan);
        }
        let predicted: Vec<_> = plans.iter().map(|plan| Some(clock.run(plan))).collect();
        let critical: Vec<u64> = plans.iter().map(|plan| critical_bytes(plan, slots)).collect();
        let outcomes = subject.case(slots, &planned.transfers, Work::Sync(&plans), progress).run()?;
        Ok(subject.line(slots, planned, outcomes, names.iter().copied().zip(critical).zip(predicted)))
    })?;
    subject.report(lines, args.json, out)
}

pub(super) fn grad_reduce(args: &ReduceArgs, out: &mut Output<'_>) -> Result<(), CliError> {
    let tiles = TileSizes { tile_bytes: args.tile_bytes, chunk_bytes: args.tile_bytes.saturating_mul(8) };
    let subject = Subject::new(
        "grad-reduce",
        &args.load,
        &args.measure,
        WeightFormat::F32,
        tiles,
        EngineSpec::STREAMING_FROM_BYTES,
    )?;
    let lines = subject.lines(&args.expert_bytes, |slots, planned, progress| {
        let both = planned.transfers.sends().iter().chain(planned.transfers.receives());
        let critical = both.copied().max().map_or(0, u64::from) * slots.layout().bytes() as u64;
        let outcomes = subject.case(slots, &planned.transfers, Work::Reduce, progress).run()?;
        Ok(subject.line(slots, planned, outcomes, std::iter::once((("fixed order", critical), None))))
    })?;
    subject.report(lines, args.json, out)
}

/// Bytes that the busiest rank sends or receives.
fn critical_bytes(plan: &TransferPlan, slots: &Slots) -> u64 {
    let mut copies = vec![[0_u64; 2]; plan.ranks()];
    for task in plan.tasks() {
        copies[task.transfer.from.index()][0] += 1;
        copies[task.transfer.to.index()][1] += 1;
    }
    let busiest = copies.into_iter().flatten().max().unwrap_or(0);
    busiest * slots.layout().bytes() as u64 / u64::from(plan.stripes().max(1))
}

/// What all lines share.
struct Subject<'a> {
    bench: &'static str,
    load: &'a LoadArgs,
    measure: &'a MeasureArgs,
    format: WeightFormat,
    tiles: TileSizes,
    engine: EngineSpec,
    topology: Topology,
}

impl<'a> Subject<'a> {
    fn new(
        bench: &'static str,
        load: &'a LoadArgs,
        measure: &'a MeasureArgs,
        format: WeightFormat,
        tiles: TileSizes,
        streaming_from_bytes: u64,
    ) -> Result<Self, CliError> {
        let topology = load.topology(RANKS)?;
        let tasks = topology.ranks() * load.slots * MAX_STRIPES as usize;
        let engine = EngineSpec { background: measure.workers as usize, tasks, streaming_from_bytes };
        Ok(Self { bench, load, measure, format, tiles, engine, topology })
    }

    fn top_k(&self) -> u32 {
        self.load.top_k.unwrap_or(TOP_K)
    }

    /// Measures every size at every imbalance.
    fn lines(
        &self,
        expert_bytes: &[u64],
        measure: impl Fn(&Slots, &Planned, &ProgressBar) -> Result<Line, CliError>,
    ) -> Result<Vec<Line>, CliError> {
        let sizes = if expert_bytes.is_empty() { &EXPERT_BYTES[..] } else { expert_bytes };
        let ratios = self.load.ratios(&RATIOS)?;
        let rounds = (self.measure.iterations + 3) * (sizes.len() * ratios.len()) as u64;
        let progress = ProgressBar::new(rounds);
        let style = ProgressStyle::with_template("measuring {bar:40} {pos}/{len} rounds, {eta} left");
        progress.set_style(style.map_err(CliError::failure)?);
        let mut lines = Vec::new();
        // All loads first: what cannot be generated is told before anything is measured.
        let plan = |ratio: Ratio| self.load.planned(&self.topology, ratio, self.top_k());
        for planned in ratios.into_iter().map(plan).collect::<Result<Vec<_>, _>>()? {
            for &bytes in sizes {
                let layout = ExpertLayout::new(&shards(self.format, bytes)).map_err(CliError::input)?;
                let slots = Slots::new(WindowId::new(0), layout, self.tiles, self.load.slots);
                lines.push(measure(&slots, &planned, &progress)?);
            }
        }
        progress.finish_and_clear();
        Ok(lines)
    }

    fn case<'b>(
        &'b self,
        slots: &'b Slots,
        transfers: &'b Transfers,
        work: Work<'b>,
        progress: &'b ProgressBar,
    ) -> Case<'b> {
        let iterations = self.measure.iterations as usize;
        Case { topology: &self.topology, transfers, slots, work, engine: self.engine, iterations, progress }
    }

    fn line(
        &self,
        slots: &Slots,
        planned: &Planned,
        outcomes: Vec<Outcome>,
        modes: impl Iterator<Item = ((&'static str, u64), Option<u64>)>,
    ) -> Line {
        let per_s = |bytes: u64, ns: u64| bytes as f64 * 1e9 / ns.max(1) as f64;
        let of_mode = |(outcome, ((mode, critical), predicted_ns)): (Outcome, ((&'static str, u64), Option<u64>))| {
            let Outcome { p50_ns, fastest_ns, moved, busiest, limit: (limit_loop, limit_ns), of_limit } = outcome;
            let bytes = moved.read_bytes + moved.written_bytes;
            let [of_limit_low, of_limit, of_limit_high] = of_limit;
            OfMode {
                mode,
                p50_ns,
                fastest_ns,
                read_bytes: moved.read_bytes,
                written_bytes: moved.written_bytes,
                bytes_per_s: per_s(bytes, p50_ns),
                critical_bytes_per_s: per_s(critical, p50_ns),
                busiest_over_mean: busiest,
                limit_ns,
                limit_loop,
                limit_bytes_per_s: per_s(bytes, limit_ns),
                of_limit,
                of_limit_low,
                of_limit_high,
                predicted_ns,
            }
        };
        Line {
            imbalance_before: planned.imbalance_before,
            expert_bytes: slots.layout().bytes(),
            replicas: planned.transfers.all().len(),
            modes: outcomes.into_iter().zip(modes).map(of_mode).collect(),
        }
    }

    fn report(&self, lines: Vec<Line>, json: bool, out: &mut Output<'_>) -> Result<(), CliError> {
        let (load, ranks) = (self.load, self.topology.ranks());
        let record = Record {
            schema: "ultraep.moved/2",
            bench: self.bench,
            source: "measured",
            load: load.record(&self.topology, self.top_k()),
            format: self.format.name(),
            workers: self.measure.workers,
            threads: ranks * (1 + self.engine.background),
            tile_bytes: self.tiles.tile_bytes,
            iterations: self.measure.iterations,
            lines,
        };
        if json { write_json(out, &record) } else { print(&record, out) }
    }
}

/// The shards of an expert of about so many bytes.
fn shards(format: WeightFormat, bytes: u64) -> Vec<Shard> {
    let hidden = HIDDEN.min(usize::try_from(bytes / 12).unwrap_or(HIDDEN)).max(1);
    let of_one: usize =
        format.shards(hidden, 1).iter().map(|shard| shard.rows * shard.columns * shard.element.bytes()).sum();
    format.shards(hidden, usize::try_from(bytes).unwrap_or(usize::MAX).div_ceil(of_one).max(1))
}

fn print(record: &Record, out: &mut Output<'_>) -> Result<(), CliError> {
    writeln!(
        out,
        "{} of {}, measured in this machine's memory: {} experts of {} on {} ranks (threads) with {} workers each, {} slots, {}",
        record.bench,
        record.load.policy,
        record.load.experts,
        record.format,
        record.load.ranks,
        record.workers,
        record.load.slots_per_rank,
        record.load.workload
    )?;
    writeln!(
        out,
        "median of {} runs; limit: the same reads and writes in plain loops, each rank's by its {} threads, interleaved (see --help)",
        record.iterations,
        1 + record.workers
    )?;
    let rate = |bytes_per_s: f64| Cell::shown(format!("{:.1} GB/s", bytes_per_s / 1e9), bytes_per_s);
    let size = |bytes: u64| Cell::shown(format!("{:.1} MB", bytes as f64 / 1e6), bytes);
    let mut table = Table::new([
        Column::number("imbalance", "largest over mean rank load as routed"),
        Column::bytes("expert", "bytes of one expert"),
        Column::number("replicas", "copies of experts that are made").minor(4),
        Column::text("mode", "how transfers are planned"),
        Column::time("latency", "median from the start until all ranks are done"),
        Column::bytes("read", "bytes read over all ranks").minor(6),
        Column::bytes("written", "bytes written over all ranks").minor(6),
        Column::number("rate", "bytes read and written a second").minor(3),
        Column::number("critical rate", "bytes of the busiest rank a second").minor(7),
        Column::number("busiest", "bytes of the busiest rank over the mean").minor(5),
        Column::time("limit", "the same reads and writes in plain loops"),
        Column::number("of limit", "limit over latency, in percent"),
        Column::number("quartiles", "of limit, quartiles over the runs").minor(2),
        Column::time("model", "what the transfer model predicts").minor(7),
        Column::text("limit's loop", "the plain loop that was fastest").minor(8),
    ])
    .grouped_by(3);
    for line in &record.lines {
        for of_mode in &line.modes {
            table.row([
                Cell::number(line.imbalance_before, 2),
                size(line.expert_bytes as u64),
                Cell::count(line.replicas),
                Cell::text(of_mode.mode),
                Cell::ns(of_mode.p50_ns),
                size(of_mode.read_bytes),
                size(of_mode.written_bytes),
                rate(of_mode.bytes_per_s),
                rate(of_mode.critical_bytes_per_s),
                Cell::number(of_mode.busiest_over_mean, 2),
                Cell::ns(of_mode.limit_ns),
                Cell::shown(format!("{:.0}%", of_mode.of_limit * 100.0), of_mode.of_limit * 100.0),
                Cell::text(format!("{:.0}-{:.0}", of_mode.of_limit_low * 100.0, of_mode.of_limit_high * 100.0)),
                Cell::maybe(of_mode.predicted_ns, Cell::ns),
                Cell::text(of_mode.limit_loop.clone()),
            ]);
        }
    }
    out.table(&table)
}
