//! The manager: the balancer of the reference layer, and what its clock charges for what the balancer does.
//!
//! Weight sync and grad reduce run beside the computation in virtual time: they have a deadline, and only what a rank waits for at
//! the join is charged.

use ultraep_balancer::{Balancer, History, LayerMasters as Registered, Pending, Plane, Planned};
use ultraep_fabric::stream::Masters;
use ultraep_fabric::{Fabric, Region};
use ultraep_plan::{Plan, PolicyFactory, Rank};

use crate::clock::Deadline;
use crate::{Endpoint, Part, RuntimeConfig, RuntimeError, VirtualLayer};

/// One layer's masters on this rank, registered where they are: `[M, weight_len]` `f32` each, in order of expert.
#[derive(Clone, Debug)]
pub struct LayerMasters {
    /// Weights.
    pub weights: Region,
    /// Gradients, added to by every backward. No bytes in a runtime that only infers.
    pub grads: Region,
}

/// Which pass a weight sync belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    Backward,
}

/// A weight sync under way.
#[must_use = "a weight sync is complete only once it has been finished"]
#[derive(Debug)]
pub(crate) struct Syncing {
    deadline: Deadline,
    pending: Pending,
}

/// A grad reduce under way.
#[derive(Debug)]
struct Reducing {
    pending: Pending,
    /// What the bytes take through the stated link, once the last rank at this one's transfers has started.
    transfer_ns: u64,
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

/// Plans, slots and masters of one rank.
pub struct Manager {
    config: RuntimeConfig,
    balancer: Balancer,
    masters: Vec<LayerMasters>,
    reducing: Option<Reducing>,
    synced_ns: u64,
}

impl Plane for Endpoint {
    fn fabric(&mut self) -> &mut dyn Fabric {
        Self::fabric(self)
    }

    fn gather_counts(&mut self, send: &Region, recv: &Region) -> Result<(), RuntimeError> {
        self.all_gather(send, recv, Part::Plan)
    }

    fn gather_digests(&mut self, send: &Region, recv: &Region) -> Result<(), RuntimeError> {
        self.gather_aside(send, recv)
    }

    fn planned(&mut self) {
        self.clock.pause();
    }

    fn stamp(&mut self) -> u64 {
        self.clock.now_ns()
    }
}

impl Manager {
    /// For `masters`, one entry a layer. All memory is taken here.
    pub fn new(
        config: RuntimeConfig,
        endpoint: &mut Endpoint,
        masters: Vec<LayerMasters>,
    ) -> Result<Self, RuntimeError> {
        let own = config.topology.masters(endpoint.rank()).len();
        let (layout, stride) = (config.layout()?, config.shape.weight_bytes());
        let master_bytes = own * stride;
        let mut registered = Vec::with_capacity(masters.len());
        for layer in &masters {
            expect_size("bytes of master weights", layer.weights.bytes(), master_bytes)?;
            expect_size("bytes of master gradients", layer.grads.bytes(), config.grad_bytes(master_bytes))?;
            let of = |region| Masters::packed(&layout, own, region, stride);
            let grads = config.trains().then(|| of(&layer.grads)).transpose()?;
            registered.push(Registered { weights: of(&layer.weights)?, grads });
        }
        let balancer = Balancer::new(config.balancer()?, endpoint, registered)?;
        Ok(Self { config, balancer, masters, reducing: None, synced_ns: 0 })
    }

    /// The configuration it was built with.
    pub fn config(&self) -> &RuntimeConfig {
        &self.config
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.balancer.rank()
    }

    /// The policy in force.
    pub fn policy(&self) -> &dyn PolicyFactory {
        self.balancer.policy()
    }

    /// Plans with the policy of this name from now on; all ranks must switch at the same place.
    pub fn set_policy(&mut self, name: &'static str) -> Result<(), RuntimeError> {
        self.balancer.set_policy(name)
    }

    /// Whether historical policies learn from now on.
    pub fn set_history(&mut self, history: History) {
        self.balancer.set_history(history);
    }

    /// A layer's masters.
    pub fn masters(&self, layer: usize) -> &LayerMasters {
        &self.masters[layer]
    }

    /// The plan in force for a virtual layer.
    pub fn plan_of(&self, at: VirtualLayer) -> Result<&Plan, RuntimeError> {
        Ok(self.planned(at)?.plan())
    }

    /// As [`Balancer::planned`].
    pub(crate) fn planned(&self, at: VirtualLayer) -> Result<&Planned, RuntimeError> {
        self.balancer.planned(at)
    }

    /// As [`Balancer::place`].
    pub(crate) fn place(&self, at: VirtualLayer) -> Result<usize, RuntimeError> {
        self.balancer.place(at)
    }

    /// As [`Balancer::replay`].
    pub(crate) fn replayed(&self, at: VirtualLayer, own: &[u32]) -> Result<usize, RuntimeError> {
        self.balancer.replay(at, own)?;
        self.balancer.place(at)
    }

    /// Frees a virtual layer's place in the ring.
    pub(crate) fn release(&mut self, at: VirtualLayer) {
        self.balancer.release(at);
    }

    /// Forgets all plans in flight.
    pub(crate) fn abandon(&mut self) {
        self.balancer.abandon();
    }

    /// Gathers the counts (`own`: tokens of this rank for every expert, `[E]`) and plans. Gives the place in the ring.
    pub(crate) fn plan(
        &mut self,
        endpoint: &mut Endpoint,
        at: VirtualLayer,
        own: &[u32],
    ) -> Result<usize, RuntimeError> {
        endpoint.clock.enter(Part::Plan);
        self.balancer.begin_at(at)?;
        let planned = self.balancer.set_counts(at, own).and_then(|()| self.balancer.plan(endpoint, at));
        // What only the clock needs to know of a plan.
        let measured = planned.and_then(|()| self.balancer.predict_sync_ns(at));
        if measured.is_err() {
            self.balancer.release(at);
        }
        measured.and_then(|_| self.balancer.place(at))
    }

    /// As [`Balancer::reroute`].
    pub(crate) fn reroute(&mut self, at: VirtualLayer, ids: &[i32], physical: &mut [i32]) -> Result<(), RuntimeError> {
        self.balancer.reroute(at, ids, physical)
    }

    /// Starts the weight sync of a kept plan. In virtual time it takes what the plan takes under the stated link. The backward's
    /// is not charged to a historical placement (its replicas have memory of their own in every layer), the forward's only when the
    /// placement is new.
    pub(crate) fn start_sync(
        &mut self,
        endpoint: &mut Endpoint,
        at: VirtualLayer,
        direction: Direction,
    ) -> Result<Syncing, RuntimeError> {
        endpoint.clock.pause();
        let kept = self.balancer.planned(at)?;
        let is_charged = !kept.is_historical() || (direction == Direction::Forward && kept.placement_is_new());
        let sync_ns = if is_charged { kept.transfers().sync_ns() } else { 0 };
        self.synced_ns += sync_ns;
        let deadline = endpoint.clock.beside(sync_ns);
        Ok(Syncing { deadline, pending: self.balancer.sync_weights(endpoint, at)? })
    }

    /// Waits until this rank's slots have their weights, and gives the moment of virtual time from which they do.
    pub(crate) fn finish_sync(&mut self, endpoint: &mut Endpoint, syncing: Syncing) -> Result<Deadline, RuntimeError> {
        if !syncing.pending.is_empty() {
            endpoint.clock.pause();
            self.balancer.wait(endpoint, syncing.pending)?;
        }
        Ok(syncing.deadline)
    }

    /// Virtual time that weight syncs took since the last call, from start to end, hidden or not.
    pub fn take_synced_ns(&mut self) -> u64 {
        std::mem::take(&mut self.synced_ns)
    }

    /// Starts the grad reduce of a kept plan; it runs beside the computation until [`Manager::join_reduce`].
    pub(crate) fn start_reduce(&mut self, endpoint: &mut Endpoint, at: VirtualLayer) -> Result<(), RuntimeError> {
        self.join_reduce(endpoint)?;
        // On a fabric without direct access it is done here, by this thread.
        endpoint.clock.enter(Part::GradReduce);
        let started = self.balancer.reduce_grads(endpoint, at);
        endpoint.clock.pause();
        let pending = started?;
        if !pending.is_empty() {
            let direct = self.balancer.planned(at)?.transfers().direct();
            let copies = direct.sends().iter().chain(direct.receives()).copied().max().map_or(0, u64::from);
            let transfer_ns = endpoint.link().transfer_ns(copies * self.config.shape.weight_bytes() as u64);
            self.reducing = Some(Reducing { pending, transfer_ns });
        }
        Ok(())
    }

    /// Waits for the grad reduce that is under way, if any: before the slots' gradients are written again. What this thread still
    /// has to add itself is work of the rank's core; in virtual time it also waits for the bytes.
    pub fn join_reduce(&mut self, endpoint: &mut Endpoint) -> Result<(), RuntimeError> {
        let Some(Reducing { pending, transfer_ns }) = self.reducing.take() else { return Ok(()) };
        endpoint.clock.enter(Part::GradReduce);
        let added = self.balancer.wait(endpoint, pending);
        endpoint.clock.pause();
        endpoint.join(Deadline(added? + transfer_ns), Part::GradReduce);
        Ok(())
    }

    /// Waits until this rank has moved all that it has started: its masters may be written again.
    pub fn drain(&mut self, endpoint: &mut Endpoint) -> Result<(), RuntimeError> {
        self.balancer.drain(endpoint)
    }

    /// Where this rank's physical experts are.
    pub(crate) fn places(&self) -> Places {
        let config = self.balancer.config();
        Places {
            masters: config.topology.masters(self.rank()).len(),
            len: self.config.shape.weight_len(),
            slot_len: config.weights.slot_bytes() / size_of::<f32>(),
        }
    }

    /// Weights in the slots, between two weight syncs.
    pub(crate) fn slot_weights(&self) -> Result<&[f32], RuntimeError> {
        self.balancer.slot_weights()
    }

    /// Weights and gradients in the slots, between two weight syncs and two grad reduces.
    pub(crate) fn slot_weights_and_grads(&mut self) -> Result<(&[f32], &mut [f32]), RuntimeError> {
        self.balancer.slot_weights_and_grads()
    }

    /// Tokens of every expert of a layer over the recorded forwards since the last call, `[E]`.
    pub fn take_loads(&mut self, layer: usize) -> Vec<u64> {
        self.balancer.take_loads(layer)
    }

    /// As [`Balancer::observed`].
    pub fn observed(&self, layer: usize) -> &[u32] {
        self.balancer.observed(layer)
    }

    /// As [`Balancer::show`].
    pub fn replay(&mut self, layer: usize, loads: &[u32]) -> Result<(), RuntimeError> {
        self.balancer.show(layer, loads)
    }
}

pub(crate) fn expect_size(what: &'static str, got: usize, expected: usize) -> Result<(), RuntimeError> {
    if got == expected { Ok(()) } else { Err(RuntimeError::Size { what, got, expected }) }
}
