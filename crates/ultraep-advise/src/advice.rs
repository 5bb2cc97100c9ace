//! What to buy: slots and domains against a share of ideal, from the outcomes of one replay.

use serde::Serialize;
use ultraep_baselines::{PolicyKind, PolicyParams};
use ultraep_plan::{Rank, Topology, TopologySpec};
use ultraep_replay::{LeastQuota, Outcomes, Scenario};

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// `N`.
    pub ranks: usize,
    /// `E`.
    pub experts: usize,
    /// Slots a rank that are tried, ascending.
    pub slots: Vec<usize>,
    /// Sizes of a domain that are tried, ascending.
    pub domains: Vec<usize>,
    /// Share of ideal that is wanted, as 0.97.
    pub within: f64,
    /// Parameters of policies, with the hardware.
    pub params: PolicyParams,
    /// Least quota of a replica.
    pub least_quota: LeastQuota,
}

/// Why a question has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum QuestionError {
    /// No group of any of the sizes.
    #[error("no group of {ranks} ranks and {experts} experts with such slots and domains can be: {reason}")]
    NoGroup {
        /// `N`.
        ranks: usize,
        /// `E`.
        experts: usize,
        /// Why the last that was tried.
        reason: String,
    },
    /// A policy that has no plan for any microbatch.
    #[error("{policy} has no plan for any microbatch: {reason}")]
    NoPlan {
        /// Which.
        policy: PolicyKind,
        /// Why the first.
        reason: String,
    },
}

/// A configuration and what it comes to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Offer {
    /// Policy that plans.
    pub policy: &'static str,
    /// Slots on each rank.
    pub slots_per_rank: usize,
    /// Ranks in a domain.
    pub domain: usize,
    /// Largest over mean rank load, mean over layers and microbatches.
    pub imbalance_mean: f64,
    /// The same, worst.
    pub imbalance_worst: f64,
    /// Replicas of a plan, mean.
    pub replicas_mean: f64,
    /// Bytes of weights that the slots of a rank hold, once for all layers.
    pub slot_bytes_per_rank: u64,
    /// Predicted forward of a layer, mean.
    pub predicted_ns_mean: f64,
    /// Predicted time of ideal routing over this one's.
    pub share_of_ideal: f64,
    /// Predicted time of no balancing over this one's.
    pub speedup: f64,
}

/// A layer without balancing and with it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Layer {
    /// By the recording's number.
    pub layer: u32,
    /// Imbalance without balancing, mean over microbatches.
    pub none: f64,
    /// The worst of them.
    pub none_worst: f64,
    /// With the configuration that is recommended.
    pub balanced: f64,
}

/// The microbatch that stands for a typical one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Typical {
    /// Its step.
    pub step: u64,
    /// Its microbatch within the step.
    pub microbatch: u32,
    /// Its layer: the one whose imbalance is in the middle of all layers.
    pub layer: u32,
    /// Its routed tokens a rank.
    pub tokens_per_rank: u64,
    /// Routed tokens a rank from which on balancing pays; `None` where no size does.
    pub pays_from: Option<u64>,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Advice {
    /// Ranks.
    pub ranks: usize,
    /// Share of ideal that was wanted.
    pub within: f64,
    /// Without balancing.
    pub none: Offer,
    /// With routing forced to be even.
    pub ideal: Offer,
    /// Ours, by slots and domain, both ascending.
    pub offers: Vec<Offer>,
    /// Index in `offers` of the fewest slots in the smallest domain that reach the wanted share; the best where none does.
    pub chosen: usize,
    /// Whether it does.
    pub is_reached: bool,
    /// Placed from the microbatch before, with the chosen slots and domain.
    pub history: Offer,
    /// Layers, most imbalanced first.
    pub layers: Vec<Layer>,
}

impl Question {
    /// Everything that has to be replayed: none, ideal and eplb and ours in every group that can be.
    pub fn scenarios(&self) -> Result<Vec<Scenario>, QuestionError> {
        let mut scenarios = Vec::new();
        let mut reason = String::new();
        for &domain_ranks in &self.domains {
            for (at, &slots_per_rank) in self.slots.iter().enumerate() {
                let &Self { ranks, experts, params, least_quota, .. } = self;
                let spec = TopologySpec { ranks, experts, domain_ranks, slots_per_rank };
                let topology = match Topology::new(spec) {
                    Ok(topology) => topology,
                    Err(error) => {
                        reason = error.to_string();
                        continue;
                    }
                };
                let kinds = [PolicyKind::None, PolicyKind::Ideal, PolicyKind::Eplb, PolicyKind::Ultraep];
                let kinds = kinds.into_iter().skip(if at == 0 { 0 } else { 2 });
                scenarios.extend(kinds.map(|kind| Scenario { kind, topology: topology.clone(), params, least_quota }));
            }
        }
        match scenarios.is_empty() {
            true => Err(QuestionError::NoGroup { ranks: self.ranks, experts: self.experts, reason }),
            false => Ok(scenarios),
        }
    }

    /// Weighs what the scenarios came to, one outcome for each.
    pub fn answer(&self, scenarios: &[Scenario], outcomes: &[Outcomes]) -> Result<Advice, QuestionError> {
        let all: Vec<(&Scenario, &Outcomes)> = scenarios.iter().zip(outcomes).collect();
        for (scenario, outcome) in &all {
            if outcome.plans() == 0 && scenario.kind != PolicyKind::Eplb {
                let reason = outcome.refusal.clone().unwrap_or_else(|| "the recording has none".to_owned());
                return Err(QuestionError::NoPlan { policy: scenario.kind, reason });
            }
        }
        let of = |kind: PolicyKind, domain: usize| {
            let is_it = |(s, _): &&(&Scenario, &Outcomes)| s.kind == kind && s.topology.domain_ranks() == domain;
            all.iter().find(is_it).map(|(_, outcome)| outcome.predicted_ns_mean())
        };
        let offer = |&(scenario, outcome): &(&Scenario, &Outcomes)| {
            let domain = scenario.topology.domain_ranks();
            let predicted = outcome.predicted_ns_mean();
            let over = |kind| of(kind, domain).filter(|_| predicted > 0.0).map_or(1.0, |other| other / predicted);
            let has_slots = matches!(scenario.kind, PolicyKind::Eplb | PolicyKind::Ultraep);
            let slots_per_rank = if has_slots { scenario.topology.slots(Rank::new(0)) } else { 0 };
            Offer {
                policy: scenario.kind.name(),
                slots_per_rank,
                domain,
                imbalance_mean: outcome.imbalance.mean(),
                imbalance_worst: outcome.imbalance.largest,
                replicas_mean: outcome.replicas_mean(),
                slot_bytes_per_rank: slots_per_rank as u64 * scenario.params.hardware.expert_bytes,
                predicted_ns_mean: predicted,
                share_of_ideal: over(PolicyKind::Ideal),
                speedup: over(PolicyKind::None),
            }
        };
        let kind = |kind: PolicyKind| all.iter().filter(move |(scenario, _)| scenario.kind == kind);
        let first = |wanted: PolicyKind| {
            let none = || QuestionError::NoPlan { policy: wanted, reason: "it was not replayed".to_owned() };
            kind(wanted).next().ok_or_else(none)
        };
        let mut ours: Vec<&(&Scenario, &Outcomes)> = kind(PolicyKind::Ultraep).collect();
        ours.sort_by_key(|(scenario, _)| (scenario.topology.slots(Rank::new(0)), scenario.topology.domain_ranks()));
        let offers: Vec<Offer> = ours.iter().map(|pair| offer(pair)).collect();
        let reached = offers.iter().position(|offer| offer.share_of_ideal >= self.within);
        let best = || (0..offers.len()).max_by(|&a, &b| offers[a].share_of_ideal.total_cmp(&offers[b].share_of_ideal));
        let chosen = reached.or_else(best).unwrap_or(0);
        let same_group = |(scenario, _): &&(&Scenario, &Outcomes)| scenario.topology == ours[chosen].0.topology;
        let history = kind(PolicyKind::Eplb).find(same_group).map_or_else(|| first(PolicyKind::Eplb), Ok)?;
        let none = first(PolicyKind::None)?;
        Ok(Advice {
            ranks: self.ranks,
            within: self.within,
            none: offer(none),
            ideal: offer(first(PolicyKind::Ideal)?),
            chosen,
            is_reached: reached.is_some(),
            history: offer(history),
            layers: layers(none.1, ours[chosen].1),
            offers,
        })
    }
}

fn layers(none: &Outcomes, balanced: &Outcomes) -> Vec<Layer> {
    let mut layers: Vec<Layer> = none
        .layers
        .iter()
        .map(|(&layer, of_layer)| Layer {
            layer,
            none: of_layer.mean(),
            none_worst: of_layer.largest,
            balanced: balanced.layers.get(&layer).map_or(0.0, |of_layer| of_layer.mean()),
        })
        .collect();
    layers.sort_by(|a, b| b.none.total_cmp(&a.none).then(a.layer.cmp(&b.layer)));
    layers
}

impl Advice {
    /// The configuration that is recommended.
    pub fn offer(&self) -> &Offer {
        &self.offers[self.chosen]
    }

    /// The layer whose imbalance without balancing is in the middle.
    pub fn typical_layer(&self) -> u32 {
        self.layers.get(self.layers.len() / 2).map_or(0, |layer| layer.layer)
    }
}
