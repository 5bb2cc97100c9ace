//! The two halves of DeepSeek's EPLB heuristic, on integers: replicate the experts with most load a copy, then pack items
//! into equally large packs.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Fractions of a token in which weights (load / copies, rounded down) are compared and summed while packing.
pub const LOAD_UNIT: u64 = 1 << 16;

/// Load for each copy, in [`LOAD_UNIT`]ths of a token, rounded down. Loads up to 2^47 tokens do not overflow.
pub fn load_a_copy(load: u64, copies: u32) -> u64 {
    load.saturating_mul(LOAD_UNIT) / u64::from(copies.max(1))
}

/// An expert by load a copy: larger fraction first, then the lower expert. Fractions are compared exactly.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    load: u64,
    copies: u32,
    index: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        let mine = u128::from(self.load) * u128::from(other.copies);
        let theirs = u128::from(other.load) * u128::from(self.copies);
        mine.cmp(&theirs).then(other.index.cmp(&self.index))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Candidate {}

/// Gives extra copies one after another to the expert with the largest load / copies, ties to the lowest.
#[derive(Clone, Debug, Default)]
pub(crate) struct Replicator {
    heap: BinaryHeap<Candidate>,
}

impl Replicator {
    /// Room for `experts` experts.
    pub(crate) fn with_capacity(experts: usize) -> Self {
        Self { heap: BinaryHeap::with_capacity(experts) }
    }

    /// Makes up to `extra` copies of the experts with these loads, each of which has one copy to begin with. `may_grow`
    /// (index, copies so far) can refuse an expert its next copy for good; `created` hears the index of the expert of
    /// each new copy, in order. `O((E + extra) log E)`.
    pub(crate) fn run(
        &mut self,
        loads: impl IntoIterator<Item = u64>,
        extra: usize,
        may_grow: impl Fn(usize, u32) -> bool,
        mut created: impl FnMut(usize),
    ) {
        self.heap.clear();
        self.heap.extend((0..).zip(loads).map(|(index, load)| Candidate { load, copies: 1, index }));
        let mut left = extra;
        while left > 0 {
            let Some(mut top) = self.heap.pop() else { return };
            if may_grow(top.index as usize, top.copies) {
                created(top.index as usize);
                top.copies += 1;
                left -= 1;
                self.heap.push(top);
            }
        }
    }
}

/// `balanced_packing`: items by decreasing weight (ties to the earlier item), each to the lightest pack that is not
/// full (ties to the lowest); when every pack has room for one item, item `i` goes to pack `i`.
#[derive(Clone, Debug, Default)]
pub(crate) struct Packer {
    order: Vec<u32>,
    room: Vec<usize>,
    packs: BinaryHeap<Reverse<(u64, u32)>>,
}

impl Packer {
    /// The items of the last run in the order in which they were packed.
    pub(crate) fn order(&self) -> &[u32] {
        &self.order
    }

    /// Packs `weights` into packs with `room` items each; writes the pack of each item to `pack_of`. The rooms must sum
    /// to at least the number of items. `O(items log items)`.
    pub(crate) fn run(&mut self, weights: &[u64], room: impl IntoIterator<Item = usize>, pack_of: &mut Vec<u32>) {
        self.room.clear();
        self.room.extend(room);
        debug_assert!(self.room.iter().sum::<usize>() >= weights.len(), "more items than room");
        pack_of.clear();
        self.order.clear();
        self.order.extend(0..weights.len() as u32);
        if self.room.iter().all(|&r| r == 1) {
            pack_of.extend(&self.order);
            return;
        }
        pack_of.resize(weights.len(), 0);
        self.order.sort_unstable_by_key(|&i| (Reverse(weights[i as usize]), i));
        self.packs.clear();
        self.packs.extend((0..self.room.len() as u32).filter(|&p| self.room[p as usize] > 0).map(|p| Reverse((0, p))));
        for &item in &self.order {
            let Some(Reverse((weight, pack))) = self.packs.pop() else { return };
            pack_of[item as usize] = pack;
            self.room[pack as usize] -= 1;
            if self.room[pack as usize] > 0 {
                self.packs.push(Reverse((weight.saturating_add(weights[item as usize]), pack)));
            }
        }
    }
}
