//! Evens out a forest: units of ranks that send more than the budget are hung elsewhere.
//!
//! The deep rule builds trees one after the other, so a later expert may find the replicas that could forward it busy with an
//! earlier one. Each round moves one unit off the busiest rank along a shortest chain:
//!
//! ```text
//! busiest p sends (e, to a)  ->  q sends it instead, q another holder of e that does not get it through a
//! q was at its budget: q sends (f, to b)  ->  s sends it instead, ...      until a rank below the budget
//! ```
//!
//! It is an augmenting path of a bipartite assignment (units to senders), with one condition more: trees stay trees, which is
//! checked again as the chain is carried out from its far end. So every state on the way is a valid forest, and a chain
//! that breaks leaves a valid one. Order: the busiest rank (ties: lower); breadth first, units in the order of the list, holders
//! home first, then in the order of the list. Complexity: O(F (N + T K)) for F units too many, T units, K replicas of an
//! expert, N ranks.

use alloc::vec::Vec;

use super::trees::{Builder, Family, Forest, HOME};
use super::{Transfer, TransferParams};

/// Nobody reached this rank.
const UNSEEN: u32 = u32::MAX;

/// One step of a chain: a rank is reached by sending `unit`, fed by `feeder`, instead of `from`.
#[derive(Clone, Copy, Debug)]
struct Step {
    from: u32,
    unit: u32,
    feeder: u32,
}

/// Memory for evening out.
#[derive(Clone, Debug, Default)]
pub(super) struct Relief {
    /// How each rank was reached, `[N]`; `from` is [`UNSEEN`] where it was not.
    steps: Vec<Step>,
    queue: Vec<u32>,
    /// Units by the rank that sends them: those of rank `r` are `units[starts[r]..starts[r + 1]]`.
    units: Vec<u32>,
    starts: Vec<u32>,
    /// For each transfer the family it belongs to, `[T]`: first transfer and replicas.
    families: Vec<(u32, u32)>,
}

impl Relief {
    pub(super) fn new(ranks: usize, transfers: usize, stripes: usize) -> Self {
        Self {
            steps: Vec::with_capacity(ranks),
            queue: Vec::with_capacity(ranks),
            units: Vec::with_capacity(transfers * stripes),
            starts: Vec::with_capacity(ranks + 2),
            families: Vec::with_capacity(transfers),
        }
    }

    /// Takes the list in.
    pub(super) fn begin(&mut self, families: &[Family], transfers: usize) {
        self.families.clear();
        self.families.resize(transfers, (0, 0));
        for family in families {
            let of_family = &mut self.families[family.first as usize..(family.first + family.replicas) as usize];
            of_family.fill((family.first, family.replicas));
        }
    }

    /// Moves units until no rank sends more than `budget`, as far as chains are found; whether all do.
    fn run(&mut self, trees: &mut Trees<'_>, budget: u32) -> bool {
        loop {
            let busiest = (0..trees.account.len()).max_by_key(|&r| (trees.account[r], usize::MAX - r)).unwrap_or(0);
            if trees.account.get(busiest).is_none_or(|&sends| sends <= budget) {
                return true;
            }
            let Some(end) = self.chain(trees, busiest as u32, budget) else { return false };
            if !self.carry_out(trees, busiest as u32, end) {
                return false;
            }
        }
    }

    /// The rank below `budget` at the end of a shortest chain from `busiest`.
    fn chain(&mut self, trees: &Trees<'_>, busiest: u32, budget: u32) -> Option<u32> {
        self.steps.clear();
        self.steps.resize(trees.account.len(), Step { from: UNSEEN, unit: 0, feeder: 0 });
        self.queue.clear();
        self.queue.push(busiest);
        self.sort_by_sender(trees);
        let mut next = 0;
        while let Some(&rank) = self.queue.get(next) {
            next += 1;
            for place in self.starts[rank as usize]..self.starts[rank as usize + 1] {
                let unit = self.units[place as usize];
                let family = self.families[(unit / trees.forest.stripes) as usize];
                for feeder in trees.feeders(unit, family) {
                    let to = trees.holder(unit, feeder);
                    if to == rank || to == busiest || self.steps[to as usize].from != UNSEEN {
                        continue;
                    }
                    if !trees.may_feed(feeder, unit, family) {
                        continue;
                    }
                    self.steps[to as usize] = Step { from: rank, unit, feeder };
                    if trees.account[to as usize] < budget {
                        return Some(to);
                    }
                    self.queue.push(to);
                }
            }
        }
        None
    }

    /// Lists the units of each rank, in their order.
    fn sort_by_sender(&mut self, trees: &Trees<'_>) {
        let units = trees.forest.parent.len() as u32;
        self.starts.clear();
        self.starts.resize(trees.account.len() + 2, 0);
        // Shifted by one, so that after filling each rank's entry is its start.
        (0..units).for_each(|unit| self.starts[trees.sender(unit) as usize + 2] += 1);
        (2..self.starts.len()).for_each(|r| self.starts[r] += self.starts[r - 1]);
        self.units.clear();
        self.units.resize(units as usize, 0);
        for unit in 0..units {
            let place = &mut self.starts[trees.sender(unit) as usize + 1];
            self.units[*place as usize] = unit;
            *place += 1;
        }
    }

    /// Carries a chain out from its far end; `false` where a step no longer holds.
    fn carry_out(&self, trees: &mut Trees<'_>, busiest: u32, end: u32) -> bool {
        let mut to = end;
        while to != busiest {
            let step = self.steps[to as usize];
            let family = self.families[(step.unit / trees.forest.stripes) as usize];
            if !trees.may_feed(step.feeder, step.unit, family) {
                return false;
            }
            trees.forest.parent[step.unit as usize] = step.feeder;
            trees.account[step.from as usize] -= 1;
            trees.account[to as usize] += 1;
            to = step.from;
        }
        true
    }
}

/// A forest under change, with what it is made of.
struct Trees<'a> {
    all: &'a [Transfer],
    params: TransferParams,
    forest: &'a mut Forest,
    account: &'a mut [u32],
}

impl Trees<'_> {
    /// The rank that sends a unit.
    fn sender(&self, unit: u32) -> u32 {
        self.holder(unit, self.forest.parent[unit as usize])
    }

    /// The rank that would send `unit` if `feeder` fed it.
    fn holder(&self, unit: u32, feeder: u32) -> u32 {
        let stripes = self.forest.stripes;
        let rank = match feeder {
            HOME => self.all[(unit / stripes) as usize].from,
            feeder => self.all[(feeder / stripes) as usize].to,
        };
        rank.index() as u32
    }

    /// Who might feed a unit: the home rank, and the other units of its stripe.
    fn feeders(&self, unit: u32, (first, replicas): (u32, u32)) -> impl Iterator<Item = u32> + use<> {
        let (stripes, stripe) = (self.forest.stripes, unit % self.forest.stripes);
        let others = (first..first + replicas).map(move |transfer| transfer * stripes + stripe);
        core::iter::once(HOME).chain(others.filter(move |&other| other != unit))
    }

    /// Whether trees stay trees, and relays as few as they must be, with `unit` under `feeder`.
    fn may_feed(&self, feeder: u32, unit: u32, (first, replicas): (u32, u32)) -> bool {
        if feeder == HOME {
            return true;
        }
        if replicas < self.params.min_replicas.max(2) || self.params.max_relays == 0 {
            return false;
        }
        let mut above = feeder;
        while above != HOME {
            if above == unit {
                return false;
            }
            above = self.forest.parent[above as usize];
        }
        self.params.max_relays == u32::MAX
            || self.relays_with(feeder, unit, (first, replicas)) <= self.params.max_relays
    }

    /// Relays of a stripe with `unit` under `feeder`.
    fn relays_with(&self, feeder: u32, unit: u32, (first, replicas): (u32, u32)) -> u32 {
        let (stripes, stripe) = (self.forest.stripes, unit % self.forest.stripes);
        let units = || (first..first + replicas).map(|transfer| transfer * stripes + stripe);
        let parent = |child: u32| if child == unit { feeder } else { self.forest.parent[child as usize] };
        units().filter(|&node| units().any(|child| parent(child) == node)).count() as u32
    }
}

impl Builder {
    /// Hangs units elsewhere until no rank sends more than `budget`, as far as that goes, and puts the forest in order again;
    /// whether no rank sends more now.
    pub(super) fn even_out(&mut self, all: &[Transfer], forest: &mut Forest, budget: u32) -> bool {
        if self.fanout() <= budget {
            return true;
        }
        let mut trees = Trees { all, params: self.params, forest, account: &mut self.account };
        let keeps = self.relief.run(&mut trees, budget);
        self.put_in_order(forest);
        keeps
    }

    /// Depths and order of a forest whose parents have changed.
    fn put_in_order(&self, forest: &mut Forest) {
        for unit in 0..forest.parent.len() {
            let (mut depth, mut above) = (1, forest.parent[unit]);
            while above != HOME {
                (depth, above) = (depth + 1, forest.parent[above as usize]);
            }
            forest.depth[unit] = depth;
        }
        let Forest { attached, depth, .. } = forest;
        // In place and stable: units are few, and nearly in order.
        for place in 1..attached.len() {
            let mut at = place;
            while at > 0 && depth[attached[at - 1] as usize] > depth[attached[at] as usize] {
                attached.swap(at - 1, at);
                at -= 1;
            }
        }
        let (parent, stripes) = (&forest.parent, forest.stripes as usize);
        let relayed = self.families.iter().filter(|f| {
            let units = f.first as usize * stripes..(f.first + f.replicas) as usize * stripes;
            parent[units].iter().any(|&parent| parent != HOME)
        });
        forest.relayed_experts = relayed.count() as u32;
    }
}
