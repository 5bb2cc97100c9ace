//! The split: how the tokens of each source rank for an expert are shared over its instances.
//!
//! # The exact rule ([`SplitRule::LocalFirstExact`])
//!
//! Source `r` first uses the quota of its own instance: `a[r] = min(lambda[r,e], u[e,r])` tokens stay at home (0 without
//! an instance). What is left, residuals `rho[r] = lambda[r,e] - a[r]` on the sources' side and `c[t] = u[e,t] - a[t]` on
//! the instances' side, has the same sum `T` on both. Put all residual tokens in one line, by source; token number `x`
//! of the line is shared out by *nested rounding*: with `C[t] = c[1] + .. + c[t]`,
//!
//! ```text
//! y[last](x) = x,   y[t-1](x) = floor(y[t](x) * C[t-1] / C[t])        (0 where C[t] = 0)
//! q[r,e,t]   = (y[t] - y[t-1])(x + rho[r]) - (y[t] - y[t-1])(x),      x = rho[0] + .. + rho[r-1]
//! ```
//!
//! *No share is negative*: `y - floor(y * a / b)` does not decrease in `y` when `a <= b`, because the floor grows by at most
//! 1 when `y` does; and `y[t](x)` does not decrease in `x`. *Sum over instances*: the differences telescope to
//! `y[last](x + rho) - y[last](x) = rho[r]`. *Sum over sources*: they telescope to `(y[t] - y[t-1])(T)`, and
//! `y[t](T) = C[t]` for all `t` (by induction: `floor(C[t] * C[t-1] / C[t]) = C[t-1]`), which gives `c[t]`. *Local first*: where
//! `rho[r] > 0`, `c[r] = 0`, so the own instance gets nothing twice. *Locality of work*: a source needs only its own row, the
//! column prefix up to its row, and one count for each instance's host.
//!
//! [`SplitRule::ProportionalExact`] is the same with nothing kept at home: `a[r] = 0` for all `r`.
//!
//! Deviation from the paper (section on quota-aware reroute) and from v1.0.0: those round each source alone, so realised
//! loads miss quotas by some tokens.
//!
//! Cost for one source: `O(E + instances)` beside the column prefix ([`Problem::tallied`] has it at no extra pass).

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use crate::{Expert, Instance, Plan, Problem, Rank, SplitRule, Topology, Turns, dealt};

/// Why a split was not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SplitError {
    /// The output has the wrong length.
    #[error("room for {got} shares: this plan needs {expected}")]
    Room {
        /// Length of the output.
        got: usize,
        /// Shares of the plan.
        expected: usize,
    },
    /// Plan and problem have different experts.
    #[error("a plan of {plan} experts for a problem of {problem}")]
    Experts {
        /// Experts of the plan.
        plan: usize,
        /// Experts of the problem.
        problem: usize,
    },
    /// The source is no rank of the group.
    #[error("source rank {source_rank} of a group of {ranks} ranks")]
    Source {
        /// Asked for.
        source_rank: Rank,
        /// `N`.
        ranks: usize,
    },
}

/// Memory for splitting; sized by a topology, reused.
#[derive(Clone, Debug, Default)]
pub struct SplitWorkspace {
    before: Vec<u32>,
}

impl SplitWorkspace {
    /// Room for the experts of `topology`.
    pub fn new(topology: &Topology) -> Self {
        Self { before: vec![0; topology.experts()] }
    }
}

/// Shares of one source: `out[i]` tokens of `source` go to instance `i` of [`Plan::instances`].
///
/// The sum over an expert's instances is exactly `lambda[source, e]`, under every rule.
pub fn split_source(
    problem: &Problem<'_>,
    plan: &Plan,
    source: Rank,
    workspace: &mut SplitWorkspace,
    out: &mut [u32],
) -> Result<(), SplitError> {
    check(problem, plan, source, plan.instances().len(), out.len())?;
    let row = problem.row(source.index());
    match plan.split_rule() {
        SplitRule::LocalFirstExact | SplitRule::ProportionalExact => {
            workspace.before.resize(row.len(), 0);
            problem.tokens_before(source, &mut workspace.before);
            exact(problem, plan, source, &workspace.before, out);
        }
        SplitRule::SourceRounded { locality } => {
            for_replicated(plan, row, out, |expert, tokens, instances, shares| {
                source_rounded(&Column { problem, expert }, source, tokens, instances, locality, shares);
            });
        }
        SplitRule::RoundRobin => for_replicated(plan, row, out, |expert, tokens, _, shares| {
            round_robin(source, tokens, plan, plan.range(Expert::new(expert)), shares);
        }),
    }
    Ok(())
}

/// Shares of all sources, `[N, instances]` row-major; row `r` is what [`split_source`] gives for rank `r`.
pub fn split_all(
    problem: &Problem<'_>,
    plan: &Plan,
    workspace: &mut SplitWorkspace,
    out: &mut [u32],
) -> Result<(), SplitError> {
    let (ranks, width) = (problem.topology().ranks(), plan.instances().len());
    check(problem, plan, Rank::new(0), ranks * width, out.len())?;
    workspace.before.clear();
    workspace.before.resize(problem.topology().experts(), 0);
    for (source, shares) in out.chunks_exact_mut(width).enumerate() {
        if matches!(plan.split_rule(), SplitRule::LocalFirstExact | SplitRule::ProportionalExact) {
            exact(problem, plan, Rank::new(source), &workspace.before, shares);
            workspace.before.iter_mut().zip(problem.row(source)).for_each(|(b, &c)| *b += c);
        } else {
            split_source(problem, plan, Rank::new(source), &mut SplitWorkspace::default(), shares)?;
        }
    }
    Ok(())
}

fn check(problem: &Problem<'_>, plan: &Plan, source: Rank, expected: usize, got: usize) -> Result<(), SplitError> {
    let topology = problem.topology();
    if plan.experts() != topology.experts() {
        return Err(SplitError::Experts { plan: plan.experts(), problem: topology.experts() });
    }
    if source.index() >= topology.ranks() {
        return Err(SplitError::Source { source_rank: source, ranks: topology.ranks() });
    }
    if got == expected { Ok(()) } else { Err(SplitError::Room { got, expected }) }
}

/// Counts of one expert, by source.
struct Column<'a> {
    problem: &'a Problem<'a>,
    expert: usize,
}

impl Column<'_> {
    #[inline]
    fn at(&self, rank: Rank) -> u32 {
        self.problem.counts()[rank.index() * self.problem.topology().experts() + self.expert]
    }
}

/// Gives experts without replicas to their master and calls `share` for the others.
#[inline]
fn for_replicated(
    plan: &Plan,
    row: &[u32],
    out: &mut [u32],
    mut share: impl FnMut(usize, u32, &[Instance], &mut [u32]),
) {
    let mut start = 0;
    for (expert, (&tokens, &end)) in row.iter().zip(plan.ends()).enumerate() {
        let end = end as usize;
        if end - start == 1 {
            out[start] = tokens;
        } else if tokens == 0 {
            out[start..end].fill(0);
        } else {
            share(expert, tokens, &plan.instances()[start..end], &mut out[start..end]);
        }
        start = end;
    }
}

fn exact(problem: &Problem<'_>, plan: &Plan, source: Rank, before: &[u32], out: &mut [u32]) {
    let local_first = plan.split_rule() == SplitRule::LocalFirstExact;
    for_replicated(plan, problem.row(source.index()), out, |expert, tokens, instances, shares| {
        let column = Column { problem, expert };
        let (mut x, mut residual, mut cumulative) = (before[expert], tokens, 0);
        for (instance, share) in instances.iter().zip(shares.iter_mut()) {
            let home = if local_first { column.at(instance.rank).min(instance.quota) } else { 0 };
            if instance.rank < source {
                x = x.saturating_sub(home);
            } else if instance.rank == source {
                residual = residual.saturating_sub(home);
            }
            cumulative += u64::from(instance.quota - home);
            *share = instance.quota - home;
        }
        nested_rounding(u64::from(x), u64::from(residual), cumulative, shares);
        if let Some(own) = instances.iter().position(|i| i.rank == source) {
            shares[own] += tokens - residual;
        }
    });
}

/// Replaces what is left of each instance by its share of the residual tokens `x..x + residual`.
#[inline]
fn nested_rounding(x: u64, residual: u64, total: u64, shares: &mut [u32]) {
    if residual == 0 {
        shares.fill(0);
        return;
    }
    let (mut low, mut high, mut cumulative) = (x, x + residual, total);
    for share in shares.iter_mut().rev() {
        let next = cumulative - u64::from(*share);
        if next == cumulative {
            continue;
        }
        // `y * C[t-1]` stays below 2^62: both are at most MAX_TOKENS.
        let (next_low, next_high) = (low * next / cumulative, high * next / cumulative);
        *share = ((high - next_high) - (low - next_low)) as u32;
        (low, high, cumulative) = (next_low, next_high, next);
    }
}

/// As released: rounded for each source alone. `planner-v1`: largest remainders get one token more, ties to the lower
/// host rank, then the earlier instance.
fn source_rounded(
    column: &Column<'_>,
    source: Rank,
    tokens: u32,
    instances: &[Instance],
    locality: bool,
    shares: &mut [u32],
) {
    let absorbed = |i: &Instance| if locality { column.at(i.rank).min(i.quota) } else { 0 };
    let own = instances.iter().position(|i| i.rank == source);
    let at_home = own.map_or(0, |own| absorbed(&instances[own]));
    let rest = u64::from(tokens - at_home);
    let capacity = |i: &Instance| u64::from(i.quota - absorbed(i));
    let total: u64 = instances.iter().map(capacity).sum();
    let takes_part = |t: usize| !(locality && own == Some(t));
    shares.fill(0);
    let mut left = rest;
    if let Some(scale) = (rest > 0).then_some(total).filter(|&t| t > 0) {
        for (t, instance) in instances.iter().enumerate().filter(|&(t, _)| takes_part(t)) {
            shares[t] = (rest * capacity(instance) / scale) as u32;
            left -= u64::from(shares[t]);
        }
        // Larger remainder first, then lower rank, then earlier instance: an increasing key.
        let key = |t: usize| {
            let host = if locality { instances[t].rank.index() } else { 0 };
            (core::cmp::Reverse(rest * capacity(&instances[t]) % scale), host, t)
        };
        let mut last = None;
        while left > 0 {
            let later = (0..instances.len()).filter(|&t| takes_part(t) && last.is_none_or(|l| key(t) > l));
            let Some(next) = later.min_by_key(|&t| key(t)) else { break };
            shares[next] += 1;
            left -= 1;
            last = Some(key(next));
        }
    }
    if let Some(own) = own {
        shares[own] += at_home;
    }
    // Only a plan whose quotas miss the load leaves tokens here; they stay with the master so that none is lost.
    shares[0] += left as u32;
}

/// Tokens to the copies in turn, starting at copy `source mod copies`; instance `i` of the plan stands for
/// [`Plan::copies`] of them.
fn round_robin(source: Rank, tokens: u32, plan: &Plan, instances: Range<usize>, shares: &mut [u32]) {
    let all = instances.clone().map(|i| plan.copies(i)).sum();
    let mut first = 0;
    for (i, share) in instances.zip(shares) {
        let mine = plan.copies(i);
        *share = if all == 0 { 0 } else { dealt(tokens, source.index(), Turns { all, first, mine }) };
        first += mine;
    }
}
