//! `lplb`, `llep` and `moonep` against oracles: the optimum of a placement by minimum cuts, and naive transcriptions of
//! the published loops.

use std::collections::BTreeMap;

use ultraep_baselines::{HistoryParams, Llep, LlepParams, Lplb, LplbLinks, LplbParams, MoonEp};
use ultraep_load::{LoadParams, Workload, generate};
use ultraep_plan::{Expert, Plan, Policy, Problem, Rank, Ratio, StopReason, Topology, TopologySpec, check_plan};

fn group(ranks: usize, experts: usize, slots_per_rank: usize) -> Topology {
    Topology::new(TopologySpec { ranks, experts, domain_ranks: ranks, slots_per_rank }).unwrap()
}

fn loads(topology: &Topology, seed: u64, ratio: u32) -> Vec<u32> {
    let ratio = Ratio::new(ratio, 10).unwrap();
    let params = LoadParams { tokens_per_rank: 3000, top_k: 4, ratio, seed, microbatch: 0 };
    generate(Workload::HotRankZipf, topology, &params).unwrap().counts().to_vec()
}

fn solve(policy: &mut dyn Policy, topology: &Topology, counts: &[u32]) -> Plan {
    let (problem, mut plan) = (Problem::new(topology, counts).unwrap(), Plan::default());
    policy.solve(&problem, &mut plan).unwrap();
    check_plan(&problem, &plan, &policy.rules()).unwrap();
    plan
}

/// `(expert, rank) -> quota` of all instances with tokens.
fn quotas(plan: &Plan) -> BTreeMap<(usize, usize), u64> {
    let of = |e: usize| plan.of(Expert::new(e)).iter().map(move |i| ((e, i.rank.index()), u64::from(i.quota)));
    (0..plan.experts()).flat_map(of).filter(|&(_, quota)| quota > 0).collect()
}

fn totals(topology: &Topology, counts: &[u32]) -> Vec<u64> {
    let column = |e: usize| counts.iter().skip(e).step_by(topology.experts()).map(|&c| u64::from(c)).sum();
    (0..topology.experts()).map(column).collect()
}

/// The least possible largest rank load when each expert may use the ranks in `hosts[e]`: by minimum cuts, the largest
/// mean over sets of ranks of what cannot leave the set.
fn optimum(hosts: &[Vec<usize>], totals: &[u64], ranks: usize) -> f64 {
    let stuck = |set: u32| {
        let inside = |e: &usize| hosts[*e].iter().all(|&r| set >> r & 1 == 1);
        (0..totals.len()).filter(inside).map(|e| totals[e]).sum::<u64>() as f64 / f64::from(set.count_ones())
    };
    (1..1_u32 << ranks).map(stuck).fold(0.0, f64::max)
}

#[test]
fn lplb_reaches_the_optimum_of_its_placement() {
    let topology = group(8, 24, 2);
    for seed in 0..20 {
        let mut lplb = Lplb::new(
            &topology,
            LplbParams { history: HistoryParams { window: 1, interval: 1 }, ..LplbParams::default() },
        );
        lplb.observe(&Problem::new(&topology, &loads(&topology, seed, 20)).unwrap());
        assert_eq!(lplb.replicas().len(), 16, "every slot is used, one replica an expert");
        let counts = loads(&topology, seed + 100, 20);
        let plan = solve(&mut lplb, &topology, &counts);
        let hosts: Vec<Vec<usize>> =
            (0..24).map(|e| plan.of(Expert::new(e)).iter().map(|i| i.rank.index()).collect()).collect();
        let best = optimum(&hosts, &totals(&topology, &counts), 8);
        let got = f64::from(plan.domains()[0].threshold);
        // Rounding: half a token for each of the at most 3 + 2 instances that a rank shares.
        assert!(got >= best - 1e-6 && got <= best + 2.5, "seed {seed}: {got}, optimum {best}");
    }
}

#[test]
fn lplb_on_its_torus_links_neighbours_and_reaches_their_optimum() {
    let topology = group(8, 24, 2);
    let links = LplbLinks::Torus { node_ranks: 4 };
    for seed in 0..20 {
        let history = HistoryParams { window: 1, interval: 1 };
        let mut lplb = Lplb::new(&topology, LplbParams { history, links, ..LplbParams::default() });
        let past = loads(&topology, seed, 20);
        lplb.observe(&Problem::new(&topology, &past).unwrap());
        let (past, counts) = (totals(&topology, &past), loads(&topology, seed + 100, 20));
        let mut hosts: Vec<Vec<usize>> = lplb.places().iter().map(|rank| vec![rank.index()]).collect();
        for rank in 0..8 {
            let mut own: Vec<usize> = (0..24).filter(|&e| hosts[e][0] == rank).collect();
            assert_eq!(own.len(), 3, "packing keeps the number of experts of a rank");
            own.sort_by_key(|&e| (std::cmp::Reverse(past[e]), e));
            let to = |e: usize| lplb.replicas().iter().find(|(expert, _)| expert.index() == e).map(|(_, r)| r.index());
            assert_eq!(to(own[0]), Some(rank / 4 * 4 + (rank + 1) % 4), "the heaviest: the next rank of the node");
            assert_eq!(to(own[1]), Some((rank + 4) % 8), "the second: the same rank of the next node");
            assert_eq!(to(own[2]), None);
        }
        lplb.replicas().iter().for_each(|(expert, rank)| hosts[expert.index()].push(rank.index()));
        let plan = solve(&mut lplb, &topology, &counts);
        let best = optimum(&hosts, &totals(&topology, &counts), 8);
        let got = f64::from(plan.domains()[0].threshold);
        assert!(got >= best - 1e-6 && got <= best + 2.5, "seed {seed}: {got}, optimum {best}");
    }
}

#[test]
fn lplb_says_when_it_is_over_its_limit() {
    let topology = group(4, 8, 1);
    let counts = loads(&topology, 1, 15);
    let mut lplb = Lplb::new(
        &topology,
        LplbParams { history: HistoryParams { window: 1, interval: 1 }, max_variables: 3, ..LplbParams::default() },
    );
    assert_eq!(solve(&mut lplb, &topology, &counts).domains()[0].stop, StopReason::NotASearch, "no placement yet");
    lplb.observe(&Problem::new(&topology, &counts).unwrap());
    let plan = solve(&mut lplb, &topology, &counts);
    assert_eq!(plan.domains()[0].stop, StopReason::SearchExhausted);
    for &(expert, _) in lplb.replicas() {
        let of = plan.of(expert);
        assert_eq!(of[1].quota, (of[0].quota + of[1].quota) / 2, "50/50");
    }
}

/// The published loop, one expert after another, with plain vectors.
fn naive_llep(topology: &Topology, totals: &[u64], min_piece: u64) -> BTreeMap<(usize, usize), u64> {
    let n = topology.ranks();
    let home = |e: usize| topology.home(Expert::new(e)).index();
    let cap = (totals.iter().sum::<u64>() * 11 / 10 / n as u64).max(1);
    let (mut assigned, mut pending) = (vec![0; n], vec![0; n]);
    (0..totals.len()).for_each(|e| pending[home(e)] += totals[e]);
    let mut order: Vec<usize> = (0..totals.len()).collect();
    order.sort_by_key(|&e| std::cmp::Reverse(totals[e]));
    let mut pieces = BTreeMap::new();
    for e in order {
        pending[home(e)] -= totals[e];
        let keep = totals[e].min(cap.saturating_sub(assigned[home(e)] + pending[home(e)]));
        let mut give = |rank: usize, tokens: u64, assigned: &mut [u64]| {
            assigned[rank] += tokens;
            *pieces.entry((e, rank)).or_insert(0) += tokens;
        };
        give(home(e), keep, &mut assigned);
        let mut left = totals[e] - keep;
        while left > 0 {
            let mut others: Vec<usize> = (0..n).filter(|&r| r != home(e)).collect();
            others.sort_by_key(|&r| assigned[r] + pending[r]);
            let room = |r: usize| left.min(cap.saturating_sub(assigned[r] + pending[r]));
            let taker = others.iter().find(|&&r| room(r) > 0 && (room(r) == left || room(r) >= min_piece));
            let (rank, piece) = taker.map_or((others[0], left), |&r| (r, room(r)));
            give(rank, piece, &mut assigned);
            left -= piece;
        }
    }
    pieces.retain(|_, tokens| *tokens > 0);
    pieces
}

#[test]
fn llep_is_its_transcription() {
    let topology = group(8, 24, 1);
    for (seed, min_piece) in (0..20).flat_map(|s| [1, 200, 1024].map(|p| (s, p))) {
        let counts = loads(&topology, seed, 25);
        let plan =
            solve(&mut Llep::new(&topology, LlepParams { min_piece, ..LlepParams::default() }), &topology, &counts);
        let expected = naive_llep(&topology, &totals(&topology, &counts), u64::from(min_piece));
        assert_eq!(quotas(&plan), expected, "seed {seed}, pieces of {min_piece}");
    }
}

#[test]
fn llep_leaves_a_balanced_load_alone() {
    let topology = group(8, 24, 1);
    let counts = loads(&topology, 1, 12);
    assert_eq!(solve(&mut Llep::new(&topology, LlepParams::default()), &topology, &counts).replicas(), 0);
}

/// The published loop with equal shares.
fn naive_moonep(topology: &Topology, totals: &[u64]) -> BTreeMap<(usize, usize), u64> {
    let n = topology.ranks();
    let share = (totals.iter().sum::<u64>() / n as u64) as i64;
    let mut left: Vec<i64> = totals.iter().map(|&t| t as i64).collect();
    let mut balance: Vec<i64> =
        (0..n).map(|r| topology.masters(Rank::new(r)).map(|e| left[e]).sum::<i64>() - share).collect();
    let mut sends: Vec<Vec<(usize, i64)>> = vec![Vec::new(); n];
    loop {
        let donor = (0..n).fold(0, |best, r| if balance[r] > balance[best] { r } else { best });
        let receiver = (0..n).fold(0, |best, r| if balance[r] < balance[best] { r } else { best });
        if balance[donor] <= 0 {
            break;
        }
        sends[donor].push((receiver, -balance[receiver]));
        balance[donor] += balance[receiver];
        balance[receiver] = 0;
    }
    let mut pieces = BTreeMap::new();
    for (donor, sends) in sends.iter_mut().enumerate() {
        while sends.iter().any(|s| s.1 > 0) {
            sends.sort_by_key(|&(receiver, tokens)| (-tokens, receiver));
            let expert = topology.masters(Rank::new(donor)).min_by_key(|&e| (-left[e], e)).unwrap();
            let piece = sends[0].1.min(left[expert]);
            sends[0].1 -= piece;
            left[expert] -= piece;
            pieces.insert((expert, sends[0].0), piece as u64);
        }
    }
    pieces.extend((0..totals.len()).map(|e| ((e, topology.home(Expert::new(e)).index()), left[e] as u64)));
    pieces.retain(|_, tokens| *tokens > 0);
    pieces
}

#[test]
fn moonep_is_its_transcription_and_keeps_its_promise() {
    let topology = group(8, 24, 0);
    for seed in 0..40 {
        let counts = loads(&topology, seed, 12 + seed as u32 % 18);
        let plan = solve(&mut MoonEp::new(&topology).unwrap(), &topology, &counts);
        assert_eq!(quotas(&plan), naive_moonep(&topology, &totals(&topology, &counts)), "seed {seed}");
        assert_eq!(plan.domains()[0].threshold, 12_000, "every rank gets its share");
        for rank in 0..8 {
            let foreign = |e: &usize| plan.of(Expert::new(*e)).iter().skip(1).any(|i| i.rank.index() == rank);
            let homes: Vec<_> = (0..24).filter(foreign).map(|e| topology.home(Expert::new(e))).collect();
            assert!(homes.len() <= 3 && homes.windows(2).all(|h| h[0] == h[1]), "one donor, at most M experts");
        }
    }
}
