//! How recordings are brought to a group, and how a microbatch is planned: from the command line or from a request.

use std::collections::BTreeMap;

use serde::Serialize;
use ultraep_baselines::{HistoryParams, PolicyKind, PolicyParams};
use ultraep_import::{OpenOptions, SourceRule};
use ultraep_plan::{Ratio, Topology, TopologySpec};
use ultraep_replay::{ExpertShape, Hardware, LeastQuota, Scenario};

use crate::ViewError;

/// Most microbatches of history that a request may ask for.
const WINDOW_MAX: usize = 100;
/// Largest hidden size and expert width.
const SHAPE_MAX: u32 = 1 << 20;

/// What the user chose beside the recordings; `None` is "as recorded, else a default".
#[derive(Clone, Debug)]
pub struct Settings {
    /// Ranks of the EP group [as recorded, else 8, else one for each expert].
    pub ranks: Option<usize>,
    /// Tokens of a microbatch over all ranks, where single tokens are recorded.
    pub microbatch_tokens: usize,
    /// Which rank they come from.
    pub rule: SourceRule,
    /// Tokens that each recorded token stands for.
    pub scale: u32,
    /// How recordings are read; its experts are those of a layer [as recorded, else the highest that occurs plus one].
    pub reading: OpenOptions,
    /// Policy for loads without a plan [`ultraep`].
    pub policy: Option<PolicyKind>,
    /// Slots on each rank [as recorded where there are any, else 2].
    pub slots: Option<usize>,
    /// Ranks in a domain [as recorded].
    pub domain_ranks: Option<usize>,
    /// Tolerated imbalance [as the run had it, else 1.01].
    pub beta: Option<Ratio>,
    /// Least quota of a replica [as the run had it, else relative to the load].
    pub min_quota: Option<LeastQuota>,
    /// Hardware to predict times for: a built-in name or a file [`gb200-nvl72`].
    pub hardware: Option<String>,
    /// Hidden size of the model [as the run had it, else 4096].
    pub hidden: Option<u32>,
    /// Width of an expert [as the run had it, else 1536].
    pub expert_width: Option<u32>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            ranks: None,
            microbatch_tokens: 8192,
            rule: SourceRule::Blocks,
            scale: 1,
            reading: OpenOptions::default(),
            policy: None,
            slots: None,
            domain_ranks: None,
            beta: None,
            min_quota: None,
            hardware: None,
            hidden: None,
            expert_width: None,
        }
    }
}

/// How a microbatch is planned.
#[derive(Clone, Debug)]
pub(crate) struct WhatIf {
    pub(crate) policy: PolicyKind,
    pub(crate) slots: usize,
    pub(crate) domain_ranks: usize,
    pub(crate) beta: Ratio,
    pub(crate) min_quota: LeastQuota,
    pub(crate) window: usize,
    pub(crate) hardware_name: String,
    pub(crate) hardware: Hardware,
    pub(crate) shape: ExpertShape,
}

/// [`WhatIf`] for the page.
#[derive(Debug, Serialize)]
pub(crate) struct WhatIfJson {
    policy: &'static str,
    slots: usize,
    domain: usize,
    beta: String,
    /// Tokens, or "auto".
    min_quota: LeastQuota,
    window: usize,
    hardware: String,
    hardware_title: String,
    hardware_sources: Vec<String>,
    hidden: u32,
    width: u32,
}

impl WhatIf {
    pub(crate) fn json(&self) -> WhatIfJson {
        WhatIfJson {
            policy: self.policy.name(),
            slots: self.slots,
            domain: self.domain_ranks,
            beta: decimal(self.beta),
            min_quota: self.min_quota,
            window: self.window,
            hardware: self.hardware_name.clone(),
            hardware_title: self.hardware.name.clone(),
            hardware_sources: self.hardware.sources.clone(),
            hidden: self.shape.hidden,
            width: self.shape.width,
        }
    }

    /// These settings with those of a request's query put in their place. Only built-in hardware can be named.
    pub(crate) fn with_query(&self, query: &BTreeMap<String, String>) -> Result<Self, ViewError> {
        let mut asked = self.clone();
        if let Some(name) = query.get("policy") {
            let names = PolicyKind::ALL.map(PolicyKind::name).join(", ");
            asked.policy = name.parse().map_err(|_| refuse("policy", name, names))?;
        }
        number(query, "slots", 0, ultraep_plan::MAX_SLOTS as u64, |n| asked.slots = n as usize)?;
        number(query, "domain", 1, ultraep_plan::MAX_RANKS as u64, |n| asked.domain_ranks = n as usize)?;
        if let Some(text) = query.get("min_quota") {
            let allowed = || format!("auto and 1 to {}", ultraep_plan::MAX_TOKENS);
            let parsed = text.parse().ok().filter(|&quota| quota <= LeastQuota::Tokens(ultraep_plan::MAX_TOKENS));
            asked.min_quota = parsed.ok_or_else(|| refuse("min_quota", text, allowed()))?;
        }
        number(query, "window", 1, WINDOW_MAX as u64, |n| asked.window = n as usize)?;
        number(query, "hidden", 1, u64::from(SHAPE_MAX), |n| asked.shape.hidden = n as u32)?;
        number(query, "width", 1, u64::from(SHAPE_MAX), |n| asked.shape.width = n as u32)?;
        if let Some(text) = query.get("beta") {
            asked.beta = text.parse().map_err(|_| refuse("beta", text, "ratios such as 1.01 or 101/100".to_owned()))?;
        }
        if let Some(name) = query.get("hardware").filter(|name| **name != self.hardware_name) {
            let names = Hardware::built_in_names();
            if !names.contains(&name.as_str()) {
                return Err(refuse("hardware", name, names.join(", ")));
            }
            (asked.hardware, asked.hardware_name) = (Hardware::find(name)?, name.clone());
        }
        Ok(asked)
    }

    /// The scenario for a group of the given size.
    pub(crate) fn scenario(&self, ranks: usize, experts: usize) -> Result<Scenario, ViewError> {
        let Self { policy, slots, domain_ranks, beta, min_quota, window, ref hardware, shape, .. } = *self;
        let topology = Topology::new(TopologySpec { ranks, experts, domain_ranks, slots_per_rank: slots })?;
        let history = HistoryParams { window, interval: 1 };
        let hardware = hardware.model(shape);
        let mut params = PolicyParams { beta, hardware, ..PolicyParams::default() };
        params.eplb.history = history;
        params.lplb.history = history;
        Ok(Scenario { kind: policy, topology, params, least_quota: min_quota })
    }
}

/// A least quota, for people.
pub(crate) fn quota_words(quota: LeastQuota) -> String {
    match quota {
        LeastQuota::OfLoad => "1/32 of the mean load of a rank, at most 1024 tokens".to_owned(),
        LeastQuota::Tokens(tokens) => format!("{tokens} tokens"),
    }
}

/// `1.01` where that is exact, else `101/99`.
pub(crate) fn decimal(ratio: Ratio) -> String {
    match [1, 10, 100, 1000, 10_000].into_iter().position(|power| power == ratio.den()) {
        Some(places) => format!("{:.places$}", f64::from(ratio.num()) / f64::from(ratio.den())),
        None => ratio.to_string(),
    }
}

fn number(
    query: &BTreeMap<String, String>,
    what: &'static str,
    min: u64,
    max: u64,
    set: impl FnOnce(u64),
) -> Result<(), ViewError> {
    let Some(text) = query.get(what) else { return Ok(()) };
    match text.parse() {
        Ok(number) if (min..=max).contains(&number) => {
            set(number);
            Ok(())
        }
        _ => Err(refuse(what, text, format!("{min} to {max}"))),
    }
}

fn refuse(what: &'static str, got: &str, allowed: String) -> ViewError {
    ViewError::Setting { what, got: got.chars().take(80).collect(), allowed }
}
