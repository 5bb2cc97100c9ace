//! Options that several commands have: one name has one value name, one help stem, one parser and so one set of bounds.
//!
//! A help text is a stem ("Slots for replicas on each rank") and, after a punctuation mark, what is special in a command.
//! `tests` walks all commands and holds them to this; what differs on purpose is listed there with its reason.

use std::ops::RangeInclusive;

use ultraep_baselines::PolicyKind;
use ultraep_plan::{MAX_EXPERTS, MAX_RANKS, MAX_SLOTS, MAX_TOKENS, Ratio};
use ultraep_replay::LeastQuota;
use ultraep_runtime::Link;

#[cfg(test)]
mod tests;

/// `--ranks <N>`
pub(crate) const RANKS: &str = "Ranks in the EP group";
/// `--experts <E>`
pub(crate) const EXPERTS: &str = "Logical experts of a layer";
/// `--experts <E>` of recordings.
pub(crate) const RECORDED_EXPERTS: &str =
    "Logical experts of a layer [default: as recorded, else the highest that occurs plus one]";
/// `--slots <R>`
pub(crate) const SLOTS: &str = "Slots for replicas on each rank";
/// `--domain <G>`
pub(crate) const DOMAIN: &str = "Ranks in a domain; replicas stay in their master's domain [default: all ranks]";
/// `--top-k <K>`
pub(crate) const TOP_K: &str = "Experts that a token chooses";
/// `--beta <RATIO>`
pub(crate) const BETA: &str = "Tolerated imbalance (largest rank load over the mean), as 1.01 or 101/100";
/// `--min-quota <TOKENS>`
pub(crate) const MIN_QUOTA: &str = "Least tokens worth a replica";
/// `--min-quota <TOKENS>` where plans are made of loads that are known.
pub(crate) const LEAST_QUOTA: &str = "Least tokens worth a replica; auto is 1/32 of a microbatch's mean load of a rank, in \
                                      powers of two from 1 to 1024";
/// `--policy <NAME>`
pub(crate) const POLICY: &str = "Policy that plans";
/// `--policies <NAME,...>`
pub(crate) const POLICIES: &str = "Policies to compare";
/// `--eplb-interval <BATCHES>`
pub(crate) const EPLB_INTERVAL: &str = "Global batches between two rebalancings of eplb and lplb";
/// `--window <MICROBATCHES>`
pub(crate) const WINDOW: &str = "Microbatches whose loads historical policies plan from";
/// `--interval <MICROBATCHES>`
pub(crate) const INTERVAL: &str = "Microbatches between two placements of historical policies";
/// `--checked`
pub(crate) const CHECKED: &str = "Check every plan and compare its digest between ranks";
/// `--workload <NAME>`
pub(crate) const WORKLOAD: &str = "Which load is generated";
/// `--ratio <RATIO>`
pub(crate) const RATIO: &str = "Imbalance before balancing";
/// `--tokens <TOKENS>`
pub(crate) const TOKENS: &str = "Tokens of each source rank";
/// `--seed <SEED>`
pub(crate) const SEED: &str = "Seed: equal seeds give equal results on every machine";
/// `--hidden <SIZE>`
pub(crate) const HIDDEN: &str = "Width of the model";
/// `--expert-width <SIZE>`
pub(crate) const EXPERT_WIDTH: &str = "Width of an expert";
/// `--link-gbps <GBPS>`
pub(crate) const LINK_GBPS: &str = "Bandwidth of a rank's link in the virtual clock, Gbit/s each way";
/// `--link-bytes-per-s <RATE>`
pub(crate) const LINK_BYTES: &str = "What one rank's link carries in each direction, bytes a second";
/// `--timeout-s <S>`
pub(crate) const TIMEOUT: &str = "Seconds after which a rank that waits for another gives up and names it";
/// `--threads <N>`
pub(crate) const THREADS: &str = "Threads; the result does not depend on them [default: all cores]";
/// `--iterations <RUNS>`
pub(crate) const ITERATIONS: &str = "Measured runs";
/// `--runs <FOLDER>`
pub(crate) const RUNS: &str = "Folder that run folders are made in";
/// `--port <PORT>`
pub(crate) const PORT: &str = "Port; 0 takes any that is free";
/// `--api-key <KEY>`
pub(crate) const API_KEY: &str = "Key that clients show as `Authorization: Bearer KEY`";
/// `--prompt-tokens <LEAST..MOST>`
pub(crate) const PROMPT_TOKENS: &str =
    "Lengths of prompts: many near the least, few near the most, half of all tokens in the long ones";
/// `--mix <stem|mixed|PATH>`
pub(crate) const MIX: &str =
    "Where prompts are cut from: mixed (all domains in turn), stem (source code), or files and folders of yours";
/// `--prompts <N>`
pub(crate) const PROMPTS: &str = "Distinct prompts";
/// `--svg <FILE>`
pub(crate) const SVG: &str = "Write the plot of TTFT against requests per second";

/// Whole numbers of a range, which the error names.
fn numbers<T: TryFrom<u64>>(range: RangeInclusive<u64>) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        let number = text.parse().ok().filter(|number| range.contains(number)).and_then(|n| T::try_from(n).ok());
        number.ok_or_else(|| format!("allowed are {} to {}", range.start(), range.end()))
    }
}

/// `--ranks`, and `--domain`: at most [`MAX_RANKS`].
pub(crate) fn ranks() -> impl Fn(&str) -> Result<usize, String> + Clone {
    numbers(1..=MAX_RANKS as u64)
}

/// `--experts`: at most [`MAX_EXPERTS`].
pub(crate) fn experts() -> impl Fn(&str) -> Result<usize, String> + Clone {
    numbers(1..=MAX_EXPERTS as u64)
}

/// `--slots`: at most [`MAX_SLOTS`].
pub(crate) fn slots() -> impl Fn(&str) -> Result<usize, String> + Clone {
    numbers(0..=MAX_SLOTS as u64)
}

/// `--top-k`: no more experts than there can be.
pub(crate) fn top_k<T: TryFrom<u64>>() -> impl Fn(&str) -> Result<T, String> + Clone {
    numbers(1..=MAX_EXPERTS as u64)
}

/// `--min-quota`, `--tokens`, `--max-tokens`: at least one token, at most what one problem may have.
pub(crate) fn tokens() -> impl Fn(&str) -> Result<u32, String> + Clone {
    numbers(1..=u64::from(MAX_TOKENS))
}

/// `--min-quota` where `auto` is allowed too.
pub(crate) fn least_quota(text: &str) -> Result<LeastQuota, String> {
    let parsed = text.parse().ok().filter(|&quota| quota <= LeastQuota::Tokens(MAX_TOKENS));
    parsed.ok_or_else(|| format!("allowed are auto and 1 to {MAX_TOKENS}"))
}

/// `--hidden`, `--expert-width`.
pub(crate) fn width<T: TryFrom<u64>>() -> impl Fn(&str) -> Result<T, String> + Clone {
    numbers(1..=1 << 20)
}

/// `--window`, `--interval`: microbatches of history.
pub(crate) fn history() -> impl Fn(&str) -> Result<usize, String> + Clone {
    numbers(1..=1000)
}

/// `--eplb-interval`: what training and serving remember at most.
pub(crate) fn eplb_interval() -> impl Fn(&str) -> Result<usize, String> + Clone {
    numbers(1..=16_384)
}

/// `--sequences` on a rank.
pub(crate) fn sequences() -> impl Fn(&str) -> Result<usize, String> + Clone {
    numbers(1..=1 << 20)
}

/// `--timeout-s`: up to a day.
pub(crate) fn seconds() -> impl Fn(&str) -> Result<u64, String> + Clone {
    numbers(1..=86_400)
}

/// `--iterations`.
pub(crate) fn iterations<T: TryFrom<u64>>() -> impl Fn(&str) -> Result<T, String> + Clone {
    numbers(1..=10_000_000)
}

/// `--threads`.
pub(crate) fn threads() -> impl Fn(&str) -> Result<usize, String> + Clone {
    numbers(1..=1024)
}

/// Bytes of something that is there, and bytes a second of a link that works.
pub(crate) fn bytes<T: TryFrom<u64>>() -> impl Fn(&str) -> Result<T, String> + Clone {
    numbers(1..=1 << 60)
}

/// `--beta` and `--ratio`: no load is more even than even.
pub(crate) fn imbalance(text: &str) -> Result<Ratio, String> {
    let ratio: Ratio = text.parse().map_err(|error: ultraep_plan::ParseRatioError| error.to_string())?;
    if ratio.num() < ratio.den() {
        return Err("an imbalance is at least 1: the largest rank load is never below the mean".into());
    }
    Ok(ratio)
}

/// `--link-gbps`.
pub(crate) fn link_gbps(text: &str) -> Result<f64, String> {
    let refuse = || "it must be a positive number of Gbit/s".to_string();
    let gbps: f64 = text.parse().map_err(|_| refuse())?;
    Link::new(gbps).map(|_| gbps).ok_or_else(refuse)
}

/// `--policy` of a run that computes with its plans: every policy but the bound.
pub(crate) fn running_policy(text: &str) -> Result<PolicyKind, String> {
    let kind: PolicyKind = text.parse().map_err(|error: ultraep_baselines::ParsePolicyError| error.to_string())?;
    if kind.forces_routing() {
        let all = PolicyKind::ALL.into_iter().filter(|kind| !kind.forces_routing());
        let names: Vec<_> = all.map(PolicyKind::name).collect();
        return Err(format!("{kind} is a bound that policies are compared with: allowed are {}", names.join(", ")));
    }
    Ok(kind)
}
