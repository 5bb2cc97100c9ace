//! A map from loads: the semantics of `eplb.rebalance_experts`.
//!
//! All experts may move. With `groups` a multiple of `nodes`, expert groups are packed to nodes first, and every copy stays
//! in its group's node; otherwise all ranks are one node. Every slot is filled.

use ultraep_baselines::{EplbPlacer, ExpertGroups, Region};
use ultraep_plan::{MAX_EXPERTS, MAX_RANKS};

use crate::map::{MAX_LAYERS, MAX_PHYSICAL};
use crate::search::improve;
use crate::{MapError, MapShape, PlacementMap};

/// Who decides where copies go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Method {
    /// DeepSeek's EPLB heuristic, copy for copy.
    Heuristic,
    /// Ours: a search that begins at the heuristic's map, so that its fullest rank is never fuller, and that takes two
    /// copies of one expert off one rank.
    #[default]
    Search,
}

/// What is asked of [`rebalance`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RebalanceSpec {
    /// `P`, physical experts of a layer; a multiple of the ranks, at least the experts.
    pub physical: usize,
    /// Expert groups of equal size, as the router limits itself to; 1 where it does not.
    pub groups: usize,
    /// Nodes of equal size.
    pub nodes: usize,
    /// `N`, ranks.
    pub ranks: usize,
    /// Who decides.
    pub method: Method,
}

/// Why there is no map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RebalanceError {
    /// A number that must divide another does not.
    #[error("{what} {got}: it must divide {of} {number}")]
    Divides {
        /// What.
        what: &'static str,
        /// Its value.
        got: usize,
        /// What it must divide.
        of: &'static str,
        /// Its value.
        number: usize,
    },
    /// Fewer physical experts than experts.
    #[error("{physical} physical experts for {experts} experts: each needs one at least")]
    TooFew {
        /// `P`, of the whole group or of one of its parts.
        physical: usize,
        /// `E`, of the same.
        experts: usize,
    },
    /// Not a whole number of layers.
    #[error("{got} weights: they must be layers of {experts} experts")]
    Weights {
        /// Weights given.
        got: usize,
        /// `E`.
        experts: usize,
    },
    /// Out of limits.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// Places `experts` experts by `weights`, `[layers, E]` row-major: loads in tokens, or in any unit.
pub fn rebalance(weights: &[u64], experts: usize, spec: &RebalanceSpec) -> Result<PlacementMap, RebalanceError> {
    let &RebalanceSpec { physical, groups, nodes, ranks, method } = spec;
    check(experts, spec)?;
    let slots_per_rank = physical / ranks;
    let hierarchical = groups.is_multiple_of(nodes);
    let groups = if hierarchical { ExpertGroups { groups, nodes } } else { ExpertGroups { groups: 1, nodes: 1 } };
    let regions = |placer: &mut EplbPlacer, loads: &[u64]| placer.nodes(loads, ranks, groups);
    let shape = MapShape { layers: layers_of(weights, experts)?, ranks, slots_per_rank, experts };
    place(weights, shape, method, regions)
}

/// As [`rebalance`], each of `regions` on its own: their experts must be all experts, their ranks all ranks, each once.
pub fn rebalance_regions(
    weights: &[u64],
    shape: MapShape,
    regions: &[Region],
    method: Method,
) -> Result<PlacementMap, RebalanceError> {
    for region in regions {
        let (physical, experts) = (region.ranks.len() * shape.slots_per_rank, region.experts.len());
        if physical < experts {
            return Err(RebalanceError::TooFew { physical, experts });
        }
    }
    let layers = layers_of(weights, shape.experts)?;
    place(weights, MapShape { layers, ..shape }, method, |_, _| regions.to_vec())
}

fn layers_of(weights: &[u64], experts: usize) -> Result<usize, RebalanceError> {
    match weights.len() / experts.max(1) {
        layers if layers > 0 && layers * experts == weights.len() => Ok(layers),
        _ => Err(RebalanceError::Weights { got: weights.len(), experts }),
    }
}

fn check(experts: usize, spec: &RebalanceSpec) -> Result<(), RebalanceError> {
    let &RebalanceSpec { physical, groups, nodes, ranks, .. } = spec;
    let limits = [
        ("experts", experts, MAX_EXPERTS),
        ("ranks", ranks, MAX_RANKS),
        ("physical experts", physical, MAX_PHYSICAL),
        ("expert groups", groups, MAX_EXPERTS),
        ("nodes", nodes, MAX_RANKS),
    ];
    if let Some((what, got, max)) = limits.into_iter().find(|&(_, got, max)| !(1..=max).contains(&got)) {
        return Err(MapError::Range { what, got, max }.into());
    }
    let pairs = [
        ("expert groups", groups, "experts", experts),
        ("nodes", nodes, "ranks", ranks),
        ("ranks", ranks, "physical experts", physical),
    ];
    if let Some((what, got, of, number)) = pairs.into_iter().find(|&(_, got, _, number)| !number.is_multiple_of(got)) {
        return Err(RebalanceError::Divides { what, got, of, number });
    }
    if physical < experts { Err(RebalanceError::TooFew { physical, experts }) } else { Ok(()) }
}

fn place(
    weights: &[u64],
    shape: MapShape,
    method: Method,
    mut regions: impl FnMut(&mut EplbPlacer, &[u64]) -> Vec<Region>,
) -> Result<PlacementMap, RebalanceError> {
    if shape.layers > MAX_LAYERS {
        return Err(MapError::Range { what: "layers", got: shape.layers, max: MAX_LAYERS }.into());
    }
    let mut placer = EplbPlacer::default();
    let (mut placement, mut entries) = (Vec::new(), Vec::with_capacity(shape.layers * shape.physical()));
    for loads in weights.chunks(shape.experts) {
        let loads = scaled(loads);
        let mut on: Vec<Vec<usize>> = vec![Vec::with_capacity(shape.slots_per_rank); shape.ranks];
        for region in regions(&mut placer, &loads) {
            placement.clear();
            placer.place(&loads, |_| shape.slots_per_rank, &region, &mut placement);
            placement.iter().for_each(|&(expert, rank)| on[rank.index()].push(expert.index()));
            if method == Method::Search {
                improve(&loads, &mut on[region.ranks]);
            }
        }
        entries.extend(on.into_iter().flatten().map(|expert| expert as i32));
    }
    Ok(PlacementMap::new(shape, entries)?)
}

/// Loads whose sum in the heuristic's unit leaves room for squares of sums: halved together until it does. No real load is
/// so large.
fn scaled(loads: &[u64]) -> Vec<u64> {
    let total: u128 = loads.iter().map(|&load| u128::from(load)).sum();
    let shift = (128 - total.leading_zeros()).saturating_sub(MAX_TOTAL_BITS);
    loads.iter().map(|&load| load >> shift).collect()
}

/// Bits of the largest sum of loads that is taken as it is: a trillion tokens.
const MAX_TOTAL_BITS: u32 = 40;
