//! Trees of copies: for every transfer, which other transfer (or the home rank) feeds it.
//!
//! Source: paper, section on chunk-streaming relay; v1.0.0 has the two-level rule. Experts come hot first: by decreasing
//! replicas, ties to the lower expert. One account of copies a rank sends runs through all of them.
//!
//! ```text
//! account[r] = copies that r sends when everything goes direct
//! two_level: for each expert with k replicas:                   deep(budget): for each expert with k replicas:
//!   relays = floor(sqrt(k)) replica ranks of least account        excess = account[home] - budget; none: stays direct
//!   home feeds relays                                             home feeds max(1, k - excess)
//!   each leaf goes to the relay that then has least account       replicas by increasing account, each to the node that
//!   undone when it gains too little                               can deliver chunk 0 to it first and has budget left
//! ```
//!
//! The deep rule is the greedy broadcast of the postal model (each informed node informs the next every `send_ns`), which
//! is the fastest way to spread one chunk, under a limit of copies a rank sends, which is what a long stream of chunks
//! needs: a rank that sends `b` copies has a period of `b * send_ns` a chunk. One budget gives one forest; the planner tries
//! budgets. Replicas for which no node has budget left go to the home rank; then the forest is evened out (relieve.rs).
//!
//! Stripes: with `S` stripes an expert is cut into `S` interleaved streams (chunk `c` belongs to stripe `c mod S`) and each gets
//! a tree of its own, under one account in units of `1 / S` copy. A rank that relays one stripe has used its budget and is a
//! leaf in the next, so trees can branch while every rank sends about one copy: with one stripe a budget of one copy
//! leaves nothing but a chain, with two its depth is logarithmic.
//!
//! Ties: the node attached earlier. Complexity: O(S T log (S T)) for T transfers.

use alloc::collections::BinaryHeap;
use alloc::vec::Vec;
use core::cmp::Reverse;

use super::relieve::Relief;
use super::{Transfer, TransferMode, TransferModel, TransferParams};

/// Fed by the home rank.
pub(super) const HOME: u32 = u32::MAX;

/// Who feeds whom. A *unit* is one stripe of one transfer: number `transfer * stripes + stripe`. `[T * stripes]` each.
#[derive(Clone, Debug, Default)]
pub(super) struct Forest {
    /// Stripes of every expert.
    pub(super) stripes: u32,
    /// The unit that brings the stripe to this one's sender, or [`HOME`].
    pub(super) parent: Vec<u32>,
    /// Hops from home, from 1.
    pub(super) depth: Vec<u32>,
    /// All units, feeders before those that they feed.
    pub(super) attached: Vec<u32>,
    /// Experts with a relay.
    pub(super) relayed_experts: u32,
}

impl Forest {
    pub(super) fn with_capacity(units: usize) -> Self {
        let room = || Vec::with_capacity(units);
        Self { stripes: 1, parent: room(), depth: room(), attached: room(), relayed_experts: 0 }
    }

    fn clear(&mut self, transfers: usize, stripes: u32) {
        let units = transfers * stripes as usize;
        self.stripes = stripes;
        self.parent.clear();
        self.parent.resize(units, HOME);
        self.depth.clear();
        self.depth.resize(units, 1);
        self.attached.clear();
        self.relayed_experts = 0;
    }

    /// Everything of one family from home.
    fn attach_direct(&mut self, family: Family) {
        let stripes = self.stripes;
        self.attached.extend((family.first..family.first + family.replicas).map(|t| t * stripes + family.stripe));
    }

    fn attach(&mut self, unit: u32, parent: u32) {
        self.parent[unit as usize] = parent;
        self.depth[unit as usize] = if parent == HOME { 1 } else { self.depth[parent as usize] + 1 };
        self.attached.push(unit);
    }
}

/// One stripe of one expert: where the expert's transfers lie in the list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Family {
    pub(super) first: u32,
    pub(super) replicas: u32,
    stripe: u32,
}

/// A node that may send. Ordered by when its next receiver would have chunk 0, then by when it was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Sender {
    arrival_ns: u64,
    attached: u32,
    /// The unit that made it a holder, or [`HOME`].
    node: u32,
    /// Units that it may still send.
    left: u32,
    /// It has sent nothing yet: it becomes a relay when it does.
    fresh: bool,
}

/// Builds forests.
#[derive(Clone, Debug)]
pub(super) struct Builder {
    model: TransferModel,
    pub(super) params: TransferParams,
    pub(super) families: Vec<Family>,
    pub(super) relief: Relief,
    direct: Vec<u32>,
    /// Units that each rank sends in the forest built last, `[N]`.
    pub(super) account: Vec<u32>,
    receives: Vec<u32>,
    /// The most experts with replicas that one rank is home of.
    most_own: u32,
    /// Units sent so far, while [`Builder::estimate_ns`] walks the forest, `[N]`.
    sent: Vec<u32>,
    /// When chunk 0 is there, and time from chunk to chunk, for each unit.
    arrival: Vec<(u64, u64)>,
    order: Vec<u32>,
    senders: BinaryHeap<Reverse<Sender>>,
}

impl Builder {
    pub(super) fn new(ranks: usize, transfers: usize, model: TransferModel, params: TransferParams) -> Self {
        let per_rank = || Vec::with_capacity(ranks);
        Self {
            model,
            params,
            families: Vec::with_capacity(transfers),
            relief: Relief::new(ranks, transfers, params.most_stripes() as usize),
            direct: per_rank(),
            account: per_rank(),
            receives: per_rank(),
            most_own: 0,
            sent: per_rank(),
            arrival: Vec::with_capacity(transfers * params.most_stripes() as usize),
            order: Vec::with_capacity(transfers),
            senders: BinaryHeap::with_capacity(transfers + 1),
        }
    }

    /// Takes the list in: families hot first, and the direct account (`sends` and `receives`: copies of each rank, `[N]`).
    pub(super) fn begin(&mut self, all: &[Transfer], sends: &[u32], receives: &[u32]) {
        self.direct.clear();
        self.direct.extend_from_slice(sends);
        self.receives.clear();
        self.receives.extend_from_slice(receives);
        self.families.clear();
        let mut first = 0;
        // Experts of one home stand together.
        let (mut home, mut own) = (None, 0);
        self.most_own = 0;
        for of_expert in all.chunk_by(|a, b| a.expert == b.expert) {
            own = if home == Some(of_expert[0].from) { own + 1 } else { 1 };
            home = Some(of_expert[0].from);
            self.most_own = self.most_own.max(own);
            let replicas = of_expert.len() as u32;
            self.families.push(Family { first, replicas, stripe: 0 });
            first += replicas;
        }
        self.families.sort_unstable_by_key(|f| (Reverse(f.replicas), f.first));
        self.relief.begin(&self.families, all.len());
    }

    /// The most units that one rank sends in the forest built last.
    pub(super) fn fanout(&self) -> u32 {
        self.account.iter().copied().max().unwrap_or(0)
    }

    /// The least budget worth trying with so many stripes: what the busiest receiver takes in anyway, what a home rank must
    /// send of its own (every expert once), and what all ranks that can send must send on average.
    pub(super) fn least_budget(&self, all: &[Transfer], stripes: u32) -> u32 {
        let most = u64::from(self.receives.iter().copied().max().unwrap_or(0));
        let taken = most * u64::from(stripes) * self.model.receive_ns / self.model.send_ns;
        let senders = self.direct.iter().zip(&self.receives).filter(|&(&s, &r)| s > 0 || r > 0).count();
        let mean = (all.len() as u64 * u64::from(stripes)).div_ceil(senders.max(1) as u64);
        u32::try_from(taken.max(mean).max(u64::from(self.most_own * stripes)).max(1)).unwrap_or(u32::MAX)
    }

    fn start(&mut self, transfers: usize, forest: &mut Forest, stripes: u32) {
        forest.clear(transfers, stripes);
        self.account.clear();
        self.account.extend(self.direct.iter().map(|&copies| copies * stripes));
    }

    /// Everything from home.
    pub(super) fn direct(&mut self, all: &[Transfer], forest: &mut Forest) {
        self.start(all.len(), forest, 1);
        forest.attached.extend(0..all.len() as u32);
    }

    fn may_relay(&self, family: Family) -> bool {
        family.replicas >= self.params.min_replicas.max(2) && self.params.max_relays > 0
    }

    /// Replicas of a family into `order`: by account, ties in the plan's order.
    fn order_replicas(&mut self, all: &[Transfer], family: Family) {
        let (account, order) = (&self.account, &mut self.order);
        order.clear();
        order.extend(family.first..family.first + family.replicas);
        order.sort_unstable_by_key(|&t| (account[all[t as usize].to.index()], t));
    }

    /// The two-level rule of v1.0.0.
    pub(super) fn two_level(&mut self, all: &[Transfer], forest: &mut Forest) {
        self.start(all.len(), forest, 1);
        for index in 0..self.families.len() {
            let family = self.families[index];
            let relays = family.replicas.isqrt().min(self.params.max_relays);
            if !self.may_relay(family) || !self.relay_two_level(all, forest, family, relays) {
                forest.attach_direct(family);
            }
        }
    }

    /// Relays one expert, unless that gains too little; whether it did.
    fn relay_two_level(&mut self, all: &[Transfer], forest: &mut Forest, family: Family, relays: u32) -> bool {
        let home = all[family.first as usize].from.index();
        self.order_replicas(all, family);
        let before = self.account[home];
        self.account[home] = before - family.replicas + relays;
        let mut critical = self.account[home];
        for &leaf in &self.order[relays as usize..] {
            let of = |relay: u32| all[relay as usize].to.index();
            let least = self.order[..relays as usize].iter().copied().min_by_key(|&relay| self.account[of(relay)]);
            let Some(relay) = least else { break };
            self.account[of(relay)] += 1;
            critical = critical.max(self.account[of(relay)]);
            (forest.parent[leaf as usize], forest.depth[leaf as usize]) = (relay, 2);
        }
        let enough = critical.saturating_add(self.params.min_fanout_gain) <= before;
        if enough || self.params.mode == TransferMode::Relay {
            forest.attached.extend_from_slice(&self.order);
            forest.relayed_experts += 1;
            return true;
        }
        self.account[home] = before;
        for &leaf in &self.order[relays as usize..] {
            self.account[all[forest.parent[leaf as usize] as usize].to.index()] -= 1;
            (forest.parent[leaf as usize], forest.depth[leaf as usize]) = (HOME, 1);
        }
        false
    }

    /// The deep rule: no rank sends more than `budget` units where relays can take over what is above.
    pub(super) fn deep(&mut self, all: &[Transfer], forest: &mut Forest, stripes: u32, budget: u32) {
        self.start(all.len(), forest, stripes);
        for index in 0..self.families.len() {
            let mut relayed = false;
            for stripe in 0..stripes {
                let family = Family { stripe, ..self.families[index] };
                let home = all[family.first as usize].from.index();
                let forced = u32::from(self.params.mode == TransferMode::Relay);
                let excess = self.account[home].saturating_sub(budget).max(forced);
                if excess == 0 || !self.may_relay(family) {
                    forest.attach_direct(family);
                } else {
                    relayed |=
                        self.relay_deep(all, forest, family, budget, family.replicas.saturating_sub(excess).max(1));
                }
            }
            forest.relayed_experts += u32::from(relayed);
        }
    }

    /// Builds the tree of one stripe; whether it has a relay.
    fn relay_deep(
        &mut self,
        all: &[Transfer],
        forest: &mut Forest,
        family: Family,
        budget: u32,
        from_home: u32,
    ) -> bool {
        let home = all[family.first as usize].from.index();
        let (delay, gap, stripes) = (self.model.delay_ns(), self.model.send_ns, forest.stripes);
        self.order_replicas(all, family);
        self.account[home] -= family.replicas;
        let source = Sender { arrival_ns: delay, attached: 0, node: HOME, left: from_home, fresh: false };
        self.senders.clear();
        self.senders.push(Reverse(source));
        let mut relays = 0;
        for place in 0..self.order.len() {
            let transfer = self.order[place];
            let unit = transfer * stripes + family.stripe;
            let sender = self.next_sender(relays < self.params.max_relays).unwrap_or(Sender { left: 1, ..source });
            relays += u32::from(sender.fresh);
            forest.attach(unit, sender.node);
            let from = if sender.node == HOME { home } else { all[(sender.node / stripes) as usize].to.index() };
            self.account[from] += 1;
            if sender.left > 1 {
                let (arrival_ns, left) = (sender.arrival_ns + gap, sender.left - 1);
                self.senders.push(Reverse(Sender { arrival_ns, left, fresh: false, ..sender }));
            }
            let left = budget.saturating_sub(self.account[all[transfer as usize].to.index()]);
            if left > 0 {
                let (arrival_ns, attached) = (sender.arrival_ns + delay, place as u32 + 1);
                self.senders.push(Reverse(Sender { arrival_ns, attached, node: unit, left, fresh: true }));
            }
        }
        relays > 0
    }

    /// The node that can deliver first; a new relay only where there may be one more.
    fn next_sender(&mut self, may_grow: bool) -> Option<Sender> {
        loop {
            let Reverse(sender) = self.senders.pop()?;
            if may_grow || !sender.fresh {
                return Some(sender);
            }
        }
    }

    /// About what a forest takes, in one walk: chunk 0 arrives by the hops and places on the way, and chunks follow each
    /// other at the pace of the slowest rank on the way. Exact where all ranks work in step; [`super::TransferClock`] is
    /// exact always.
    pub(super) fn estimate_ns(&mut self, all: &[Transfer], forest: &Forest) -> u64 {
        let model = self.model;
        self.sent.clear();
        self.sent.resize(self.account.len(), 0);
        self.arrival.clear();
        self.arrival.resize(forest.attached.len(), (0, 0));
        let of = |unit: u32| all[(unit / forest.stripes) as usize];
        let rounds = model.chunks().div_ceil(u64::from(forest.stripes));
        let mut finish = 0;
        for &unit in &forest.attached {
            let (transfer, parent) = (of(unit), forest.parent[unit as usize]);
            let (from, (start, period)) = match parent {
                HOME => (transfer.from, (0, 0)),
                feeder => (of(feeder).to, self.arrival[feeder as usize]),
            };
            let place = u64::from(self.sent[from.index()]);
            self.sent[from.index()] += 1;
            let sending = u64::from(self.account[from.index()]) * model.send_ns;
            let taking = u64::from(self.receives[transfer.to.index()] * forest.stripes) * model.receive_ns;
            let (first, period) = (start + model.delay_ns() + place * model.send_ns, period.max(sending).max(taking));
            self.arrival[unit as usize] = (first, period);
            finish = finish.max(first + (rounds - 1) * period);
        }
        finish
    }
}
