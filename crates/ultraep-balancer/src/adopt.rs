//! A placement that someone else made, as a plan: quotas for given replicas.
//!
//! Problem: instances are given, tokens of an expert may be shared among its instances in any way; the largest rank load is to be
//! least. It is a flow problem. We start from even shares and move tokens along shortest chains of experts from the fullest
//! rank to one that has at least two tokens less, until there is no such chain; then no sharing is better (a chain exists
//! whenever one is: the difference of two sharings is a sum of chains). With even shares nothing is moved.
//!
//! Cost: a breadth-first search of `O(instances)` for each chain, and at most a few chains a rank and domain, as each moves as many
//! tokens as it can. Not meant for the critical path.

use ultraep_plan::{Expert, Instance, PhysicalIndex, Plan, Problem, Rank, SplitRule, Topology};

/// How the tokens of an expert are shared among its instances.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Quotas {
    /// So that the fullest rank has as few tokens as these instances allow.
    #[default]
    Balanced,
    /// Evenly, as engines without quotas do; the first instances get what is left over.
    Even,
}

/// The plan of a placement `[N, physical_per_rank]`: the expert at each physical id, -1 for none.
///
/// # Errors
/// One line: masters that are not where the topology has them, an expert that does not exist or is twice on a rank, a replica
/// outside of its domain.
pub(crate) fn plan_of(
    problem: &Problem<'_>,
    placement: &[i32],
    physical_per_rank: usize,
    quotas: Quotas,
    plan: &mut Plan,
) -> Result<(), String> {
    let topology = problem.topology();
    let (ranks, experts) = (topology.ranks(), topology.experts());
    if placement.len() != ranks * physical_per_rank {
        return Err(format!("{} entries, expected {ranks} ranks of {physical_per_rank}", placement.len()));
    }
    let mut instances: Vec<Vec<(Rank, usize)>> = (0..experts).map(|expert| vec![home(topology, expert)]).collect();
    for (rank, row) in placement.chunks_exact(physical_per_rank.max(1)).enumerate().map(|(r, row)| (Rank::new(r), row))
    {
        let masters = topology.masters(rank);
        for (physical, &id) in row.iter().enumerate() {
            let is_master = physical < masters.len();
            if is_master && id != (masters.start + physical) as i32 {
                let expected = masters.start + physical;
                return Err(format!(
                    "rank {rank}, physical index {physical}: {id}, but masters do not move: {expected}"
                ));
            }
            if is_master || id == -1 {
                continue;
            }
            let expert = usize::try_from(id).ok().filter(|&expert| expert < experts);
            let expert = expert.ok_or_else(|| {
                format!("rank {rank}, physical index {physical}: expert {id}; allowed are -1 and 0 to {}", experts - 1)
            })?;
            if topology.domain_of(rank) != topology.domain_of(topology.home(Expert::new(expert))) {
                return Err(format!("rank {rank}, physical index {physical}: expert {id} lives in another domain"));
            }
            if instances[expert].iter().any(|&(other, _)| other == rank) {
                return Err(format!("rank {rank}, physical index {physical}: expert {id} is on this rank already"));
            }
            instances[expert].push((rank, physical));
        }
    }
    let mut loads = vec![0; experts];
    problem.expert_loads(&mut loads);
    let mut shares: Vec<Vec<u32>> = loads.iter().zip(&instances).map(|(&load, of)| evenly(load, of.len())).collect();
    if quotas == Quotas::Balanced {
        balance(ranks, &instances, &mut shares);
    }
    plan.begin(SplitRule::LocalFirstExact);
    for (instances, shares) in instances.iter().zip(&shares) {
        for (&(rank, physical), &quota) in instances.iter().zip(shares) {
            plan.push_instance(Instance { rank, physical: PhysicalIndex::new(physical), quota });
        }
        plan.end_expert();
    }
    Ok(())
}

fn home(topology: &Topology, expert: usize) -> (Rank, usize) {
    let home = topology.home(Expert::new(expert));
    (home, expert - topology.masters(home).start)
}

fn evenly(load: u32, parts: usize) -> Vec<u32> {
    let (each, rest) = (load / parts as u32, load as usize % parts);
    (0..parts).map(|part| each + u32::from(part < rest)).collect()
}

/// Moves tokens along chains until the fullest rank cannot give any away.
fn balance(ranks: usize, instances: &[Vec<(Rank, usize)>], shares: &mut [Vec<u32>]) {
    let mut load = vec![0_u64; ranks];
    // Of each rank: (expert, which of its instances).
    let mut on: Vec<Vec<(usize, usize)>> = vec![Vec::new(); ranks];
    for (expert, (of, shares)) in instances.iter().zip(&*shares).enumerate() {
        for (index, (&(rank, _), &share)) in of.iter().zip(shares).enumerate() {
            load[rank.index()] += u64::from(share);
            on[rank.index()].push((expert, index));
        }
    }
    while let Some(from) = (0..ranks).max_by_key(|&rank| (load[rank], ranks - rank)) {
        // How each rank was reached: (rank before, expert, its instance there, its instance here).
        let mut reached: Vec<Option<(usize, usize, usize, usize)>> = vec![None; ranks];
        let (mut queue, mut next, mut to) = (vec![from], 0, None);
        while let Some(&rank) = queue.get(next) {
            next += 1;
            if load[rank] + 2 <= load[from] {
                to = Some(rank);
                break;
            }
            for &(expert, index) in on[rank].iter().filter(|&&(expert, index)| shares[expert][index] > 0) {
                for (other, &(target, _)) in instances[expert].iter().enumerate() {
                    let target = target.index();
                    if target != from && reached[target].is_none() {
                        reached[target] = Some((rank, expert, index, other));
                        queue.push(target);
                    }
                }
            }
        }
        let Some(to) = to else { return };
        let mut at = to;
        let chain = std::iter::from_fn(|| {
            let (before, expert, gives, takes) = reached[at].filter(|_| at != from)?;
            at = before;
            Some((expert, gives, takes))
        });
        let steps: Vec<_> = chain.collect();
        let can = steps.iter().map(|&(expert, gives, _)| shares[expert][gives]).min().unwrap_or(0);
        let moved = u64::from(can).min((load[from] - load[to]) / 2) as u32;
        for (expert, gives, takes) in steps {
            shares[expert][gives] -= moved;
            shares[expert][takes] += moved;
        }
        load[from] -= u64::from(moved);
        load[to] += u64::from(moved);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use ultraep_plan::TopologySpec;

    fn topology() -> Topology {
        Topology::new(TopologySpec { ranks: 3, experts: 3, domain_ranks: 3, slots_per_rank: 2 }).expect("a small group")
    }

    fn quotas(counts: &[u32], placement: &[i32], how: Quotas) -> Result<Vec<Vec<u32>>, String> {
        let topology = topology();
        let problem = Problem::new(&topology, counts).expect("three by three");
        let mut plan = Plan::for_slots(&topology);
        plan_of(&problem, placement, 3, how, &mut plan)?;
        let of = |expert| plan.of(Expert::new(expert)).iter().map(|instance| instance.quota).collect();
        Ok((0..3).map(of).collect())
    }

    #[test]
    fn chains_balance_what_even_shares_do_not() {
        // Expert 0 (90 tokens) on ranks 0 and 1, expert 1 (0) on 1 and 2, expert 2 (0) at home.
        let counts = [90, 0, 0, 0, 0, 0, 0, 0, 0];
        let placement = [0, -1, -1, 1, 0, -1, 2, 1, -1];
        assert_eq!(quotas(&counts, &placement, Quotas::Even), Ok(vec![vec![45, 45], vec![0, 0], vec![0]]));
        // Expert 1 now has 60: rank 1 hands it on to rank 2, so that all have 50.
        let counts = [90, 60, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(quotas(&counts, &placement, Quotas::Balanced), Ok(vec![vec![50, 40], vec![10, 50], vec![0]]));
    }

    #[test]
    fn what_is_no_placement_of_this_group_is_refused() {
        let refused = |placement: &[i32]| quotas(&[1; 9], placement, Quotas::Even).expect_err("refused");
        assert!(refused(&[0, -1, -1]).contains("expected 3 ranks of 3"));
        assert!(refused(&[1, -1, -1, 0, -1, -1, 2, -1, -1]).contains("masters do not move"));
        assert!(refused(&[0, 3, -1, 1, -1, -1, 2, -1, -1]).contains("expert 3"));
        assert!(refused(&[0, 1, 1, 1, -1, -1, 2, -1, -1]).contains("already"));
        assert!(refused(&[0, 0, -1, 1, -1, -1, 2, -1, -1]).contains("already"));
    }

    /// The least threshold by trying each: whether tokens fit is a flow of at most three experts, found by the subsets of ranks
    /// (Hall): the tokens of the experts that have all their instances in a subset must fit into it.
    fn least_threshold(loads: [u32; 3], on: [[bool; 3]; 3]) -> u32 {
        let fits = |threshold: u32| {
            (1..8_u32).all(|subset| {
                let inside = |expert: usize| (0..3).all(|rank| !on[expert][rank] || subset >> rank & 1 == 1);
                let tokens: u32 = (0..3).filter(|&expert| inside(expert)).map(|expert| loads[expert]).sum();
                tokens <= threshold * subset.count_ones()
            })
        };
        (0..).find(|&threshold| fits(threshold)).expect("all tokens fit at last")
    }

    proptest! {
        #[test]
        fn balanced_quotas_are_the_best(loads in [0..200_u32, 0..200_u32, 0..200_u32], extra in any::<[bool; 9]>()) {
            let mut placement = vec![-1; 9];
            let mut on = [[false; 3]; 3];
            for rank in 0..3 {
                placement[rank * 3] = rank as i32;
                on[rank][rank] = true;
                let others = (0..3).filter(|&expert| expert != rank && extra[rank * 3 + expert]);
                for (slot, expert) in others.enumerate() {
                    placement[rank * 3 + 1 + slot] = expert as i32;
                    on[expert][rank] = true;
                }
            }
            let mut counts = vec![0; 9];
            counts[..3].copy_from_slice(&loads);
            let got = quotas(&counts, &placement, Quotas::Balanced).expect("a placement");
            let mut of_rank = [0; 3];
            for (expert, shares) in got.iter().enumerate() {
                prop_assert_eq!(shares.iter().sum::<u32>(), loads[expert]);
                let others = (0..3).filter(|&rank| rank != expert && on[expert][rank]);
                std::iter::once(expert).chain(others).zip(shares).for_each(|(rank, share)| of_rank[rank] += share);
            }
            prop_assert_eq!(of_rank.iter().max().copied(), Some(least_threshold(loads, on)));
        }
    }
}
