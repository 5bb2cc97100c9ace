//! The best trees of tiny cases, one an expert, found by trying all.

use ultraep_plan::{Stripe, TransferModel};

use crate::naive::{Copying, finish_ns};

/// An expert at `home` with replicas on `replicas`.
#[derive(Clone, Debug)]
pub(crate) struct Family {
    pub(crate) home: usize,
    pub(crate) replicas: Vec<usize>,
}

/// All trees of `k` replicas: for each replica the replica that feeds it, or `None` for the home rank.
fn trees(k: usize) -> Vec<Vec<Option<usize>>> {
    let mut all = Vec::new();
    for code in 0..(k + 1).pow(k as u32) {
        let parents: Vec<Option<usize>> =
            (0..k).map(|i| (code / (k + 1).pow(i as u32)) % (k + 1)).map(|p| p.checked_sub(1)).collect();
        let reaches_home = |mut node: usize| {
            for _ in 0..k {
                match parents[node] {
                    Some(parent) => node = parent,
                    None => return true,
                }
            }
            false
        };
        if (0..k).all(reaches_home) {
            all.push(parents);
        }
    }
    all
}

/// Copies of one family under a tree; those with the most behind them first. `first`: index of its first copy.
fn copies(expert: usize, family: &Family, parents: &[Option<usize>], first: usize) -> Vec<Copying> {
    let mut behind = vec![0; parents.len()];
    for node in 0..parents.len() {
        let mut at = Some(node);
        while let Some(node) = at {
            behind[node] += 1;
            at = parents[node];
        }
    }
    let mut order: Vec<usize> = (0..parents.len()).collect();
    order.sort_by_key(|&node| (std::cmp::Reverse(behind[node]), node));
    let place = |node: usize| first + order.iter().position(|&n| n == node).expect("every node is placed");
    let copying = |&node: &usize| {
        let from = parents[node].map_or(family.home, |parent| family.replicas[parent]);
        Copying { expert, from, to: family.replicas[node], feeder: parents[node].map(place), stripe: Stripe::default() }
    };
    order.iter().map(copying).collect()
}

/// The least finish over all trees of all families.
pub(crate) fn optimum_ns(ranks: usize, model: &TransferModel, families: &[Family]) -> u64 {
    let forests: Vec<Vec<Vec<Option<usize>>>> = families.iter().map(|f| trees(f.replicas.len())).collect();
    let mut least = u64::MAX;
    for code in 0..forests.iter().map(Vec::len).product() {
        let (mut rest, mut all) = (code, Vec::new());
        for (expert, (family, trees)) in families.iter().zip(&forests).enumerate() {
            all.extend(copies(expert, family, &trees[rest % trees.len()], all.len()));
            rest /= trees.len();
        }
        least = least.min(finish_ns(ranks, model, &all));
    }
    least
}

#[test]
fn trees_are_counted_by_cayley() {
    assert_eq!([1, 2, 3, 4].map(|k| trees(k).len()), [1, 3, 16, 125]);
}
