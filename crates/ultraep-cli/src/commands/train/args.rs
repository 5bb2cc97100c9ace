//! Options of `ultraep train`: one table that makes help, defaults and the configuration.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::CommandFactory;
use clap::parser::ValueSource;
use ultraep_baselines::PolicyKind;
use ultraep_fabric::FabricKind;
use ultraep_plan::Ratio;
use ultraep_runtime::Link;
use ultraep_train::{RouterChoice, TrainConfig};

use crate::options;

/// Arguments of `ultraep train`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, args_override_self = true)]
pub(crate) struct Args {
    /// Text to train on: files or folders. Default: sources, Markdown and documentation that the Rust toolchain and this
    /// project have on this machine
    #[arg(long, value_name = "PATH", num_args = 1.., help_heading = "Text")]
    pub(super) text: Vec<PathBuf>,

    #[arg(long, default_value_t = 16, value_name = "N", help_heading = "Ranks", value_parser = options::ranks(), help = options::RANKS)]
    ranks: usize,
    /// Ranks as threads of one process, or as processes over shared memory
    #[arg(long, default_value_t = FabricKind::Threads, value_name = "KIND", help_heading = "Ranks")]
    pub(super) fabric: FabricKind,
    #[arg(long, value_name = "G", help_heading = "Ranks", value_parser = options::ranks(), help = options::DOMAIN)]
    domain: Option<usize>,
    #[arg(long, default_value_t = Link::DEFAULT_GBPS, value_name = "GBPS", help_heading = "Ranks", value_parser = options::link_gbps, help = format!("{}. The default is what one core copies between two ranks' memory: the machine's memory is the fabric here", options::LINK_GBPS))]
    link_gbps: f64,
    #[arg(long, default_value_t = 60, value_name = "S", help_heading = "Ranks", value_parser = options::seconds(), help = options::TIMEOUT)]
    timeout_s: u64,

    #[arg(long, default_value_t = PolicyKind::Ultraep, value_name = "NAME", help_heading = "Balancing", value_parser = options::running_policy, help = format!("{}, in the training itself", options::POLICY))]
    policy: PolicyKind,
    #[arg(long, default_value_t = 2, value_name = "R", help_heading = "Balancing", value_parser = options::slots(), help = options::SLOTS)]
    slots: usize,
    #[arg(long, default_value = "1.01", value_name = "RATIO", help_heading = "Balancing", value_parser = options::imbalance, help = options::BETA)]
    beta: Ratio,
    #[arg(long, default_value_t = 16, value_name = "TOKENS", help_heading = "Balancing", value_parser = options::tokens(), help = options::MIN_QUOTA)]
    min_quota: u32,
    #[arg(long, default_value_t = 3, value_name = "BATCHES", help_heading = "Balancing", value_parser = options::eplb_interval(), help = format!("{}; a step trains one", options::EPLB_INTERVAL))]
    eplb_interval: usize,
    /// Policies to compare on the way, from the same weights on the same batches
    #[arg(long, value_delimiter = ',', default_values_t = COMPARED, value_name = "NAME,...", help_heading = "Balancing")]
    compare: Vec<PolicyKind>,
    /// Steps between two comparisons; 0 for none
    #[arg(long, default_value_t = 8, value_name = "STEPS", help_heading = "Balancing")]
    compare_every: u64,
    /// Do not train a second time without balancing to compare the loss curves
    #[arg(long, help_heading = "Balancing")]
    no_reference: bool,
    #[arg(long, help_heading = "Balancing", help = options::CHECKED)]
    checked: bool,

    #[arg(long, default_value_t = 256, value_name = "SIZE", help_heading = "Model", value_parser = options::width::<usize>(), help = options::HIDDEN)]
    hidden: usize,
    /// Attention heads
    #[arg(long, default_value_t = 4, value_name = "N", help_heading = "Model")]
    heads: usize,
    /// Layers, each with an MoE layer
    #[arg(long, default_value_t = 2, value_name = "N", help_heading = "Model")]
    layers: usize,
    #[arg(long, default_value_t = 64, value_name = "E", help_heading = "Model", value_parser = options::experts(), help = options::EXPERTS)]
    experts: usize,
    #[arg(long, default_value_t = 4, value_name = "K", help_heading = "Model", value_parser = options::top_k::<usize>(), help = options::TOP_K)]
    top_k: usize,
    /// Inner width of an expert
    #[arg(long, default_value_t = 256, value_name = "SIZE", value_parser = options::width::<usize>(), help_heading = "Model")]
    intermediate: usize,
    /// Router: softmax (GShard's auxiliary loss) or bias (DeepSeek's bias update)
    #[arg(long, default_value = "softmax", value_parser = parse_router, value_name = "KIND", help_heading = "Model")]
    router: RouterChoice,
    /// Weight of the auxiliary loss
    #[arg(long, default_value_t = 0.001, value_name = "WEIGHT", help_heading = "Model")]
    aux: f32,
    /// Step of the router's bias
    #[arg(long, default_value_t = 0.001, value_name = "RATE", help_heading = "Model")]
    bias_rate: f32,

    /// Optimizer steps
    #[arg(long, default_value_t = 48, value_name = "STEPS", help_heading = "Training")]
    steps: u64,
    /// Microbatches of a step
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "Training")]
    microbatches: u32,
    /// Sequences on each rank, in every microbatch
    #[arg(long, default_value_t = 8, value_name = "N", help_heading = "Training", value_parser = options::sequences())]
    sequences: usize,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 64, value_name = "TOKENS", help_heading = "Training")]
    sequence_tokens: usize,
    /// Largest learning rate
    #[arg(long, default_value_t = 0.002, value_name = "RATE", help_heading = "Training")]
    learning_rate: f32,
    /// Steps of warm-up
    #[arg(long, default_value_t = 8, value_name = "STEPS", help_heading = "Training")]
    warmup: u64,
    /// Weight decay
    #[arg(long, default_value_t = 0.1, value_name = "RATE", help_heading = "Training")]
    weight_decay: f32,
    /// Largest norm of the gradient
    #[arg(long, default_value_t = 1.0, value_name = "NORM", help_heading = "Training")]
    clip: f32,
    #[arg(long, default_value_t = 1, value_name = "SEED", help_heading = "Training", help = options::SEED)]
    seed: u64,
    /// Compute experts' forward again in backward instead of keeping it
    #[arg(long, help_heading = "Training")]
    recompute: bool,

    #[arg(long, default_value = "runs", value_name = "FOLDER", help_heading = "Output", help = options::RUNS)]
    pub(super) runs: PathBuf,
    /// Steps between two checkpoints; 0 for one at the end
    #[arg(long, default_value_t = 0, value_name = "STEPS", help_heading = "Output")]
    save_every: u64,
    /// Checkpoints kept, the latest ones; 0 keeps all
    #[arg(long, default_value_t = TrainConfig::default_keep(), value_name = "N", help_heading = "Output")]
    keep: usize,
    /// Record loads, of every Nth step; 0 records none
    #[arg(long, default_value_t = 1, value_name = "N", help_heading = "Output")]
    profile_every: u64,
    /// Go on with a run or a checkpoint: its settings and its text are kept, what is asked for besides is put over them. Model,
    /// seed and text must be the same; with other ranks, policy or rates it goes on in a folder of its own beside the first
    #[arg(long, value_name = "RUN", help_heading = "Output")]
    pub(super) resume: Option<PathBuf>,
    /// JSON (schema ultraep.train/1) instead of tables
    #[arg(long, help_heading = "Output")]
    pub(super) json: bool,
}

/// Policies of the default table.
const COMPARED: [PolicyKind; 5] =
    [PolicyKind::None, PolicyKind::Eplb, PolicyKind::EplbExact, PolicyKind::Ultraep, PolicyKind::Ideal];

const EXAMPLES: &str = "Examples:
  ultraep train
  ultraep train --ranks 8 --slots 1 --text src docs README.md
  ultraep train --fabric processes --steps 200 --save-every 50
  ultraep train --resume runs/2026-11-24T15-00-00Z --steps 400";

fn parse_router(name: &str) -> Result<RouterChoice, String> {
    match name {
        "softmax" => Ok(RouterChoice::Softmax),
        "bias" => Ok(RouterChoice::Bias),
        _ => Err("allowed are softmax and bias".into()),
    }
}

/// Cores that ranks share.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

impl Args {
    pub(super) fn config(&self) -> TrainConfig {
        TrainConfig {
            ranks: self.ranks,
            domain_ranks: self.domain.unwrap_or(self.ranks),
            slots: self.slots,
            policy: self.policy.name().into(),
            min_quota: self.min_quota,
            beta: self.beta.to_string(),
            eplb_interval_steps: self.eplb_interval,
            hidden: self.hidden,
            heads: self.heads,
            layers: self.layers,
            experts: self.experts,
            top_k: self.top_k,
            intermediate: self.intermediate,
            router: self.router,
            aux_coefficient: self.aux,
            bias_rate: self.bias_rate,
            steps: self.steps,
            microbatches: self.microbatches,
            sequences: self.sequences,
            sequence_tokens: self.sequence_tokens,
            learning_rate: self.learning_rate,
            warmup_steps: self.warmup,
            weight_decay: self.weight_decay,
            clip_norm: self.clip,
            seed: self.seed,
            recompute: self.recompute,
            checked: self.checked,
            link_gbps: self.link_gbps,
            compare_every: self.compare_every,
            compare: self.compare.iter().map(|kind| kind.name().into()).collect(),
            reference: !self.no_reference,
            save_every: self.save_every,
            keep: self.keep,
            profile_every: self.profile_every,
            timeout_s: self.timeout_s,
            cores: cores(),
        }
    }
}

/// Parses options alone.
#[derive(clap::Parser)]
struct Options {
    #[command(flatten)]
    args: Args,
}

/// Options that set a field of the configuration by another name.
const RENAMED: [(&str, &str); 6] = [
    ("domain", "domain_ranks"),
    ("eplb_interval", "eplb_interval_steps"),
    ("aux", "aux_coefficient"),
    ("warmup", "warmup_steps"),
    ("clip", "clip_norm"),
    ("no_reference", "reference"),
];

/// Fields of the configuration that `arguments` (of `ultraep`, from `train` on) set themselves, be it to the default.
pub(super) fn given(arguments: impl Iterator<Item = OsString>) -> Vec<String> {
    let Ok(matches) = Options::command().try_get_matches_from(arguments) else { return Vec::new() };
    let on_line = |id: &&clap::Id| matches.value_source(id.as_str()) == Some(ValueSource::CommandLine);
    let mut fields: Vec<String> = matches.ids().filter(on_line).map(|id| field(id.as_str()).to_string()).collect();
    if fields.iter().any(|name| name == "ranks") {
        // One domain by default: as many ranks as there are now.
        fields.push("domain_ranks".into());
    }
    fields
}

fn field(option: &str) -> &str {
    RENAMED.iter().find(|(id, _)| *id == option).map_or(option, |(_, field)| field)
}

impl Args {
    /// The configuration of a run that goes on: a checkpoint's, with what `arguments` (of `ultraep`, from `train` on) ask for
    /// put over it.
    pub(super) fn config_over(
        &self,
        checkpoint: TrainConfig,
        arguments: impl Iterator<Item = OsString>,
    ) -> TrainConfig {
        let fields = |config: &TrainConfig| match serde_json::to_value(config) {
            Ok(serde_json::Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        let (asked, mut merged) = (fields(&self.config()), fields(&checkpoint));
        for name in given(arguments).into_iter().chain(["cores".to_string()]) {
            if let Some(value) = asked.get(&name) {
                merged.insert(name, value.clone());
            }
        }
        serde_json::from_value(serde_json::Value::Object(merged)).unwrap_or(checkpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn arguments(options: &[&str]) -> impl Iterator<Item = OsString> {
        std::iter::once("train").chain(options.iter().copied()).map(OsString::from)
    }

    fn parse(options: &[&str]) -> Args {
        Options::parse_from(arguments(options)).args
    }

    #[test]
    fn a_resumed_run_keeps_what_is_not_asked_for() {
        let first = parse(&["--layers", "3", "--steps", "10", "--domain", "4", "--no-reference"]).config();
        let over = |options: &[&str]| parse(options).config_over(first.clone(), arguments(options));
        assert_eq!(over(&[]), first);
        // A value that is asked for counts, also when it is the default.
        assert_eq!(over(&["--steps", "48"]), TrainConfig { steps: 48, ..first.clone() });
        assert_eq!(over(&["--ranks", "8"]), TrainConfig { ranks: 8, domain_ranks: 8, ..first.clone() });
    }

    #[test]
    fn every_option_of_the_configuration_sets_a_field_of_it() {
        let config = serde_json::to_value(parse(&[]).config()).unwrap();
        let elsewhere = ["text", "fabric", "runs", "resume", "json", "help"];
        for option in Options::command().get_arguments().map(|a| a.get_id().as_str().to_string()) {
            let known = elsewhere.contains(&option.as_str()) || config.get(field(&option)).is_some();
            assert!(known, "--{option} sets no field");
        }
    }

    #[test]
    fn the_defaults_are_a_valid_run() {
        parse(&[]).config().validate().unwrap_or_else(|error| panic!("{error}"));
    }
}
