//! The closed list of policies and the factory that builds them.

use std::fmt;
use std::str::FromStr;

use ultraep_plan::{Policy, Topology};

use crate::{Eplb, EplbExact, EplbParams, MastersOnly};

/// Every policy of the project.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum PolicyKind {
    /// DeepSeek's EPLB on past loads.
    Eplb,
    /// The EPLB heuristic on the exact counts.
    EplbExact,
    /// The force-balanced bound.
    Ideal,
}

impl PolicyKind {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 3] = [Self::Eplb, Self::EplbExact, Self::Ideal];

    /// Name on the command line, in tables and in files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Eplb => "eplb",
            Self::EplbExact => "eplb-exact",
            Self::Ideal => "ideal",
        }
    }

    /// One line for `--help` and reports.
    pub const fn description(self) -> &'static str {
        match self {
            Self::Eplb => "DeepSeek EPLB: all experts placed anew every few microbatches, from past loads",
            Self::EplbExact => "the EPLB heuristic on the exact counts, masters fixed (the paper's EPLB+)",
            Self::Ideal => "the bound: routing itself forced to be balanced",
        }
    }

    /// Whether it plans from earlier microbatches ([`Policy::observe`]); one instance then serves one layer only.
    pub const fn is_historical(self) -> bool {
        matches!(self, Self::Eplb)
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
}

/// Parameters of all policies; each takes what concerns it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyParams {
    /// `eplb`.
    pub eplb: EplbParams,
}

/// Builds a policy for `topology`.
pub fn build(kind: PolicyKind, topology: &Topology, params: &PolicyParams) -> Result<Box<dyn Policy>, BuildError> {
    Ok(match kind {
        PolicyKind::Eplb => Box::new(Eplb::new(topology, params.eplb)?),
        PolicyKind::EplbExact => Box::new(EplbExact::new(topology)),
        PolicyKind::Ideal => Box::new(MastersOnly::new(kind.name(), topology)),
    })
}
