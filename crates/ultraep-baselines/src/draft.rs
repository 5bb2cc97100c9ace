//! From loose pieces (expert, rank, amount) to a plan in canonical order: master first, replicas by rank, pieces of one
//! expert on one rank merged, physical indices by rank in the order of the experts.

use ultraep_plan::{
    Domain, DomainOutcome, Expert, Instance, PhysicalIndex, Plan, Problem, Rank, SplitRule, StopReason, Topology,
};

/// What the amounts of a [`Draft`] mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Amounts {
    /// Tokens. A master without a piece gets quota 0. The split follows the quotas.
    Quotas(SplitRule),
    /// Copies. Tokens are dealt to them round-robin, which fixes the quotas. An expert without a piece has one copy, at
    /// home; a master without a piece beside other copies has none.
    Copies,
}

/// What the outcome's lower bound may claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bound {
    /// Work stays in its domain: the domain's mean, rounded up, bounds every plan.
    DomainMean,
    /// Work crosses domains: nothing is claimed.
    None,
}

/// How a [`Draft`] becomes a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) amounts: Amounts,
    pub(crate) bound: Bound,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Piece {
    expert: Expert,
    /// False sorts first: the home rank.
    away: bool,
    rank: Rank,
    amount: u32,
}

/// Pieces of a plan under construction, with the workspace to finish it. Reused from solve to solve.
#[derive(Clone, Debug)]
pub(crate) struct Draft {
    pieces: Vec<Piece>,
    /// Next free index behind the masters, per rank.
    next_index: Vec<usize>,
    rank_loads: Vec<u64>,
    quotas: Vec<u32>,
    changes: Vec<i32>,
}

impl Draft {
    /// Room for `pieces` pieces, so that a solve allocates nothing.
    pub(crate) fn with_capacity(topology: &Topology, pieces: usize) -> Self {
        Self {
            pieces: Vec::with_capacity(pieces),
            next_index: Vec::with_capacity(topology.ranks()),
            rank_loads: Vec::with_capacity(topology.ranks()),
            quotas: Vec::with_capacity(topology.ranks()),
            changes: Vec::with_capacity(total_slots(topology) + 2),
        }
    }

    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
    }

    pub(crate) fn push(&mut self, topology: &Topology, expert: Expert, rank: Rank, amount: u32) {
        self.pieces.push(Piece { expert, away: topology.home(expert) != rank, rank, amount });
    }

    /// Leaves the whole load of every expert at home.
    pub(crate) fn push_masters(&mut self, topology: &Topology, totals: &[u32]) {
        for (expert, &total) in totals.iter().enumerate() {
            let expert = Expert::new(expert);
            self.push(topology, expert, topology.home(expert), total);
        }
    }

    /// Writes the plan of a policy that does not search.
    pub(crate) fn finish(&mut self, problem: &Problem<'_>, amounts: Amounts, bound: Bound, plan: &mut Plan) {
        self.finish_with(problem, Shape { amounts, bound }, |_| StopReason::NotASearch, plan);
    }

    /// Writes the plan; `stop` says why the solver of a domain stopped. Complexity: the pieces, sorted, and
    /// for each expert the source ranks where tokens are dealt.
    pub(crate) fn finish_with(
        &mut self,
        problem: &Problem<'_>,
        Shape { amounts, bound }: Shape,
        stop: impl Fn(Domain) -> StopReason,
        plan: &mut Plan,
    ) {
        let topology = problem.topology();
        plan.begin(match amounts {
            Amounts::Quotas(rule) => rule,
            Amounts::Copies => SplitRule::RoundRobin,
        });
        self.merge();
        self.next_index.clear();
        self.next_index.extend((0..topology.ranks()).map(|r| topology.masters(Rank::new(r)).len()));
        self.rank_loads.clear();
        self.rank_loads.resize(topology.ranks(), 0);
        let mut rest = 0;
        for expert in (0..topology.experts()).map(Expert::new) {
            let start = rest;
            while rest < self.pieces.len() && self.pieces[rest].expert == expert {
                rest += 1;
            }
            self.finish_expert(problem, expert, start..rest, amounts, plan);
        }
        for domain in (0..topology.domains()).map(Domain::new) {
            let loads = &self.rank_loads[topology.domain_range(domain)];
            let lower_bound = match bound {
                Bound::DomainMean => loads.iter().sum::<u64>().div_ceil(loads.len() as u64) as u32,
                Bound::None => 0,
            };
            let threshold = loads.iter().copied().max().unwrap_or(0) as u32;
            plan.push_domain(DomainOutcome { threshold, lower_bound, stop: stop(domain) });
        }
    }

    /// Sorts the pieces and joins those of one expert on one rank.
    fn merge(&mut self) {
        self.pieces.sort_unstable();
        self.pieces.dedup_by(|next, kept| {
            let same = (next.expert, next.rank) == (kept.expert, kept.rank);
            if same {
                kept.amount += next.amount;
            }
            same
        });
    }

    fn finish_expert(
        &mut self,
        problem: &Problem<'_>,
        expert: Expert,
        range: core::ops::Range<usize>,
        amounts: Amounts,
        plan: &mut Plan,
    ) {
        let topology = problem.topology();
        let home = topology.home(expert);
        let pieces = &self.pieces[range];
        let (at_home, away) = match pieces.first() {
            Some(first) if !first.away => (first.amount, &pieces[1..]),
            None if amounts == Amounts::Copies => (1, pieces),
            _ => (0, pieces),
        };
        self.quotas.clear();
        self.quotas.push(at_home);
        self.quotas.extend(away.iter().map(|p| p.amount));
        if amounts == Amounts::Copies {
            deal_quotas(problem, expert, &mut self.quotas, &mut self.changes);
        }
        let master = expert.index() - topology.masters(home).start;
        for (k, &quota) in self.quotas.iter().enumerate() {
            let (rank, physical, amount) = if k == 0 {
                (home, master, at_home)
            } else {
                let piece = away[k - 1];
                let index = self.next_index[piece.rank.index()];
                self.next_index[piece.rank.index()] += 1;
                (piece.rank, index, piece.amount)
            };
            self.rank_loads[rank.index()] += u64::from(quota);
            let instance = Instance { rank, physical: PhysicalIndex::new(physical), quota };
            match amounts {
                Amounts::Quotas(_) => plan.push_instance(instance),
                Amounts::Copies => plan.push_copies(instance, amount as u16),
            }
        }
        plan.end_expert();
    }
}

/// Turns the copies of each instance into the tokens that dealing brings it ([`ultraep_plan::dealt`] over all sources).
///
/// A source gives every copy its whole rounds, and one token more to the copies from `source mod all` on that its last
/// round reaches. `changes[c]` is how many more sources' last rounds reach copy `c` than the copy before. `O(N + copies)`.
fn deal_quotas(problem: &Problem<'_>, expert: Expert, copies: &mut [u32], changes: &mut Vec<i32>) {
    let all: u32 = copies.iter().sum();
    changes.clear();
    changes.resize(all as usize + 1, 0);
    let mut rounds = 0;
    for source in 0..problem.topology().ranks() {
        let tokens = problem.row(source)[expert.index()];
        rounds += tokens / all;
        let start = source % all as usize;
        let end = start + (tokens % all) as usize;
        changes[start] += 1;
        if end <= all as usize {
            changes[end] -= 1;
        } else {
            changes[0] += 1;
            changes[end - all as usize] -= 1;
        }
    }
    let mut reached = 0;
    let mut next = changes.iter();
    for slot in copies {
        let of_copy = |change: &i32| {
            reached += change;
            rounds + reached.unsigned_abs()
        };
        *slot = next.by_ref().take(*slot as usize).map(of_copy).sum();
    }
}

/// Slots of all ranks.
pub(crate) fn total_slots(topology: &Topology) -> usize {
    (0..topology.ranks()).map(|r| topology.slots(Rank::new(r))).sum()
}
