//! The direct transfers of a plan: which master goes to which slot. (Relays shorten the critical fan-out; they are
//! planned on top of this list, see [`TransferPlanner`](crate::TransferPlanner).)

use alloc::vec;
use alloc::vec::Vec;

use crate::draft::{Move, total_slots};
use crate::{Expert, PhysicalIndex, Plan, Rank, Topology};

/// One expert's weights to one slot (in backward: that slot's gradients to the master).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Transfer {
    /// The expert.
    pub expert: Expert,
    /// Rank of its master.
    pub from: Rank,
    /// Rank of the replica.
    pub to: Rank,
    /// Physical index of the replica there.
    pub physical: PhysicalIndex,
}

/// All transfers of a plan. Order: by expert, then in the order of its replicas; every rank derives the same list.
#[derive(Clone, Debug, Default)]
pub struct Transfers {
    all: Vec<Transfer>,
    sends: Vec<u32>,
    receives: Vec<u32>,
}

impl Transfers {
    /// Room for as many transfers as `topology` has slots.
    pub fn new(topology: &Topology) -> Self {
        let ranks = topology.ranks();
        Self { all: Vec::with_capacity(total_slots(topology)), sends: vec![0; ranks], receives: vec![0; ranks] }
    }

    /// Lists the transfers of `plan`, a plan for `topology`.
    pub fn list(&mut self, topology: &Topology, plan: &Plan) {
        self.clear(topology);
        for expert in (0..plan.experts()).map(Expert::new) {
            let Some((master, replicas)) = plan.of(expert).split_first() else { continue };
            for replica in replicas {
                let (from, to, physical) = (master.rank, replica.rank, replica.physical);
                self.push(Transfer { expert, from, to, physical });
            }
        }
    }

    /// Lists the transfers of replicas that are not in a plan yet; their places on their ranks are left open.
    pub(crate) fn list_moves(&mut self, topology: &Topology, moves: &[Move]) {
        self.clear(topology);
        for m in moves {
            let (expert, to) = (Expert::new(m.expert as usize), Rank::new(m.rank as usize));
            self.push(Transfer { expert, from: topology.home(expert), to, physical: PhysicalIndex::default() });
        }
        self.all.sort_unstable_by_key(|t| (t.expert, t.to));
    }

    fn clear(&mut self, topology: &Topology) {
        self.all.clear();
        for counts in [&mut self.sends, &mut self.receives] {
            counts.clear();
            counts.resize(topology.ranks(), 0);
        }
    }

    fn push(&mut self, transfer: Transfer) {
        self.sends[transfer.from.index()] += 1;
        self.receives[transfer.to.index()] += 1;
        self.all.push(transfer);
    }

    /// The transfers, ordered.
    pub fn all(&self) -> &[Transfer] {
        &self.all
    }

    /// Transfers that a rank sends.
    pub fn sent_by(&self, rank: Rank) -> impl Iterator<Item = &Transfer> {
        self.all.iter().filter(move |t| t.from == rank)
    }

    /// Transfers that a rank receives.
    pub fn received_by(&self, rank: Rank) -> impl Iterator<Item = &Transfer> {
        self.all.iter().filter(move |t| t.to == rank)
    }

    /// Copies each rank sends, `[N]`.
    pub fn sends(&self) -> &[u32] {
        &self.sends
    }

    /// Copies each rank receives, `[N]`.
    pub fn receives(&self) -> &[u32] {
        &self.receives
    }

    /// Copies on the busiest link, sent or received.
    pub fn busiest_copies(&self) -> u32 {
        self.sends.iter().chain(&self.receives).copied().max().unwrap_or(0)
    }
}
