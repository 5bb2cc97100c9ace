//! What a training run is asked to do. The same on every rank; written into the run folder and into checkpoints.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use ultraep_baselines::{EplbParams, HistoryParams, LplbParams, PolicyKind, PolicyParams, Recipe};
use ultraep_fabric::GroupSpec;
use ultraep_model::{ModelConfig, RouterKind};
use ultraep_plan::{Ratio, Topology, TopologySpec};
use ultraep_runtime::{Link, Recompute, RuntimeConfig, RuntimeError, TransferConfig};

use crate::TrainError;

/// How tokens choose experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterChoice {
    /// Softmax with GShard's auxiliary loss.
    Softmax,
    /// Sigmoid with DeepSeek's bias update.
    Bias,
}

/// Most microbatches that historical policies remember.
const MAX_HISTORY: u128 = 16_384;

/// A training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// `N`, ranks of the EP group.
    pub ranks: usize,
    /// `G`, ranks in a domain.
    pub domain_ranks: usize,
    /// `R`, slots on each rank.
    pub slots: usize,
    /// Policy that balances the training itself.
    pub policy: String,
    /// `u_min`, least quota of a replica.
    pub min_quota: u32,
    /// Tolerated imbalance, such as `1.01`.
    pub beta: String,
    /// Global batches between two rebalancings of `eplb` and `lplb`.
    pub eplb_interval_steps: usize,

    /// Width of the model.
    pub hidden: usize,
    /// Attention heads.
    pub heads: usize,
    /// Layers.
    pub layers: usize,
    /// `E`, logical experts a layer.
    pub experts: usize,
    /// Experts a token chooses.
    pub top_k: usize,
    /// Inner width of an expert.
    pub intermediate: usize,
    /// Router.
    pub router: RouterChoice,
    /// Weight of the auxiliary loss (softmax router).
    pub aux_coefficient: f32,
    /// Step of the bias (bias router).
    pub bias_rate: f32,

    /// Optimizer steps.
    pub steps: u64,
    /// Microbatches of a step (gradient accumulation).
    pub microbatches: u32,
    /// Sequences of a microbatch on each rank.
    pub sequences: usize,
    /// Tokens of a sequence.
    pub sequence_tokens: usize,
    /// Largest learning rate, reached after the warm-up.
    pub learning_rate: f32,
    /// Steps of linear warm-up; cosine decay to a tenth follows.
    pub warmup_steps: u64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f32,
    /// Largest global norm of the gradient.
    pub clip_norm: f32,
    /// Seed of model and batches.
    pub seed: u64,

    /// Whether experts' inputs and first products are computed again in backward instead of kept.
    pub recompute: bool,
    /// Checked mode.
    pub checked: bool,
    /// Bandwidth of a rank's link in the virtual clock, gigabits a second.
    pub link_gbps: f64,
    /// Steps between two comparisons of policies on the batch at hand; 0 for none.
    pub compare_every: u64,
    /// Policies compared.
    pub compare: Vec<String>,
    /// Whether to train a second time without balancing and compare the loss curves.
    pub reference: bool,
    /// Steps between two checkpoints; 0 for one at the end only.
    pub save_every: u64,
    /// Checkpoints kept, the latest ones; 0 keeps all.
    #[serde(default = "TrainConfig::default_keep")]
    pub keep: usize,
    /// Steps from one whose loads are recorded to the next; 1 records all, 0 none.
    #[serde(default = "every_step")]
    pub profile_every: u64,
    /// Seconds after which a rank that waits for another gives up and names it.
    pub timeout_s: u64,
    /// Ranks that compute at a time; 0 for all.
    pub cores: usize,
}

/// [`TrainConfig::profile_every`] of checkpoints that do not say.
fn every_step() -> u64 {
    1
}

impl TrainConfig {
    /// Checkpoints kept by default: one to go on from and two before it, should the last steps have gone wrong.
    pub const fn default_keep() -> usize {
        3
    }

    /// The model.
    pub fn model(&self) -> ModelConfig {
        ModelConfig {
            hidden: self.hidden,
            heads: self.heads,
            layers: self.layers,
            experts: self.experts,
            top_k: self.top_k,
            intermediate: self.intermediate,
            sequence_tokens: self.sequence_tokens,
            router: match self.router {
                RouterChoice::Softmax => RouterKind::Softmax { aux_coefficient: self.aux_coefficient },
                RouterChoice::Bias => RouterKind::BiasUpdate { rate: self.bias_rate },
            },
        }
    }

    /// The EP group.
    pub fn topology(&self) -> Result<Topology, TrainError> {
        Ok(Topology::new(TopologySpec {
            ranks: self.ranks,
            experts: self.experts,
            domain_ranks: self.domain_ranks,
            slots_per_rank: self.slots,
        })?)
    }

    /// The policy of the training itself.
    pub fn policy(&self) -> Result<PolicyKind, TrainError> {
        Ok(self.policy.parse()?)
    }

    /// The policies compared, in the order of the table.
    pub fn compared(&self) -> Result<Vec<PolicyKind>, TrainError> {
        self.compare.iter().map(|name| Ok(name.parse()?)).collect()
    }

    /// Tokens that a rank routes in a microbatch.
    pub fn tokens_per_rank(&self) -> usize {
        self.sequences * self.sequence_tokens
    }

    /// Tokens of a step, over all ranks and microbatches.
    pub fn tokens_per_step(&self) -> u64 {
        (self.ranks * self.tokens_per_rank()) as u64 * u64::from(self.microbatches)
    }

    /// What backward computes again.
    pub fn recompute(&self) -> Recompute {
        if self.recompute { Recompute::Experts } else { Recompute::Nothing }
    }

    /// The runtime of each rank.
    pub fn runtime(&self) -> Result<RuntimeConfig, TrainError> {
        let mut kinds = vec![self.policy()?];
        for kind in self.compared()?.into_iter().chain(self.reference.then_some(PolicyKind::None)) {
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        let beta: Ratio = self.beta.parse().map_err(|error| TrainError::Beta { beta: self.beta.clone(), error })?;
        if beta.num() < beta.den() {
            return Err(TrainError::BetaBelowOne(self.beta.clone()));
        }
        let interval = self.eplb_interval_steps * self.microbatches as usize;
        let history = HistoryParams { window: interval, interval };
        let params = PolicyParams {
            beta,
            min_quota: self.min_quota,
            eplb: EplbParams { history, ..EplbParams::default() },
            lplb: LplbParams { history, ..LplbParams::default() },
            ..PolicyParams::default()
        };
        Ok(RuntimeConfig {
            topology: self.topology()?,
            layers: self.layers,
            max_microbatches: 1,
            shape: self.model().expert_shape(),
            tokens_per_rank: self.tokens_per_rank(),
            top_k: self.top_k,
            policies: Recipe::all(&kinds, params),
            link: Link::new(self.link_gbps).ok_or(TrainError::Link(self.link_gbps))?,
            transfer: TransferConfig::default(),
            checked: self.checked,
        })
    }

    /// The group to start. `config_digest` is that of the configuration, so that ranks of different runs refuse each other.
    pub fn group(&self) -> Result<GroupSpec, TrainError> {
        let json = serde_json::to_vec(self).map_err(|error| TrainError::Encode(error.to_string()))?;
        Ok(GroupSpec {
            ranks: self.ranks,
            windows: self.runtime()?.windows(),
            timeout: Duration::from_secs(self.timeout_s),
            cores: self.cores,
            config_digest: xxhash_rust::xxh64::xxh64(&json, 0),
        })
    }

    /// Checks everything that can be checked before anything starts.
    pub fn validate(&self) -> Result<(), TrainError> {
        self.model().validate()?;
        let sizes = [("steps", self.steps), ("microbatches", u64::from(self.microbatches))];
        let sizes = sizes.into_iter().chain([("sequences", self.sequences as u64), ("timeout", self.timeout_s)]);
        for (what, value) in sizes {
            if value == 0 {
                return Err(TrainError::Zero(what));
            }
        }
        self.validate_numbers()?;
        self.validate_sizes()?;
        self.group()?;
        let topology = self.topology()?;
        for policy in self.runtime()?.policies {
            policy.build(&topology).map_err(RuntimeError::Build)?;
        }
        Ok(())
    }

    fn validate_numbers(&self) -> Result<(), TrainError> {
        let numbers = [
            ("auxiliary weight", self.aux_coefficient),
            ("step of the bias", self.bias_rate),
            ("learning rate", self.learning_rate),
            ("weight decay", self.weight_decay),
        ];
        let refuse = |what, value, least| Err(TrainError::Number { what, value, least });
        if let Some((what, value)) = numbers.into_iter().find(|(_, v)| !(v.is_finite() && *v >= 0.0)) {
            return refuse(what, value, "at least 0");
        }
        if !(self.clip_norm.is_finite() && self.clip_norm > 0.0) {
            return refuse("largest gradient norm", self.clip_norm, "above 0");
        }
        Ok(())
    }

    /// Sizes whose products would not fit the numbers that hold them; everything after this may multiply them.
    pub(crate) fn validate_sizes(&self) -> Result<(), TrainError> {
        let product = |factors: &[usize]| factors.iter().fold(1, |p: u128, &f| p.saturating_mul(f as u128));
        let microbatches = self.microbatches as usize;
        // Rows have 32-bit numbers; memory has 63-bit sizes, and a matrix of 2^40 elements is no small model.
        let rows = product(&[self.ranks, self.sequences, self.sequence_tokens, self.top_k]);
        let history = product(&[self.eplb_interval_steps, microbatches]);
        let sizes = [
            ("tokens of a microbatch, times top-k", rows, u128::from(u32::MAX / 2)),
            ("layers", self.layers as u128, 1 << 16),
            ("elements of an expert", product(&[3, self.hidden, self.intermediate]), 1 << 40),
            ("elements of an attention matrix", product(&[3, self.hidden, self.hidden]), 1 << 40),
            ("elements of a microbatch's rows", rows.saturating_mul(self.hidden as u128), 1 << 58),
            ("microbatches between two rebalancings of eplb", history, MAX_HISTORY),
        ];
        match sizes.into_iter().find(|&(_, got, limit)| got > limit) {
            Some((what, got, limit)) => Err(TrainError::TooLarge { what, got, limit }),
            None => Ok(()),
        }
    }
}
