//! The checker: whether a plan keeps every rule, and what it achieves. Shares types with the planners, no code.
//!
//! Runs in tests, fuzzing, the command line and the runtime's checked mode; it allocates and takes its time:
//! `O(E + instances + N * R)`, plus one pass over the counts and, for the remote tokens, `O(N * instances)`.

use alloc::vec;
use alloc::vec::Vec;

use crate::{
    Domain, Expert, FULL_SPEED, Plan, PlanRules, Problem, Rank, SlotRule, SplitError, SplitRule, SplitWorkspace,
    Topology, split_source,
};

/// What a plan achieves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanReport {
    /// Tokens on each rank with masters only, `[N]`.
    pub rank_load_before: Vec<u32>,
    /// Tokens on each rank under the quotas, `[N]`.
    pub rank_load_after: Vec<u32>,
    /// Replicas in all.
    pub replicas: usize,
    /// Largest `|H(e)| - 1`.
    pub max_fanout: usize,
    /// Most expert copies that one rank has to send: the sum of `|H(e)| - 1` over its masters.
    pub max_sends: usize,
    /// Most instances other than masters at home that one rank has to hold.
    pub max_copies: usize,
    /// Tokens processed away from their source rank, under the plan's split.
    pub remote_tokens: u64,
    /// Tokens in all.
    pub total_tokens: u64,
}

impl PlanReport {
    /// Largest rank load times `N`, and the total: their quotient is the imbalance before balancing.
    pub fn imbalance_before(&self) -> (u64, u64) {
        imbalance(&self.rank_load_before)
    }

    /// Largest rank load times `N`, and the total: their quotient is the imbalance after balancing.
    pub fn imbalance_after(&self) -> (u64, u64) {
        imbalance(&self.rank_load_after)
    }
}

/// Max over mean as `(numerator, denominator)`; 1/1 when there are no tokens.
fn imbalance(loads: &[u32]) -> (u64, u64) {
    let total = loads.iter().map(|&l| u64::from(l)).sum();
    let max = u64::from(loads.iter().copied().max().unwrap_or(0));
    if total == 0 { (1, 1) } else { (max * loads.len() as u64, total) }
}

/// A rule that a plan breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanViolation {
    /// Not one list of instances for each expert.
    #[error("instances for {got} experts; the problem has {expected}")]
    Experts {
        /// Experts of the plan.
        got: usize,
        /// Experts of the problem.
        expected: usize,
    },
    /// Not one outcome for each domain.
    #[error("outcomes for {got} domains; the group has {expected}")]
    Domains {
        /// Outcomes of the plan.
        got: usize,
        /// Domains of the group.
        expected: usize,
    },
    /// An expert without instances, or whose first instance is not its master.
    #[error("expert {expert}: its first instance is not the master on rank {home}")]
    MasterFirst {
        /// The expert.
        expert: Expert,
        /// Its home.
        home: Rank,
    },
    /// An instance on a rank that the group does not have.
    #[error("expert {expert}: an instance on rank {rank} of {ranks}")]
    NoSuchRank {
        /// The expert.
        expert: Expert,
        /// The rank named.
        rank: Rank,
        /// `N`.
        ranks: usize,
    },
    /// Two instances of one expert on one rank.
    #[error("expert {expert}: two instances on rank {rank}")]
    Twice {
        /// The expert.
        expert: Expert,
        /// The rank.
        rank: Rank,
    },
    /// A replica outside its master's domain.
    #[error("expert {expert}: a replica on rank {rank} (domain {got}) leaves its master's domain {expected}")]
    Domain {
        /// The expert.
        expert: Expert,
        /// The replica's rank.
        rank: Rank,
        /// The replica's domain.
        got: Domain,
        /// The master's domain.
        expected: Domain,
    },
    /// A replica with a physical index that is a master's, beyond the rank's slots, or taken.
    #[error("rank {rank}: physical index {physical} of expert {expert}'s replica is a master's, out of range or taken")]
    Physical {
        /// The expert.
        expert: Expert,
        /// The rank.
        rank: Rank,
        /// The physical index.
        physical: usize,
    },
    /// More on a rank than it has room for.
    #[error("rank {rank} holds {got} {what}; it has room for {expected}")]
    Room {
        /// The rank.
        rank: Rank,
        /// What is counted.
        what: &'static str,
        /// How many there are.
        got: usize,
        /// How many are allowed.
        expected: usize,
    },
    /// A replica with less than the least quota.
    #[error("expert {expert}: the replica on rank {rank} has {got} tokens; at least {expected} are required")]
    MinQuota {
        /// The expert.
        expert: Expert,
        /// The replica's rank.
        rank: Rank,
        /// Its quota.
        got: u32,
        /// `u_min`.
        expected: u32,
    },
    /// An expert's quotas do not add up to its load.
    #[error("expert {expert}: quotas add up to {got}, its load is {expected}")]
    Quotas {
        /// The expert.
        expert: Expert,
        /// Sum of its quotas.
        got: u64,
        /// Its load.
        expected: u64,
    },
    /// A rank's load exceeds its domain's threshold.
    #[error("rank {rank} has a load of {got} under the quotas; its domain's threshold is {expected}")]
    Threshold {
        /// The rank.
        rank: Rank,
        /// Its load, at its speed.
        got: u64,
        /// The threshold.
        expected: u32,
    },
    /// A plan below what its solver calls a lower bound.
    #[error("domain {domain}: the plan reaches {got}, below the lower bound {bound} that comes with it")]
    Bound {
        /// The domain.
        domain: Domain,
        /// Largest rank load under the quotas, at the rank's speed.
        got: u64,
        /// The bound claimed.
        bound: u32,
    },
    /// The split could not be made.
    #[error("split: {0}")]
    Split(SplitError),
    /// A split whose shares of one source and expert do not add up to the count.
    #[error("split of source {source_rank}, expert {expert}: shares add up to {got}, the count is {expected}")]
    SourceSum {
        /// The source rank.
        source_rank: Rank,
        /// The expert.
        expert: Expert,
        /// Sum of the shares.
        got: u64,
        /// The count.
        expected: u32,
    },
    /// An exact split whose shares of one instance do not add up to its quota.
    #[error("split of expert {expert} on rank {rank}: shares add up to {got}, the quota is {expected}")]
    InstanceSum {
        /// The expert.
        expert: Expert,
        /// The instance's rank.
        rank: Rank,
        /// Sum of the shares.
        got: u64,
        /// Its quota.
        expected: u32,
    },
    /// A local-first split that sends tokens away while the source's own instance has quota left.
    #[error("split of source {source_rank}, expert {expert}: {got} tokens stay at home where {expected} could")]
    LocalFirst {
        /// The source rank.
        source_rank: Rank,
        /// The expert.
        expert: Expert,
        /// Tokens given to the own instance.
        got: u32,
        /// Tokens it can take.
        expected: u32,
    },
}

/// What a split achieves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SplitReport {
    /// Most tokens by which an instance's realised load differs from its quota (0 under the exact rule).
    pub largest_miss: u64,
    /// Tokens processed away from their source rank.
    pub remote_tokens: u64,
}

/// Checks `plan` against every rule of the system for `problem`, and reports what it achieves.
///
/// Masters first and where they belong; instances of an expert on distinct ranks; replicas in their domain, with at least
/// `rules.min_quota` tokens, in distinct physical places that exist; room on every rank; quotas that add up to the exact
/// load; rank loads within the thresholds, thresholds not below the claimed bounds.
pub fn check_plan(problem: &Problem<'_>, plan: &Plan, rules: &PlanRules) -> Result<PlanReport, PlanViolation> {
    let topology = problem.topology();
    if plan.experts() != topology.experts() {
        return Err(PlanViolation::Experts { got: plan.experts(), expected: topology.experts() });
    }
    if plan.domains().len() != topology.domains() {
        return Err(PlanViolation::Domains { got: plan.domains().len(), expected: topology.domains() });
    }
    let mut loads = vec![0u64; topology.experts()];
    for source in 0..topology.ranks() {
        loads.iter_mut().zip(problem.row(source)).for_each(|(load, &count)| *load += u64::from(count));
    }
    for (expert, load) in loads.into_iter().enumerate().map(|(e, load)| (Expert::new(e), load)) {
        check_instances(topology, plan, rules, expert)?;
        let quotas: u64 = plan.of(expert).iter().map(|i| u64::from(i.quota)).sum();
        if quotas != load {
            return Err(PlanViolation::Quotas { expert, got: quotas, expected: load });
        }
    }
    check_room(topology, plan, rules)?;
    let report = report(problem, plan)?;
    check_thresholds(topology, plan, rules, &report.rank_load_after)?;
    Ok(report)
}

fn check_instances(topology: &Topology, plan: &Plan, rules: &PlanRules, expert: Expert) -> Result<(), PlanViolation> {
    let home = topology.home(expert);
    let instances = plan.of(expert);
    let index = expert.index() - topology.masters(home).start;
    match instances.first() {
        Some(master) if master.rank == home && master.physical.index() == index => {}
        _ => return Err(PlanViolation::MasterFirst { expert, home }),
    }
    for (at, replica) in instances.iter().enumerate().skip(1) {
        let rank = replica.rank;
        if rank.index() >= topology.ranks() {
            return Err(PlanViolation::NoSuchRank { expert, rank, ranks: topology.ranks() });
        }
        if instances[..at].iter().any(|earlier| earlier.rank == rank) {
            return Err(PlanViolation::Twice { expert, rank });
        }
        let (got, expected) = (topology.domain_of(rank), topology.domain_of(home));
        if rules.within_domain && got != expected {
            return Err(PlanViolation::Domain { expert, rank, got, expected });
        }
        let expected = if rules.empty_replicas && replica.quota == 0 { 0 } else { rules.min_quota };
        if replica.quota < expected {
            return Err(PlanViolation::MinQuota { expert, rank, got: replica.quota, expected });
        }
    }
    Ok(())
}

fn check_room(topology: &Topology, plan: &Plan, rules: &PlanRules) -> Result<(), PlanViolation> {
    let mut taken: Vec<Vec<usize>> = vec![Vec::new(); topology.ranks()];
    let mut working_masters = vec![0; topology.ranks()];
    for expert in (0..topology.experts()).map(Expert::new) {
        let (master, replicas) = plan.of(expert).split_first().expect("checked: a master first");
        working_masters[master.rank.index()] += usize::from(master.quota > 0);
        for replica in replicas {
            let (rank, physical) = (replica.rank, replica.physical.index());
            let slots = topology.masters(rank).len()..topology.physical_experts(rank);
            let in_range = physical >= slots.start && (rules.slots != SlotRule::Replicas || physical < slots.end);
            let taken = &mut taken[rank.index()];
            if !in_range || taken.contains(&physical) {
                return Err(PlanViolation::Physical { expert, rank, physical });
            }
            taken.push(physical);
        }
    }
    for rank in (0..topology.ranks()).map(Rank::new) {
        let replicas = taken[rank.index()].len();
        let (what, got, expected) = match rules.slots {
            SlotRule::Replicas => ("replicas", replicas, topology.replica_slots(rank)),
            SlotRule::Physical => {
                ("working instances", replicas + working_masters[rank.index()], topology.physical_experts(rank))
            }
            SlotRule::Unlimited => continue,
        };
        if got > expected {
            return Err(PlanViolation::Room { rank, what, got, expected });
        }
    }
    Ok(())
}

fn check_thresholds(
    topology: &Topology,
    plan: &Plan,
    rules: &PlanRules,
    rank_loads: &[u32],
) -> Result<(), PlanViolation> {
    for (domain, outcome) in plan.domains().iter().enumerate().map(|(d, o)| (Domain::new(d), o)) {
        let mut largest = 0;
        for rank in topology.domain_range(domain).map(Rank::new) {
            let speed = match topology.speed(rank) {
                speed if rules.speeds && speed > 0 => speed,
                _ => FULL_SPEED,
            };
            let weighed = (u64::from(rank_loads[rank.index()]) * u64::from(FULL_SPEED)).div_ceil(u64::from(speed));
            // Thresholds are 32 bits wide; beyond, all are as bad.
            let got = weighed.min(u64::from(u32::MAX));
            if got > u64::from(outcome.threshold) {
                return Err(PlanViolation::Threshold { rank, got, expected: outcome.threshold });
            }
            largest = largest.max(got);
        }
        if rules.within_domain && largest < u64::from(outcome.lower_bound) {
            return Err(PlanViolation::Bound { domain, got: largest, bound: outcome.lower_bound });
        }
    }
    Ok(())
}

fn report(problem: &Problem<'_>, plan: &Plan) -> Result<PlanReport, PlanViolation> {
    let topology = problem.topology();
    let mut rank_load_before = vec![0; topology.ranks()];
    let mut rank_load_after = vec![0; topology.ranks()];
    let mut sends = vec![0; topology.ranks()];
    let mut copies = vec![0; topology.ranks()];
    let mut max_fanout = 0;
    for expert in (0..topology.experts()).map(Expert::new) {
        let instances = plan.of(expert);
        let home = topology.home(expert).index();
        sends[home] += instances.len() - 1;
        max_fanout = max_fanout.max(instances.len() - 1);
        for instance in instances {
            rank_load_before[home] += instance.quota;
            rank_load_after[instance.rank.index()] += instance.quota;
        }
        instances[1..].iter().for_each(|i| copies[i.rank.index()] += 1);
    }
    Ok(PlanReport {
        rank_load_before,
        rank_load_after,
        replicas: plan.replicas(),
        max_fanout,
        max_sends: sends.into_iter().max().unwrap_or(0),
        max_copies: copies.into_iter().max().unwrap_or(0),
        remote_tokens: remote_tokens(problem, plan)?,
        total_tokens: u64::from(problem.total()),
    })
}

/// Local-first rules keep all that the own instance can take; for the others the split itself says.
fn remote_tokens(problem: &Problem<'_>, plan: &Plan) -> Result<u64, PlanViolation> {
    let mut local = 0;
    match plan.split_rule() {
        SplitRule::LocalFirstExact | SplitRule::SourceRounded { locality: true } => {
            for expert in (0..plan.experts()).map(Expert::new) {
                let own = plan.of(expert).iter().map(|i| i.quota.min(problem.row(i.rank.index())[expert.index()]));
                local += own.map(u64::from).sum::<u64>();
            }
        }
        _ => {
            let mut workspace = SplitWorkspace::new(problem.topology());
            let mut shares = vec![0; plan.instances().len()];
            for source in (0..problem.topology().ranks()).map(Rank::new) {
                split_source(problem, plan, source, &mut workspace, &mut shares).map_err(PlanViolation::Split)?;
                let own = plan.instances().iter().zip(&shares).filter(|(i, _)| i.rank == source);
                local += own.map(|(_, &s)| u64::from(s)).sum::<u64>();
            }
        }
    }
    Ok(u64::from(problem.total()) - local)
}

/// Checks a split of all sources, `[N, instances]` row-major, of a plan that [`check_plan`] has accepted.
///
/// Per source under every rule; per instance under the exact ones, and local first under [`SplitRule::LocalFirstExact`]. The report says by
/// how much other rules miss the quotas.
pub fn check_split(problem: &Problem<'_>, plan: &Plan, split: &[u32]) -> Result<SplitReport, PlanViolation> {
    let (topology, width) = (problem.topology(), plan.instances().len());
    if split.len() != topology.ranks() * width {
        let (got, expected) = (split.len(), topology.ranks() * width);
        return Err(PlanViolation::Split(SplitError::Room { got, expected }));
    }
    let local_first = plan.split_rule() == SplitRule::LocalFirstExact;
    let exact = local_first || plan.split_rule() == SplitRule::ProportionalExact;
    let mut realised = vec![0u64; width];
    let mut report = SplitReport::default();
    for source in (0..topology.ranks()).map(Rank::new) {
        let shares = &split[source.index() * width..(source.index() + 1) * width];
        for expert in (0..plan.experts()).map(Expert::new) {
            let of_expert = &shares[plan.range(expert)];
            let expected = problem.row(source.index())[expert.index()];
            let got = of_expert.iter().map(|&s| u64::from(s)).sum();
            if got != u64::from(expected) {
                return Err(PlanViolation::SourceSum { source_rank: source, expert, got, expected });
            }
            for (instance, &got) in plan.of(expert).iter().zip(of_expert) {
                let at_home = instance.rank == source;
                if local_first && at_home && got != expected.min(instance.quota) {
                    let expected = expected.min(instance.quota);
                    return Err(PlanViolation::LocalFirst { source_rank: source, expert, got, expected });
                }
                report.remote_tokens += if at_home { 0 } else { u64::from(got) };
            }
        }
        realised.iter_mut().zip(shares).for_each(|(sum, &s)| *sum += u64::from(s));
    }
    for expert in (0..plan.experts()).map(Expert::new) {
        for (instance, &got) in plan.of(expert).iter().zip(&realised[plan.range(expert)]) {
            if exact && got != u64::from(instance.quota) {
                let (rank, expected) = (instance.rank, instance.quota);
                return Err(PlanViolation::InstanceSum { expert, rank, got, expected });
            }
            report.largest_miss = report.largest_miss.max(got.abs_diff(u64::from(instance.quota)));
        }
    }
    Ok(report)
}
