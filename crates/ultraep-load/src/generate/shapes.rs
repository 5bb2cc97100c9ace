//! The skewed part of a workload: one weight for each expert.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use ultraep_plan::{Rank, Topology};

use super::LoadParams;
use super::workload::{Workload, is_burst};

/// Mean weight of an expert.
pub(super) const MEAN_WEIGHT: u64 = 1 << 12;
/// Largest exponent of a power law.
const LAST_PLAIN: u32 = 4;
/// Largest sharpness that changes something.
pub(super) const MAX_SHARPNESS: u32 = 2 * LAST_PLAIN;
/// Microbatches over which a drift goes from one set of hot experts to the next.
const DRIFT_MICROBATCHES: u32 = 16;

/// Weights of all experts, `[E]`, with mean [`MEAN_WEIGHT`] up to rounding.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub(super) weights: Vec<u64>,
    /// An expert that every token chooses first.
    pub(super) everyones: Option<usize>,
}

/// A generator for one purpose: ChaCha8 over (seed, purpose, index), so that purposes never share numbers.
pub(super) fn random(seed: u64, purpose: u32, index: u32) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..12].copy_from_slice(&purpose.to_le_bytes());
    key[12..16].copy_from_slice(&index.to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// A number below `bound`.
pub(super) fn below(rng: &mut ChaCha8Rng, bound: u32) -> u32 {
    ((u64::from(rng.next_u32()) * u64::from(bound)) >> 32) as u32
}

const ORDER: u32 = 1;
const MASTERS: u32 = 2;
const PICK: u32 = 3;

impl Shape {
    /// The skewed part of `workload`; larger `sharpness` is more skewed where there is a choice.
    pub(super) fn of(workload: Workload, topology: &Topology, params: &LoadParams, sharpness: u32) -> Self {
        let (ranks, experts) = (topology.ranks(), topology.experts());
        let seed = params.seed;
        let pick = |bound: usize| below(&mut random(seed, PICK, 0), bound as u32) as usize;
        let mut everyones = None;
        let raw: Vec<u64> = match workload {
            Workload::Balanced => vec![1; experts],
            Workload::HotExperts => {
                // Neighbours, so that a part of a rank or several ranks are hot; fewer are hotter.
                let (first, hot) = (pick(experts), (experts >> (2 + sharpness)).max(2));
                (0..experts).map(|e| u64::from((e + experts - first) % experts < hot)).collect()
            }
            Workload::HotRank => on_rank(topology, pick(ranks)),
            Workload::RotatingHotspot => on_rank(topology, (pick(ranks) + params.microbatch as usize) % ranks),
            Workload::Burst if is_burst(params.microbatch) => on_rank(topology, pick(ranks)),
            Workload::Burst => vec![1; experts],
            Workload::SpreadHot => {
                let first = |e: usize| topology.masters(topology.homes()[e]).start == e;
                (0..experts).map(|e| if first(e) { 8 } else { 1 }).collect()
            }
            Workload::IdleRank if ranks > 1 => {
                let idle = topology.masters(Rank::new(pick(ranks)));
                (0..experts).map(|e| u64::from(!idle.contains(&e))).collect()
            }
            Workload::IdleRank => vec![1; experts],
            Workload::HotRankZipf => {
                let order = permutation(ranks, &mut random(seed, ORDER, 0));
                let mut rng = random(seed, MASTERS, 0);
                let uneven =
                    |rank: &Rank| zipf(order[rank.index()], sharpness) * u64::from(512 + below(&mut rng, 1024));
                topology.homes().iter().map(uneven).collect()
            }
            Workload::PowerLaw => (0..experts).map(|e| zipf(e, sharpness)).collect(),
            Workload::ShuffledHomes | Workload::RaggedSources | Workload::SilentRank => {
                let order = shuffled(topology, &mut random(seed, ORDER, 0), sharpness);
                order.into_iter().map(|position| zipf(position, sharpness)).collect()
            }
            Workload::Drift => drift(topology, params, sharpness),
            Workload::OneExpert => {
                everyones = Some(pick(experts));
                vec![1; experts]
            }
        };
        let sum: u128 = raw.iter().map(|&w| u128::from(w)).sum();
        let scale = |w: u64| (u128::from(w) * u128::from(MEAN_WEIGHT) * experts as u128 / sum.max(1)) as u64;
        Self { weights: raw.into_iter().map(scale).collect(), everyones }
    }
}

/// `1 / (position + 1)^p` with `p` from 1 to [`LAST_PLAIN`], and again for larger sharpness, in 2^40ths, rounded down.
fn zipf(position: usize, sharpness: u32) -> u64 {
    (1 << 40) / (position as u64 + 1).saturating_pow((sharpness - 1) % LAST_PLAIN + 1)
}

fn on_rank(topology: &Topology, rank: usize) -> Vec<u64> {
    let hot = topology.masters(Rank::new(rank));
    (0..topology.experts()).map(|e| u64::from(hot.contains(&e))).collect()
}

/// Between the orders of two neighbouring epochs, in proportion to how far this one has gone. Each has a hottest rank, so
/// that one sharpness serves all microbatches.
fn drift(topology: &Topology, params: &LoadParams, sharpness: u32) -> Vec<u64> {
    let (epoch, gone) = (params.microbatch / DRIFT_MICROBATCHES, params.microbatch % DRIFT_MICROBATCHES);
    let order =
        |epoch: u32| gathered(topology, permutation(topology.experts(), &mut random(params.seed, ORDER, epoch)));
    let mixed = |(old, new): (usize, usize)| {
        zipf(old, sharpness) * u64::from(DRIFT_MICROBATCHES - gone) + zipf(new, sharpness) * u64::from(gone)
    };
    order(epoch).into_iter().zip(order(epoch + 1)).map(mixed).collect()
}

/// A random order of the experts; above [`LAST_PLAIN`], where chance alone spreads the hottest too evenly for the target,
/// a gathered one.
fn shuffled(topology: &Topology, rng: &mut ChaCha8Rng, sharpness: u32) -> Vec<usize> {
    let order = permutation(topology.experts(), rng);
    if sharpness > LAST_PLAIN { gathered(topology, order) } else { order }
}

/// The order in which the rank of the hottest expert has the next hottest too.
fn gathered(topology: &Topology, mut order: Vec<usize>) -> Vec<usize> {
    let find = |order: &[usize], position| order.iter().position(|&p| p == position);
    let hottest = find(&order, 0).unwrap_or(0);
    for (position, expert) in topology.masters(topology.homes()[hottest]).enumerate() {
        if let Some(holder) = find(&order, position) {
            order.swap(holder, expert);
        }
    }
    order
}

/// A random order: the position of each index.
fn permutation(length: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..length).collect();
    for last in (1..length).rev() {
        order.swap(last, below(rng, last as u32 + 1) as usize);
    }
    order
}
