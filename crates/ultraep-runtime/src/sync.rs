//! Weight sync: from a plan to the bytes in the slots, and what it costs.

use ultraep_fabric::Region;
use ultraep_fabric::stream::{EngineSpec, LayoutError, Masters, SlotSet, Slots, WeightSync};
use ultraep_plan::{PlannedTransfers, Rank, SyncPlanner};

use crate::clock::Deadline;
use crate::reduce::Reducing;
use crate::{Endpoint, LayerMasters, RuntimeConfig, RuntimeError};

/// Which pass a weight sync belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    Backward,
}

impl RuntimeConfig {
    /// The planner of transfers for the experts, the link and the rule of this configuration: training, serving and the
    /// benchmarks that replay them ask this one.
    ///
    /// # Errors
    /// [`RuntimeError`] when an expert has no size or more chunks than a transfer may have.
    pub fn sync_planner(&self) -> Result<SyncPlanner, RuntimeError> {
        let model = self.weight_slots()?.model(self.link.bytes_per_s(), self.transfer.hop_ns)?;
        Ok(SyncPlanner::new(&self.topology, model, self.transfer.params)?)
    }
}

/// A weight sync under way.
#[must_use = "a weight sync is complete only once it has been finished"]
#[derive(Debug)]
pub(crate) struct Syncing {
    deadline: Deadline,
    open: bool,
}

/// Where the weights and gradients of one rank's physical experts are: a master's among the masters, a replica's in a slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Places {
    masters: usize,
    /// Elements of an expert.
    len: usize,
    /// Elements from slot to slot.
    slot_len: usize,
}

impl Places {
    /// Whether a physical expert is in a slot, and its elements there or among the masters.
    pub(crate) fn of(&self, physical: usize) -> (bool, std::ops::Range<usize>) {
        match physical.checked_sub(self.masters) {
            Some(slot) => (true, slot * self.slot_len..slot * self.slot_len + self.len),
            None => (false, physical * self.len..(physical + 1) * self.len),
        }
    }
}

/// Moves expert state of one rank: slots, registered masters, the tile engine and the planner of transfers.
pub(crate) struct Carrier {
    pub(super) config: RuntimeConfig,
    rank: Rank,
    /// Apart, as a grad reduce may be under way when the next layer's weights are restored.
    weight_slots: SlotSet,
    /// Nothing in a runtime that only infers.
    pub(super) grad_slots: Option<SlotSet>,
    weights: Vec<Masters>,
    pub(super) grads: Vec<Masters>,
    pub(crate) transfers: SyncPlanner,
    pub(super) reducing: Option<Reducing>,
    synced_ns: u64,
}

impl Carrier {
    /// For `masters`, one entry a layer. Takes all memory, starts the worker threads.
    pub(crate) fn new(
        config: &RuntimeConfig,
        endpoint: &mut Endpoint,
        masters: &[LayerMasters],
    ) -> Result<Self, RuntimeError> {
        let (rank, topology) = (endpoint.rank(), &config.topology);
        let (own, stride) = (topology.masters(rank).len(), config.shape.weight_bytes());
        let (weight_slots, grad_slots) = (config.weight_slots()?, config.grad_slots()?);
        let of = |region: fn(&LayerMasters) -> &Region| -> Result<Vec<Masters>, LayoutError> {
            let layout = weight_slots.layout();
            masters.iter().map(|layer| Masters::packed(layout, own, region(layer), stride)).collect()
        };
        let weights = of(|layer| &layer.weights)?;
        let grads = if config.trains() { of(|layer| &layer.grads)? } else { Vec::new() };
        let transfer = &config.transfer;
        let replicas = topology.ranks() * config.slot_capacity();
        let mut set = |slots: Slots, background| -> Result<SlotSet, RuntimeError> {
            let tasks = replicas * transfer.params.max_stripes.max(1) as usize;
            let engine = EngineSpec { background, tasks, streaming_from_bytes: transfer.streaming_from_bytes };
            let mut set = SlotSet::new(endpoint.fabric(), slots, engine)?;
            touch(&mut set, topology.slots(rank))?;
            Ok(set)
        };
        let weight_slots = set(weight_slots, transfer.sync_workers)?;
        let grad_slots = config.trains().then(|| set(grad_slots, transfer.reduce_workers)).transpose()?;
        Ok(Self {
            rank,
            weight_slots,
            grad_slots,
            weights,
            grads,
            transfers: config.sync_planner()?,
            reducing: None,
            synced_ns: 0,
            config: config.clone(),
        })
    }

    /// Weights in the slots, between two weight syncs.
    pub(crate) fn slot_weights(&self) -> Result<&[f32], RuntimeError> {
        Ok(self.weight_slots.read()?)
    }

    /// Weights and gradients in the slots, between two weight syncs and two grad reduces.
    pub(crate) fn slot_weights_and_grads(&mut self) -> Result<(&[f32], &mut [f32]), RuntimeError> {
        let grads = self.grad_slots.as_mut().map_or(Ok(&mut [][..]), SlotSet::write)?;
        Ok((self.weight_slots.read()?, grads))
    }

    /// Where this rank's physical experts are.
    pub(crate) fn places(&self) -> Places {
        Places {
            masters: self.config.topology.masters(self.rank).len(),
            len: self.config.shape.weight_len(),
            slot_len: self.weight_slots.slots().layout().slot_bytes() / size_of::<f32>(),
        }
    }

    /// Starts the weight sync of a plan: home ranks and relays write into the replicas' slots. In virtual time it runs beside
    /// the computation and takes what the plan takes under the stated link; `charged` is whether it costs anything at all.
    pub(crate) fn start_sync(
        &mut self,
        endpoint: &mut Endpoint,
        layer: usize,
        planned: &PlannedTransfers,
        charged: bool,
    ) -> Result<Syncing, RuntimeError> {
        endpoint.clock.pause();
        if planned.direct().all().is_empty() {
            return Ok(Syncing { deadline: endpoint.clock.beside(0), open: false });
        }
        let sync_ns = if charged { planned.sync_ns() } else { 0 };
        self.synced_ns += sync_ns;
        let deadline = endpoint.clock.beside(sync_ns);
        let topology = &self.config.topology;
        let work = WeightSync { topology, plan: planned.plan(), masters: &self.weights[layer] };
        self.weight_slots.sync(endpoint.fabric(), &work, self.config.transfer.sync_workers, 0)?;
        Ok(Syncing { deadline, open: true })
    }

    /// Waits until this rank's slots have their weights.
    pub(crate) fn finish_sync(&mut self, endpoint: &mut Endpoint, syncing: Syncing) -> Result<Deadline, RuntimeError> {
        if syncing.open {
            endpoint.clock.pause();
            self.weight_slots.join(endpoint.fabric())?;
        }
        Ok(syncing.deadline)
    }

    /// Waits until this rank has moved all that it has started: its masters may be written again.
    pub(crate) fn drain(&mut self, endpoint: &mut Endpoint) -> Result<(), RuntimeError> {
        self.weight_slots.drain(endpoint.fabric())?;
        self.grad_slots.as_mut().map_or(Ok(()), |set| set.drain(endpoint.fabric()))?;
        Ok(())
    }

    /// Virtual time that weight syncs took since the last call, from start to end, hidden or not.
    pub(crate) fn take_synced_ns(&mut self) -> u64 {
        std::mem::take(&mut self.synced_ns)
    }
}

/// Touches the pages of the first `count` slots, so that no sync meets a page for the first time. (Places beyond the
/// topology's slots, which only some baselines use, take memory when they are used.)
fn touch(set: &mut SlotSet, count: usize) -> Result<(), RuntimeError> {
    const PAGE_BYTES: usize = 4096;
    let Some(last) = count.min(set.slots().slots()).checked_sub(1) else { return Ok(()) };
    let end = set.slots().range(last).end;
    set.write::<u8>()?[..end].chunks_mut(PAGE_BYTES).for_each(|page| page[0] = 0);
    Ok(())
}
