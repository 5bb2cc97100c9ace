//! `ultraep replay --only`: one microbatch planned by every scenario, as a table or JSON.

use std::collections::VecDeque;
use std::io::Write;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use ultraep_import::{Microbatch, Microbatches, OpenOptions};
use ultraep_plan::Rank;
use ultraep_replay::{Hardware, Replan, ReplanError, Scenario, quotient, replan};

use super::{Args, Place};
use crate::commands::recordings::grouping_error;
use crate::commands::write_json;
use crate::error::CliError;
use crate::timing::pretty;

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
    digest: Option<String>,
}

pub(super) fn run(args: &Args, place: Place, out: &mut dyn Write) -> Result<(), CliError> {
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
            plans.push(Line::of(scenario, replan(scenario, &counts, &history))?);
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
    let kept = (args.window as usize).max(args.interval as usize);
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
            min_quota: scenario.params.min_quota,
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
            digest: None,
        };
        match planned {
            Ok(Replan { anatomy, digest, max_fanout }) => {
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
    fn print(&self, out: &mut dyn Write) -> Result<(), CliError> {
        let Self { recording, step, microbatch, layer, .. } = self;
        writeln!(out, "{recording}: step {step}, microbatch {microbatch}, layer {layer}")?;
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        let header = ["ranks", "domain", "slots", "min quota", "policy", "as routed", "after", "replicas", "remote"];
        table.set_header(header.into_iter().chain(["weight sync", "if direct", "predicted"]));
        for line in self.plans.iter().filter(|line| line.refusal.is_none()) {
            table.add_row([
                line.ranks.to_string(),
                line.domain.to_string(),
                line.slots_per_rank.to_string(),
                line.min_quota.to_string(),
                line.policy.to_owned(),
                format!("{:.4}", line.imbalance_before),
                format!("{:.4}", line.imbalance_after),
                line.replicas.to_string(),
                format!("{:.1}%", 100.0 * line.remote_share),
                pretty(line.weight_sync_ns),
                pretty(line.direct_weight_sync_ns),
                pretty(line.predicted_ns),
            ]);
        }
        table.column_iter_mut().for_each(|column| column.set_cell_alignment(CellAlignment::Right));
        writeln!(out, "{table}")?;
        writeln!(
            out,
            "weight sync: by the planned transfers, chunk by chunk; if direct: home ranks send everything; predicted: forward of \
             the layer without relays"
        )?;
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
