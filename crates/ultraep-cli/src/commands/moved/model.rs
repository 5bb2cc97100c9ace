//! Times that the transfer planner's model of a fabric predicts, beside the bound that no plan of transfers beats. They are
//! numbers of a model, not measurements.

use std::io::Write;

use serde::Serialize;
use ultraep_plan::{
    BoundTables, Ratio, Topology, TransferClock, TransferModel, TransferPlan, TransferPlanner, Transfers,
};

use super::{Args, LoadRecord, Mode, Planned};
use crate::commands::write_json;
use crate::error::CliError;
use crate::output::Output;
use crate::table::{Cell, Column, Table};
use crate::timing::{measure, pretty};

/// `ultraep.weight-sync/1`.
#[derive(Debug, Serialize)]
struct Record {
    schema: &'static str,
    bench: &'static str,
    /// Where the times come from.
    source: &'static str,
    #[serde(flatten)]
    load: LoadRecord,
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
    bound_sharing_ns: u64,
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

/// Defaults of the group in mode `--model`.
const RANKS: usize = 64;
const TOP_K: u32 = 8;
const RATIOS: [&str; 5] = ["1.5", "2", "4", "6", "8"];

pub(super) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    let load = &args.load;
    let (topology, top_k) = (load.topology(RANKS)?, load.top_k.unwrap_or(TOP_K));
    let expert_bytes = match args.expert_bytes[..] {
        [] => TransferModel::default().expert_bytes,
        [bytes] => bytes,
        _ => return Err(CliError::input("--expert-bytes: --model takes one size at a time")),
    };
    let model = TransferModel::of_link(expert_bytes, args.chunk_bytes, args.link_bytes_per_s, args.hop_ns);
    model.check().map_err(CliError::input)?;
    let ratios = load.ratios(&RATIOS)?.into_iter();
    let lines = ratios.map(|ratio| line(args, &topology, model, (ratio, top_k))).collect::<Result<_, _>>()?;
    let record = Record {
        schema: "ultraep.weight-sync/1",
        bench: "weight-sync",
        source: "model",
        load: load.record(&topology, top_k),
        expert_bytes: model.expert_bytes,
        chunk_bytes: model.chunk_bytes,
        send_ns: model.send_ns,
        receive_ns: model.receive_ns,
        hop_ns: model.hop_ns,
        lines,
    };
    if args.json { write_json(out, &record) } else { print(&record, out) }
}

fn line(
    args: &Args,
    topology: &Topology,
    model: TransferModel,
    (ratio, top_k): (Ratio, u32),
) -> Result<Line, CliError> {
    let Planned { imbalance_before, transfers } = args.load.planned(topology, ratio, top_k)?;
    let bound = BoundTables::new(topology, model).map_err(CliError::input)?.bound(&transfers);
    let bound_ns = bound.ns();
    let subject = Subject { topology, model, transfers: &transfers, bound_ns, max_stripes: args.max_stripes };
    Ok(Line {
        imbalance_before,
        replicas: transfers.all().len(),
        busiest_receiver_copies: transfers.receives().iter().copied().max().unwrap_or(0),
        bound_ns,
        bound_receiver_ns: bound.receiver_ns,
        bound_links_ns: bound.links_ns,
        bound_sharing_ns: bound.sharing_ns,
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

fn print(record: &Record, out: &mut Output<'_>) -> Result<(), CliError> {
    writeln!(
        out,
        "weight-sync of {}, predicted by a model: {} experts on {} ranks, {} slots, {}, {} tokens a rank, top-{}",
        record.load.policy,
        record.load.experts,
        record.load.ranks,
        record.load.slots_per_rank,
        record.load.workload,
        record.load.tokens_per_rank,
        record.load.top_k
    )?;
    writeln!(
        out,
        "{} bytes an expert in chunks of {}, {} a chunk on a link, {} a hop",
        record.expert_bytes,
        record.chunk_bytes,
        pretty(record.send_ns),
        pretty(record.hop_ns)
    )?;
    let mut table = Table::new([
        Column::number("imbalance", "largest over mean rank load as routed"),
        Column::number("replicas", "copies of experts that the plan makes").minor(3),
        Column::time("bound", "no plan of transfers takes less"),
        Column::text("mode", "direct: home ranks send all; others relay through replicas"),
        Column::time("predicted", "weight sync of the layer, by the model"),
        Column::number("of bound", "predicted over bound"),
        Column::number("relayed", "experts that go through relays").minor(4),
        Column::number("fan-out", "copies that the busiest sender sends").minor(2),
        Column::number("stripes", "most parts that one expert is cut into").minor(5),
        Column::number("hops", "longest way of a chunk").minor(6),
        Column::time("planned in", "median time to plan the transfers").minor(1),
    ])
    .grouped_by(3);
    for line in &record.lines {
        for of_mode in &line.modes {
            table.row([
                Cell::number(line.imbalance_before, 2),
                Cell::count(line.replicas),
                Cell::ns(line.bound_ns),
                Cell::text(of_mode.mode),
                Cell::ns(of_mode.predicted_ns),
                Cell::number(of_mode.ratio_to_bound, 2),
                Cell::count(of_mode.relayed_experts),
                Cell::number(of_mode.fanout_copies, 2),
                Cell::count(of_mode.stripes),
                Cell::count(of_mode.hops),
                Cell::ns(of_mode.plan_p50_ns),
            ]);
        }
    }
    out.table(&table)?;
    Ok(())
}
