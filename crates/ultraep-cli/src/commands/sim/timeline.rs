//! A step's timeline in the Chrome trace format, which Perfetto and chrome://tracing open.
//!
//! One process a rank with a thread for each stream (the first microbatch of the first stage), and one process for the
//! pipeline with a thread for each stage.

use std::path::Path;

use serde::Serialize;
use ultraep_run::write_atomically;
use ultraep_sim::{Direction, StepReport, Stream};

use crate::error::CliError;

/// A complete event. Times are microseconds.
#[derive(Debug, Serialize)]
struct Event<'a> {
    name: &'a str,
    ph: &'static str,
    pid: u32,
    tid: u32,
    ts: f64,
    dur: f64,
}

/// A name of a process or thread.
#[derive(Debug, Serialize)]
struct Name<'a> {
    name: &'static str,
    ph: &'static str,
    pid: u32,
    tid: u32,
    args: NameArgs<'a>,
}

#[derive(Debug, Serialize)]
struct NameArgs<'a> {
    name: &'a str,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Line<'a> {
    Event(Event<'a>),
    Name(Name<'a>),
}

/// The pipeline's process; ranks follow.
const PIPELINE: u32 = 0;

/// Writes the timeline of a step.
pub(super) fn write(path: &Path, report: &StepReport) -> Result<(), CliError> {
    let us = |ps: u64| ps as f64 / 1e6;
    let names: Vec<String> = report
        .ops
        .iter()
        .map(|(op, ..)| {
            let way = if op.direction == Direction::Forward { "forward" } else { "backward" };
            format!("{way} {}", op.microbatch)
        })
        .collect();
    let mut lines = vec![named("process_name", PIPELINE, 0, "pipeline")];
    for ((op, start, end), name) in report.ops.iter().zip(&names) {
        let (ts, dur) = (us(*start), us(end - start));
        lines.push(Line::Event(Event { name, ph: "X", pid: PIPELINE, tid: op.stage, ts, dur }));
    }
    let ranks = report.spans.iter().map(|span| span.rank + 1).max().unwrap_or(0);
    let titles: Vec<String> = (0..ranks).map(|rank| format!("rank {rank}")).collect();
    for (rank, title) in (1..).zip(&titles) {
        lines.push(named("process_name", rank, 0, title));
        lines.push(named("thread_name", rank, 0, "compute"));
        lines.push(named("thread_name", rank, 1, "communication"));
    }
    for span in &report.spans {
        let tid = u32::from(span.stream == Stream::Communication);
        let (ts, dur) = (us(span.start_ps), us(span.end_ps - span.start_ps));
        lines.push(Line::Event(Event { name: span.name, ph: "X", pid: span.rank + 1, tid, ts, dur }));
    }
    let bytes = serde_json::to_vec(&lines)?;
    write_atomically(path, &bytes).map_err(CliError::failure)
}

fn named<'a>(what: &'static str, pid: u32, tid: u32, name: &'a str) -> Line<'a> {
    Line::Name(Name { name: what, ph: "M", pid, tid, args: NameArgs { name } })
}
