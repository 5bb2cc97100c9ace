//! How good a placement is for loads that it meets.

use std::collections::BTreeMap;

use ultraep_import::Microbatch;
use ultraep_placement::{PlacementMap, Sharing};
use ultraep_plan::{Rank, Topology, TopologyError, TopologySpec};
use ultraep_replay::Distribution;

/// Why a placement cannot be judged by a load.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JudgeError {
    /// A layer of the load that the map does not have.
    #[error("layer {layer} has no row in the map, which has {rows}")]
    NoRow {
        /// The recording's number of the layer.
        layer: u32,
        /// Rows of the map.
        rows: String,
    },
    /// Loads of another number of experts.
    #[error("the map has {map} experts, the load {load}")]
    Experts {
        /// `E` of the map.
        map: usize,
        /// `E` of the load.
        load: usize,
    },
    /// A layer in which an expert with tokens is on no rank.
    #[error("layer {layer}: an expert with tokens is on no rank")]
    Missing {
        /// The recording's number of the layer.
        layer: u32,
    },
    /// Fewer slots than the experts of a rank.
    #[error("{slots} experts a rank in the map: a rank is home to {masters}")]
    Room {
        /// Of the map.
        slots: usize,
        /// Of the rank with most masters.
        masters: usize,
    },
    /// No group of that size.
    #[error(transparent)]
    Topology(#[from] TopologyError),
}

/// What a placement came to, in one layer or in all.
#[derive(Clone, Debug, Default)]
pub struct Judged {
    /// Largest over mean rank load, over the microbatches.
    pub imbalance: Distribution,
    /// Tokens processed away from their source.
    pub remote_tokens: f64,
    /// Tokens in all.
    pub tokens: u64,
}

impl Judged {
    fn add(&mut self, sharing: &Sharing) {
        self.imbalance.add(sharing.imbalance());
        self.remote_tokens += sharing.remote_tokens();
        self.tokens += sharing.tokens;
    }

    /// Share of tokens processed away from their source.
    pub fn remote_share(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.remote_tokens / self.tokens as f64 }
    }
}

/// A placement and what it does with the loads shown to it.
#[derive(Clone, Debug)]
pub struct Judge {
    map: PlacementMap,
    rows: BTreeMap<u32, usize>,
    layers: BTreeMap<u32, Judged>,
    all: Judged,
}

impl Judge {
    /// Of `map` for a recording with these layers. A map that knows its layers' numbers is matched by them; one that has as
    /// many rows as there are layers is taken in order; one with more rows by number, as SGLang's is.
    pub fn new(map: PlacementMap, layers: &[u32]) -> Result<Self, JudgeError> {
        let rows = map.shape().layers;
        let row_of = |(at, layer): (usize, u32)| match map.layer_numbers() {
            Some(numbers) => numbers.binary_search(&layer).ok(),
            None if rows == layers.len() => Some(at),
            None => usize::try_from(layer).ok().filter(|&row| row < rows),
        };
        let words = || match map.layer_numbers() {
            Some(numbers) => format!("layers {}", numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")),
            None => format!("{rows} rows"),
        };
        let mut found = BTreeMap::new();
        for (at, &layer) in layers.iter().enumerate() {
            let row = row_of((at, layer)).ok_or_else(|| JudgeError::NoRow { layer, rows: words() })?;
            found.insert(layer, row);
        }
        Ok(Self { map, rows: found, layers: BTreeMap::new(), all: Judged::default() })
    }

    /// Shows it a microbatch, with as many sources as the map has ranks.
    pub fn add(&mut self, microbatch: &Microbatch) -> Result<(), JudgeError> {
        let (layer, shape) = (microbatch.layer, self.map.shape());
        let load = microbatch.counts.len() / shape.ranks.max(1);
        if load != shape.experts {
            return Err(JudgeError::Experts { map: shape.experts, load });
        }
        let row = *self.rows.get(&layer).ok_or_else(|| JudgeError::NoRow { layer, rows: "others".to_owned() })?;
        let sharing = Sharing::of_counts(&self.map, row, &microbatch.counts).ok_or(JudgeError::Missing { layer })?;
        self.layers.entry(layer).or_default().add(&sharing);
        self.all.add(&sharing);
        Ok(())
    }

    /// The placement.
    pub fn map(&self) -> &PlacementMap {
        &self.map
    }

    /// The row of a layer.
    pub fn row(&self, layer: u32) -> Option<usize> {
        self.rows.get(&layer).copied()
    }

    /// What it came to by layer.
    pub fn layers(&self) -> &BTreeMap<u32, Judged> {
        &self.layers
    }

    /// What it came to in all layers.
    pub fn all(&self) -> &Judged {
        &self.all
    }
}

/// The group of ours with as much room on every rank as `map` has: its masters in order, the rest slots.
pub fn same_room(map: &PlacementMap, domain_ranks: usize) -> Result<Topology, JudgeError> {
    let shape = map.shape();
    let spec = TopologySpec { ranks: shape.ranks, experts: shape.experts, domain_ranks, slots_per_rank: 0 };
    let topology = Topology::new(spec)?;
    let masters: Vec<usize> = (0..shape.ranks).map(|r| topology.masters(Rank::new(r)).len()).collect();
    let most = masters.iter().copied().max().unwrap_or(0);
    if most > shape.slots_per_rank {
        return Err(JudgeError::Room { slots: shape.slots_per_rank, masters: most });
    }
    let slots: Vec<usize> = masters.iter().map(|masters| shape.slots_per_rank - masters).collect();
    Ok(topology.with_slots(&slots)?)
}
