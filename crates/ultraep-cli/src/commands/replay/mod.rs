//! `ultraep replay`: every policy on every layer and microbatch of a recording.

mod plot;
mod report;
mod single;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use ultraep_baselines::{HistoryParams, PolicyKind, PolicyParams};
use ultraep_import::{Leftover, Microbatches, OpenOptions, RecordingInfo};
use ultraep_plan::{HardwareModel, Ratio, Topology, TopologySpec};
use ultraep_replay::{ExpertShape, Hardware, LeastQuota, Outcomes, Scenario, replay};

use self::report::Replay;
use super::recordings::{RecordingArgs, SourceArgs, grouping_error};
use super::train::cores;
use super::write_json;
use crate::error::{CliError, note};
use crate::input::policy_list;
use crate::options;
use crate::output::Output;
use crate::timing::now_ns;

/// Arguments of `ultraep replay`.
#[derive(Debug, clap::Args)]
#[command(after_help = format!("Policies:\n{}\n{EXAMPLES}", policy_list()))]
pub(crate) struct Args {
    #[command(flatten)]
    recording: RecordingArgs,
    #[command(flatten)]
    sources: SourceArgs,
    #[arg(long, value_delimiter = ',', value_name = "N,...", value_parser = options::ranks(),
          help = format!("{} [default: as recorded, else those of 8,16,32,64 that the experts cover]", options::RANKS))]
    ranks: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_value = "1,2", value_name = "R,...", value_parser = options::slots(),
          help = options::SLOTS)]
    slots: Vec<usize>,
    #[arg(long, value_delimiter = ',', value_name = "G,...", value_parser = options::ranks(), help = options::DOMAIN)]
    domain: Vec<usize>,
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', default_value = DEFAULT_POLICIES, help = options::POLICIES)]
    policies: Vec<PolicyKind>,
    #[arg(long, default_value = "1.01", value_name = "RATIO", value_parser = options::imbalance, help = options::BETA)]
    beta: Ratio,
    #[arg(long, value_delimiter = ',', default_value = "auto", value_name = "TOKENS,...", value_parser = options::least_quota,
          help = options::LEAST_QUOTA)]
    min_quota: Vec<LeastQuota>,
    #[arg(long, default_value_t = 1, value_name = "MICROBATCHES", value_parser = options::history(), help = options::WINDOW)]
    window: usize,
    #[arg(long, default_value_t = 1, value_name = "MICROBATCHES", value_parser = options::history(), help = options::INTERVAL)]
    interval: usize,
    /// Hardware to predict times for: a file, or one that comes with the program
    #[arg(long, value_name = "NAME|FILE", help = format!("Hardware to predict times for: a file or one of {} [default: 900 GB/s links, 800 TFLOPS]", Hardware::built_in_names().join(", ")))]
    hardware: Option<String>,
    #[arg(long, default_value_t = 4096, value_name = "SIZE", value_parser = options::width::<u32>(), requires = "hardware",
          help = format!("{}, for predicted times", options::HIDDEN))]
    hidden: u32,
    #[arg(long, default_value_t = 1536, value_name = "SIZE", value_parser = options::width::<u32>(), requires = "hardware",
          help = format!("{}, for predicted times", options::EXPERT_WIDTH))]
    expert_width: u32,
    /// Draw imbalance over microbatches and by layer, a line for each policy
    #[arg(long, value_name = "FILE", conflicts_with = "only")]
    svg: Option<PathBuf>,
    /// Plan this microbatch alone, with all that follows from each plan
    #[arg(long, value_name = "STEP/MICROBATCH/LAYER")]
    only: Option<Place>,
    #[arg(long, value_name = "N", value_parser = options::threads(), help = options::THREADS)]
    threads: Option<usize>,
    /// JSON (schema ultraep.replay/1) instead of tables
    #[arg(long)]
    json: bool,
}

/// Which microbatch of which layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    step: u64,
    microbatch: u32,
    layer: u32,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.step, self.microbatch, self.layer)
    }
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |text: &str| {
            let mut parts = text.split('/');
            let place = Self {
                step: parts.next()?.parse().ok()?,
                microbatch: parts.next()?.parse().ok()?,
                layer: parts.next()?.parse().ok()?,
            };
            parts.next().is_none().then_some(place)
        };
        parse(text).ok_or_else(|| "allowed are step/microbatch/layer, as 12/0/3".to_owned())
    }
}

const DEFAULT_POLICIES: &str = "none,eplb,eplb-exact,llep,greedy,ultraep-v1,ultraep,ideal";

const EXAMPLES: &str = "Examples:
  ultraep replay runs/2026-11-24T14-39-16Z
  ultraep replay log.jsonl.gz --drop-dummy-run --ranks 8,16,32 --slots 1,2,4 --min-quota 1
  ultraep replay runs/2026-11-24T14-39-16Z --policies none,eplb,ultraep --slots 2 --svg replay.svg
  ultraep replay runs/2026-11-24T14-39-16Z --only 12/0/3 --slots 1,2,4
  ultraep replay prompts/ --ranks 32 --microbatch-tokens 512 --scale 16 --hardware h100x8 --domain 8";

/// Sizes of the group tried where the recording does not know its own.
const DEFAULT_RANKS: [usize; 4] = [8, 16, 32, 64];

/// Microbatches between two looks at the progress bar.
const SHOW_EVERY: u64 = 64;

/// Most scenarios in one replay.
const MAX_SCENARIOS: usize = 4096;

pub(crate) fn run(args: &Args, out: &mut Output<'_>) -> Result<(), CliError> {
    if let Some(place) = args.only {
        return single::run(args, place, out);
    }
    let start = Instant::now();
    let (info, experts) = args.recording.describe()?;
    let hardware = args.hardware.as_deref().map(Hardware::find).transpose().map_err(CliError::input)?;
    let sizes = args.ranks_for(&info, experts);
    // Every size of the group reads the recording once.
    let bar = progress_bar(args.recording.bytes().saturating_mul(sizes.len() as u64));
    let mut replay = Replay::new(args.recording.title(), &info, experts, hardware.as_ref());
    for ranks in sizes {
        let scenarios = args.scenarios(ranks, experts, hardware.as_ref(), &mut replay.notes);
        if scenarios.is_empty() {
            continue;
        }
        replay.notes.extend(args.sources.grouping(ranks, experts).describe_sources(info.sources));
        let (outcomes, leftover, ending) = args.replay_for(ranks, experts, &scenarios, &bar)?;
        replay.notes.extend(leftover_note(leftover));
        replay.notes.extend(ending);
        replay.add(&scenarios, outcomes);
    }
    bar.finish_and_clear();
    if replay.is_empty() {
        return Err(CliError::Input(replay.notes.join("; ")));
    }
    replay.finish(start.elapsed());
    if let Some(path) = &args.svg {
        if let Some(left_out) = plot::write(path, &replay.title(), &replay.plot_groups())? {
            note(left_out);
        }
        note(format_args!("wrote {}", path.display()));
    }
    if args.json { write_json(out, &replay) } else { replay.print(out) }
}

impl Args {
    fn ranks_for(&self, info: &RecordingInfo, experts: usize) -> Vec<usize> {
        match info.ranks {
            _ if !self.ranks.is_empty() => self.ranks.clone(),
            Some(recorded) if recorded > 1 => vec![recorded],
            _ if experts < DEFAULT_RANKS[0] => vec![experts],
            _ => DEFAULT_RANKS.into_iter().filter(|&ranks| ranks <= experts).collect(),
        }
    }

    /// Every combination that the group allows; the others become notes.
    fn scenarios(
        &self,
        ranks: usize,
        experts: usize,
        hardware: Option<&Hardware>,
        notes: &mut Vec<String>,
    ) -> Vec<Scenario> {
        let shape = ExpertShape { hidden: self.hidden, width: self.expert_width };
        let model = hardware.map_or_else(HardwareModel::default, |h| h.model(shape));
        let domains = if self.domain.is_empty() { vec![ranks] } else { self.domain.clone() };
        let mut scenarios = Vec::new();
        for domain_ranks in domains {
            for (slots_index, &slots) in self.slots.iter().enumerate() {
                let spec = TopologySpec { ranks, experts, domain_ranks, slots_per_rank: slots };
                let topology = match Topology::new(spec) {
                    Ok(topology) => topology,
                    Err(error) => {
                        notes.push(format!("{ranks} ranks left out: {error}"));
                        continue;
                    }
                };
                for (quota_index, &least_quota) in self.min_quota.iter().enumerate() {
                    let kinds = self.policies.iter().filter(|kind| {
                        (slots_index == 0 || has_slots(**kind)) && (quota_index == 0 || kind.has_min_quota())
                    });
                    let params = self.params(model);
                    scenarios.extend(kinds.map(|&kind| Scenario {
                        kind,
                        topology: topology.clone(),
                        params,
                        least_quota,
                    }));
                }
            }
        }
        notes.dedup();
        if scenarios.len() > MAX_SCENARIOS {
            notes.push(format!("{} scenarios: the first {MAX_SCENARIOS} are replayed", scenarios.len()));
            scenarios.truncate(MAX_SCENARIOS);
        }
        scenarios
    }

    fn params(&self, hardware: HardwareModel) -> PolicyParams {
        let history = HistoryParams { window: self.window, interval: self.interval };
        let mut params = PolicyParams { beta: self.beta, hardware, ..PolicyParams::default() };
        params.eplb.history = history;
        params.lplb.history = history;
        params
    }

    /// One pass over the recording for one size of the group.
    fn replay_for(
        &self,
        ranks: usize,
        experts: usize,
        scenarios: &[Scenario],
        bar: &ProgressBar,
    ) -> Result<(Vec<Outcomes>, Leftover, Option<String>), CliError> {
        let options = OpenOptions::default();
        let before = bar.position();
        let mut recording = self.recording.open(&options)?;
        let mut microbatches =
            Microbatches::new(&mut *recording, self.sources.grouping(ranks, experts)).map_err(grouping_error)?;
        let threads = self.threads.unwrap_or_else(cores);
        let mut microbatches_read = 0_u64;
        let outcomes = replay(scenarios, threads, now_ns, |microbatch| {
            if microbatches_read.is_multiple_of(SHOW_EVERY) {
                bar.set_position(before + options.bytes_read.load(Ordering::Relaxed));
                bar.set_message(format!("EP{ranks}, {} plans", microbatches_read * scenarios.len() as u64));
            }
            microbatches_read += 1;
            microbatches.next(microbatch)
        })?;
        bar.set_position(before + options.bytes_read.load(Ordering::Relaxed));
        let leftover = microbatches.leftover();
        Ok((outcomes, leftover, recording.ending()))
    }
}

/// Whether slots make a difference to a policy.
fn has_slots(kind: PolicyKind) -> bool {
    !matches!(kind, PolicyKind::None | PolicyKind::Ideal | PolicyKind::Llep | PolicyKind::MoonEp)
}

fn leftover_note(leftover: Leftover) -> Option<String> {
    let Leftover { tokens, used_tokens } = leftover;
    (tokens > 0).then(|| {
        format!("{tokens} tokens at the ends of layers fill no microbatch and are left out; {used_tokens} are used")
    })
}

/// Shown on a terminal only.
fn progress_bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    match ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {msg} {eta}") {
        Ok(style) => bar.set_style(style),
        Err(error) => note(error),
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
