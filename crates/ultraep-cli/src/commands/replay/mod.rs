//! `ultraep replay`: every policy on every layer and microbatch of a recording.

mod plot;
mod report;
mod single;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Instant;

use ultraep_advise::{Judge, Totals};
use ultraep_baselines::{HistoryParams, ParsePolicyError, PolicyKind, PolicyParams};
use ultraep_import::RecordingInfo;
use ultraep_placement::Method;
use ultraep_plan::{HardwareModel, Ratio, Topology, TopologySpec};
use ultraep_replay::{ExpertShape, Hardware, LeastQuota, Scenario};

use self::report::Replay;
use super::pass::{Pass, progress_bar};
use super::placement::PlacementArgs;
use super::recordings::{RecordingArgs, SourceArgs};
use super::train::cores;
use super::write_json;
use crate::error::{CliError, note};
use crate::input::policy_list;
use crate::options;
use crate::output::Output;

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
    /// Layers to show instead of the frontier: all, or a list as 0,5,7
    #[arg(long, value_name = "all|LAYERS", value_parser = Layers::from_str, conflicts_with = "only")]
    layers: Option<Layers>,
    /// Order of the table by layer: layer, or the name of a policy, most imbalanced first
    #[arg(long, default_value = "layer", value_name = "layer|POLICY", value_parser = sort, requires = "layers")]
    sort: Sort,
    #[command(flatten)]
    placement: PlacementArgs,
    /// Plan this microbatch alone, with all that follows from each plan
    #[arg(long, value_name = "STEP/MICROBATCH/LAYER")]
    only: Option<Place>,
    #[arg(long, value_name = "N", value_parser = options::threads(), help = options::THREADS)]
    threads: Option<usize>,
    /// JSON (schema ultraep.replay/1) instead of tables
    #[arg(long)]
    json: bool,
}

/// Which layers a table shows.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Layers {
    All,
    These(Vec<u32>),
}

impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self::All);
        }
        let layers = text.split(',').map(str::parse).collect::<Result<_, _>>();
        layers.map(Self::These).map_err(|_| "allowed are all and numbers of layers, as 0,5,7".to_owned())
    }
}

impl Layers {
    fn has(&self, layer: u32) -> bool {
        match self {
            Self::All => true,
            Self::These(layers) => layers.contains(&layer),
        }
    }
}

/// The order of layers: by their numbers, or by a policy's imbalance.
fn sort(text: &str) -> Result<Sort, String> {
    match text {
        "layer" => Ok(Sort::Layer),
        policy => policy.parse().map(Sort::Policy).map_err(|error: ParsePolicyError| error.to_string()),
    }
}

/// Order of a table by layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Layer,
    Policy(PolicyKind),
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

impl FromStr for Place {
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
  ultraep replay runs/2026-11-24T14-39-16Z --layers all --sort none --slots 2 --policies none,eplb,ultraep
  ultraep replay log.jsonl.gz --ranks 16 --slots 2 --out placement.json --for sglang
  ultraep replay prompts/ --ranks 32 --microbatch-tokens 512 --scale 16 --hardware h100x8 --domain 8";

/// Sizes of the group tried where the recording does not know its own.
const DEFAULT_RANKS: [usize; 4] = [8, 16, 32, 64];

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
    args.check_placement(&sizes)?;
    let threads = args.threads.unwrap_or_else(cores);
    let (mut totals, mut group) = (Totals::default(), None);
    for ranks in sizes {
        let scenarios = args.scenarios(ranks, experts, hardware.as_ref(), &mut replay.notes);
        if scenarios.is_empty() {
            continue;
        }
        replay.notes.extend(args.sources.grouping(ranks, experts).describe_sources(info.sources));
        let pass = Pass { recording: &args.recording, sources: &args.sources, threads, bar: &bar };
        let passed = pass.run((ranks, experts), &scenarios, |microbatch| {
            if args.placement.out.is_some() {
                totals.add(microbatch, experts);
            }
            Ok(())
        })?;
        let outcomes = passed.outcomes;
        replay.notes.extend(passed.notes);
        group = scenarios.first().map(|scenario| scenario.topology.clone());
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
    match (args.json, &args.layers) {
        (true, _) => write_json(out, &replay)?,
        (false, Some(layers)) => replay.print_layers(layers, args.sort, out)?,
        (false, None) => replay.print(out)?,
    }
    match group.filter(|_| args.placement.out.is_some()) {
        Some(group) => args.place(&totals, &group),
        None => Ok(()),
    }
}

impl Args {
    /// A placement is for one group.
    fn check_placement(&self, sizes: &[usize]) -> Result<(), CliError> {
        if self.placement.out.is_none() || (sizes.len() == 1 && self.slots.len() == 1 && self.domain.len() <= 1) {
            return Ok(());
        }
        let reason = "--out: a placement is for one group: give one --ranks, one --slots and at most one --domain";
        Err(CliError::Input(reason.to_owned()))
    }

    /// One static placement for the whole recording.
    fn place(&self, totals: &Totals, group: &Topology) -> Result<(), CliError> {
        let map = totals.place(group, Method::Search).map_err(CliError::input)?;
        let layers: Vec<u32> = totals.layers().collect();
        let mut judge = Judge::new(map.clone(), &layers).map_err(CliError::input)?;
        let bar = progress_bar(self.recording.bytes());
        let threads = self.threads.unwrap_or_else(cores);
        let pass = Pass { recording: &self.recording, sources: &self.sources, threads, bar: &bar };
        pass.run((group.ranks(), group.experts()), &[], |microbatch| judge.add(microbatch).map_err(CliError::input))?;
        bar.finish_and_clear();
        let all = judge.all();
        let imbalance =
            format!("imbalance on this load {:.4} mean, {:.3} worst", all.imbalance.mean(), all.imbalance.largest);
        self.placement.save(&map, &imbalance)
    }

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
}

/// Whether slots make a difference to a policy.
fn has_slots(kind: PolicyKind) -> bool {
    !matches!(kind, PolicyKind::None | PolicyKind::Ideal | PolicyKind::Llep | PolicyKind::MoonEp)
}
