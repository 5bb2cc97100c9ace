//! A grid of configurations: where balancing pays, what slots, domains and links are worth.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;

use serde::Serialize;

use super::files::{model, systems};
use super::plan_file::{Case, Metric, Plan, Sweep};
use super::training::{Ready, figures, in_parallel, prepare, prepare_like, relate, step};
use crate::error::{CliError, note};
use crate::output::Output;
use crate::table::{Cell, Column, Table};

/// Most configurations of one sweep.
const MAX_CONFIGURATIONS: usize = 100_000;

/// `ultraep.sim-sweep/1`.
#[derive(Debug, Serialize)]
pub(super) struct SweepRecord {
    schema: &'static str,
    title: String,
    machine: String,
    seed: u32,
    systems: Vec<String>,
    /// Combinations that cannot exist: a domain that does not divide the ranks, fewer experts than ranks.
    left_out: usize,
    points: Vec<Point>,
}

/// One configuration.
#[derive(Clone, Debug, Serialize)]
struct Point {
    case: String,
    ranks: u32,
    domain: u32,
    slots: u32,
    bandwidth_percent: u32,
    tokens: u32,
    top_k: u32,
    /// Imbalance as routed.
    imbalance_before: f64,
    /// By system: throughput over that of `ideal`.
    of_ideal: BTreeMap<String, f64>,
    /// By system: imbalance after balancing.
    imbalance: BTreeMap<String, f64>,
    /// By system: memory of the fullest rank.
    memory_bytes: BTreeMap<String, u64>,
    /// Systems that a rank has too little memory for. Tables take means over the points where this has none of the systems
    /// shown.
    does_not_fit: Vec<String>,
}

impl Point {
    /// Whether a rank has memory enough for all of `systems`, and for `ideal`, which they are compared with.
    fn fits(&self, systems: &[&String]) -> bool {
        !self.does_not_fit.iter().any(|name| name == "ideal" || systems.contains(&name))
    }
}

/// One value of a configuration.
type Axis = (&'static str, fn(&Point) -> u32);

const AXES: [Axis; 6] = [
    ("ranks", |p| p.ranks),
    ("domain", |p| p.domain),
    ("slots", |p| p.slots),
    ("bandwidth %", |p| p.bandwidth_percent),
    ("tokens a rank", |p| p.tokens),
    ("top-k", |p| p.top_k),
];

/// Runs every combination.
pub(super) fn run(plan: &Plan, threads: usize) -> Result<SweepRecord, CliError> {
    let Some(sweep) = &plan.sweep else {
        return Err(CliError::Input(format!("{}: no [sweep]: experiment \"sweep\" needs it", plan.title)));
    };
    if !plan.systems.iter().any(|name| name == "ideal") {
        return Err(CliError::Input(format!(
            "{}: systems: a sweep compares with \"ideal\", which is not there",
            plan.title
        )));
    }
    let mut cases = Vec::new();
    let mut left_out = 0;
    for (index, base) in plan.case.iter().enumerate() {
        for case in combinations(base, sweep) {
            if exists(&case)? { cases.push((index, case)) } else { left_out += 1 }
        }
    }
    if cases.is_empty() || cases.len() > MAX_CONFIGURATIONS {
        let got = cases.len();
        return Err(CliError::Input(format!(
            "{}: {got} configurations: allowed are 1 to {MAX_CONFIGURATIONS}",
            plan.title
        )));
    }
    // One load for all that differ in slots, domain and links only: fitted anew, each would have another.
    let (mut origins, mut of_case, mut known) = (Vec::new(), Vec::with_capacity(cases.len()), HashMap::new());
    for (base, case) in &cases {
        // All that a combination may change beside slots, domain and links.
        let key = (*base, case.ranks, case.tokens, case.top_k);
        of_case.push(*known.entry(key).or_insert_with(|| {
            origins.push(origin(&plan.case[*base], case));
            origins.len() - 1
        }));
    }
    let fit = |index: usize| prepare(&origins[index], &plan.machine, plan.seed);
    let fitted = in_parallel(origins.len(), threads, fit)?;
    // Large groups first, so that no thread is left with one at the end.
    let mut order: Vec<usize> = (0..cases.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(u64::from(cases[index].1.ranks).pow(2)));
    let run = |place: usize| {
        let index = order[place];
        point(plan, &cases[index].1, &fitted[of_case[index]]).map(|point| (index, point))
    };
    let mut points = in_parallel(order.len(), threads, run)?;
    points.sort_by_key(|(index, _)| *index);
    Ok(SweepRecord {
        schema: "ultraep.sim-sweep/1",
        title: plan.title.clone(),
        machine: plan.machine.clone(),
        seed: plan.seed,
        systems: plan.systems.clone(),
        left_out,
        points: points.into_iter().map(|(_, point)| point).collect(),
    })
}

fn combinations(base: &Case, sweep: &Sweep) -> Vec<Case> {
    let mut all = vec![base.clone()];
    fn vary(all: &mut Vec<Case>, values: &[u32], set: impl Fn(&mut Case, u32)) {
        if values.is_empty() {
            return;
        }
        let with = |case: &Case, value: u32| {
            let mut case = case.clone();
            set(&mut case, value);
            case
        };
        *all = all.iter().flat_map(|case| values.iter().map(move |&value| with(case, value))).collect();
    }
    vary(&mut all, &sweep.ranks, |case, ranks| {
        case.ranks = ranks;
        if let Some(each) = sweep.experts_per_rank {
            case.experts = Some(ranks * each);
        }
    });
    vary(&mut all, &sweep.domain, |case, domain| case.domain = Some(domain));
    vary(&mut all, &sweep.slots, |case, slots| case.slots = slots);
    vary(&mut all, &sweep.bandwidth_percent, |case, percent| case.bandwidth_percent = percent);
    vary(&mut all, &sweep.tokens, |case, tokens| case.tokens = tokens);
    vary(&mut all, &sweep.top_k, |case, top_k| case.top_k = Some(top_k));
    all
}

/// Whether there is such a group.
fn exists(case: &Case) -> Result<bool, CliError> {
    let model = model(&case.model)?;
    let domain = case.domain.unwrap_or(1);
    let experts = case.experts.unwrap_or(model.experts);
    Ok(domain > 0 && case.ranks.is_multiple_of(domain) && experts >= case.ranks)
}

/// The case whose load a configuration has: with the base's slots, domain and links.
fn origin(base: &Case, case: &Case) -> Case {
    let domain = base.domain.filter(|&domain| case.ranks.is_multiple_of(domain));
    Case { slots: base.slots, domain, bandwidth_percent: base.bandwidth_percent, ..case.clone() }
}

fn point(plan: &Plan, case: &Case, fitted: &Ready) -> Result<Point, CliError> {
    let ready = prepare_like(case, fitted, &plan.machine, plan.seed)?;
    let mut all = Vec::new();
    let (mut memory_bytes, mut does_not_fit) = (BTreeMap::new(), Vec::new());
    let mut before = 1.0;
    for system in systems(&plan.systems, case.microbatches)? {
        let report = step(&ready, &system, plan.fidelity, false)?;
        before = report.system.imbalance_before;
        memory_bytes.insert(system.name.clone(), report.system.memory.total_bytes());
        if report.system.memory.check(&ready.spec.machine).is_err() {
            does_not_fit.push(system.name.clone());
        }
        all.push((system.name.clone(), figures(&report)));
    }
    relate(&mut all);
    let of = |metric: Metric| {
        let figure = |(name, figures): &(String, BTreeMap<Metric, f64>)| Some((name.clone(), *figures.get(&metric)?));
        all.iter().filter_map(figure).collect()
    };
    Ok(Point {
        case: case.name.clone(),
        ranks: ready.spec.ranks,
        domain: ready.spec.domain_ranks,
        slots: case.slots,
        bandwidth_percent: case.bandwidth_percent,
        tokens: case.tokens,
        top_k: ready.spec.model.top_k,
        imbalance_before: before,
        of_ideal: of(Metric::OfIdeal),
        imbalance: of(Metric::Imbalance),
        memory_bytes,
        does_not_fit,
    })
}

/// A system's mean share of `ideal` over the configurations that all shown systems fit in, `common` of `points`; and in
/// brackets how many of `points` it does not fit in itself.
fn share(points: &[&Point], common: &[&Point], system: &str) -> String {
    let too_large = points.iter().filter(|p| p.does_not_fit.iter().any(|name| name == system)).count();
    let left_out = if too_large == 0 { String::new() } else { format!(" ({too_large})") };
    if common.is_empty() {
        return format!("-{left_out}");
    }
    let shares = common.iter().filter_map(|p| p.of_ideal.get(system));
    format!("{:.1}%{left_out}", 100.0 * shares.sum::<f64>() / common.len() as f64)
}

impl SweepRecord {
    /// Means along every axis that varies.
    pub(super) fn print(&self, out: &mut Output<'_>) -> Result<(), CliError> {
        writeln!(out, "{}: {} configurations, shares of ideal throughput (means)", self.title, self.points.len())?;
        if self.left_out > 0 {
            note(format!("{} combinations cannot exist and are left out", self.left_out));
        }
        if self.points.iter().any(|point| !point.does_not_fit.is_empty()) {
            writeln!(
                out,
                "Means are over the configurations that every system shown fits in (\"all fit\"), so that columns compare. In \
                 brackets: configurations that a rank has too little memory for under that system."
            )?;
        }
        let shown: Vec<&String> = self.systems.iter().filter(|name| *name != "ideal").collect();
        let mut columns = vec![
            Column::text("axis", "what is varied"),
            Column::number("value", "its value"),
            Column::number("configurations", "configurations with that value").minor(2),
            Column::number("all fit", "of these, those that every system shown fits in: means are over them"),
            Column::number("imbalance", "as routed, mean").minor(1),
        ];
        let share_help = |at: usize| if at == 0 { "share of ideal throughput, mean" } else { "" };
        columns.extend(shown.iter().enumerate().map(|(at, name)| Column::number(name.as_str(), share_help(at))));
        let mut table = Table::new(columns).grouped_by(1);
        for (axis, value) in AXES {
            let mut values: Vec<u32> = self.points.iter().map(value).collect();
            values.sort_unstable();
            values.dedup();
            if values.len() < 2 {
                continue;
            }
            for wanted in values {
                let of: Vec<&Point> = self.points.iter().filter(|p| value(p) == wanted).collect();
                let common: Vec<&Point> = of.iter().copied().filter(|point| point.fits(&shown)).collect();
                let before = common.iter().map(|point| point.imbalance_before).sum::<f64>() / common.len() as f64;
                let mut row = vec![
                    Cell::text(axis),
                    Cell::count(wanted),
                    Cell::count(of.len()),
                    Cell::count(common.len()),
                    if common.is_empty() { Cell::text("-") } else { Cell::number(before, 2) },
                ];
                row.extend(shown.iter().map(|name| Cell::text(share(&of, &common, name))));
                table.row(row);
            }
        }
        out.table(&table)
    }
}
