//! The closed list of policies and the factory that builds them.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use ultraep_plan::{
    Charge, Expert, Greedy, GreedyParams, HardwareModel, Lookback, Plan, Policy, PolicyFactory, PolicyRefused, Rank,
    Ratio, TokenChoice, Topology, TransferModelError, Ultraep, UltraepParams, UltraepV1, UltraepV1Params, Unbalanced,
};

use crate::draft::total_slots;
use crate::history::HistoryParams;
use crate::ideal::balanced_choice;
use crate::{Eplb, EplbExact, EplbParams, Llep, LlepParams, Lplb, LplbParams, MastersOnly, MoonEp};

/// Every policy of the project.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum PolicyKind {
    /// Masters only.
    None,
    /// DeepSeek's EPLB on past loads.
    Eplb,
    /// The EPLB heuristic on the exact counts.
    EplbExact,
    /// DeepSeek's linear program over a placement from past loads.
    Lplb,
    /// Least-loaded expert parallelism.
    Llep,
    /// Every rank gets exactly its share.
    MoonEp,
    /// The paper's Algorithm 1.
    Greedy,
    /// UltraEP v1.0.0 as released.
    UltraepV1,
    /// Ours.
    #[default]
    Ultraep,
    /// Ours, for the least predicted time.
    UltraepCost,
    /// The force-balanced bound.
    Ideal,
}

impl PolicyKind {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 11] = [
        Self::None,
        Self::Eplb,
        Self::EplbExact,
        Self::Lplb,
        Self::Llep,
        Self::MoonEp,
        Self::Greedy,
        Self::UltraepV1,
        Self::Ultraep,
        Self::UltraepCost,
        Self::Ideal,
    ];

    /// Name on the command line, in tables and in files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Eplb => "eplb",
            Self::EplbExact => "eplb-exact",
            Self::Lplb => "lplb",
            Self::Llep => "llep",
            Self::MoonEp => "moonep",
            Self::Greedy => "greedy",
            Self::UltraepV1 => "ultraep-v1",
            Self::Ultraep => "ultraep",
            Self::UltraepCost => "ultraep-cost",
            Self::Ideal => "ideal",
        }
    }

    /// One line for `--help` and reports.
    pub const fn description(self) -> &'static str {
        match self {
            Self::None => "masters only",
            Self::Eplb => "DeepSeek EPLB: all experts placed anew every few microbatches, from past loads",
            Self::EplbExact => "the EPLB heuristic on the exact counts, masters fixed (the paper's EPLB+)",
            Self::Lplb => "DeepSeek LPLB: replicas placed from past loads, shares by a linear program",
            Self::Llep => "least-loaded EP: experts over a cap spill to the least loaded ranks, no slot limit",
            Self::MoonEp => "MoonEP: every rank gets exactly its share, no slot limit, no locality",
            Self::Greedy => "the paper's Algorithm 1: bisection on the threshold with a greedy test",
            Self::UltraepV1 => "UltraEP v1.0.0 as released",
            Self::Ultraep => "ours: proven bound, best of several constructions, fewest replicas at the target",
            Self::UltraepCost => "ours, for the least time that the hardware model predicts; may do nothing",
            Self::Ideal => "the bound: routing itself forced to be balanced",
        }
    }

    /// Whether it plans from earlier microbatches ([`Policy::observe`]); one instance then serves one layer only.
    pub const fn is_historical(self) -> bool {
        matches!(self, Self::Eplb | Self::Lplb)
    }

    /// Which costs of balancing fall on a forward's critical path under this policy's plan; `is_new` is whether the plan's
    /// instances are others than the plan's before. Masters only needs none; historical policies place beside other work and
    /// keep what they placed.
    pub const fn charge(self, is_new: bool) -> Charge {
        match self {
            Self::None | Self::Ideal => Charge::Nothing,
            Self::Eplb | Self::Lplb if is_new => Charge::Placed,
            Self::Eplb | Self::Lplb => Charge::Kept,
            _ => Charge::Planned,
        }
    }

    /// Whether [`PolicyParams::min_quota`] makes a difference to it.
    pub const fn has_min_quota(self) -> bool {
        matches!(self, Self::Greedy | Self::UltraepV1 | Self::Ultraep | Self::UltraepCost)
    }

    /// Whether the caller has to route by [`crate::ideal`] for the policy to mean anything.
    pub const fn forces_routing(self) -> bool {
        matches!(self, Self::Ideal)
    }
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for PolicyKind {
    type Err = ParsePolicyError;

    fn from_str(name: &str) -> Result<Self, ParsePolicyError> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| ParsePolicyError { got: name.to_owned() })
    }
}

/// A name that no policy has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no policy {got:?}: allowed are {}", PolicyKind::ALL.map(PolicyKind::name).join(", "))]
pub struct ParsePolicyError {
    /// What was given.
    pub got: String,
}

/// Why a policy was not built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// Groups and nodes do not divide what they must.
    #[error(
        "{groups} expert groups on {nodes} nodes: groups must divide {experts} experts, nodes must divide groups and \
         {ranks} ranks, and a node must hold its share of experts"
    )]
    Groups {
        /// Expert groups asked for.
        groups: usize,
        /// Nodes asked for.
        nodes: usize,
        /// `E`.
        experts: usize,
        /// `N`.
        ranks: usize,
    },
    /// The policy has no notion of a rank that must not get replicas.
    #[error("{policy} cannot serve a group with a rank of speed weight 0")]
    ZeroSpeed {
        /// Its name.
        policy: &'static str,
    },
    /// The hardware model has no weight sync.
    #[error(transparent)]
    Transfers(#[from] TransferModelError),
}

/// Parameters of all policies; each takes what concerns it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyParams {
    /// Tolerated imbalance: `greedy`, `ultraep`, `ultraep-cost`.
    pub beta: Ratio,
    /// `u_min`, least quota of a replica in tokens: `greedy`, `ultraep-v1`, `ultraep`, `ultraep-cost`.
    pub min_quota: u32,
    /// `eplb`.
    pub eplb: EplbParams,
    /// `lplb`.
    pub lplb: LplbParams,
    /// `llep`.
    pub llep: LlepParams,
    /// `ultraep-cost`.
    pub hardware: HardwareModel,
}

impl Default for PolicyParams {
    /// As published.
    fn default() -> Self {
        Self {
            beta: Ratio::BETA,
            min_quota: 1024,
            eplb: EplbParams::default(),
            lplb: LplbParams::default(),
            llep: LlepParams::default(),
            hardware: HardwareModel::default(),
        }
    }
}

/// Builds a policy for `topology`.
pub fn build(kind: PolicyKind, topology: &Topology, params: &PolicyParams) -> Result<Box<dyn Policy>, BuildError> {
    let &PolicyParams { beta, min_quota, eplb, lplb, llep, hardware } = params;
    Ok(match kind {
        PolicyKind::None => Box::new(Unbalanced::new(topology)),
        PolicyKind::Eplb => Box::new(Eplb::new(topology, eplb)?),
        PolicyKind::EplbExact => Box::new(EplbExact::new(topology)),
        PolicyKind::Lplb => Box::new(Lplb::new(topology, lplb)),
        PolicyKind::Llep => Box::new(Llep::new(topology, llep)),
        PolicyKind::MoonEp => Box::new(MoonEp::new(topology)?),
        PolicyKind::Greedy => Box::new(Greedy::new(topology, GreedyParams { beta, min_quota })),
        PolicyKind::UltraepV1 => {
            Box::new(UltraepV1::new(topology, UltraepV1Params { min_tokens: min_quota, ..Default::default() }))
        }
        PolicyKind::Ultraep => Box::new(Ultraep::new(topology, UltraepParams { beta, min_quota })),
        PolicyKind::UltraepCost => {
            Box::new(Ultraep::cost_aware(topology, UltraepParams { beta, min_quota }, hardware)?)
        }
        PolicyKind::Ideal => Box::new(MastersOnly::new(kind.name(), topology)),
    })
}

/// An empty plan with room for what a policy makes on `topology`, so that solving allocates nothing for it.
pub fn plan_for(kind: PolicyKind, topology: &Topology) -> Plan {
    let replicas = match kind {
        PolicyKind::None | PolicyKind::Ideal => 0,
        // Every physical expert may be away from its home.
        PolicyKind::Eplb | PolicyKind::Lplb => topology.experts() + total_slots(topology),
        // No slot limit, but one of their own.
        PolicyKind::Llep => 2 * topology.experts() + topology.ranks(),
        PolicyKind::MoonEp => topology.experts() + topology.ranks(),
        _ => total_slots(topology),
    };
    Plan::with_capacity(topology, replicas)
}

/// Physical experts that a rank needs room for under a policy: masters, then as many more as its plans may place there.
/// The largest over all ranks; every physical index of the policy's plans is below it.
pub fn physical_per_rank(kind: PolicyKind, topology: &Topology) -> usize {
    let masters = |rank: Rank| topology.masters(rank).len();
    let ranks = || (0..topology.ranks()).map(Rank::new);
    let most_masters = ranks().map(masters).max().unwrap_or(0);
    let foreign = |rank: Rank| match kind {
        PolicyKind::None | PolicyKind::Ideal => 0,
        // Masters may all be away, and the rank full of others.
        PolicyKind::Eplb => topology.physical_experts(rank),
        // All experts of the domain.
        PolicyKind::Llep => topology.domain_experts(topology.domain_of(rank)).len() - masters(rank),
        // One donor.
        PolicyKind::MoonEp => most_masters,
        _ => topology.slots(rank),
    };
    ranks().map(|rank| masters(rank) + foreign(rank)).max().unwrap_or(0)
}

/// A policy of the project with its parameters, as a runtime takes it.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// Which policy.
    pub kind: PolicyKind,
    /// Parameters of all; it takes what concerns it.
    pub params: PolicyParams,
}

impl Recipe {
    /// One for each of `kinds`, in their order.
    pub fn all(kinds: &[PolicyKind], params: PolicyParams) -> Vec<Arc<dyn PolicyFactory>> {
        kinds.iter().map(|&kind| Arc::new(Self { kind, params }) as _).collect()
    }
}

impl PolicyFactory for Recipe {
    fn name(&self) -> &'static str {
        self.kind.name()
    }

    fn build(&self, topology: &Topology) -> Result<Box<dyn Policy>, PolicyRefused> {
        let refused = |error: BuildError| PolicyRefused { policy: self.kind.name(), reason: error.to_string() };
        build(self.kind, topology, &self.params).map_err(refused)
    }

    fn physical_per_rank(&self, topology: &Topology) -> usize {
        physical_per_rank(self.kind, topology)
    }

    fn history(&self) -> Option<Lookback> {
        let HistoryParams { window, interval } = match self.kind {
            PolicyKind::Eplb => self.params.eplb.history,
            PolicyKind::Lplb => self.params.lplb.history,
            _ => return None,
        };
        Some(Lookback { window, interval })
    }

    fn forced_choice(&self, topology: &Topology, choice: TokenChoice) -> Option<Expert> {
        let TokenChoice { rank, token, k, top_k } = choice;
        self.kind.forces_routing().then(|| balanced_choice(rank.index(), token, k, topology, top_k))
    }
}
