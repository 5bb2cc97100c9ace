//! Loads of a whole recording, summed, and the one placement that is made of them.

use std::collections::BTreeMap;

use ultraep_import::Microbatch;
use ultraep_placement::{MapShape, Method, PlacementMap, RebalanceError, Region, rebalance_regions};
use ultraep_plan::{Domain, Expert, Rank, Topology};

/// Loads of every expert by layer, over all microbatches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    layers: BTreeMap<u32, Vec<u64>>,
}

/// Why there is no placement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StaticError {
    /// No load at all.
    #[error("no microbatch: nothing to place by")]
    Nothing,
    /// The group cannot be.
    #[error(transparent)]
    Rebalance(#[from] RebalanceError),
}

impl Totals {
    /// Adds a microbatch of `experts` experts.
    pub fn add(&mut self, microbatch: &Microbatch, experts: usize) {
        self.add_counts(microbatch.layer, &microbatch.counts, experts);
    }

    /// Adds counts, `[sources, E]`, of a layer.
    pub fn add_counts(&mut self, layer: u32, counts: &[u32], experts: usize) {
        let loads = self.layers.entry(layer).or_insert_with(|| vec![0; experts]);
        for source in counts.chunks(experts.max(1)) {
            loads.iter_mut().zip(source).for_each(|(load, &count)| *load += u64::from(count));
        }
    }

    /// The layers, ascending.
    pub fn layers(&self) -> impl Iterator<Item = u32> {
        self.layers.keys().copied()
    }

    /// One placement for all microbatches: every rank of `topology` holds as many experts as its fullest rank has masters
    /// and slots, all filled, copies share tokens evenly, and experts stay in their domain.
    pub fn place(&self, topology: &Topology, method: Method) -> Result<PlacementMap, StaticError> {
        if self.layers.is_empty() {
            return Err(StaticError::Nothing);
        }
        let weights: Vec<u64> = self.layers.values().flatten().copied().collect();
        let shape = MapShape {
            layers: self.layers.len(),
            ranks: topology.ranks(),
            slots_per_rank: (0..topology.ranks()).map(|r| topology.physical_experts(Rank::new(r))).max().unwrap_or(0),
            experts: topology.experts(),
        };
        let region = |domain: Domain| Region {
            experts: topology.domain_experts(domain).map(Expert::new).collect(),
            ranks: topology.domain_range(domain),
        };
        let regions: Vec<Region> = (0..topology.domains()).map(Domain::new).map(region).collect();
        let map = rebalance_regions(&weights, shape, &regions, method)?;
        let numbers = self.layers.keys().copied().collect();
        Ok(map.with_layer_numbers(numbers).map_err(RebalanceError::from)?)
    }
}
