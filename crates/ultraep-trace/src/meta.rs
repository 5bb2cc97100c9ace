//! The header's JSON: what was recorded.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use ultraep_plan::{MAX_EXPERTS, MAX_RANKS, Rank, Topology};

/// Name and version of the format, the header's `schema`.
pub const SCHEMA: &str = "ultraep.trace/1";
/// Most layers.
pub const MAX_LAYERS: usize = 1 << 16;
/// Most slots of a rank. More than a topology allows: recordings of other systems may have more.
pub const MAX_RECORDED_SLOTS: u32 = 4096;

/// What was recorded. Unknown fields are refused: they would belong to a later version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceMeta {
    /// [`SCHEMA`].
    pub schema: String,
    /// `N`, ranks of the EP group.
    pub ranks: usize,
    /// `E`, logical experts of a layer.
    pub experts: usize,
    /// `G`, ranks in a domain; divides `ranks`.
    pub domain_ranks: usize,
    /// Masters on each rank, `[N]`; experts lie on ranks in contiguous blocks. Their sum is `E`.
    pub masters_per_rank: Vec<u32>,
    /// Slots on each rank, `[N]`.
    pub slots_per_rank: Vec<u32>,
    /// Number of MoE layers; records name one by index.
    pub layers: usize,
    /// Experts chosen for each token, if known.
    pub top_k: Option<usize>,
    /// Tokens of a rank in one microbatch, if always the same.
    pub tokens_per_rank: Option<u64>,
    /// Anything else: model, text, command, versions, how sources were split.
    #[serde(default)]
    pub metadata: BTreeMap<String, serde_json::Value>,
}

/// Why a header was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MetaError {
    /// Another format or version.
    #[error("schema {got:?}; this reader knows {SCHEMA:?}")]
    Schema {
        /// As read.
        got: String,
    },
    /// A number outside its limits.
    #[error("{what}: {got}; allowed are {min} to {max}")]
    Range {
        /// Which field.
        what: &'static str,
        /// Its value.
        got: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// A per-rank list of another length.
    #[error("{what} has {got} values for {ranks} ranks")]
    Length {
        /// Which field.
        what: &'static str,
        /// Its length.
        got: usize,
        /// `N`.
        ranks: usize,
    },
    /// The masters do not add up to the experts.
    #[error("masters_per_rank adds up to {got}; there are {experts} experts")]
    Masters {
        /// Their sum.
        got: u64,
        /// `E`.
        experts: usize,
    },
    /// The domain size does not divide the rank count.
    #[error("domains of {domain_ranks} ranks do not divide {ranks} ranks evenly")]
    Domain {
        /// `G`.
        domain_ranks: usize,
        /// `N`.
        ranks: usize,
    },
}

impl TraceMeta {
    /// The header for a group, without top-k, tokens or metadata.
    pub fn of_topology(topology: &Topology, layers: usize) -> Self {
        let ranks = || (0..topology.ranks()).map(Rank::new);
        Self {
            schema: SCHEMA.to_string(),
            ranks: topology.ranks(),
            experts: topology.experts(),
            domain_ranks: topology.domain_ranks(),
            masters_per_rank: ranks().map(|r| topology.masters(r).len() as u32).collect(),
            slots_per_rank: ranks().map(|r| topology.slots(r) as u32).collect(),
            layers,
            top_k: None,
            tokens_per_rank: None,
            metadata: BTreeMap::new(),
        }
    }

    /// Counts in one record, `N * E`.
    pub fn counts(&self) -> usize {
        self.ranks * self.experts
    }

    /// Checks every field against the limits and the others.
    pub fn check(&self) -> Result<(), MetaError> {
        if self.schema != SCHEMA {
            return Err(MetaError::Schema { got: self.schema.clone() });
        }
        range("ranks", self.ranks as u64, 1, MAX_RANKS as u64)?;
        range("experts", self.experts as u64, 1, MAX_EXPERTS as u64)?;
        range("layers", self.layers as u64, 1, MAX_LAYERS as u64)?;
        range("top_k", self.top_k.unwrap_or(1) as u64, 1, self.experts as u64)?;
        for (what, values) in [("masters_per_rank", &self.masters_per_rank), ("slots_per_rank", &self.slots_per_rank)] {
            if values.len() != self.ranks {
                return Err(MetaError::Length { what, got: values.len(), ranks: self.ranks });
            }
        }
        for &slots in &self.slots_per_rank {
            range("slots_per_rank", u64::from(slots), 0, u64::from(MAX_RECORDED_SLOTS))?;
        }
        let masters = self.masters_per_rank.iter().map(|&m| u64::from(m)).sum();
        if masters != self.experts as u64 {
            return Err(MetaError::Masters { got: masters, experts: self.experts });
        }
        if self.domain_ranks == 0 || !self.ranks.is_multiple_of(self.domain_ranks) {
            return Err(MetaError::Domain { domain_ranks: self.domain_ranks, ranks: self.ranks });
        }
        Ok(())
    }
}

fn range(what: &'static str, got: u64, min: u64, max: u64) -> Result<(), MetaError> {
    if (min..=max).contains(&got) { Ok(()) } else { Err(MetaError::Range { what, got, min, max }) }
}
