//! The overview in sentences, for the page, the report and those who do not look at pictures.

use crate::entry::State;
use crate::source::Source;

/// A few sentences with the main figures.
pub(crate) fn describe(source: &Source, state: &State) -> Vec<String> {
    let summary = &state.summary;
    if summary.records == 0 {
        return vec!["Nothing is recorded yet.".to_owned()];
    }
    let (before, after) = (&summary.before, &summary.after);
    let mut words = vec![format!(
        "As routed, the fullest rank has {:.3} times the mean load on average over {} microbatches of {} (median {:.3}, 95th \
         percentile {:.3}, worst {:.3}).",
        before.mean(),
        summary.records,
        plural(summary.layers.len(), "layer"),
        before.quantile(50),
        before.quantile(95),
        before.largest
    )];
    let policy = state.progress.policy.as_deref().unwrap_or("the plan");
    if after.count > 0 {
        let excess = |mean: f64| mean - 1.0;
        let removed = 100.0 * (1.0 - excess(after.mean()) / excess(before.mean()).max(1e-12));
        let removed =
            if excess(before.mean()) > 1e-9 { format!(", {removed:.1}% of the excess removed") } else { String::new() };
        let remote = summary.remote_share().map_or_else(String::new, |share| {
            format!("; {:.1}% of the tokens are processed on another rank than their source", 100.0 * share)
        });
        words.push(format!(
            "Under {policy} it is {:.3} times (median {:.3}, 95th percentile {:.3}, worst {:.3}){removed}, with {:.1} replicas a \
             layer{remote}.",
            after.mean(),
            after.quantile(50),
            after.quantile(95),
            after.largest,
            summary.replicas as f64 / summary.records as f64
        ));
    }
    if let Some(worst) = summary.worst.first() {
        let after = worst.after.map_or_else(String::new, |after| format!(", {after:.3} after"));
        words.push(format!(
            "The worst is step {}, microbatch {}, layer {}: {:.3} as routed{after}.",
            worst.step, worst.microbatch, worst.layer, worst.before
        ));
    }
    if state.progress.planned > 0 {
        let planned = &source.planned;
        let all = if state.progress.planned == state.progress.read { "No plans were" } else { "Some plans were not" };
        words.push(format!(
            "{all} recorded: {} plans with {} on a rank, domains of {}, beta {} and replicas of at least {}.",
            planned.policy,
            plural(planned.slots, "slot"),
            plural(planned.domain_ranks, "rank"),
            crate::settings::decimal(planned.beta),
            crate::settings::quota_words(planned.min_quota)
        ));
    }
    words
}

fn plural(count: usize, word: &str) -> String {
    format!("{count} {word}{}", if count == 1 { "" } else { "s" })
}
