//! What a person sees of a training run: the text used, a progress bar, the final tables.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use ultraep_fabric::FabricKind;
use ultraep_run::{
    CorpusSummary, Digest, DomainSummary, PolicyRow, PolicyTable, ProfileSummary, RunInfo, RunStatus, RunWriter,
    UtcTime,
};
use ultraep_runtime::LayerRecord;
use ultraep_train::{
    BalanceCount, Comparison, Observer, Outcome, Phase, RunFolder, StepReport, Summary, TrainConfig, TrainError,
    find_checkpoint, pin_text,
};

use super::job::{Job, Resume};
use crate::commands::write_json;
use crate::error::CliError;
use crate::output::Output;
use crate::shell_word::quoted;
use crate::table::{Cell, Column, Table};

/// The observer of rank 0: writes the run folder and shows how it goes.
pub(super) struct Screen {
    folder: RunFolder,
    config: TrainConfig,
    json: bool,
    bar: ProgressBar,
    plain: bool,
    since: Instant,
    /// The command with which it can go on, for a shell.
    again: String,
}

fn say(text: impl std::fmt::Display) {
    // A closed stderr is no reason to stop training.
    let _ = writeln!(std::io::stderr(), "{text}");
}

impl Screen {
    pub(super) fn new(job: &Job) -> Result<Self, CliError> {
        say("text:");
        job.corpus.summary().iter().for_each(|line| say(format_args!("  {line}")));
        let continuation = job.resume.as_ref().map(|resume| &resume.continuation);
        // One that names no other run goes on in its own folder.
        let taken_up = continuation.filter(|continuation| continuation.from.is_none());
        let info = info(job)?;
        let writer = match taken_up {
            Some(taken_up) => RunWriter::resume(&job.folder, taken_up.step).and_then(|mut writer| {
                writer.update_info(|kept| {
                    kept.config = info.config;
                    kept.continued.push(taken_up.clone());
                })?;
                Ok(writer)
            }),
            None => RunWriter::create(&job.folder, info),
        };
        let writer = writer.map_err(CliError::failure)?;
        pin_text(&job.folder, &job.corpus).map_err(CliError::failure)?;
        let folder = RunFolder::new(writer, job.config.clone(), taken_up.map(|c| c.step)).map_err(CliError::failure)?;
        describe_run(job);
        Ok(Self {
            folder,
            config: job.config.clone(),
            json: job.json,
            bar: ProgressBar::hidden(),
            plain: !std::io::stderr().is_terminal(),
            since: Instant::now(),
            again: command_to_go_on(job)?,
        })
    }

    /// Ends the run folder and prints the result.
    pub(super) fn finish(
        self,
        result: Result<Outcome, CliError>,
        ended: UtcTime,
        out: &mut Output<'_>,
    ) -> Result<(), CliError> {
        self.bar.finish_and_clear();
        let path = self.folder.path().to_path_buf();
        let status = match &result {
            Ok(outcome) if outcome.stopped => RunStatus::Interrupted { reason: "asked to stop".into() },
            Ok(_) => RunStatus::Finished,
            Err(error) => RunStatus::Failed { reason: error.to_string() },
        };
        let ending = self.folder.finish(status, ended).map_err(CliError::failure);
        let incomplete = result.as_ref().map_or(true, |outcome| outcome.stopped && outcome.steps < self.config.steps);
        if incomplete && find_checkpoint(&path).is_ok() {
            say(format_args!("go on with:\n  {}", self.again));
        }
        let outcome = result?;
        let (summary, table) = ending?;
        if self.json {
            write_json(out, &Json::new(&path, &outcome, &summary, table.as_ref()))?;
        } else {
            print(out, &self.config, &summary, table.as_ref())?;
            writeln!(out, "run folder: {}", path.display())?;
        }
        say(format_args!("took {:.0} s", self.since.elapsed().as_secs_f64()));
        if outcome.stopped {
            let saved = outcome.checkpoint.map_or("nothing saved".into(), |p| format!("saved {}", p.display()));
            let again = if outcome.steps < self.config.steps {
                "see above how to go on"
            } else {
                "the training was complete, its reference was not"
            };
            return Err(CliError::Failure(format!("interrupted after step {}: {saved}; {again}", outcome.steps)));
        }
        Ok(())
    }
}

/// The command that takes up the run: what it does is in its folder, only how its ranks run is not.
fn command_to_go_on(job: &Job) -> Result<String, CliError> {
    let mut words: Vec<OsString> =
        vec![super::program_name(), "train".into(), "--resume".into(), job.folder.clone().into_os_string()];
    if job.fabric != FabricKind::Threads {
        words.extend(["--fabric".into(), job.fabric.to_string().into()]);
    }
    if job.json {
        words.push("--json".into());
    }
    let words = words.iter().map(|word| word.to_str().map(quoted));
    let words = words.collect::<Option<Vec<_>>>();
    let unspeakable = || CliError::Failure(format!("{}: not a name that can be typed", job.folder.display()));
    Ok(words.ok_or_else(unspeakable)?.join(" "))
}

fn info(job: &Job) -> Result<RunInfo, CliError> {
    let mut info = RunInfo::starting(job.started);
    info.command = super::command_line();
    info.continued = job.resume.iter().map(|resume| resume.continuation.clone()).collect();
    if let serde_json::Value::Object(config) = serde_json::to_value(&job.config)? {
        info.config = config;
    }
    info.versions = BTreeMap::from([("ultraep".to_string(), env!("CARGO_PKG_VERSION").to_string())]);
    let domain = |d: &ultraep_text::TextDomain| DomainSummary {
        name: d.name.clone(),
        bytes: d.bytes.len() as u64,
        file_count: d.files as u64,
        origin: d.origin.clone(),
    };
    info.corpus = Some(CorpusSummary {
        digest: Digest(job.corpus.digest()),
        domains: job.corpus.domains.iter().map(domain).collect(),
    });
    Ok(info)
}

fn describe_run(job: &Job) {
    let c = &job.config;
    let experts = c.experts * c.layers * c.model().expert_shape().weight_len();
    let dense = 2 * 256 * c.hidden + c.layers * (4 * c.hidden * c.hidden + c.hidden * c.experts);
    say(format_args!(
        "model: {} layers of width {}, {} experts a layer, top-{}, {:.1} M parameters ({:.1} M a token)",
        c.layers,
        c.hidden,
        c.experts,
        c.top_k,
        (experts + dense) as f64 / 1e6,
        (experts / c.experts * c.top_k + dense) as f64 / 1e6
    ));
    say(format_args!(
        "group: {} ranks on {} cores, {} experts and {} slots a rank, policy {}, {} tokens a rank and microbatch",
        c.ranks,
        c.cores,
        c.experts.div_ceil(c.ranks),
        c.slots,
        c.policy,
        c.tokens_per_rank()
    ));
    if let Some(Resume { continuation, .. }) = &job.resume {
        let changed: Vec<String> = continuation.changed.iter().map(ToString::to_string).collect();
        let changed = if changed.is_empty() { String::new() } else { format!(", with {}", changed.join(", ")) };
        match &continuation.from {
            None => say(format_args!("going on after step {}{changed}", continuation.step)),
            Some(from) => {
                say(format_args!("going on from {from} in a folder of its own, {}{changed}", job.folder.display()))
            }
        }
    }
}

impl Observer for Screen {
    fn begin(&mut self, phase: Phase, first_step: u64) -> Result<(), TrainError> {
        self.bar.finish_and_clear();
        let (name, policy) = match phase {
            Phase::Training => ("training", self.config.policy.as_str()),
            Phase::Reference => ("reference", "none"),
        };
        if self.plain {
            say(format_args!("{name} with {policy}, {} steps", self.config.steps - first_step));
        } else {
            self.bar = ProgressBar::new(self.config.steps).with_position(first_step);
            let template = "{prefix:9} {bar:24} {pos}/{len} {elapsed} {wide_msg}";
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            self.bar.set_style(style);
            self.bar.set_prefix(name);
        }
        self.folder.begin(phase, first_step)
    }

    fn step(&mut self, report: &StepReport<'_>) -> Result<(), TrainError> {
        let mean = |of: fn(&LayerRecord) -> f64| {
            report.records.iter().map(of).sum::<f64>() / report.records.len().max(1) as f64
        };
        let tokens_per_s = report.tokens as f64 * 1e9 / report.time.total_ns.max(1) as f64;
        let message = format!(
            "loss {:.3}  {:.0} tokens/s  imbalance {:.2} -> {:.3}",
            report.loss,
            tokens_per_s,
            mean(LayerRecord::imbalance_before),
            mean(LayerRecord::imbalance_after)
        );
        let done = report.step + 1;
        let every = (self.config.steps / 10).max(1);
        if !self.plain {
            self.bar.set_message(message);
            self.bar.set_position(done);
        } else if done.is_multiple_of(every) || done == self.config.steps {
            say(format_args!("step {done:>5}  {message}"));
        }
        self.folder.step(report)
    }

    fn compared(&mut self, comparison: &Comparison<'_>) -> Result<(), TrainError> {
        self.bar.set_message(format!("comparing {}", comparison.policy));
        self.folder.compared(comparison)
    }

    fn saved(&mut self, step: u64, path: &Path) -> Result<(), TrainError> {
        self.folder.saved(step, path)
    }
}

/// `ultraep.train/1`.
#[derive(Serialize)]
struct Json<'a> {
    schema: &'static str,
    run_folder: &'a Path,
    steps: u64,
    stopped: bool,
    checkpoint: Option<&'a Path>,
    final_loss: Option<f32>,
    reference_loss_difference: Option<f32>,
    gradient_difference: Option<f64>,
    balance: BalanceJson,
    profile: ProfileSummary,
    table: Option<&'a PolicyTable>,
}

#[derive(Serialize)]
struct BalanceJson {
    plans: u64,
    within_1_02: u64,
    above_at_proven_bound: u64,
    imbalance_before_mean: f64,
    imbalance_before_worst: f64,
    imbalance_after_mean: f64,
    imbalance_after_worst: f64,
    lower_bound_mean: f64,
    lower_bound_worst: f64,
}

impl<'a> Json<'a> {
    fn new(folder: &'a Path, outcome: &'a Outcome, summary: &Summary, table: Option<&'a PolicyTable>) -> Self {
        let b = summary.balance;
        let (before, after) = b.means();
        Self {
            schema: "ultraep.train/1",
            run_folder: folder,
            steps: outcome.steps,
            stopped: outcome.stopped,
            checkpoint: outcome.checkpoint.as_deref(),
            final_loss: summary.losses.last().map(|&(_, loss)| loss),
            reference_loss_difference: largest_difference(summary),
            gradient_difference: summary.gradient_difference,
            balance: BalanceJson {
                plans: b.plans,
                within_1_02: b.within,
                above_at_proven_bound: b.at_bound,
                imbalance_before_mean: before,
                imbalance_before_worst: b.worst_before,
                imbalance_after_mean: after,
                imbalance_after_worst: b.worst_after,
                lower_bound_mean: b.mean_bound(),
                lower_bound_worst: b.worst_bound,
            },
            profile: summary.profile,
            table,
        }
    }
}

fn largest_difference(summary: &Summary) -> Option<f32> {
    let pairs = summary.losses.iter().zip(&summary.reference_losses);
    pairs.map(|(a, b)| (a.1 - b.1).abs()).reduce(f32::max)
}

fn print(
    out: &mut Output<'_>,
    config: &TrainConfig,
    summary: &Summary,
    table: Option<&PolicyTable>,
) -> Result<(), CliError> {
    if table.is_none() && config.compare_every > 0 {
        writeln!(out, "no policies compared: the run ended before the first comparison (--compare-every)")?;
    }
    if let Some(table) = table {
        writeln!(out, "\n{}\n", table.title)?;
        out.table(&main_table(table))?;
        writeln!(out, "\nParts of the step, ms (* what of weight sync and grad reduce was not hidden)")?;
        out.table(&parts_table(table))?;
        writeln!(out)?;
        for note in &table.notes {
            out.wrapped(note)?;
        }
        writeln!(out)?;
    }
    print_balance(out, config, &summary.balance)?;
    print_profile(out, summary.profile)?;
    print_agreement(out, summary)
}

fn print_balance(out: &mut Output<'_>, config: &TrainConfig, b: &BalanceCount) -> Result<(), CliError> {
    if b.plans == 0 {
        return Ok(());
    }
    let (before, after) = b.means();
    let above = b.plans - b.within;
    let text = format!(
        "training with {}: {} plans, imbalance {before:.2} (worst {:.2}) -> {after:.3} (worst {:.3}); {} above 1.02, {} of \
         them at the proven bound",
        config.policy, b.plans, b.worst_before, b.worst_after, above, b.at_bound
    );
    out.wrapped(&text)?;
    if config.domain_ranks < config.ranks {
        let bound = b.mean_bound();
        writeln!(
            out,
            "domains of {}: lower bound of the imbalance {bound:.3} (worst {:.3}); no plan inside domains beats it",
            config.domain_ranks, b.worst_bound
        )?;
    }
    Ok(())
}

fn print_profile(out: &mut Output<'_>, profile: ProfileSummary) -> Result<(), CliError> {
    if profile.every > 0 {
        writeln!(out, "loads recorded: {} layers, {} dropped", profile.recorded, profile.dropped)?;
    }
    Ok(())
}

fn print_agreement(out: &mut Output<'_>, summary: &Summary) -> Result<(), CliError> {
    if let Some(difference) = summary.gradient_difference {
        out.wrapped(&format!(
            "outputs: equal bit for bit under all policies compared (but ideal); gradients differ by {difference:.1e} at most"
        ))?;
    }
    let Some(largest) = largest_difference(summary) else { return Ok(()) };
    let pairs: Vec<_> = summary.losses.iter().zip(&summary.reference_losses).collect();
    let mut table = Table::new([
        Column::number("step", "training step"),
        Column::number("loss, balanced", "with live balancing"),
        Column::number("loss, none", "the same run without balancing"),
        Column::number("difference", "of the two"),
    ]);
    let points = 6.min(pairs.len());
    for i in 0..points {
        let (a, b) = pairs[i * (pairs.len() - 1) / (points - 1).max(1)];
        let difference = f64::from(a.1) - f64::from(b.1);
        table.row([
            Cell::count(a.0 + 1),
            Cell::number(a.1.into(), 4),
            Cell::number(b.1.into(), 4),
            Cell::shown(format!("{difference:+.1e}"), difference),
        ]);
    }
    out.table(&table)?;
    writeln!(out, "largest difference of the loss curves over {} steps: {largest:.1e}", pairs.len())?;
    Ok(())
}

/// Milliseconds.
fn ms(ns: u64) -> Cell {
    Cell::number(ns as f64 / 1e6, 2)
}

fn main_table(table: &PolicyTable) -> Table {
    let with_wall = table.rows.iter().any(|row| row.wall_ns.is_some());
    let mut columns = vec![
        Column::text("policy", "who planned"),
        Column::number("imbalance\nmean", "largest over mean rank load as planned, mean over layers and steps"),
        Column::number("imbalance\nworst", "the same, worst"),
        Column::number("replicas\na layer", "copies of experts, mean over layers").minor(1),
        Column::number("crossed\nranks", "token choices processed on another rank than their source").minor(3),
        Column::number("step ms\n(parallel)", "median time of a step by the virtual clocks"),
        Column::number("of\nideal", "throughput over that of ideal routing"),
        Column::number("tokens/s", "throughput by parallel time").minor(2),
        Column::number("peak tokens\non a rank", "most tokens on one rank in a layer and microbatch").minor(4),
    ];
    columns.extend(with_wall.then(|| Column::number("step ms\n(wall)", "median wall time of a step")));
    let mut text = Table::new(columns);
    for row in &table.rows {
        let mut cells = vec![
            Cell::text(row.policy.clone()),
            Cell::number(row.imbalance_after.mean, 3),
            Cell::number(row.imbalance_after.worst, 3),
            Cell::number(row.replicas_per_layer, 1),
            Cell::share(row.tokens_crossed_fraction),
            ms(row.step_ns),
            Cell::maybe(row.share_of_ideal, Cell::share),
            Cell::number(row.throughput_tokens_per_s, 0),
            Cell::count(row.peak_tokens_per_rank),
        ];
        cells.extend(with_wall.then(|| Cell::maybe(row.wall_ns, ms)));
        text.row(cells);
    }
    text
}

/// Parts as rows, policies as columns: narrow enough for any terminal.
fn parts_table(table: &PolicyTable) -> Table {
    let names = ["dense", "router", "plan", "reroute", "weight sync*", "all-to-all", "experts", "grad reduce*"];
    let names = names.into_iter().chain(["all-reduce", "optimizer"]);
    let values = |row: &PolicyRow| {
        let p = &row.parts;
        let moe = [p.dense_ns, p.router_ns, p.plan_ns, p.reroute_ns, p.exposed_sync_ns, p.all_to_all_ns, p.experts_ns];
        let rest = [p.grad_reduce_exposed_ns, p.all_reduce_ns, p.optimizer_ns];
        moe.into_iter().chain(rest).map(ms).collect::<Vec<_>>()
    };
    let columns: Vec<_> = table.rows.iter().map(values).collect();
    let mut heads = vec![Column::text("part", "part of the step")];
    heads.extend(table.rows.iter().map(|row| Column::number(row.policy.as_str(), "")));
    let mut text = Table::new(heads);
    for (i, name) in names.enumerate() {
        text.row(std::iter::once(Cell::text(name)).chain(columns.iter().map(|column| column[i].clone())));
    }
    let share = |row: &PolicyRow| 100.0 * row.parts.balancing_ns() as f64 / row.step_ns.max(1) as f64;
    let extra = table.rows.iter().map(share).map(|percent| Cell::shown(format!("{percent:.2}%"), percent));
    text.row(std::iter::once(Cell::text("plan + weight sync*")).chain(extra));
    text
}
