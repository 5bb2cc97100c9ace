//! The balancer: virtual layers, their plans, and the movement of expert state that follows from them.

mod moving;
mod planning;
mod routing;

pub use moving::Pending;

use ultraep_fabric::Region;
use ultraep_fabric::stream::{EngineSpec, Masters, SlotSet, Slots};
use ultraep_plan::{Cursor, PolicyFactory, Rank, RouteTable};

use crate::core::{Core, History, Planned};
use crate::count::{TokenId, count_ids, count_map};
use crate::ring::Ring;
use crate::{BalancerConfig, BalancerError, Plane, Release, VirtualLayer};

/// One layer's masters on this rank, registered where they are.
#[derive(Clone, Debug)]
pub struct LayerMasters {
    /// Weights, in the layout of [`BalancerConfig::weights`].
    pub weights: Masters,
    /// Gradients, added to by [`Balancer::reduce_grads`]; `None` in a balancer that only infers.
    pub grads: Option<Masters>,
}

/// Plans, slots and masters of one rank. See the [crate's documentation](crate) for the order of calls.
pub struct Balancer {
    config: BalancerConfig,
    rank: Rank,
    core: Core,
    masters: Vec<LayerMasters>,
    /// Apart, as a grad reduce may be under way when the next layer's weights are restored.
    weights: SlotSet,
    grads: Option<SlotSet>,
    /// Movements started, of each kind.
    synced: u64,
    reduced: u64,
    ring: Ring<Planned>,
    /// Microbatches begun by [`Balancer::begin`], by layer.
    begun: Vec<u64>,
    counts_send: Region,
    counts_recv: Region,
    digest_send: Region,
    digest_recv: Region,
    table: RouteTable,
    cursor: Cursor,
    ids: Vec<i32>,
}

impl Balancer {
    /// For `masters`, one entry a layer; the windows of `config` are taken for good. All memory is taken here and the worker threads
    /// are started.
    ///
    /// # Errors
    /// [`BalancerError::Size`] when masters are missing; [`BalancerError::Fabric`] when a window is missing, too small or in use;
    /// what policies refuse.
    pub fn new(
        config: BalancerConfig,
        plane: &mut dyn Plane,
        masters: Vec<LayerMasters>,
    ) -> Result<Self, BalancerError> {
        let fabric = plane.fabric();
        let (rank, topology) = (fabric.rank(), &config.topology);
        expect_size("ranks of the fabric", fabric.ranks(), topology.ranks())?;
        expect_size("layers of masters", masters.len(), config.layers)?;
        let own = topology.masters(rank).len();
        for layer in &masters {
            expect_size("masters of a layer", layer.weights.experts(), own)?;
            let grads = layer.grads.as_ref().map_or(0, Masters::experts);
            expect_size("gradients of a layer's masters", grads, if config.gradients.is_some() { own } else { 0 })?;
        }
        let transfer = &config.transfer;
        let replicas = topology.ranks() * config.slot_capacity();
        let mut set = |slots: Slots, background| -> Result<SlotSet, BalancerError> {
            let tasks = replicas * transfer.params.max_stripes.max(1) as usize;
            let engine = EngineSpec { background, tasks, streaming_from_bytes: transfer.streaming_from_bytes };
            let mut set = SlotSet::new(plane.fabric(), slots, engine)?;
            touch(&mut set, topology.slots(rank))?;
            Ok(set)
        };
        let weights = set(config.weight_slots(), transfer.sync_workers)?;
        let grads = config.grad_slots().map(|slots| set(slots, transfer.reduce_workers)).transpose()?;
        let kept = || Planned::new(topology, replicas);
        let row = topology.experts() + 1;
        Ok(Self {
            rank,
            core: Core::new(&config)?,
            masters,
            weights,
            grads,
            synced: 0,
            reduced: 0,
            ring: Ring::new(config.layers, config.in_flight, kept),
            begun: vec![0; config.layers],
            counts_send: Region::zeroed(row * size_of::<u32>()),
            counts_recv: Region::zeroed(topology.ranks() * row * size_of::<u32>()),
            digest_send: Region::zeroed(size_of::<u64>()),
            digest_recv: Region::zeroed(topology.ranks() * size_of::<u64>()),
            table: RouteTable::new(topology, config.physical_per_rank()),
            cursor: Cursor::new(topology),
            ids: Vec::new(),
            config,
        })
    }

    /// The configuration it was built with.
    #[must_use]
    pub fn config(&self) -> &BalancerConfig {
        &self.config
    }

    /// This rank.
    #[must_use]
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// A layer's masters; `None` for a layer that there is not.
    #[must_use]
    pub fn masters(&self, layer: usize) -> Option<&LayerMasters> {
        self.masters.get(layer)
    }

    /// The policy in force.
    #[must_use]
    pub fn policy(&self) -> &dyn PolicyFactory {
        self.core.policy()
    }

    /// Plans with the policy of this name from now on; all ranks must switch at the same place.
    ///
    /// # Errors
    /// [`BalancerError::UnknownPolicy`].
    pub fn set_policy(&mut self, name: &'static str) -> Result<(), BalancerError> {
        self.core.set_policy(name)
    }

    /// Whether historical policies learn from now on.
    pub fn set_history(&mut self, history: History) {
        self.core.history = history;
    }

    /// Begins the next microbatch of a layer: a place for its plan, under a number of the balancer's choice.
    ///
    /// # Errors
    /// [`BalancerError::RingExhausted`] when all places are taken and release is explicit; [`BalancerError::Layer`].
    pub fn begin(&mut self, layer: usize) -> Result<VirtualLayer, BalancerError> {
        let layers = self.config.layers;
        let microbatch = *self.begun.get(layer).ok_or(BalancerError::Layer { layer, layers })?;
        let at = VirtualLayer { layer, microbatch };
        self.begin_at(at)?;
        self.begun[layer] = microbatch + 1;
        Ok(at)
    }

    /// Begins a virtual layer under a number of the caller's choice.
    ///
    /// # Errors
    /// As for [`Balancer::begin`]; [`BalancerError::InFlight`] when it has been begun and not released.
    pub fn begin_at(&mut self, at: VirtualLayer) -> Result<(), BalancerError> {
        let place = match self.config.release {
            Release::Explicit => self.ring.claim(at)?,
            Release::Cyclic => self.ring.claim_oldest(at)?,
        };
        let kept = self.ring.get_mut(place);
        kept.is_planned = false;
        kept.own.fill(0);
        Ok(())
    }

    /// Adds this rank's choices to a virtual layer's counts: `ids` are `[tokens, top_k]` logical experts, -1 for none.
    ///
    /// # Errors
    /// [`BalancerError::Id`] names the first that is no expert (the layer is to be released then); [`BalancerError::NoPlan`] when
    /// the layer has not been begun.
    pub fn count<I: TokenId>(&mut self, at: VirtualLayer, ids: &[I]) -> Result<(), BalancerError> {
        let place = self.ring.kept(at)?;
        count_ids(ids, &mut self.ring.get_mut(place).own)
    }

    /// As [`Balancer::count`], from a map `[tokens, E]` whose bytes other than 0 are choices.
    ///
    /// # Errors
    /// As for [`Balancer::count`]; [`BalancerError::Size`].
    pub fn count_map(&mut self, at: VirtualLayer, map: &[u8]) -> Result<(), BalancerError> {
        let place = self.ring.kept(at)?;
        count_map(map, &mut self.ring.get_mut(place).own)
    }

    /// Sets this rank's counts, `[E]`, where they were counted elsewhere.
    ///
    /// # Errors
    /// [`BalancerError::Size`]; [`BalancerError::NoPlan`].
    pub fn set_counts(&mut self, at: VirtualLayer, own: &[u32]) -> Result<(), BalancerError> {
        let place = self.ring.kept(at)?;
        let kept = self.ring.get_mut(place);
        expect_size("counts", own.len(), kept.own.len())?;
        kept.own.copy_from_slice(own);
        Ok(())
    }

    /// Frees a virtual layer's place in the ring, planned or not. One that is not there is left alone.
    pub fn release(&mut self, at: VirtualLayer) {
        if let Ok(place) = self.ring.kept(at) {
            self.ring.release(place);
        }
    }

    /// Forgets all plans in flight.
    pub fn abandon(&mut self) {
        self.ring.clear();
    }
}

/// Touches the pages of the first `count` slots, so that no sync meets a page for the first time. (Places beyond the
/// topology's slots, which only some baselines use, take memory when they are used.)
fn touch(set: &mut SlotSet, count: usize) -> Result<(), BalancerError> {
    const PAGE_BYTES: usize = 4096;
    let Some(last) = count.min(set.slots().slots()).checked_sub(1) else { return Ok(()) };
    let end = set.slots().range(last).end;
    set.write::<u8>()?[..end].chunks_mut(PAGE_BYTES).for_each(|page| page[0] = 0);
    Ok(())
}

pub(crate) fn expect_size(what: &'static str, got: usize, expected: usize) -> Result<(), BalancerError> {
    if got == expected { Ok(()) } else { Err(BalancerError::Size { what, got, expected }) }
}
