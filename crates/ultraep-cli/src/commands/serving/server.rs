//! `ultraep serve`: the HTTP server.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ultraep_baselines::PolicyKind;
use ultraep_http::Hosts;
use ultraep_run::{RunInfo, RunStatus};
use ultraep_runtime::LayerRecord;
use ultraep_serve::http::{AccessLog, HttpConfig, bind, serve};
use ultraep_serve::{Engine, EngineConfig, Observer, Recorder, ServedModel};

use super::{GroupArgs, KeyArgs, serve_error};
use crate::commands::train;
use crate::error::{CliError, note};
use crate::options;
use crate::output::Output;

/// Arguments of `ultraep serve`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(flatten)]
    group: GroupArgs,
    #[arg(long, default_value_t = 8, value_name = "N", help_heading = "Ranks", value_parser = options::ranks(), help = format!("{}, threads of this process", options::RANKS))]
    ranks: usize,
    #[arg(long, default_value_t = 60, value_name = "S", help_heading = "Ranks", value_parser = options::seconds(), help = options::TIMEOUT)]
    timeout_s: u64,
    #[arg(long, default_value_t = PolicyKind::Ultraep, value_name = "NAME", help_heading = "Balancing", value_parser = options::running_policy, help = format!("{}, for batches with prompt tokens", options::POLICY))]
    policy: PolicyKind,
    /// Policy of batches that only decode: they are bound by memory and gain little
    #[arg(long, default_value_t = PolicyKind::None, value_name = "NAME", help_heading = "Balancing", value_parser = options::running_policy)]
    decode_policy: PolicyKind,
    #[arg(long, help_heading = "Balancing", help = options::CHECKED)]
    checked: bool,
    /// Longest prompt with its new tokens
    #[arg(long, default_value_t = 32_768, value_name = "TOKENS", help_heading = "Limits", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    context: u32,
    /// KV budget of a rank in tokens [default: twice the context]
    #[arg(long, value_name = "TOKENS", help_heading = "Limits")]
    kv_tokens: Option<u32>,
    /// Most requests that wait; more get 429
    #[arg(long, default_value_t = 256, value_name = "N", help_heading = "Limits")]
    queue: usize,
    /// Seconds after which a request that has not started gets 429
    #[arg(long, default_value_t = 60, value_name = "S", help_heading = "Limits", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    queue_timeout_s: u64,
    /// Tokens that a request asks for, at most
    #[arg(long, default_value_t = 256, value_name = "TOKENS", help_heading = "Limits", value_parser = options::tokens())]
    max_tokens: u32,
    /// Seconds after which a request is cancelled
    #[arg(long, default_value_t = 120, value_name = "S", help_heading = "Limits", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    request_timeout_s: u64,
    /// Most connections at a time
    #[arg(long, default_value_t = 4096, value_name = "N", help_heading = "Limits", value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    connections: u32,
    /// Seconds after which a client that takes nothing of its answer loses its connection
    #[arg(long, default_value_t = 30, value_name = "S", help_heading = "Limits", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    write_timeout_s: u64,
    /// Address or name to answer on; any other than 127.0.0.1 lets other machines ask
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST", help_heading = "Server")]
    host: String,
    /// Further names under which it may be asked, as behind a proxy: beside addresses, localhost and --host. Requests with
    /// another Host are refused (DNS rebinding)
    #[arg(long, value_delimiter = ',', value_name = "NAME,...", help_heading = "Server")]
    allow_host: Vec<String>,
    #[arg(long, default_value_t = 8000, value_name = "PORT", help_heading = "Server", help = options::PORT)]
    port: u16,
    #[command(flatten)]
    key: KeyArgs,
    /// Append a line for each request to this file [default: stderr]
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    access_log: Option<PathBuf>,
    /// No access log
    #[arg(long, conflicts_with = "access_log", help_heading = "Output")]
    quiet: bool,
    #[arg(long, value_name = "FOLDER", help_heading = "Output", help = format!("{}; with it loads and plans are recorded, for `ultraep view` and `ultraep replay`", options::RUNS))]
    runs: Option<PathBuf>,
    /// Record loads, of every Nth batch with --runs; 0 records none
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "Output")]
    profile_every: u64,
}

const EXAMPLES: &str = "Examples:
  ultraep serve --checkpoint runs/2026-11-24T15-00-00Z
  ultraep serve --checkpoint runs/2026-11-24T15-00-00Z --ranks 16 --chunk 4096 --api-key-file key --runs runs
  ultraep serve --checkpoint runs/2026-11-24T15-00-00Z --host 0.0.0.0 --allow-host gpu7,gpu7.cluster --api-key-file key
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{\"prompt\": \"fn main() {\", \"max_tokens\": 32}'";

/// Says on stderr what the operator must know, and feeds the recorder.
struct Watch {
    recorder: Option<Recorder>,
    failed: AtomicBool,
}

impl Observer for Watch {
    fn batch(&self, records: &[LayerRecord]) {
        let Some(recorder) = &self.recorder else { return };
        if let Err(error) = recorder.batch(records)
            && !self.failed.swap(true, Ordering::Relaxed)
        {
            note(format!("no more loads are recorded: {error}"));
        }
    }

    fn ranks_lost(&self, reason: &str) {
        note(format!("ranks lost, starting them again: {reason}"));
    }

    fn suspended(&self, time: Duration) {
        note(format!("this process was suspended for {:.1} s; the ranks go on", time.as_secs_f64()));
    }
}

pub(crate) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    train::keep_tensors_on_one_thread()?;
    let (key, access_log) = (args.key.key()?, access_log(args)?);
    let model = ServedModel::load(&args.group.checkpoint, args.context as usize).map_err(CliError::input)?;
    let kv_tokens = args.kv_tokens.unwrap_or(args.context.saturating_mul(2));
    let limits = args.group.limits(&model, args.ranks, kv_tokens, args.queue)?;
    let policies =
        if args.policy == args.decode_policy { vec![args.policy] } else { vec![args.policy, args.decode_policy] };
    let mut group = args.group.group(&limits, policies, Duration::from_secs(args.timeout_s))?;
    group.checked = args.checked;
    let stop = train::stop_flag()?;
    let recorder = args
        .runs
        .as_ref()
        .filter(|_| args.profile_every > 0)
        .map(|runs| recorder(args, runs, &model, &group))
        .transpose()?;
    if let Some(recorder) = &recorder {
        note(format!("run folder: {}", recorder.folder().display()));
    }
    let watch = Arc::new(Watch { recorder, failed: AtomicBool::new(false) });
    let config = EngineConfig { group, limits, queue_timeout: Duration::from_secs(args.queue_timeout_s) };
    let engine = Engine::start(model, config, Some(watch.clone())).map_err(serve_error)?;
    let http = HttpConfig {
        api_key: key,
        hosts: Hosts::new(args.allow_host.iter().chain([&args.host])),
        access_log,
        new_tokens_max: args.max_tokens,
        request_timeout: Duration::from_secs(args.request_timeout_s),
        write_timeout: Duration::from_secs(args.write_timeout_s),
        connections_max: args.connections as usize,
        ..HttpConfig::for_context(args.context as usize)
    };
    let served = serve_until_stopped(args, http, &engine, stop, out);
    engine.stop();
    if let Some(recorder) = Arc::into_inner(watch).and_then(|watch| watch.recorder) {
        let status = match &served {
            Ok(()) => RunStatus::Finished,
            Err(error) => RunStatus::Failed { reason: error.to_string() },
        };
        let summary = recorder.finish(status, train::now()).map_err(serve_error)?;
        if summary.dropped > 0 {
            note(format!("{} records were dropped because the disk was too slow", summary.dropped));
        }
    }
    served
}

/// The log of requests: a file that grows, or stderr.
fn access_log(args: &Args) -> Result<Option<AccessLog>, CliError> {
    if args.quiet {
        return Ok(None);
    }
    let to: Box<dyn Write + Send> = match &args.access_log {
        None => Box::new(std::io::stderr()),
        Some(path) => {
            let refuse = |error| CliError::Input(format!("--access-log {}: {error}", path.display()));
            Box::new(File::options().append(true).create(true).open(path).map_err(refuse)?)
        }
    };
    let failed = |error| note(format!("no more requests are logged: {error}"));
    AccessLog::new(BufWriter::new(to), failed).map(Some).map_err(CliError::failure)
}

fn serve_until_stopped(
    args: &Args,
    http: HttpConfig,
    engine: &Engine,
    stop: Arc<AtomicBool>,
    out: &mut Output<'_>,
) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(CliError::failure)?;
    runtime.block_on(async {
        let (listener, address) = bind(&args.host, args.port).await.map_err(CliError::input)?;
        if !address.ip().is_loopback() && http.api_key.is_none() {
            note(format!("{address}: every machine that reaches this address can use the model; see --api-key-file"));
        }
        let model = engine.handle().model().name().to_string();
        writeln!(out, "http://{address}/v1  model {model}  (Ctrl-C finishes what was admitted and ends)")?;
        out.flush()?;
        let stopped = async move {
            while !stop.load(Ordering::Relaxed) {
                tokio::time::sleep(STOP_POLL).await;
            }
        };
        serve(listener, engine.handle(), http, stopped).await;
        Ok(())
    })
}

/// How often the wish to stop is looked for.
const STOP_POLL: Duration = Duration::from_millis(50);

fn recorder(
    args: &Args,
    runs: &std::path::Path,
    model: &ServedModel,
    group: &ultraep_serve::GroupConfig,
) -> Result<Recorder, CliError> {
    let runtime = group.runtime(model).map_err(serve_error)?;
    let started = train::now();
    let mut info = RunInfo::starting(started);
    info.command = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned()).collect();
    // A key is nobody's business.
    if let Some(key) = &args.key.api_key {
        info.command.iter_mut().for_each(|argument| *argument = argument.replace(key, "***"));
    }
    let c = model.config();
    let settings = serde_json::json!({
        "ranks": group.ranks, "domain_ranks": group.ranks, "slots": group.slots, "policy": args.policy.name(),
        "beta": args.group.beta.to_string(), "min_quota": args.group.min_quota, "chunk_tokens": args.group.chunk,
        "hidden": c.hidden, "intermediate": c.intermediate, "layers": c.layers, "experts": c.experts, "top_k": c.top_k,
        "checkpoint": args.group.checkpoint.display().to_string(),
    });
    info.config = settings.as_object().cloned().unwrap_or_default();
    info.versions.insert("ultraep".into(), env!("CARGO_PKG_VERSION").into());
    let folder = train::free_folder(runs, started);
    Recorder::create(&folder, info, &runtime.topology, runtime.layers, args.profile_every).map_err(CliError::failure)
}
