//! `ultraep view` and `ultraep report`: runs and recordings as pictures.

use std::io::{IsTerminal, Write};
use std::net::{IpAddr, TcpListener, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use ultraep_baselines::PolicyKind;
use ultraep_import::OutputFile;
use ultraep_plan::Ratio;
use ultraep_replay::LeastQuota;
use ultraep_view::{Settings, ViewError, Viewer};

use super::recordings::{ReadingArgs, SourceArgs};
use super::write_error;
use crate::error::{CliError, note};
use crate::options;
use crate::output::Output;

/// How loads are brought to a group, and planned where no plan was recorded.
#[derive(Debug, clap::Args)]
pub(crate) struct ViewSettings {
    #[command(flatten)]
    reading: ReadingArgs,
    #[command(flatten)]
    sources: SourceArgs,
    #[arg(long, value_name = "N", value_parser = options::ranks(),
          help = format!("{} [default: as recorded, else 8]", options::RANKS))]
    ranks: Option<usize>,
    #[arg(long, value_name = "NAME",
          help = format!("{}, for loads that were recorded without a plan [default: ultraep]", options::POLICY))]
    policy: Option<PolicyKind>,
    #[arg(long, value_name = "R", value_parser = options::slots(),
          help = format!("{} [default: as recorded, else 2]", options::SLOTS))]
    slots: Option<usize>,
    /// Ranks in a domain; replicas stay in their master's domain [default: as recorded]
    #[arg(long, value_name = "G", value_parser = options::ranks())]
    domain: Option<usize>,
    #[arg(long, value_name = "RATIO", value_parser = options::imbalance,
          help = format!("{} [default: as the run had it, else 1.01]", options::BETA))]
    beta: Option<Ratio>,
    #[arg(long, value_name = "TOKENS", value_parser = options::least_quota,
          help = format!("{} [default: as the run had it, else auto]", options::LEAST_QUOTA))]
    min_quota: Option<LeastQuota>,
    /// Hardware to predict times for: a file, or one that comes with the program [default: gb200-nvl72]
    #[arg(long, value_name = "NAME|FILE")]
    hardware: Option<String>,
    #[arg(long, value_name = "SIZE", value_parser = options::width::<u32>(),
          help = format!("{}, for predicted times [default: as the run had it, else 4096]", options::HIDDEN))]
    hidden: Option<u32>,
    #[arg(long, value_name = "SIZE", value_parser = options::width::<u32>(),
          help = format!("{}, for predicted times [default: as the run had it, else 1536]", options::EXPERT_WIDTH))]
    expert_width: Option<u32>,
}

/// Arguments of `ultraep view`.
#[derive(Debug, clap::Args)]
#[command(after_help = VIEW_EXAMPLES)]
pub(crate) struct ViewArgs {
    /// Run folders, traces, or recordings of other systems (a folder is one recording)
    #[arg(required = true, value_name = "RUN|TRACE")]
    paths: Vec<PathBuf>,
    #[arg(long, default_value_t = 8674, value_name = "PORT", help = options::PORT)]
    port: u16,
    /// Address or name to answer on; any other than 127.0.0.1 lets other machines read the recordings
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    host: String,
    #[command(flatten)]
    settings: ViewSettings,
}

const VIEW_EXAMPLES: &str = "Examples:
  ultraep view runs/2026-11-24T14-39-16Z
  ultraep view loads.uet log.jsonl.gz --drop-dummy-run --ranks 12 --min-quota 64
  ultraep view prompts/ --ranks 32 --microbatch-tokens 512 --scale 16 --port 0";

/// Arguments of `ultraep report`.
#[derive(Debug, clap::Args)]
#[command(after_help = REPORT_EXAMPLES)]
pub(crate) struct ReportArgs {
    /// A run folder, a trace, or a recording of another system
    #[arg(value_name = "RUN|TRACE")]
    path: PathBuf,
    /// File to write, in HTML; it must not exist
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    settings: ViewSettings,
}

const REPORT_EXAMPLES: &str = "Examples:
  ultraep report runs/2026-11-24T14-39-16Z -o report.html
  ultraep report prompts/ --ranks 16 --min-quota 64 -o report.html";

impl ViewSettings {
    fn settings(&self) -> Settings {
        // The numbers of ranks and experts that a grouping would add are not known yet.
        let grouping = self.sources.grouping(0, 0);
        Settings {
            ranks: self.ranks,
            microbatch_tokens: grouping.microbatch_tokens,
            rule: grouping.rule,
            scale: grouping.scale,
            reading: self.reading.options(),
            policy: self.policy,
            slots: self.slots,
            domain_ranks: self.domain,
            beta: self.beta,
            min_quota: self.min_quota,
            hardware: self.hardware.clone(),
            hidden: self.hidden,
            expert_width: self.expert_width,
        }
    }
}

fn view_error(error: ViewError) -> CliError {
    if error.is_input() { CliError::input(error) } else { CliError::failure(error) }
}

/// How often an interrupt is looked for.
const INTERRUPT_POLL: Duration = Duration::from_millis(100);

pub(crate) fn view(args: &ViewArgs, out: &mut Output<'_>) -> Result<(), CliError> {
    let listener = listen(&args.host, args.port)?;
    let waiting = spinner("reading recordings of other systems");
    let viewer = Viewer::open(&args.paths, &args.settings.settings()).map_err(view_error)?;
    waiting.finish_and_clear();
    let address = listener.local_addr().map_err(CliError::failure)?;
    if !address.ip().is_loopback() {
        note(format!("{address}: every machine that reaches this address can read the recordings"));
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, stop.clone()).map_err(CliError::failure)?;
    }
    writeln!(out, "http://{address}/  (Ctrl-C ends it)")?;
    out.flush()?;
    let until_stopped = async move {
        while !stop.load(Ordering::Relaxed) {
            tokio::time::sleep(INTERRUPT_POLL).await;
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::failure)?;
    let served = runtime.block_on(ultraep_view::serve(listener, Arc::new(viewer), &args.host, until_stopped));
    runtime.shutdown_background();
    served.map_err(CliError::failure)
}

/// Shown on a terminal only.
fn spinner(message: &'static str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(message);
    if std::io::stderr().is_terminal() {
        spinner.enable_steady_tick(Duration::from_millis(200));
    }
    spinner
}

fn listen(host: &str, port: u16) -> Result<TcpListener, CliError> {
    let refuse = |error: std::io::Error| CliError::Input(format!("--host {host} --port {port}: {error}"));
    match host.parse::<IpAddr>() {
        Ok(address) => TcpListener::bind((address, port)).map_err(refuse),
        Err(_) => {
            let addresses: Vec<_> = (host, port).to_socket_addrs().map_err(refuse)?.collect();
            TcpListener::bind(addresses.as_slice()).map_err(refuse)
        }
    }
}

pub(crate) fn report(args: &ReportArgs, out: &mut Output<'_>) -> Result<(), CliError> {
    let output = OutputFile::new(&args.output).map_err(write_error(&args.output))?;
    let bar = spinner("opening");
    let style =
        ProgressStyle::with_template("{bar:30} {human_pos}/{human_len} records {eta}").map_err(CliError::failure)?;
    let show = |read: u64, records: u64| {
        if read > 0 && bar.length() != Some(records) {
            bar.set_style(style.clone());
        }
        bar.set_length(records);
        bar.set_position(read);
    };
    let html = ultraep_view::report(&args.path, &args.settings.settings(), &show).map_err(view_error)?;
    bar.finish_and_clear();
    let written = output.file().and_then(|mut file| file.write_all(html.as_bytes()));
    written.and_then(|()| output.finish()).map_err(write_error(&args.output))?;
    writeln!(out, "{}: {} bytes", args.output.display(), html.len())?;
    Ok(())
}
