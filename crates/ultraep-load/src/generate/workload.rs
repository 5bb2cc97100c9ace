//! The closed list of workloads.

use std::fmt;
use std::str::FromStr;

/// A synthetic workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Workload {
    /// Every expert the same.
    Balanced,
    /// A few neighbouring experts take the skew, a part of a rank or several ranks (target ratio).
    HotExperts,
    /// One rank's experts take the skew (target ratio).
    HotRank,
    /// One hot expert on each rank: experts differ, ranks do not.
    SpreadHot,
    /// Sources with a quarter to seven quarters of the mean tokens, power-law experts (target ratio).
    RaggedSources,
    /// One rank whose experts get no token.
    IdleRank,
    /// The hot rank moves on with every microbatch (target ratio).
    RotatingHotspot,
    /// Even, but every eighth microbatch has a hot rank (target ratio there).
    Burst,
    /// Ranks follow Zipf's law in random order, masters of a rank differ (target ratio).
    HotRankZipf,
    /// Experts follow a power law in order of their index, so that neighbours on a rank are hot together (target ratio).
    PowerLaw,
    /// Experts follow a power law in random order (target ratio).
    ShuffledHomes,
    /// A power law whose hot experts change gradually over 16 microbatches (target ratio).
    Drift,
    /// Every token chooses one expert first; its other choices are even.
    OneExpert,
    /// One source rank has no tokens, power-law experts (target ratio).
    SilentRank,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Balanced,
        Self::HotExperts,
        Self::HotRank,
        Self::SpreadHot,
        Self::RaggedSources,
        Self::IdleRank,
        Self::RotatingHotspot,
        Self::Burst,
        Self::HotRankZipf,
        Self::PowerLaw,
        Self::ShuffledHomes,
        Self::Drift,
        Self::OneExpert,
        Self::SilentRank,
    ];

    /// Name on the command line and in files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::HotExperts => "hot-experts",
            Self::HotRank => "hot-rank",
            Self::SpreadHot => "spread-hot",
            Self::RaggedSources => "ragged-sources",
            Self::IdleRank => "idle-rank",
            Self::RotatingHotspot => "rotating-hotspot",
            Self::Burst => "burst",
            Self::HotRankZipf => "hot-rank-zipf",
            Self::PowerLaw => "power-law",
            Self::ShuffledHomes => "shuffled-homes",
            Self::Drift => "drift",
            Self::OneExpert => "one-expert",
            Self::SilentRank => "silent-rank",
        }
    }

    /// One line for `--help`.
    pub const fn description(self) -> &'static str {
        match self {
            Self::Balanced => "every expert the same",
            Self::HotExperts => "a few neighbouring experts are hot",
            Self::HotRank => "one rank is hot",
            Self::SpreadHot => "one hot expert on each rank: experts differ, ranks do not (no target)",
            Self::RaggedSources => "sources differ in tokens, power-law experts",
            Self::IdleRank => "one rank's experts get no token (no target)",
            Self::RotatingHotspot => "the hot rank moves on with every microbatch",
            Self::Burst => "even, but every eighth microbatch has a hot rank",
            Self::HotRankZipf => "ranks follow Zipf's law in random order",
            Self::PowerLaw => "experts follow a power law in order",
            Self::ShuffledHomes => "experts follow a power law in random order",
            Self::Drift => "a power law whose hot experts change over 16 microbatches",
            Self::OneExpert => "every token chooses one expert (no target)",
            Self::SilentRank => "one source rank has no tokens, power-law experts",
        }
    }

    /// Whether the target ratio shapes the load of this microbatch.
    pub const fn takes_ratio(self, microbatch: u32) -> bool {
        match self {
            Self::Balanced | Self::SpreadHot | Self::IdleRank | Self::OneExpert => false,
            Self::Burst => is_burst(microbatch),
            _ => true,
        }
    }
}

/// Whether [`Workload::Burst`] is hot in this microbatch.
pub(super) const fn is_burst(microbatch: u32) -> bool {
    microbatch % 8 == 7
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no workload has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no workload {got:?}: allowed are {}", Workload::ALL.map(Workload::name).join(", "))]
pub struct ParseWorkloadError {
    /// What was given.
    pub got: String,
}

impl FromStr for Workload {
    type Err = ParseWorkloadError;

    fn from_str(name: &str) -> Result<Self, ParseWorkloadError> {
        let found = Self::ALL.into_iter().find(|w| w.name() == name);
        found.ok_or_else(|| ParseWorkloadError { got: name.to_owned() })
    }
}
