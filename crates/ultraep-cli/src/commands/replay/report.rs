//! The report of a replay: frontier, distributions, what-if, worst cases; as tables or JSON.

use std::io::Write;
use std::time::Duration;

use serde::Serialize;
use ultraep_baselines::PolicyKind;
use ultraep_import::RecordingInfo;
use ultraep_plan::Rank;
use ultraep_replay::{Hardware, LeastQuota, Outcomes, Scenario, Series, Worst, quotient};

use super::plot::{Curve, Group};
use super::{Layers, Sort, has_slots};

use crate::commands::quota_words;
use crate::error::CliError;
use crate::output::Output;
use crate::table::{Cell, Column, Table};

use crate::timing::pretty;

/// `ultraep.replay/1`.
#[derive(Debug, Serialize)]
pub(super) struct Replay {
    schema: &'static str,
    recording: String,
    format: String,
    experts: usize,
    hardware: Option<String>,
    hardware_sources: Vec<String>,
    pub(super) notes: Vec<String>,
    plans: u64,
    elapsed_ns: u64,
    plans_per_s: f64,
    scenarios: Vec<Line>,
}

/// One policy in one group over the whole recording.
#[derive(Debug, Serialize)]
struct Line {
    ranks: usize,
    domain: usize,
    slots_per_rank: usize,
    /// As asked for: tokens or "auto".
    min_quota: LeastQuota,
    /// Smallest and largest that the plans kept to, in tokens; `None` for policies without one.
    min_quota_tokens: Option<(u32, u32)>,
    policy: &'static str,
    historical: bool,
    #[serde(skip)]
    kind: PolicyKind,
    /// No other scenario of these ranks is at least as good in imbalance, replicas and remote tokens, and better in one.
    on_frontier: bool,
    plans: u64,
    refused: u64,
    refusal: Option<String>,
    imbalance_mean: f64,
    imbalance_p50: f64,
    imbalance_p95: f64,
    imbalance_worst: f64,
    replicas_mean: f64,
    remote_share: f64,
    max_fanout: usize,
    max_sends: usize,
    max_copies: usize,
    wasted_copies: u64,
    /// Share of plans that reach the target or a proven lower bound; `None` for policies that do not search.
    proven_share: Option<f64>,
    /// Share of plans that a proven lower bound above the target ends: no slot more would help at this least quota.
    bound_share: Option<f64>,
    /// Bytes of weights that a rank's slots hold, once for all layers.
    slot_bytes_per_rank: u64,
    solve_ns_p50: f64,
    solve_ns_p95: f64,
    predicted_ns_mean: f64,
    /// Predicted time of `none` in the same group over this one's.
    predicted_speedup: Option<f64>,
    /// Predicted time of `ideal` in the same group over this one's.
    share_of_ideal: Option<f64>,
    /// Plans that a least quota of one token would make more even, and the mean imbalance that would lead to.
    finer_plans: u64,
    finer_imbalance_mean: f64,
    worst: Vec<Worst>,
    layers: Vec<LayerLine>,
    #[serde(skip)]
    series: Series,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct LayerLine {
    layer: u32,
    plans: u64,
    imbalance_mean: f64,
    imbalance_worst: f64,
}

impl Replay {
    pub(super) fn new(recording: String, info: &RecordingInfo, experts: usize, hardware: Option<&Hardware>) -> Self {
        Self {
            schema: "ultraep.replay/1",
            recording,
            format: info.format.to_string(),
            experts,
            hardware: hardware.map(|h| h.name.clone()),
            hardware_sources: hardware.map(|h| h.sources.clone()).unwrap_or_default(),
            notes: info.notes.clone(),
            plans: 0,
            elapsed_ns: 0,
            plans_per_s: 0.0,
            scenarios: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.scenarios.is_empty()
    }

    pub(super) fn add(&mut self, scenarios: &[Scenario], outcomes: Vec<Outcomes>) {
        let first = self.scenarios.len();
        let lines = scenarios.iter().zip(outcomes).map(|(scenario, outcomes)| Line::of(scenario, outcomes));
        self.scenarios.extend(lines);
        let lines = &mut self.scenarios[first..];
        self.plans += lines.iter().map(|line| line.plans).sum::<u64>();
        mark_frontier(lines);
        for index in 0..lines.len() {
            let over = |kind: PolicyKind| {
                let other = lines.iter().find(|l| l.policy == kind.name() && l.domain == lines[index].domain)?;
                Some(other.predicted_ns_mean / lines[index].predicted_ns_mean).filter(|quotient| quotient.is_finite())
            };
            let (speedup, share) = (over(PolicyKind::None), over(PolicyKind::Ideal));
            (lines[index].predicted_speedup, lines[index].share_of_ideal) = (speedup, share);
        }
        self.notes.extend(least_quota_notes(lines));
        let mut seen = std::collections::HashSet::new();
        self.notes.retain(|note| seen.insert(note.clone()));
    }

    pub(super) fn finish(&mut self, elapsed: Duration) {
        self.elapsed_ns = elapsed.as_nanos() as u64;
        self.plans_per_s = self.plans as f64 / elapsed.as_secs_f64().max(1e-9);
    }

    pub(super) fn title(&self) -> String {
        format!("{}, {} experts", self.recording, self.experts)
    }

    /// Curves of every group; policies that slots and least quota make no difference to are in all groups of their ranks.
    pub(super) fn plot_groups(&self) -> Vec<Group> {
        let planned = || self.scenarios.iter().filter(|line| line.plans > 0);
        let mut keys: Vec<_> = planned().map(Line::group).collect();
        keys.dedup();
        let mut seen = std::collections::HashSet::new();
        keys.retain(|key| seen.insert(*key));
        let group = |key: (usize, usize, usize, LeastQuota)| {
            let (ranks, domain, slots, quota) = key;
            let is_in = |line: &&Line| {
                let same = (line.ranks, line.domain) == (ranks, domain);
                same && (line.group() == key
                    || !has_slots(line.kind)
                    || (line.slots_per_rank == slots && !line.kind.has_min_quota()))
            };
            let domain = if domain == ranks { String::new() } else { format!(", domains of {domain}") };
            let quota = if quota == LeastQuota::OfLoad { String::new() } else { format!(", least quota {quota}") };
            Group {
                title: format!("EP{ranks}{domain}, slots {slots}{quota}"),
                width: planned().filter(is_in).map(|line| line.series.width()).max().unwrap_or(1),
                curves: planned().filter(is_in).map(Line::curve).collect(),
            }
        };
        keys.into_iter().map(group).collect()
    }

    pub(super) fn print(&self, out: &mut Output<'_>) -> Result<(), CliError> {
        writeln!(out, "{} ({}), {} experts", self.recording, self.format, self.experts)?;
        if let Some(hardware) = &self.hardware {
            writeln!(out, "predicted for {hardware}")?;
        }
        out.table(&self.frontier())?;
        if let Some(table) = self.what_if() {
            writeln!(out, "what if: mean imbalance (predicted speedup over none) of {}", self.what_if_policy())?;
            out.table(&table)?;
        }
        self.print_worst(out)?;
        for line in self.scenarios.iter().filter(|line| line.refused > 0) {
            let reason = line.refusal.as_deref().unwrap_or_default();
            writeln!(out, "{} at EP{} skipped {} microbatches: {reason}", line.policy, line.ranks, line.refused)?;
        }
        for note in &self.notes {
            writeln!(out, "note: {note}")?;
        }
        writeln!(
            out,
            "{} plans in {}, reading and checking included: {:.0} plans/s",
            self.plans,
            pretty(self.elapsed_ns),
            self.plans_per_s
        )?;
        Ok(())
    }

    /// Imbalance by layer, a column for each policy and group.
    pub(super) fn print_layers(&self, layers: &Layers, sort: Sort, out: &mut Output<'_>) -> Result<(), CliError> {
        let lines: Vec<&Line> = self.scenarios.iter().filter(|line| line.plans > 0).collect();
        let mut numbers: Vec<u32> = lines.iter().flat_map(|line| line.layers.iter().map(|layer| layer.layer)).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers.retain(|&layer| layers.has(layer));
        if numbers.is_empty() {
            return Err(CliError::Input("--layers: the recording has none of them; see trace info".to_owned()));
        }
        let of = |line: &Line, layer: u32| line.layers.iter().find(|of_layer| of_layer.layer == layer).copied();
        if let Sort::Policy(kind) = sort {
            let Some(line) = lines.iter().find(|line| line.policy == kind.name()) else {
                let all: Vec<&str> = lines.iter().map(|line| line.policy).collect();
                return Err(CliError::Input(format!(
                    "--sort {kind:?}: not replayed: allowed are layer, {}",
                    all.join(", ")
                )));
            };
            let mean = |layer: u32| of(line, layer).map_or(0.0, |of_layer| of_layer.imbalance_mean);
            numbers.sort_by(|&a, &b| mean(b).total_cmp(&mean(a)).then(a.cmp(&b)));
        }
        let mut columns = vec![Column::number("layer", "MoE layer, by the recording's own number")];
        let help = |at: usize| if at == 0 { "imbalance after balancing: mean over microbatches (worst)" } else { "" };
        let groups: std::collections::BTreeSet<_> = lines.iter().map(|line| line.group()).collect();
        columns.extend(lines.iter().enumerate().map(|(at, line)| {
            let group = match (groups.len(), has_slots(line.kind)) {
                (1, _) => String::new(),
                (_, true) => format!("\nEP{}/{}, {} slots", line.ranks, line.domain, line.slots_per_rank),
                (_, false) => format!("\nEP{}/{}", line.ranks, line.domain),
            };
            Column::number(format!("{}{group}", line.policy), help(at))
        }));
        let mut table = Table::new(columns);
        for layer in numbers {
            let cell = |line: &&Line| {
                Cell::maybe(of(line, layer), |l| {
                    Cell::shown(format!("{:.3} ({:.2})", l.imbalance_mean, l.imbalance_worst), l.imbalance_mean)
                })
            };
            table.row(std::iter::once(Cell::count(layer)).chain(lines.iter().map(cell)));
        }
        writeln!(out, "{} ({}), {} experts", self.recording, self.format, self.experts)?;
        out.table(&table)?;
        for note in &self.notes {
            out.wrapped(&format!("note: {note}"))?;
        }
        Ok(())
    }

    fn frontier(&self) -> Table {
        let has_domains = self.scenarios.iter().any(|line| line.domain != line.ranks);
        let has_quotas = self.scenarios.iter().any(|line| line.min_quota != self.scenarios[0].min_quota);
        let mut columns = vec![Column::number("ranks", "ranks in the EP group")];
        columns.extend(has_domains.then(|| Column::number("domain", "ranks in a domain")));
        columns.push(Column::number("slots", "slots for replicas on each rank"));
        columns.extend(has_quotas.then(|| Column::number("min quota", "least tokens worth a replica")));
        columns.extend([
            Column::text("policy", "* plans from earlier microbatches; + best in imbalance, replicas or remote tokens"),
            Column::number("imbalance", "largest over mean rank load, mean over layers and microbatches"),
            Column::number("p50", "its median").minor(5),
            Column::number("p95", "its 95th percentile").minor(3),
            Column::number("worst", "the worst"),
            Column::number("replicas", "copies of experts a plan, mean").minor(1),
            Column::number("remote", "tokens processed away from their source").minor(2),
            Column::number("sends", "most copies that one rank sends").minor(6),
            Column::number("fullest", "most foreign experts on one rank").minor(7),
            Column::time("solve p50", "median time to plan").minor(4),
            Column::time("predicted", "forward of a layer on the hardware, mean"),
            Column::number("speedup", "predicted time of none over this one's"),
            Column::number("of ideal", "predicted time of ideal routing over this one's").minor(3),
            Column::text("ended by", "target reached; the bound: no slot would help; search: slots may help").minor(2),
        ]);
        let mut table = Table::new(columns);
        for line in self.scenarios.iter().filter(|line| line.plans > 0) {
            let marks = [(line.historical, " *"), (line.on_frontier, " +")];
            let marks: String = marks.into_iter().filter(|(is_set, _)| *is_set).map(|(_, mark)| mark).collect();
            let mut row = vec![Cell::count(line.ranks)];
            row.extend(has_domains.then(|| Cell::count(line.domain)));
            row.push(Cell::count(line.slots_per_rank));
            row.extend(has_quotas.then(|| Cell::text(line.min_quota.to_string())));
            row.extend([
                Cell::text(format!("{}{marks}", line.policy)),
                Cell::number(line.imbalance_mean, 4),
                Cell::number(line.imbalance_p50, 3),
                Cell::number(line.imbalance_p95, 3),
                Cell::number(line.imbalance_worst, 3),
                Cell::number(line.replicas_mean, 1),
                Cell::share(line.remote_share),
                Cell::count(line.max_sends),
                Cell::count(line.max_copies),
                Cell::ns(line.solve_ns_p50 as u64),
                Cell::ns(line.predicted_ns_mean as u64),
                Cell::maybe(line.predicted_speedup, |speedup| Cell::shown(format!("{speedup:.2}x"), speedup)),
                Cell::maybe(line.share_of_ideal, Cell::share),
                Cell::maybe(line.ended_by(), Cell::text),
            ]);
            table.row(row);
        }
        table
    }

    /// The last policy that uses slots: ours, unless the user chose others.
    fn what_if_policy(&self) -> &'static str {
        let names = || self.scenarios.iter().map(|line| line.policy);
        let ours = names().find(|name| *name == PolicyKind::Ultraep.name());
        ours.or_else(|| names().next_back()).unwrap_or_default()
    }

    /// One policy by size of the group and slots, where there is more than one of either.
    fn what_if(&self) -> Option<Table> {
        let policy = self.what_if_policy();
        let of_policy: Vec<&Line> = self.scenarios.iter().filter(|l| l.policy == policy && l.plans > 0).collect();
        let mut slots: Vec<usize> = of_policy.iter().map(|line| line.slots_per_rank).collect();
        slots.sort_unstable();
        slots.dedup();
        let mut groups: Vec<(usize, usize, LeastQuota)> =
            of_policy.iter().map(|l| (l.ranks, l.domain, l.min_quota)).collect();
        groups.dedup();
        groups.sort_unstable();
        groups.dedup();
        if of_policy.len() < 2 {
            return None;
        }
        let mut columns = vec![
            Column::number("ranks", "ranks in the EP group"),
            Column::number("domain", "ranks in a domain").minor(2),
            Column::number("min quota", "least tokens worth a replica").minor(1),
        ];
        columns.extend(slots.iter().map(|slots| Column::number(format!("{slots} slots"), "")));
        let mut table = Table::new(columns);
        for group in groups {
            let mut row = vec![Cell::count(group.0), Cell::count(group.1), Cell::count(group.2)];
            for &slots in &slots {
                let of_group = |l: &&&Line| (l.ranks, l.domain, l.min_quota) == group && l.slots_per_rank == slots;
                row.push(Cell::maybe(of_policy.iter().find(of_group), |line| {
                    let speedup = line.predicted_speedup.map_or_else(String::new, |s| format!(" ({s:.2}x)"));
                    Cell::shown(format!("{:.4}{speedup}", line.imbalance_mean), line.imbalance_mean)
                }));
            }
            table.row(row);
        }
        Some(table)
    }

    fn print_worst(&self, out: &mut Output<'_>) -> Result<(), CliError> {
        for policy in [PolicyKind::None.name(), self.what_if_policy()] {
            let lines = self.scenarios.iter().filter(|line| line.policy == policy && line.plans > 0);
            let worst = |line: &Line| line.worst.first().map_or(0.0, |w| w.imbalance);
            let Some(line) = lines.max_by(|a, b| worst(a).total_cmp(&worst(b))) else { continue };
            let cases = line.worst.iter().take(3);
            let cases: Vec<String> = cases
                .map(|w| {
                    format!("{:.3} (step {}, microbatch {}, layer {})", w.imbalance, w.step, w.microbatch, w.layer)
                })
                .collect();
            let group = format!("EP{}, {} slots", line.ranks, line.slots_per_rank);
            writeln!(out, "worst of {policy} ({group}): {}", cases.join(", "))?;
        }
        Ok(())
    }
}

/// Slots of a rank, none for a policy that they make no difference to.
fn slots_of(scenario: &Scenario) -> usize {
    if has_slots(scenario.kind) { scenario.topology.slots(Rank::new(0)) } else { 0 }
}

impl Line {
    /// What ended the search, in words: what is most in the way first.
    fn ended_by(&self) -> Option<String> {
        let (proven, bound) = (self.proven_share?, self.bound_share?);
        let percent = |share: f64| format!("{:.0}%", 100.0 * share);
        let mut words = Vec::new();
        if proven < 1.0 {
            words.push(format!("search {}", percent(1.0 - proven)));
        }
        if bound > 0.0 {
            words.push(format!("bound {}", percent(bound)));
        }
        if proven > bound {
            words.push(format!("target {}", percent(proven - bound)));
        }
        Some(words.join(", "))
    }

    fn group(&self) -> (usize, usize, usize, LeastQuota) {
        (self.ranks, self.domain, self.slots_per_rank, self.min_quota)
    }

    fn curve(&self) -> Curve {
        Curve {
            policy: self.kind,
            microbatches: self.series.means().map(|(place, mean)| (place as f64, mean)).collect(),
            layers: self.layers.iter().map(|layer| (f64::from(layer.layer), layer.imbalance_mean)).collect(),
        }
    }

    fn of(scenario: &Scenario, outcomes: Outcomes) -> Self {
        let is_search = matches!(scenario.kind, PolicyKind::Greedy | PolicyKind::Ultraep);
        let plans = outcomes.plans();
        Self {
            ranks: scenario.topology.ranks(),
            domain: scenario.topology.domain_ranks(),
            slots_per_rank: scenario.topology.slots(Rank::new(0)),
            min_quota: scenario.least_quota,
            min_quota_tokens: outcomes.min_quotas.filter(|_| scenario.kind.has_min_quota()),
            policy: scenario.kind.name(),
            historical: scenario.kind.is_historical(),
            kind: scenario.kind,
            on_frontier: false,
            plans,
            refused: outcomes.refused,
            imbalance_mean: outcomes.imbalance.mean(),
            imbalance_p50: outcomes.imbalance.quantile(50),
            imbalance_p95: outcomes.imbalance.quantile(95),
            imbalance_worst: outcomes.imbalance.largest,
            replicas_mean: outcomes.replicas_mean(),
            remote_share: outcomes.remote_share(),
            max_fanout: outcomes.max_fanout,
            max_sends: outcomes.max_sends,
            max_copies: outcomes.max_copies,
            wasted_copies: outcomes.wasted_copies,
            proven_share: is_search.then(|| quotient((outcomes.proven, plans))),
            bound_share: is_search.then(|| quotient((outcomes.at_bound, plans))),
            slot_bytes_per_rank: scenario.params.hardware.expert_bytes * slots_of(scenario) as u64,
            solve_ns_p50: outcomes.solve_ns.quantile(50),
            solve_ns_p95: outcomes.solve_ns.quantile(95),
            predicted_ns_mean: outcomes.predicted_ns_mean(),
            predicted_speedup: None,
            share_of_ideal: None,
            finer_plans: outcomes.finer.0,
            finer_imbalance_mean: outcomes.finer_mean(),
            layers: outcomes
                .layers
                .iter()
                .map(|(&layer, of_layer)| LayerLine {
                    layer,
                    plans: of_layer.count,
                    imbalance_mean: of_layer.mean(),
                    imbalance_worst: of_layer.largest,
                })
                .collect(),
            series: outcomes.series,
            refusal: outcomes.refusal,
            worst: outcomes.worst,
        }
    }
}

/// Marks the scenarios that no other of them beats. `ideal` changes routing and is no competitor.
fn mark_frontier(lines: &mut [Line]) {
    let competes = |line: &Line| line.plans > 0 && line.policy != PolicyKind::Ideal.name();
    let scores = |line: &Line| [line.imbalance_mean, line.replicas_mean, line.remote_share];
    for index in 0..lines.len() {
        let own = scores(&lines[index]);
        let is_beaten = lines.iter().filter(|other| competes(other)).any(|other| {
            let pairs = || scores(other).into_iter().zip(own);
            pairs().all(|(other, own)| other <= own) && pairs().any(|(other, own)| other < own)
        });
        lines[index].on_frontier = competes(&lines[index]) && !is_beaten;
    }
}

/// What the least quota was, and where a smaller one would have made plans more even.
fn least_quota_notes(lines: &[Line]) -> Vec<String> {
    let ours = || lines.iter().filter(|line| line.policy == PolicyKind::Ultraep.name() && line.plans > 0);
    let mut notes = Vec::new();
    if let Some((least, most)) = ours().find(|l| l.min_quota == LeastQuota::OfLoad).and_then(|l| l.min_quota_tokens) {
        let tokens = if least == most { least.to_string() } else { format!("{least} to {most}") };
        notes.push(format!(
            "EP{}: least quota of a replica {}",
            lines[0].ranks,
            quota_words(LeastQuota::OfLoad, &tokens)
        ));
    }
    // Where a smaller one was replayed too, and no plan can gain, the table says it.
    let is_shown = |line: &&Line| {
        let group = |l: &Line| (l.ranks, l.domain, l.slots_per_rank);
        ours().any(|other| group(other) == group(line) && other.finer_plans == 0)
    };
    let most_gained = ours().filter(|line| line.finer_plans > 0 && !is_shown(line)).max_by(|a, b| {
        let gain = |line: &Line| line.imbalance_mean - line.finer_imbalance_mean;
        gain(a).total_cmp(&gain(b))
    });
    if let Some(line) = most_gained {
        notes.push(format!(
            "with --min-quota 1, {} of {} plans of ultraep (EP{}, {} slots, least quota {}) would be more even: imbalance {:.4} \
             instead of {:.4}",
            line.finer_plans,
            line.plans,
            line.ranks,
            line.slots_per_rank,
            line.min_quota,
            line.finer_imbalance_mean,
            line.imbalance_mean
        ));
    }
    notes
}
