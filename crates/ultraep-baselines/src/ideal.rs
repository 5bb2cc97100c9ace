//! The force-balanced bound: what a layer would cost if routing itself were perfectly balanced.
//!
//! Source: the paper's "ideal" rows. Routing is changed, not placement: every source rank deals its tokens to the experts
//! round-robin, and each rank starts at another place. Were all ranks to walk the experts in the same order from the
//! same start, they would all send to the same rank at the same time, and the bound would be none.
//!
//! ```text
//! N divides E:      choice(rank r, token j, k) = (r E / N + j top_k + k) mod E
//! it does not:      at p = r + j top_k + k:  rank p mod N, its master number floor(p / N) mod M of that rank
//! ranks' speeds differ (counts only): every rank gets its share of the speeds, its masters the same up to 1
//! ```
//!
//! What is even is ranks, as their load is what a layer waits for; experts are too where all ranks have as many. Why it is
//! balanced when all sources have the same number of tokens: a source's whole rounds are even, and its last partial round is a
//! window that starts at another place for each rank, so every rank lies in equally many windows. A token's experts are
//! distinct for `top_k <= N floor(E / N)`: on each rank they are consecutive masters. Beyond that a token must take more from
//! ranks with more masters, and no routing is even; tokens then walk the experts in order.

use ultraep_plan::{Expert, FULL_SPEED, Rank, Topology};

/// The `k_index`-th expert of token `token` of source rank `rank`, when each token chooses `top_k` experts.
///
/// `rank` is taken modulo `N`. Distinct for the `top_k` indices of one token while `top_k <= E`.
pub fn balanced_choice(rank: usize, token: usize, k_index: usize, topology: &Topology, top_k: usize) -> Expert {
    let (ranks, experts) = (topology.ranks(), topology.experts());
    let rank = rank % ranks;
    if experts.is_multiple_of(ranks) || top_k > experts / ranks * ranks {
        let dealt = (token % experts) * (top_k % experts) + k_index;
        return Expert::new((rank * experts / ranks + dealt) % experts);
    }
    let place = rank + token * top_k + k_index;
    let masters = topology.masters(Rank::new(place % ranks));
    Expert::new(masters.start + place / ranks % masters.len())
}

/// The counts `[N, E]`, row-major, of [`balanced_choice`] when source rank `r` makes `row_sums[r]` choices (tokens times
/// top-k). A rank without an entry makes none.
///
/// With equal row sums and speeds these are exactly the choices of [`balanced_choice`] (for `top_k <= N floor(E / N)`). With
/// ragged ones the same walk would not be even, so each source goes on where the one before stopped: every rank gets the same
/// up to 1, or its share of the speeds up to 1 where ranks' speeds differ (weight 0 counts at full speed, as for the planner).
pub fn balanced_counts(topology: &Topology, row_sums: &[u32]) -> Vec<u32> {
    let (ranks, experts) = (topology.ranks(), topology.experts());
    if topology.speeds().iter().any(|&speed| weight(speed) != weight(topology.speeds()[0])) {
        return counts_at_speeds(topology, row_sums);
    }
    let equal = row_sums.len() >= ranks && row_sums[..ranks].windows(2).all(|w| w[0] == w[1]);
    let mut counts = vec![0; ranks * experts];
    let mut next = 0;
    for (rank, (row, &sum)) in counts.chunks_mut(experts).zip(row_sums).enumerate() {
        if experts.is_multiple_of(ranks) && equal {
            deal_to_experts(row, rank * experts / ranks, sum);
        } else {
            let first = if equal { rank } else { next };
            deal_to_ranks(row, topology, first, sum);
            next = (first + sum as usize) % (ranks * rounds(topology));
        }
    }
    counts
}

/// Rounds over the ranks after which the walk over their masters starts over.
fn rounds(topology: &Topology) -> usize {
    let each = topology.experts() / topology.ranks();
    // Ranks have `each` masters or one more.
    if topology.experts().is_multiple_of(topology.ranks()) { each } else { each * (each + 1) }
}

/// Walks the experts in order from `first`.
fn deal_to_experts(row: &mut [u32], first: usize, sum: u32) {
    let experts = row.len();
    let (whole, rest) = (sum / experts as u32, sum as usize % experts);
    row.fill(whole);
    (first..first + rest).for_each(|place| row[place % experts] += 1);
}

/// Walks the ranks in order, each rank's masters in turn, from place `first`.
fn deal_to_ranks(row: &mut [u32], topology: &Topology, first: usize, sum: u32) {
    let (ranks, sum) = (topology.ranks(), sum as usize);
    for rank in 0..ranks {
        // Places `p` of this rank in `first..first + sum` are `rank + N q` for consecutive rounds q.
        let before = |end: usize| (end + ranks - 1 - rank) / ranks;
        let (from, until) = (before(first), before(first + sum));
        let masters = topology.masters(Rank::new(rank));
        let (whole, rest) = ((until - from) / masters.len(), (until - from) % masters.len());
        for (index, count) in row[masters.clone()].iter_mut().enumerate() {
            let late = (index + masters.len() - from % masters.len()) % masters.len();
            *count = whole as u32 + u32::from(late < rest);
        }
    }
}

/// Weight 0 keeps its masters' load at full speed.
fn weight(speed: u32) -> u64 {
    u64::from(if speed == 0 { FULL_SPEED } else { speed })
}

/// Every source's choices shared over the ranks by speed. All choices stand in one line, by source; what the line up to place
/// `x` gives to the ranks up to `r` is rounded from the last rank down, so that no share is negative and the sums of sources
/// and of ranks are exact (as in the planner's split):
///
/// ```text
/// y[last](x) = x        y[r-1](x) = floor(y[r](x) W[r-1] / W[r])        W[r] = sum of the speeds of ranks 0..=r
/// ```
fn counts_at_speeds(topology: &Topology, row_sums: &[u32]) -> Vec<u32> {
    let (ranks, experts) = (topology.ranks(), topology.experts());
    let weights: Vec<u64> = topology.speeds().iter().map(|&speed| weight(speed)).collect();
    let mut counts = vec![0; ranks * experts];
    let (mut line, mut turn) = (0_u64, vec![0_usize; ranks]);
    for (row, &sum) in counts.chunks_mut(experts).zip(row_sums) {
        let (mut from, mut until) = (line, line + u64::from(sum));
        line = until;
        let mut below: u64 = weights.iter().sum();
        for rank in (0..ranks).rev() {
            let all = below;
            below -= weights[rank];
            let share = |upto: u64| (u128::from(upto) * u128::from(below) / u128::from(all)) as u64;
            let (lower_from, lower_until) = (share(from), share(until));
            let mine = (until - lower_until) - (from - lower_from);
            (from, until) = (lower_from, lower_until);
            let masters = topology.masters(Rank::new(rank));
            let (whole, rest) = (mine / masters.len() as u64, (mine % masters.len() as u64) as usize);
            for (index, count) in row[masters.clone()].iter_mut().enumerate() {
                let late = (index + masters.len() - turn[rank]) % masters.len();
                *count = whole as u32 + u32::from(late < rest);
            }
            turn[rank] = (turn[rank] + rest) % masters.len();
        }
    }
    counts
}
