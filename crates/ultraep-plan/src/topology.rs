//! The EP group that plans are made for: ranks, domains, home ranks of experts, slots and speeds. Validated once.

use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use crate::{Domain, Expert, Rank};

/// Most ranks in an EP group.
pub const MAX_RANKS: usize = 1024;
/// Most logical experts in a layer.
pub const MAX_EXPERTS: usize = 4096;
/// Most slots on a rank.
pub const MAX_SLOTS: usize = 64;
/// Speed weight of a rank at full speed.
pub const FULL_SPEED: u32 = 1 << 10;

/// What a [`Topology`] is built from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopologySpec {
    /// `N`, ranks in the EP group.
    pub ranks: usize,
    /// `E`, logical experts.
    pub experts: usize,
    /// `G`, ranks in a domain; must divide `N`.
    pub domain_ranks: usize,
    /// `R`, slots on each rank.
    pub slots_per_rank: usize,
}

/// A validated EP group.
///
/// Experts have their masters on ranks in contiguous blocks: rank `r` is home to `masters(r)`. When `N` does not divide
/// `E`, the first `E mod N` ranks hold one master more.
///
/// Clones share their contents: cloning costs nothing, comparing clones neither.
#[derive(Clone, Debug)]
pub struct Topology(Arc<Contents>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Contents {
    domain_ranks: usize,
    master_offsets: Vec<u16>,
    homes: Vec<Rank>,
    slots: Vec<u16>,
    speeds: Vec<u32>,
}

/// Why a [`Topology`] was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// Rank count outside `1..=MAX_RANKS`.
    #[error("{0} ranks: allowed are 1 to {MAX_RANKS}")]
    Ranks(usize),
    /// Expert count outside `N..=MAX_EXPERTS`.
    #[error("{experts} experts on {ranks} ranks: allowed are {ranks} (one a rank) to {MAX_EXPERTS}")]
    Experts {
        /// Asked for.
        experts: usize,
        /// Ranks they must cover.
        ranks: usize,
    },
    /// The domain size does not divide the rank count.
    #[error("domains of {domain_ranks} ranks do not divide {ranks} ranks evenly")]
    Domain {
        /// Asked for.
        domain_ranks: usize,
        /// Ranks to divide.
        ranks: usize,
    },
    /// Slot count over the limit.
    #[error("{0} slots on a rank: allowed are 0 to {MAX_SLOTS}")]
    Slots(usize),
    /// A per-rank list has the wrong length.
    #[error("{what}: {got} values for {ranks} ranks")]
    Length {
        /// Which list.
        what: &'static str,
        /// Its length.
        got: usize,
        /// Ranks.
        ranks: usize,
    },
    /// A speed weight over [`FULL_SPEED`].
    #[error("speed weight {0}: allowed are 0 (no replica here) to {FULL_SPEED} (full speed)")]
    Speed(u32),
    /// A domain in which every rank has speed weight 0.
    #[error("every rank of domain {0} has speed weight 0")]
    NoSpeed(Domain),
}

impl PartialEq for Topology {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}

impl Eq for Topology {}

impl Topology {
    /// A group with the same slots on every rank and all ranks at full speed.
    pub fn new(spec: TopologySpec) -> Result<Self, TopologyError> {
        let TopologySpec { ranks, experts, domain_ranks, slots_per_rank } = spec;
        if !(1..=MAX_RANKS).contains(&ranks) {
            return Err(TopologyError::Ranks(ranks));
        }
        if experts < ranks || experts > MAX_EXPERTS {
            return Err(TopologyError::Experts { experts, ranks });
        }
        if domain_ranks == 0 || !ranks.is_multiple_of(domain_ranks) {
            return Err(TopologyError::Domain { domain_ranks, ranks });
        }
        if slots_per_rank > MAX_SLOTS {
            return Err(TopologyError::Slots(slots_per_rank));
        }
        let (each, extra) = (experts / ranks, experts % ranks);
        let offset = |rank: usize| rank * each + rank.min(extra);
        let master_offsets = (0..=ranks).map(|r| offset(r) as u16).collect();
        let homes = (0..ranks).flat_map(|r| core::iter::repeat_n(Rank::new(r), offset(r + 1) - offset(r))).collect();
        let (slots, speeds) = (vec![slots_per_rank as u16; ranks], vec![FULL_SPEED; ranks]);
        Ok(Self(Arc::new(Contents { domain_ranks, master_offsets, homes, slots, speeds })))
    }

    /// The same group with `slots[r]` slots on rank `r`.
    pub fn with_slots(mut self, slots: &[usize]) -> Result<Self, TopologyError> {
        self.check_length("slots", slots.len())?;
        if let Some(&over) = slots.iter().find(|&&s| s > MAX_SLOTS) {
            return Err(TopologyError::Slots(over));
        }
        Arc::make_mut(&mut self.0).slots = slots.iter().map(|&s| s as u16).collect();
        Ok(self)
    }

    /// The same group with speed weights: rank `r` works at `speeds[r] / FULL_SPEED` of full speed; 0 means that it gets
    /// no replica (its masters stay).
    pub fn with_speeds(mut self, speeds: &[u32]) -> Result<Self, TopologyError> {
        self.check_length("speeds", speeds.len())?;
        if let Some(&over) = speeds.iter().find(|&&s| s > FULL_SPEED) {
            return Err(TopologyError::Speed(over));
        }
        for (domain, of_domain) in speeds.chunks(self.domain_ranks()).enumerate() {
            if of_domain.iter().all(|&s| s == 0) {
                return Err(TopologyError::NoSpeed(Domain::new(domain)));
            }
        }
        Arc::make_mut(&mut self.0).speeds = speeds.to_vec();
        Ok(self)
    }

    fn check_length(&self, what: &'static str, got: usize) -> Result<(), TopologyError> {
        if got == self.ranks() { Ok(()) } else { Err(TopologyError::Length { what, got, ranks: self.ranks() }) }
    }

    /// `N`.
    #[inline]
    pub fn ranks(&self) -> usize {
        self.0.slots.len()
    }

    /// `E`.
    #[inline]
    pub fn experts(&self) -> usize {
        self.0.homes.len()
    }

    /// `G`, ranks in a domain.
    #[inline]
    pub fn domain_ranks(&self) -> usize {
        self.0.domain_ranks
    }

    /// Number of domains, `N / G`.
    #[inline]
    pub fn domains(&self) -> usize {
        self.ranks() / self.0.domain_ranks
    }

    /// The domain of a rank.
    #[inline]
    pub fn domain_of(&self, rank: Rank) -> Domain {
        Domain::new(rank.index() / self.0.domain_ranks)
    }

    /// Ranks of a domain, as indices.
    #[inline]
    pub fn domain_range(&self, domain: Domain) -> Range<usize> {
        domain.index() * self.0.domain_ranks..(domain.index() + 1) * self.0.domain_ranks
    }

    /// Experts whose home is in a domain, as indices.
    #[inline]
    pub fn domain_experts(&self, domain: Domain) -> Range<usize> {
        let ranks = self.domain_range(domain);
        self.0.master_offsets[ranks.start] as usize..self.0.master_offsets[ranks.end] as usize
    }

    /// Experts whose home is this rank, as indices.
    #[inline]
    pub fn masters(&self, rank: Rank) -> Range<usize> {
        self.0.master_offsets[rank.index()] as usize..self.0.master_offsets[rank.index() + 1] as usize
    }

    /// Home rank of every expert, `[E]`.
    #[inline]
    pub fn homes(&self) -> &[Rank] {
        &self.0.homes
    }

    /// Home rank of an expert.
    #[inline]
    pub fn home(&self, expert: Expert) -> Rank {
        self.0.homes[expert.index()]
    }

    /// Slots on a rank.
    #[inline]
    pub fn slots(&self, rank: Rank) -> usize {
        self.0.slots[rank.index()] as usize
    }

    /// Slots on a rank that a planner may fill: none where the speed weight is 0.
    #[inline]
    pub fn replica_slots(&self, rank: Rank) -> usize {
        if self.0.speeds[rank.index()] == 0 { 0 } else { self.slots(rank) }
    }

    /// Speed weight of a rank, `0..=FULL_SPEED`.
    #[inline]
    pub fn speed(&self, rank: Rank) -> u32 {
        self.0.speeds[rank.index()]
    }

    /// Speed weights of all ranks, `[N]`.
    #[inline]
    pub fn speeds(&self) -> &[u32] {
        &self.0.speeds
    }

    /// Physical experts on a rank: masters and slots.
    #[inline]
    pub fn physical_experts(&self, rank: Rank) -> usize {
        self.masters(rank).len() + self.slots(rank)
    }
}
