//! `ultraep serve`, `ultraep loadtest` and `ultraep prefill-bench`.

mod bench;
mod load;
mod server;

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use ultraep_baselines::{EplbParams, HistoryParams, PolicyKind, PolicyParams};
use ultraep_plan::Ratio;
use ultraep_runtime::Link;
use ultraep_schedule::{Lengths, Limits};
use ultraep_serve::bench::Mix;
use ultraep_serve::http::ApiKey;
use ultraep_serve::{GroupConfig, ServeError, ServedModel};
use ultraep_text::Corpus;

pub(crate) use bench::{Args as BenchArgs, run as bench};
pub(crate) use load::{Args as LoadTestArgs, run as loadtest};
pub(crate) use server::{Args as ServeArgs, run as serve};

use crate::error::{CliError, note};
use crate::options;
use crate::table::Cell;

/// The model and the group that serves it: the same for the server and the benchmark.
#[derive(Debug, clap::Args)]
struct GroupArgs {
    /// A run folder of `ultraep train`, or one of its checkpoints; any number of ranks may have written it
    #[arg(long, value_name = "RUN|DIR")]
    checkpoint: PathBuf,
    #[arg(long, default_value_t = 2, value_name = "R", help_heading = "Balancing", value_parser = options::slots(), help = options::SLOTS)]
    slots: usize,
    #[arg(long, default_value = "1.01", value_name = "RATIO", help_heading = "Balancing", value_parser = options::imbalance, help = options::BETA)]
    beta: Ratio,
    #[arg(long, default_value_t = 16, value_name = "TOKENS", help_heading = "Balancing", value_parser = options::tokens(), help = options::MIN_QUOTA)]
    min_quota: u32,
    #[arg(long, default_value_t = 50, value_name = "BATCHES", help_heading = "Balancing", value_parser = options::eplb_interval(), help = options::EPLB_INTERVAL)]
    eplb_interval: usize,
    /// Chunk budget: most tokens of a batch over all ranks; each runs at most its even share
    #[arg(long, default_value_t = 2048, value_name = "TOKENS", help_heading = "Batches")]
    chunk: u32,
    /// Tokens of context whose attention counts as much as a token in the chunk budget, so that ranks with long contexts
    /// do not hold up the others; 0 counts tokens alone [default: by the model's sizes]
    #[arg(long, value_name = "TOKENS", help_heading = "Batches")]
    context_per_token: Option<u32>,
    /// Sequences on each rank, most at a time [default: 64, or as many as a rank's share of the chunk budget]
    #[arg(long, value_name = "N", help_heading = "Batches", value_parser = options::sequences())]
    sequences: Option<usize>,
    #[arg(long, default_value_t = Link::DEFAULT_GBPS, value_name = "GBPS", help_heading = "Ranks", value_parser = options::link_gbps, help = options::LINK_GBPS)]
    link_gbps: f64,
}

/// The key of a server, for it and for its clients.
#[derive(Debug, clap::Args)]
struct KeyArgs {
    /// File with the key; without it the environment variable ULTRAEP_API_KEY is looked at
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    api_key_file: Option<PathBuf>,
    #[arg(long, value_name = "KEY", help_heading = "Server", conflicts_with = "api_key_file", help = format!("{}; everyone sees it who can list processes: better take --api-key-file", options::API_KEY))]
    api_key: Option<String>,
}

/// Where the key is looked for when no option names one.
const KEY_VARIABLE: &str = "ULTRAEP_API_KEY";
/// A file of more bytes than this is no key.
const KEY_BYTES_MAX: u64 = 4096;

impl KeyArgs {
    /// The key, if there is one. An empty one is an error: it would keep nobody out.
    fn key(&self) -> Result<Option<ApiKey>, CliError> {
        let of = |place: &str, text: &str| {
            let key = ApiKey::new(text).map_err(|error| CliError::Input(format!("{place}: {error}")))?;
            Ok(Some(key))
        };
        if let Some(path) = &self.api_key_file {
            let place = path.display().to_string();
            return of(&place, &read_key(path).map_err(|reason| CliError::Input(format!("{place}: {reason}")))?);
        }
        if let Some(key) = &self.api_key {
            note("--api-key shows the key to everyone who can list processes: better take --api-key-file");
            return of("--api-key", key);
        }
        match std::env::var(KEY_VARIABLE) {
            Ok(key) => of(KEY_VARIABLE, &key),
            Err(std::env::VarError::NotPresent) => Ok(None),
            Err(std::env::VarError::NotUnicode(_)) => of(KEY_VARIABLE, "\u{fffd}"),
        }
    }
}

fn read_key(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    file.take(KEY_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > KEY_BYTES_MAX {
        return Err(format!("more than {KEY_BYTES_MAX} bytes: that is no key"));
    }
    Ok(text)
}

impl GroupArgs {
    fn params(&self) -> PolicyParams {
        let interval = self.eplb_interval;
        let history = HistoryParams { window: interval, interval };
        let mut params = PolicyParams { beta: self.beta, min_quota: self.min_quota, ..PolicyParams::default() };
        params.eplb = EplbParams { history, ..params.eplb };
        params.lplb.history = history;
        params
    }

    fn link(&self) -> Result<Link, CliError> {
        let refuse = || CliError::Input(format!("--link-gbps {}: it must be a positive number", self.link_gbps));
        Link::new(self.link_gbps).ok_or_else(refuse)
    }

    fn limits(
        &self,
        model: &ServedModel,
        ranks: usize,
        kv_tokens_per_rank: u32,
        queue_max: usize,
    ) -> Result<Limits, CliError> {
        let by_sizes = u32::try_from(model.config().context_per_token()).unwrap_or(u32::MAX);
        let mut limits = Limits {
            ranks,
            chunk_tokens: self.chunk,
            context_per_token: self.context_per_token.unwrap_or(by_sizes),
            kv_tokens_per_rank,
            sequences_per_rank: 1,
            queue_max,
        };
        let share = limits.chunk_tokens_per_rank() as usize;
        limits.sequences_per_rank = self.sequences.unwrap_or_else(|| 64.min(share).max(1));
        limits.validate().map_err(CliError::input)?;
        Ok(limits)
    }

    fn group(&self, limits: &Limits, policies: Vec<PolicyKind>, timeout: Duration) -> Result<GroupConfig, CliError> {
        Ok(GroupConfig {
            ranks: limits.ranks,
            slots: self.slots,
            policies,
            params: self.params(),
            tokens_per_rank: limits.chunk_tokens_per_rank() as usize,
            link: self.link()?,
            checked: false,
            timeout,
            cores: super::train::cores(),
        })
    }
}

/// The processor and how many of it, in words.
fn machine() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim()));
    format!("{} cores of {}", super::train::cores(), name.unwrap_or(std::env::consts::ARCH))
}

/// Bad input or a failure, by what went wrong.
fn serve_error(error: ServeError) -> CliError {
    match error {
        ServeError::Train(_)
        | ServeError::Topology(_)
        | ServeError::Build(_)
        | ServeError::Limits(_)
        | ServeError::Text(_)
        | ServeError::ForcedRouting(_)
        | ServeError::Setting(_)
        | ServeError::Context { .. } => CliError::input(error),
        other => CliError::failure(other),
    }
}

/// Where prompts are cut from.
#[derive(Clone, Debug)]
enum MixArg {
    /// Text that is found as `ultraep train` finds it.
    Found(Mix),
    /// All domains of a path.
    Path(PathBuf),
}

impl FromStr for MixArg {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "stem" => Self::Found(Mix::Stem),
            "mixed" => Self::Found(Mix::Mixed),
            path => Self::Path(path.into()),
        })
    }
}

impl MixArg {
    fn mix(&self) -> Mix {
        match self {
            Self::Found(mix) => *mix,
            Self::Path(_) => Mix::Mixed,
        }
    }

    fn read_text(&self) -> Result<Corpus, CliError> {
        let paths = match self {
            Self::Found(_) => &[][..],
            Self::Path(path) => std::slice::from_ref(path),
        };
        super::train::read_text(paths, Path::new("runs")).map_err(CliError::input)
    }
}

fn parse_lengths(text: &str) -> Result<Lengths, String> {
    let (least, most) = text.split_once("..").ok_or("it must be LEAST..MOST, such as 128..16384")?;
    let number = |text: &str| text.trim().parse().map_err(|_| format!("{text:?} is no number of tokens"));
    let lengths = Lengths::new(number(least)?, number(most)?).map_err(|error| error.to_string())?;
    if lengths.most as usize > ultraep_text::MAX_SEQUENCE_TOKENS {
        return Err(format!("the most is {} tokens", ultraep_text::MAX_SEQUENCE_TOKENS));
    }
    Ok(lengths)
}

fn progress(what: &'static str, length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length);
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {human_pos}/{human_len} {eta}") {
        bar.set_style(style);
    }
    bar.set_message(what);
    if std::io::stderr().is_terminal() {
        bar.enable_steady_tick(Duration::from_millis(200));
    } else {
        note(what);
    }
    bar
}

/// Milliseconds.
fn ms(ns: u64) -> String {
    format!("{:.1}", ns as f64 * 1e-6)
}

/// Milliseconds for tables.
fn ms_cell(ns: u64) -> Cell {
    Cell::number(ns as f64 * 1e-6, 1)
}
