//! The force-balanced bound: what a layer would cost if routing itself were perfectly balanced.
//!
//! Source: the paper's "ideal" rows. Routing is changed, not placement: every source rank deals its tokens to the experts
//! round-robin, and each rank starts at another expert. Were all ranks to walk the experts in the same order from the
//! same start, they would all send to the same rank at the same time, and the bound would be none.
//!
//! ```text
//! choice(rank r, token j, k) = (floor(r E / N) + j top_k + k) mod E
//! ```
//!
//! Why it is balanced when all sources have the same number of tokens: a source's whole rounds are even, and its last
//! partial round is a window of experts that starts at `floor(r E / N)`. The starts are spread as evenly as integers
//! allow, so any two experts lie in equally many windows, up to 1. When `N` divides `E` the windows of all ranks are
//! rotations of each other by whole ranks, so every rank gets exactly the same. A token's experts are consecutive, so
//! they are distinct for `top_k <= E`.

use ultraep_plan::{Expert, Topology};

/// The `k_index`-th expert of token `token` of source rank `rank`, when each token chooses `top_k` experts.
///
/// `rank` is taken modulo `N`. Distinct for the `top_k` indices of one token while `top_k <= E`.
pub fn balanced_choice(rank: usize, token: usize, k_index: usize, topology: &Topology, top_k: usize) -> Expert {
    let experts = topology.experts();
    let dealt = (token % experts) * (top_k % experts) + k_index;
    Expert::new((first_expert(rank % topology.ranks(), topology) + dealt) % experts)
}

/// The counts `[N, E]`, row-major, of [`balanced_choice`] when source rank `r` makes `row_sums[r]` choices (tokens times
/// top-k). A rank without an entry makes none.
///
/// With equal row sums these are exactly the choices of [`balanced_choice`]. With ragged ones the same walk would not be
/// even, so each source goes on where the one before stopped, along experts taken from the ranks in turn: every expert
/// gets the same up to 1, and every rank too when all ranks have equally many masters.
pub fn balanced_counts(topology: &Topology, row_sums: &[u32]) -> Vec<u32> {
    let (ranks, experts) = (topology.ranks(), topology.experts());
    let mut counts = vec![0; ranks * experts];
    let equal = row_sums.len() >= ranks && row_sums[..ranks].windows(2).all(|w| w[0] == w[1]);
    let order = if equal { Vec::new() } else { interleaved(topology) };
    let mut next = 0;
    for (rank, (row, &sum)) in counts.chunks_mut(experts).zip(row_sums).enumerate() {
        let (rounds, rest) = (sum / experts as u32, sum as usize % experts);
        row.fill(rounds);
        let start = if equal { first_expert(rank, topology) } else { next };
        for position in (start..start + rest).map(|p| p % experts) {
            row[if equal { position } else { order[position] }] += 1;
        }
        next = (start + rest) % experts;
    }
    counts
}

fn first_expert(rank: usize, topology: &Topology) -> usize {
    rank * topology.experts() / topology.ranks()
}

/// Experts in turn from the ranks: the first master of each, then the second of each, and so on.
fn interleaved(topology: &Topology) -> Vec<usize> {
    let masters = |r: usize| topology.masters(ultraep_plan::Rank::new(r));
    let most = (0..topology.ranks()).map(|r| masters(r).len()).max().unwrap_or(0);
    (0..most).flat_map(|i| (0..topology.ranks()).filter_map(move |r| masters(r).nth(i))).collect()
}
