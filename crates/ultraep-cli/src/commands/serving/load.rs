//! `ultraep loadtest`: open-loop load on a server.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use ultraep_run::write_atomically;
use ultraep_schedule::Lengths;
use ultraep_serve::bench::{PoolSummary, PromptSpec, prompts};
use ultraep_serve::loadtest::{LOADTEST_SCHEMA, LoadResult, LoadSpec, Target, run as run_rate};
use ultraep_serve::plot::{Line, ttft_plot};

use super::{KeyArgs, MixArg, ms, ms_cell, parse_lengths, progress, serve_error};
use crate::commands::write_json;
use crate::error::CliError;
use crate::options;
use crate::output::Output;
use crate::table::{Cell, Column, Table};

/// Arguments of `ultraep loadtest`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The server, such as http://127.0.0.1:8000
    #[arg(long, value_name = "URL")]
    url: String,
    #[command(flatten)]
    key: KeyArgs,
    /// Requests per second: one rate after another
    #[arg(long, value_delimiter = ',', required = true, value_parser = parse_rate, value_name = "RATE,...")]
    rps: Vec<u64>,
    /// Seconds of arrivals at every rate
    #[arg(long, default_value_t = 30, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    #[arg(long, default_value = "mixed", value_name = "stem|mixed|PATH", help = options::MIX)]
    mix: MixArg,
    #[arg(long, default_value_t = 96, value_name = "N", help = options::PROMPTS, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    prompts: u32,
    #[arg(long, default_value = "128..16384", value_parser = parse_lengths, value_name = "LEAST..MOST", help = options::PROMPT_TOKENS)]
    prompt_tokens: Lengths,
    /// Tokens that a request asks for
    #[arg(long, default_value_t = 1, value_name = "TOKENS", value_parser = options::tokens())]
    max_tokens: u32,
    /// Time to first token that is good enough
    #[arg(long, default_value_t = 10_000, value_name = "MS")]
    ttft_limit_ms: u64,
    /// After so long a request is given up
    #[arg(long, default_value_t = 120_000, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..))]
    timeout_ms: u64,
    #[arg(long, default_value_t = 1, value_name = "SEED", help = options::SEED)]
    seed: u64,
    #[arg(long, value_name = "FILE", help = options::SVG)]
    svg: Option<PathBuf>,
    /// JSON (schema ultraep.loadtest/1) instead of a table
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "Examples:
  ultraep loadtest --url http://127.0.0.1:8000 --rps 1,2,4,8 --seconds 30
  ultraep loadtest --url http://127.0.0.1:8000 --rps 0.5,1 --mix stem --prompt-tokens 256..32768 --svg ttft.svg
  ultraep loadtest --url http://127.0.0.1:8000 --rps 2 --mix docs --json";

/// A rate as requests in a thousand seconds.
fn parse_rate(text: &str) -> Result<u64, String> {
    let rate: f64 = text.trim().parse().map_err(|_| "it must be a number of requests per second".to_string())?;
    if (0.001..=1e6).contains(&rate) {
        Ok((rate * 1e3).round() as u64)
    } else {
        Err("allowed is 0.001 to 1000000".into())
    }
}

/// The document.
#[derive(Serialize)]
struct Document<'a> {
    schema: &'static str,
    url: &'a str,
    prompts: PromptSpec,
    pool: PoolSummary,
    ttft_limit_ms: u64,
    rates: &'a [LoadResult],
}

pub(crate) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    let target = Target::new(&args.url, args.key.key()?.map(|key| key.text().to_string())).map_err(CliError::input)?;
    let corpus = Arc::new(args.mix.read_text()?);
    let count = args.prompts as usize;
    let spec = PromptSpec { mix: args.mix.mix(), lengths: args.prompt_tokens, count, seed: args.seed };
    let pool = Arc::new(prompts(&corpus, &spec).map_err(serve_error)?);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::failure)?;
    let mut results = Vec::new();
    for &rate in &args.rps {
        let requests = (u128::from(rate) * u128::from(args.seconds) / 1000).max(1) as usize;
        let load = LoadSpec {
            requests_per_1000_s: rate,
            requests,
            new_tokens: args.max_tokens,
            ttft_limit_ms: args.ttft_limit_ms,
            timeout_ms: args.timeout_ms,
            seed: args.seed,
        };
        let bar = progress("requests answered", requests as u64);
        results.push(runtime.block_on(run_rate(&target, &pool, &load, &|over| bar.set_position(over as u64))));
        bar.finish_and_clear();
    }
    if let Some(path) = &args.svg {
        let points = results.iter().map(|r| (r.rps, r.ttft.p95_ns as f64 * 1e-9)).collect();
        let line = Line { name: args.url.clone(), points };
        let limit = args.ttft_limit_ms as f64 * 1e-3;
        let svg = ttft_plot("TTFT against load", &[line], Some(limit)).map_err(CliError::failure)?;
        write_atomically(path, svg.as_bytes()).map_err(CliError::failure)?;
    }
    let document = Document {
        schema: LOADTEST_SCHEMA,
        url: &args.url,
        prompts: spec,
        pool: PoolSummary::of(&pool),
        ttft_limit_ms: args.ttft_limit_ms,
        rates: &results,
    };
    if args.json {
        write_json(out, &document)?;
    } else {
        print(out, args, &results)?;
    }
    if results.iter().all(|r| r.finished == 0) {
        return Err(CliError::Failure(format!("{}: no request was answered", args.url)));
    }
    Ok(())
}

fn print(out: &mut Output<'_>, args: &Args, results: &[LoadResult]) -> Result<(), CliError> {
    let mut table = Table::new([
        Column::number("requests/s", "arrivals a second that were planned"),
        Column::number("really\nsent", "requests a second that were sent, over the time that sending took").minor(4),
        Column::number("sent", "requests that were sent").minor(3),
        Column::number("finished", "requests that were answered whole").minor(2),
        Column::number("failed", "requests that were not; in no figure beside this one"),
        Column::number("TTFT mean", "time to the first token from the arrival drawn, ms").minor(1),
        Column::number("p50", "its median, ms"),
        Column::number("p95", "its 95th percentile, ms"),
        Column::number("p99", "its 99th percentile, ms").minor(1),
        Column::number("tokens/s", "prompt tokens of finished requests a second of the time taken").minor(4),
        Column::number("finished/s", "finished requests a second of the time taken").minor(3),
        Column::number("goodput/s", "of these, those with the first token within the limit"),
        Column::number("planned s", "time that the arrivals were planned to take").minor(5),
        Column::number("taken s", "time from the start to the last whole answer").minor(2),
    ]);
    let seconds = |ns: u64| Cell::number(ns as f64 * 1e-9, 1);
    for r in results {
        table.row([
            Cell::number(r.rps, 2),
            Cell::number(r.sent_rps, 2),
            Cell::count(r.requests),
            Cell::count(r.finished),
            Cell::count(r.failed()),
            ms_cell(r.ttft.mean_ns),
            ms_cell(r.ttft.p50_ns),
            ms_cell(r.ttft.p95_ns),
            ms_cell(r.ttft.p99_ns),
            Cell::number(r.tokens_per_s, 0),
            Cell::number(r.finished_rps, 2),
            Cell::number(r.goodput_rps, 2),
            seconds(r.planned_ns),
            seconds(r.answered_ns),
        ]);
    }
    out.table(&table)?;
    for r in results {
        for (kind, failed) in &r.errors {
            let (count, mean, longest) = (failed.count, ms(failed.mean_ns), ms(failed.longest_ns));
            writeln!(
                out,
                "failed at {:.2} requests/s: {count} x {kind}, after {mean} ms (longest {longest} ms)",
                r.rps
            )?;
        }
    }
    writeln!(out, "the first token within {} ms counts as goodput", args.ttft_limit_ms)?;
    Ok(())
}
