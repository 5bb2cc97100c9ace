//! `ultraep replay --only`: one microbatch planned by every scenario, as a table or JSON.

use std::collections::VecDeque;
use std::io::Write;

use serde::Serialize;
use ultraep_import::{Microbatch, Microbatches, OpenOptions};
use ultraep_plan::Rank;
use ultraep_replay::{Hardware, LeastQuota, Replan, ReplanError, Scenario, break_even, quotient, replan};

use super::{Args, Place};
use crate::commands::recordings::grouping_error;
use crate::commands::write_json;
use crate::error::CliError;
use crate::output::Output;
use crate::table::{Cell, Column, Table};

/// `ultraep.replan/1`.
#[derive(Debug, Serialize)]
struct Replans {
    schema: &'static str,
    recording: String,
    step: u64,
    microbatch: u32,
    layer: u32,
    notes: Vec<String>,
    plans: Vec<Line>,
}

/// One scenario's plan.
#[derive(Debug, Serialize)]
struct Line {
    ranks: usize,
    domain: usize,
    slots_per_rank: usize,
    /// As asked for: tokens or "auto".
    least_quota: LeastQuota,
    /// What the plan kept to, in tokens.
    min_quota: u32,
    policy: &'static str,
    /// Why there is no plan; the rest is 0 then.
    refusal: Option<String>,
    imbalance_before: f64,
    imbalance_after: f64,
    replicas: usize,
    max_fanout: usize,
    remote_share: f64,
    weight_sync_ns: u64,
    direct_weight_sync_ns: u64,
    predicted_ns: u64,
    /// Routed tokens a rank from which on it is predicted to be faster than masters only, for a load of this form.
    pays_from: Option<u64>,
    digest: Option<String>,
}

pub(super) fn run(args: &Args, place: Place, out: &mut Output<'_>) -> Result<(), CliError> {
    let (info, experts) = args.recording.describe()?;
    let hardware = args.hardware.as_deref().map(Hardware::find).transpose().map_err(CliError::input)?;
    let Place { step, microbatch, layer } = place;
    let (mut plans, mut notes) = (Vec::new(), info.notes.clone());
    for ranks in args.ranks_for(&info, experts) {
        let scenarios = args.scenarios(ranks, experts, hardware.as_ref(), &mut notes);
        if scenarios.is_empty() {
            continue;
        }
        notes.extend(args.sources.grouping(ranks, experts).describe_sources(info.sources));
        let (counts, history) = find(args, place, ranks, experts)?;
        for scenario in &scenarios {
            let mut line = Line::of(scenario, replan(scenario, &counts, &history))?;
            // A historical policy's placement does not follow from one load.
            if line.refusal.is_none() && !scenario.kind.is_historical() && !scenario.kind.forces_routing() {
                line.pays_from = break_even(scenario, &counts)?;
            }
            plans.push(line);
        }
    }
    if plans.is_empty() {
        return Err(CliError::Input(notes.join("; ")));
    }
    let recording = args.recording.title();
    let all = Replans { schema: "ultraep.replan/1", recording, step, microbatch, layer, notes, plans };
    if args.json { write_json(out, &all) } else { all.print(out) }
}

/// The microbatch's counts, and those of its layer before it, oldest first.
fn find(args: &Args, place: Place, ranks: usize, experts: usize) -> Result<(Vec<u32>, Vec<Vec<u32>>), CliError> {
    let mut recording = args.recording.open(&OpenOptions::default())?;
    let grouping = args.sources.grouping(ranks, experts);
    let mut microbatches = Microbatches::new(&mut *recording, grouping).map_err(grouping_error)?;
    let (mut one, mut history) = (Microbatch::default(), VecDeque::new());
    let kept = args.window.max(args.interval);
    while microbatches.next(&mut one).map_err(grouping_error)? {
        if one.layer != place.layer {
            continue;
        }
        if (one.step, one.microbatch) == (place.step, place.microbatch) {
            return Ok((one.counts, history.into()));
        }
        history.push_back(std::mem::take(&mut one.counts));
        if history.len() > kept {
            history.pop_front();
        }
    }
    Err(CliError::Input(format!("--only {place}: {} has no such microbatch; see trace info", args.recording.title())))
}

impl Line {
    fn of(scenario: &Scenario, planned: Result<Replan, ReplanError>) -> Result<Self, CliError> {
        let topology = &scenario.topology;
        let mut line = Self {
            ranks: topology.ranks(),
            domain: topology.domain_ranks(),
            slots_per_rank: topology.slots(Rank::new(0)),
            least_quota: scenario.least_quota,
            min_quota: 0,
            policy: scenario.kind.name(),
            refusal: None,
            imbalance_before: 0.0,
            imbalance_after: 0.0,
            replicas: 0,
            max_fanout: 0,
            remote_share: 0.0,
            weight_sync_ns: 0,
            direct_weight_sync_ns: 0,
            predicted_ns: 0,
            pays_from: None,
            digest: None,
        };
        match planned {
            Ok(Replan { anatomy, digest, max_fanout, min_quota }) => {
                line.min_quota = min_quota;
                line.imbalance_before = anatomy.imbalance_before();
                line.imbalance_after = anatomy.imbalance_after();
                line.replicas = anatomy.plan.replicas();
                line.max_fanout = max_fanout;
                line.remote_share = quotient((anatomy.remote_tokens, anatomy.total_tokens()));
                (line.weight_sync_ns, line.direct_weight_sync_ns) = (anatomy.sync_ns, anatomy.direct_sync_ns);
                line.predicted_ns = anatomy.prediction.total_ps().div_ceil(1000);
                line.digest = Some(format!("{digest:016x}"));
            }
            Err(error) if error.is_input() => line.refusal = Some(error.to_string()),
            Err(error) => return Err(CliError::failure(error)),
        }
        Ok(line)
    }
}

impl Replans {
    fn print(&self, out: &mut Output<'_>) -> Result<(), CliError> {
        let Self { recording, step, microbatch, layer, .. } = self;
        writeln!(out, "{recording}: step {step}, microbatch {microbatch}, layer {layer}")?;
        let mut table = Table::new([
            Column::number("ranks", "ranks in the EP group"),
            Column::number("domain", "ranks in a domain").minor(4),
            Column::number("slots", "slots for replicas on each rank"),
            Column::number("min quota", "least tokens worth a replica").minor(3),
            Column::text("policy", "who planned"),
            Column::number("as routed", "largest over mean rank load before balancing"),
            Column::number("after", "the same after balancing"),
            Column::number("replicas", "copies of experts").minor(1),
            Column::number("remote", "tokens processed away from their source").minor(2),
            Column::time("weight sync", "by the planned transfers, chunk by chunk").minor(1),
            Column::time("if direct", "the same if home ranks sent everything").minor(5),
            Column::time("predicted", "forward of the layer by the hardware model"),
            Column::number("pays from", "routed tokens a rank from which on it beats masters only").minor(2),
        ]);
        for line in self.plans.iter().filter(|line| line.refusal.is_none()) {
            table.row([
                Cell::count(line.ranks),
                Cell::count(line.domain),
                Cell::count(line.slots_per_rank),
                Cell::count(line.min_quota),
                Cell::text(line.policy),
                Cell::number(line.imbalance_before, 4),
                Cell::number(line.imbalance_after, 4),
                Cell::count(line.replicas),
                Cell::share(line.remote_share),
                Cell::ns(line.weight_sync_ns),
                Cell::ns(line.direct_weight_sync_ns),
                Cell::ns(line.predicted_ns),
                Cell::maybe(line.pays_from, Cell::count),
            ]);
        }
        out.table(&table)?;
        for line in &self.plans {
            if let Some(reason) = &line.refusal {
                writeln!(out, "{} at EP{}: {reason}", line.policy, line.ranks)?;
            }
        }
        for note in &self.notes {
            writeln!(out, "note: {note}")?;
        }
        Ok(())
    }
}
