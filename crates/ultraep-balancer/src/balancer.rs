//! The balancer: virtual layers, their plans, and the movement of expert state that follows from them.

use ultraep_fabric::stream::{EngineSpec, GradReduce, Masters, SlotSet, Slots, WeightSync};
use ultraep_fabric::{Pod, Region};
use ultraep_plan::{Cursor, PhysicalIndex, PolicyFactory, Problem, Rank, RouteTable};

use crate::adopt::{self, Quotas};
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

/// Movement of expert state under way. It goes on whether or not anybody waits; dropping this changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "slots may be used once this has been waited for"]
pub struct Pending {
    what: What,
    /// Number of the movement among those of its kind; 0 for one with nothing to move.
    number: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Weights,
    Grads,
}

impl Pending {
    /// Whether there is nothing to move: the plan has no replicas.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.number == 0
    }
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

    /// Gathers all ranks' counts, plans, splits, and plans the transfers. Nothing else is exchanged: every rank gets the same plan
    /// from the same counts.
    ///
    /// # Errors
    /// [`BalancerError::Counts`], [`BalancerError::Solve`], [`BalancerError::Split`]; in checked mode [`BalancerError::Plan`] and
    /// [`BalancerError::DigestMismatch`]; the fabric's.
    pub fn plan(&mut self, plane: &mut dyn Plane, at: VirtualLayer) -> Result<(), BalancerError> {
        let place = self.ring.kept(at)?;
        self.gather(plane, place)?;
        let Self { core, ring, config, counts_recv, .. } = self;
        {
            let (counts, targets) = ring.get_mut(place).parts();
            let gathered = counts_recv.read::<u32>()?;
            let problem = checked_problem(config, at, counts, &gathered)?;
            core.plan(at, &problem, targets)?;
        }
        plane.planned();
        self.note(at, place)?;
        if self.config.checked {
            let kept = self.ring.get(place);
            self.core.check(at, &self.problem(at, place)?, kept)?;
            self.compare_digests(plane, at, place)?;
        }
        Ok(())
    }

    /// Puts a placement that someone else made in force: `placement` is `[N, physical_per_rank]`
    /// ([`BalancerConfig::physical_per_rank`]), the expert at each physical id, -1 for none. Masters stay where they are; tokens
    /// are shared among the instances as `quotas` says. Counts are gathered as for [`Balancer::plan`], and ranks compare what they have.
    ///
    /// # Errors
    /// [`BalancerError::Placement`] says what is wrong; [`BalancerError::DigestMismatch`] when ranks were given different placements.
    pub fn adopt(
        &mut self,
        plane: &mut dyn Plane,
        at: VirtualLayer,
        placement: &[i32],
        quotas: Quotas,
    ) -> Result<(), BalancerError> {
        let place = self.ring.kept(at)?;
        self.gather(plane, place)?;
        let Self { core, ring, config, counts_recv, .. } = self;
        {
            let (counts, targets) = ring.get_mut(place).parts();
            let gathered = counts_recv.read::<u32>()?;
            let problem = checked_problem(config, at, counts, &gathered)?;
            let refused = |reason| BalancerError::Placement { at, reason };
            adopt::plan_of(&problem, placement, config.physical_per_rank(), quotas, targets.plan).map_err(refused)?;
            core.derive(at, &problem, targets)?;
        }
        plane.planned();
        self.note(at, place)?;
        self.compare_digests(plane, at, place)
    }

    /// All-gathers the counts into the place's table.
    fn gather(&mut self, plane: &mut dyn Plane, place: usize) -> Result<(), BalancerError> {
        let kept = self.ring.get_mut(place);
        let experts = kept.own.len();
        {
            // The last element is the row's sum, so that a damaged table is refused before anything is planned.
            let mut send = self.counts_send.write::<u32>()?;
            send[..experts].copy_from_slice(&kept.own);
            send[experts] = kept.own.iter().sum();
        }
        plane.gather_counts(&self.counts_send, &self.counts_recv)?;
        let gathered = self.counts_recv.read::<u32>()?;
        kept.counts.clear();
        gathered.chunks_exact(experts + 1).for_each(|row| kept.counts.extend_from_slice(&row[..experts]));
        Ok(())
    }

    fn note(&mut self, at: VirtualLayer, place: usize) -> Result<(), BalancerError> {
        let Self { core, ring, config, .. } = self;
        let kept = ring.get_mut(place);
        kept.is_planned = true;
        let (counts, notes) = kept.notes();
        let problem = Problem::new(&config.topology, counts);
        core.note(at, &problem.map_err(|source| BalancerError::Counts { at, source })?, notes);
        Ok(())
    }

    fn problem(&self, at: VirtualLayer, place: usize) -> Result<Problem<'_>, BalancerError> {
        let problem = Problem::new(&self.config.topology, &self.ring.get(place).counts);
        problem.map_err(|source| BalancerError::Counts { at, source })
    }

    fn compare_digests(&mut self, plane: &mut dyn Plane, at: VirtualLayer, place: usize) -> Result<(), BalancerError> {
        let ours = self.ring.get(place).digest(&self.problem(at, place)?);
        self.digest_send.write::<u64>()?[0] = ours;
        plane.gather_digests(&self.digest_send, &self.digest_recv)?;
        let all = self.digest_recv.read::<u64>()?;
        match all.iter().position(|&theirs| theirs != ours) {
            Some(rank) => Err(BalancerError::DigestMismatch { at, rank, ours, theirs: all[rank] }),
            None => Ok(()),
        }
    }

    /// That a kept plan is the one for a batch with these counts of this rank (`[E]`), which is run again: nothing is planned.
    ///
    /// # Errors
    /// [`BalancerError::ReplayDiffers`]; [`BalancerError::NoPlan`].
    pub fn replay(&self, at: VirtualLayer, own: &[u32]) -> Result<(), BalancerError> {
        let planned = &self.ring.get(self.place(at)?).own;
        expect_size("counts", own.len(), planned.len())?;
        match planned.iter().zip(own).position(|(planned, own)| planned != own) {
            Some(expert) => {
                let (planned, got) = (planned[expert], own[expert]);
                Err(BalancerError::ReplayDiffers { at, expert, planned, got })
            }
            None => Ok(()),
        }
    }

    /// Which of the ring's places a planned virtual layer has, `0..layers * in_flight`: for what a caller keeps beside the plan.
    ///
    /// # Errors
    /// [`BalancerError::NoPlan`], [`BalancerError::NotPlanned`], [`BalancerError::Layer`].
    pub fn place(&self, at: VirtualLayer) -> Result<usize, BalancerError> {
        let place = self.ring.kept(at)?;
        if self.ring.get(place).is_planned { Ok(place) } else { Err(BalancerError::NotPlanned { at }) }
    }

    /// The plan in force for a virtual layer, and what follows from it.
    ///
    /// # Errors
    /// As for [`Balancer::place`].
    pub fn planned(&self, at: VirtualLayer) -> Result<&Planned, BalancerError> {
        Ok(self.ring.get(self.place(at)?))
    }

    /// From the start of a virtual layer's weight sync until the last replica is complete, under the stated link, in nanoseconds.
    ///
    /// # Errors
    /// As for [`Balancer::place`].
    pub fn predict_sync_ns(&mut self, at: VirtualLayer) -> Result<u64, BalancerError> {
        let place = self.place(at)?;
        Ok(self.core.transfers.measure(&mut self.ring.get_mut(place).transfers))
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

    /// Starts to fill this rank's slots with the weights of the replicas that a virtual layer's plan gives it, and to send its own
    /// masters' weights to theirs. What the slots held is gone. In forward, and again in backward when another layer has synced since.
    ///
    /// # Errors
    /// As for [`Balancer::place`]; [`BalancerError::Fabric`] when masters are in use, and the fabric's.
    pub fn sync_weights(&mut self, plane: &mut dyn Plane, at: VirtualLayer) -> Result<Pending, BalancerError> {
        let kept = self.ring.get(self.place(at)?);
        let nothing = Pending { what: What::Weights, number: 0 };
        if kept.transfers.direct().all().is_empty() {
            return Ok(nothing);
        }
        let masters = &self.masters[at.layer].weights;
        let work = WeightSync { topology: &self.config.topology, plan: kept.transfers.plan(), masters };
        let stamp = plane.stamp();
        self.weights.sync(plane.fabric(), &work, self.config.transfer.sync_workers, stamp)?;
        self.synced += 1;
        Ok(Pending { number: self.synced, ..nothing })
    }

    /// Starts to add replicas' gradients to their masters', master first, then the replicas in the plan's order, so that the sum is
    /// the same on every run, and to zero the slots' gradients.
    ///
    /// # Errors
    /// As for [`Balancer::sync_weights`]; [`BalancerError::InferenceOnly`].
    pub fn reduce_grads(&mut self, plane: &mut dyn Plane, at: VirtualLayer) -> Result<Pending, BalancerError> {
        let kept = self.ring.get(self.place(at)?);
        let nothing = Pending { what: What::Grads, number: 0 };
        let (Some(slots), Some(masters)) = (&mut self.grads, &self.masters[at.layer].grads) else {
            return Err(BalancerError::InferenceOnly { at });
        };
        let transfers = kept.transfers.direct();
        if transfers.all().is_empty() {
            return Ok(nothing);
        }
        let work = GradReduce { topology: &self.config.topology, transfers, masters };
        let stamp = plane.stamp();
        slots.reduce(plane.fabric(), &work, self.config.transfer.reduce_workers, stamp)?;
        self.reduced += 1;
        Ok(Pending { number: self.reduced, ..nothing })
    }

    /// Waits until what `pending` brings this rank is there: after a weight sync its slots may be read; after a grad reduce its
    /// masters' gradients are complete and its slots' are 0. Gives the largest [`Plane::stamp`] of this rank and those at the other
    /// end of its transfers. One that a later movement of its kind has overtaken is over, and gives 0.
    ///
    /// # Errors
    /// The fabric's; a timeout names the rank that was waited for.
    pub fn wait(&mut self, plane: &mut dyn Plane, pending: Pending) -> Result<u64, BalancerError> {
        Ok(match (pending.what, &mut self.grads) {
            _ if pending.is_empty() => 0,
            (What::Weights, _) if pending.number == self.synced => self.weights.join(plane.fabric())?,
            (What::Grads, Some(grads)) if pending.number == self.reduced => grads.join(plane.fabric())?,
            _ => 0,
        })
    }

    /// Waits until this rank has moved all that it has started: its masters are its own again.
    ///
    /// # Errors
    /// As for [`Balancer::wait`].
    pub fn drain(&mut self, plane: &mut dyn Plane) -> Result<(), BalancerError> {
        self.weights.drain(plane.fabric())?;
        self.grads.as_mut().map_or(Ok(()), |grads| grads.drain(plane.fabric()))?;
        Ok(())
    }

    /// The physical expert for each of this rank's choices: `ids` are `[tokens, top_k]` logical experts (-1 for none), the very ones
    /// that were counted; `physical`, of the same shape, gets `rank * physical_per_rank + physical index`, or -1.
    ///
    /// # Errors
    /// [`BalancerError::Assign`] when the ids are not those that were counted; as for [`Balancer::place`].
    pub fn reroute<I: TokenId>(
        &mut self,
        at: VirtualLayer,
        ids: &[I],
        physical: &mut [i32],
    ) -> Result<(), BalancerError> {
        self.prepare(at)?;
        let Self { table, cursor, ids: own, .. } = self;
        let ids = match I::as_i32(ids) {
            Some(ids) => ids,
            None => {
                own.clear();
                own.extend(ids.iter().map(|id| i32::try_from(id.value()).unwrap_or(i32::MAX)));
                own
            }
        };
        Ok(table.assign(cursor, ids, physical)?)
    }

    /// As [`Balancer::reroute`] for maps: `map` and `values` (probabilities, say) are `[tokens, E]`; `physical_map` and `physical_values`
    /// are `[tokens, N * physical_per_rank]`.
    ///
    /// # Errors
    /// As for [`Balancer::reroute`].
    pub fn reroute_map<T: Copy + Default>(
        &mut self,
        at: VirtualLayer,
        (map, values): (&[u8], &[T]),
        (physical_map, physical_values): (&mut [u8], &mut [T]),
    ) -> Result<(), BalancerError> {
        self.prepare(at)?;
        Ok(self.table.reroute_dense(&mut self.cursor, map, values, physical_map, physical_values)?)
    }

    /// The backward of [`Balancer::reroute_map`]: gathers the values' gradients, `[tokens, N * physical_per_rank]`, back to
    /// `[tokens, E]`.
    ///
    /// # Errors
    /// As for [`Balancer::reroute`].
    pub fn reroute_map_backward<T: Copy + Default>(
        &mut self,
        at: VirtualLayer,
        map: &[u8],
        physical_gradient: &[T],
        gradient: &mut [T],
    ) -> Result<(), BalancerError> {
        self.prepare(at)?;
        Ok(self.table.reroute_dense_backward(&mut self.cursor, map, physical_gradient, gradient)?)
    }

    /// The routes of this rank's tokens under a kept plan.
    fn prepare(&mut self, at: VirtualLayer) -> Result<(), BalancerError> {
        let kept = self.ring.get(self.place(at)?);
        let width = kept.plan.instances().len();
        let own = &kept.split[self.rank.index() * width..(self.rank.index() + 1) * width];
        self.table.prepare(&kept.plan, own)?;
        self.table.start(&mut self.cursor);
        Ok(())
    }

    /// Where a physical expert of this rank lies among its slots, in bytes; `None` for a master.
    #[must_use]
    pub fn slot_range(&self, physical: PhysicalIndex) -> Option<std::ops::Range<usize>> {
        self.weights.slot(&self.config.topology, physical).map(|slot| self.weights.slots().range(slot))
    }

    /// Where a physical expert's gradients lie among the slots' gradients, in bytes; `None` for a master.
    #[must_use]
    pub fn grad_slot_range(&self, physical: PhysicalIndex) -> Option<std::ops::Range<usize>> {
        let grads = self.grads.as_ref()?;
        grads.slot(&self.config.topology, physical).map(|slot| grads.slots().range(slot))
    }

    /// Weights in this rank's slots, once the last weight sync has been waited for.
    ///
    /// # Errors
    /// [`BalancerError::Access`] before, and when `T` does not fit.
    pub fn slot_weights<T: Pod>(&self) -> Result<&[T], BalancerError> {
        Ok(self.weights.read()?)
    }

    /// Weights and gradients in this rank's slots: backward adds to the latter. Once the last movement of each kind has been waited for.
    ///
    /// # Errors
    /// As for [`Balancer::slot_weights`].
    pub fn slot_weights_and_grads<T: Pod, G: Pod>(&mut self) -> Result<(&[T], &mut [G]), BalancerError> {
        let grads = self.grads.as_mut().map_or(Ok(&mut [][..]), SlotSet::write)?;
        Ok((self.weights.read()?, grads))
    }

    /// Tokens of every expert of a layer over the recorded microbatches since the last call, `[E]`.
    pub fn take_loads(&mut self, layer: usize) -> Vec<u64> {
        self.core.take_loads(layer)
    }

    /// Expert loads of the microbatches that historical policies were shown last, `[microbatches, E]`: as many as
    /// [`Balancer::show`] needs to bring them where they are. Empty without historical policies.
    #[must_use]
    pub fn observed(&self, layer: usize) -> &[u32] {
        self.core.observed(layer)
    }

    /// Shows historical policies what [`Balancer::observed`] gave in the run that goes on here; before the first forward.
    ///
    /// # Errors
    /// [`BalancerError::Size`] when the loads are no whole number of microbatches; [`BalancerError::Counts`].
    pub fn show(&mut self, layer: usize, loads: &[u32]) -> Result<(), BalancerError> {
        let (ranks, experts) = (self.config.topology.ranks(), self.config.topology.experts());
        expect_size("loads seen by historical policies", loads.len(), loads.len() / experts * experts)?;
        let mut counts = vec![0; ranks * experts];
        for microbatch in loads.chunks_exact(experts) {
            // Historical policies look at sums over sources only.
            counts[..experts].copy_from_slice(microbatch);
            let at = VirtualLayer { layer, microbatch: 0 };
            let problem = Problem::new(&self.config.topology, &counts);
            let problem = problem.map_err(|source| BalancerError::Counts { at, source })?;
            self.core.show_again(layer, &problem, microbatch);
        }
        Ok(())
    }
}

fn checked_problem<'a>(
    config: &'a BalancerConfig,
    at: VirtualLayer,
    counts: &'a [u32],
    gathered: &[u32],
) -> Result<Problem<'a>, BalancerError> {
    let experts = config.topology.experts();
    let row_sums = gathered.chunks_exact(experts + 1).map(|row| u64::from(row[experts]));
    let problem = Problem::with_row_sums(&config.topology, counts, row_sums);
    problem.map_err(|source| BalancerError::Counts { at, source })
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
