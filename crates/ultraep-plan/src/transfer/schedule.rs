//! The plan of transfers as each rank carries it out.

use alloc::vec::Vec;

use super::trees::{Forest, HOME};
use super::{MAX_STRIPES, Transfer, Transfers};
use crate::draft::total_slots;
use crate::{PhysicalIndex, Rank, Topology};

/// Which chunks of an expert: those whose number is `index` modulo `count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stripe {
    /// Below `count`.
    pub index: u32,
    /// Stripes of the expert, at least 1.
    pub count: u32,
}

impl Default for Stripe {
    /// All chunks.
    fn default() -> Self {
        Self { index: 0, count: 1 }
    }
}

impl Stripe {
    /// Numbers of its chunks, of an expert with `chunks` chunks.
    pub fn chunks(self, chunks: u64) -> impl ExactSizeIterator<Item = u64> {
        let (index, count) = (u64::from(self.index), u64::from(self.count.max(1)));
        let number = usize::try_from(chunks.saturating_sub(index).div_ceil(count)).unwrap_or(usize::MAX);
        (0..number).map(move |i| index + i as u64 * count)
    }
}

/// One copy, or one stripe of it, that a rank sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransferTask {
    /// What goes where. `from` is the rank that sends, not always the home rank.
    pub transfer: Transfer,
    /// The physical expert of the sending rank whose chunks it forwards as they get ready; `None` when it sends its master.
    pub waits_for: Option<PhysicalIndex>,
    /// Hops from the home rank to the receiver, from 1.
    pub depth: u32,
    /// Which chunks it sends. A replica gets every stripe from one task.
    pub stripe: Stripe,
}

/// Each rank's tasks, ordered.
///
/// A rank's list starts with its masters and goes on with what it forwards, by hops from home, then expert and stripe; copies of one
/// stripe of one expert stand together (a *stream*: each chunk is read once and written to all of them). How to carry it out: take the
/// stream whose next chunk is ready and has the lowest number, ties to the first in the list; write that chunk to all its
/// receivers and set their flags; again, until all chunks of all streams are written. No order of arrival blocks it. Every
/// rank derives the same lists.
#[derive(Clone, Debug, Default)]
pub struct TransferPlan {
    tasks: Vec<TransferTask>,
    /// For each task the task that brings the stripe to its sender, or [`HOME`].
    feeders: Vec<u32>,
    offsets: Vec<u32>,
    relayed_experts: u32,
    stripes: u32,
    order: Vec<u32>,
    task_of: Vec<u32>,
}

impl TransferPlan {
    /// An empty plan with room for as many copies as `topology` has slots; it grows for plans with more.
    pub fn new(topology: &Topology) -> Self {
        let room = total_slots(topology) * MAX_STRIPES as usize;
        Self {
            tasks: Vec::with_capacity(room),
            feeders: Vec::with_capacity(room),
            offsets: Vec::with_capacity(topology.ranks() + 1),
            relayed_experts: 0,
            stripes: 1,
            order: Vec::with_capacity(room),
            task_of: Vec::with_capacity(room),
        }
    }

    /// Turns a forest over `transfers` into ordered tasks.
    pub(super) fn fill(&mut self, transfers: &Transfers, forest: &Forest) {
        let (all, ranks, stripes) = (transfers.all(), transfers.sends().len(), forest.stripes);
        let of = |unit: u32| all[(unit / stripes) as usize];
        let sender = |unit: u32| match forest.parent[unit as usize] {
            HOME => of(unit).from,
            feeder => of(feeder).to,
        };
        // By rank, hops, expert, stripe, and then in the order in which children were attached.
        let units = forest.attached.len();
        self.task_of.clear();
        self.task_of.resize(units, 0);
        for (place, &unit) in forest.attached.iter().enumerate() {
            self.task_of[unit as usize] = place as u32;
        }
        self.order.clear();
        self.order.extend(0..units as u32);
        let place = &self.task_of;
        self.order.sort_unstable_by_key(|&unit| {
            let depth = forest.depth[unit as usize];
            (sender(unit), depth, of(unit).expert, unit % stripes, place[unit as usize])
        });
        for (task, &unit) in self.order.iter().enumerate() {
            self.task_of[unit as usize] = task as u32;
        }
        self.tasks.clear();
        self.feeders.clear();
        self.offsets.clear();
        for &unit in &self.order {
            let from = sender(unit);
            while self.offsets.len() <= from.index() {
                self.offsets.push(self.tasks.len() as u32);
            }
            let (waits_for, feeder) = match forest.parent[unit as usize] {
                HOME => (None, HOME),
                feeder => (Some(of(feeder).physical), self.task_of[feeder as usize]),
            };
            let (transfer, depth) = (Transfer { from, ..of(unit) }, forest.depth[unit as usize]);
            let stripe = Stripe { index: unit % stripes, count: stripes };
            self.tasks.push(TransferTask { transfer, waits_for, depth, stripe });
            self.feeders.push(feeder);
        }
        self.offsets.resize(ranks + 1, self.tasks.len() as u32);
        (self.relayed_experts, self.stripes) = (forest.relayed_experts, stripes);
    }

    /// All tasks, by rank that sends.
    pub fn tasks(&self) -> &[TransferTask] {
        &self.tasks
    }

    /// Ranks of the group.
    pub fn ranks(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// What a rank sends, in order. Empty for a rank that is not of the group.
    pub fn sent_by(&self, rank: Rank) -> &[TransferTask] {
        &self.tasks[self.range(rank)]
    }

    pub(super) fn range(&self, rank: Rank) -> core::ops::Range<usize> {
        match self.offsets.get(rank.index()..rank.index() + 2) {
            Some(&[first, end]) => first as usize..end as usize,
            _ => 0..0,
        }
    }

    /// A rank's streams, in order: its tasks, those of one stripe of one expert together.
    pub fn streams(&self, rank: Rank) -> impl Iterator<Item = &[TransferTask]> {
        self.sent_by(rank).chunk_by(|a, b| a.transfer.expert == b.transfer.expert && a.stripe == b.stripe)
    }

    /// What a rank receives.
    pub fn received_by(&self, rank: Rank) -> impl Iterator<Item = &TransferTask> {
        self.tasks.iter().filter(move |task| task.transfer.to == rank)
    }

    /// The task that brings the stripe to the sender of `task`, an index into [`TransferPlan::tasks`]; `None` when the sender
    /// is the home rank.
    pub fn feeder(&self, task: usize) -> Option<usize> {
        self.feeders.get(task).filter(|&&feeder| feeder != HOME).map(|&feeder| feeder as usize)
    }

    /// Experts that a relay forwards.
    pub fn relayed_experts(&self) -> u32 {
        self.relayed_experts
    }

    /// Stripes of every copy.
    pub fn stripes(&self) -> u32 {
        self.stripes
    }

    /// The most tasks that one rank sends: copies, times stripes.
    pub fn fanout(&self) -> u32 {
        self.offsets.windows(2).map(|ends| ends[1] - ends[0]).max().unwrap_or(0)
    }

    /// The most hops from home to a replica.
    pub fn depth(&self) -> u32 {
        self.tasks.iter().map(|task| task.depth).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    #[test]
    fn stripes_share_all_chunks() {
        let of = |index, count, chunks| Stripe { index, count }.chunks(chunks).collect::<alloc::vec::Vec<_>>();
        assert_eq!((of(0, 1, 3), of(0, 2, 5), of(1, 2, 5)), (vec![0, 1, 2], vec![0, 2, 4], vec![1, 3]));
        assert_eq!((of(2, 3, 2), of(0, 3, 1)), (vec![], vec![0]));
    }
}
