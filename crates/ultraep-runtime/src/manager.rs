//! The manager: which plan is in force where, and the movement of expert state that follows from it.
//!
//! One set of slots (weights and gradients) serves all layers. Masters stay in the memory that the framework registered;
//! the manager reads their weights (weight sync) and adds to their gradients (grad reduce), and never moves them.

use std::sync::Arc;
use ultraep_fabric::{Operation, Region, Span};
use ultraep_plan::{
    Plan, PlannedTransfers, Policy, PolicyFactory, Problem, Rank, SplitWorkspace, check_plan, check_split, digest_plan,
    digest_problem, split_all,
};

use crate::clock::Deadline;
use crate::observed::Observed;
use crate::ring::Ring;
use crate::sync::{Carrier, Direction, Places, Syncing};
use crate::{Endpoint, Part, RuntimeConfig, RuntimeError, VirtualLayer};

/// One layer's masters on this rank, registered where they are: `[M, weight_len]` `f32` each, in order of expert.
#[derive(Clone, Debug)]
pub struct LayerMasters {
    /// Weights.
    pub weights: Region,
    /// Gradients, added to by every backward. No bytes in a runtime that only infers.
    pub grads: Region,
}

/// Whether historical policies learn from the microbatches that are planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum History {
    /// Every forward's counts are shown to them.
    Record,
    /// They keep what they have seen: the pass is a comparison on a batch that training sees anyway.
    Frozen,
}

/// A plan in force for one virtual layer, with what was derived from it.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    pub(crate) plan: Plan,
    /// `[N, E]`.
    pub(crate) counts: Vec<u32>,
    /// `[N, instances]`.
    pub(crate) split: Vec<u32>,
    pub(crate) transfers: PlannedTransfers,
    /// Whether the forward's weight sync is charged: not for a historical placement that was there before.
    placement_is_new: bool,
    historical: bool,
}

struct PolicyState {
    factory: Arc<dyn PolicyFactory>,
    layers: Vec<Box<dyn Policy>>,
    /// Digest of each layer's last placement, quotas aside.
    placements: Vec<u64>,
}

/// Plans, slots and masters of one rank.
pub struct Manager {
    config: RuntimeConfig,
    rank: Rank,
    policies: Vec<PolicyState>,
    active: usize,
    history: History,
    masters: Vec<LayerMasters>,
    carrier: Carrier,
    ring: Ring<Kept>,
    counts_send: Region,
    counts_recv: Region,
    digest_send: Region,
    digest_recv: Region,
    split_workspace: SplitWorkspace,
    /// Tokens of every expert since [`Manager::take_loads`], `[layers, E]`.
    loads: Vec<u64>,
    /// What historical policies have seen, by layer.
    observed: Vec<Observed>,
    /// Workspace, `[E]`.
    expert_loads: Vec<u32>,
}

impl Manager {
    /// For `masters`, one entry a layer. All memory is taken here.
    pub fn new(
        config: RuntimeConfig,
        endpoint: &mut Endpoint,
        masters: Vec<LayerMasters>,
    ) -> Result<Self, RuntimeError> {
        let rank = endpoint.rank();
        let topology = &config.topology;
        expect_size("layers of masters", masters.len(), config.layers)?;
        let master_bytes = topology.masters(rank).len() * config.shape.weight_bytes();
        for layer in &masters {
            expect_size("bytes of master weights", layer.weights.bytes(), master_bytes)?;
            expect_size("bytes of master gradients", layer.grads.bytes(), config.grad_bytes(master_bytes))?;
        }
        let mut policies = Vec::new();
        for factory in &config.policies {
            let layers = (0..config.layers).map(|_| factory.build(topology)).collect::<Result<Vec<_>, _>>()?;
            policies.push(PolicyState { factory: Arc::clone(factory), layers, placements: vec![0; config.layers] });
        }
        let historical = || config.policies.iter().filter_map(|policy| policy.history());
        let replicas = topology.ranks() * config.slot_capacity();
        let kept = || Kept {
            plan: Plan::with_capacity(topology, replicas),
            transfers: PlannedTransfers::new(&config.topology),
            ..Kept::default()
        };
        let (ranks, experts) = (topology.ranks(), topology.experts());
        let row = experts + 1;
        Ok(Self {
            rank,
            policies,
            active: 0,
            history: History::Record,
            carrier: Carrier::new(&config, endpoint, &masters)?,
            masters,
            ring: Ring::new(config.layers, config.ring_places(), kept),
            counts_send: Region::zeroed(row * size_of::<u32>()),
            counts_recv: Region::zeroed(ranks * row * size_of::<u32>()),
            digest_send: Region::zeroed(size_of::<u64>()),
            digest_recv: Region::zeroed(ranks * size_of::<u64>()),
            split_workspace: SplitWorkspace::new(topology),
            loads: vec![0; config.layers * experts],
            observed: vec![Observed::new(historical(), experts); config.layers],
            expert_loads: vec![0; experts],
            config,
        })
    }

    /// What it was built from.
    pub fn config(&self) -> &RuntimeConfig {
        &self.config
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The policy in force.
    pub fn policy(&self) -> &dyn PolicyFactory {
        &*self.policies[self.active].factory
    }

    /// Plans with the policy of this name from now on; all ranks must switch at the same place.
    pub fn set_policy(&mut self, name: &'static str) -> Result<(), RuntimeError> {
        let found = self.policies.iter().position(|policy| policy.factory.name() == name);
        self.active = found.ok_or(RuntimeError::UnknownPolicy(name))?;
        Ok(())
    }

    /// Whether historical policies learn from now on.
    pub fn set_history(&mut self, history: History) {
        self.history = history;
    }

    /// A layer's masters.
    pub fn masters(&self, layer: usize) -> &LayerMasters {
        &self.masters[layer]
    }

    /// Weights in the slots, between two weight syncs.
    pub(crate) fn slot_weights(&self) -> Result<&[f32], RuntimeError> {
        self.carrier.slot_weights()
    }

    /// Weights and gradients in the slots, between two weight syncs and two grad reduces.
    pub(crate) fn slot_weights_and_grads(&mut self) -> Result<(&[f32], &mut [f32]), RuntimeError> {
        self.carrier.slot_weights_and_grads()
    }

    /// Waits until this rank has moved all that it has started: its masters may be written again.
    pub fn drain(&mut self, endpoint: &mut Endpoint) -> Result<(), RuntimeError> {
        self.carrier.drain(endpoint)
    }

    pub(crate) fn kept(&self, place: usize) -> &Kept {
        self.ring.get(place)
    }

    /// The place in the ring where a forward left its plan.
    pub(crate) fn place(&self, at: VirtualLayer) -> Result<usize, RuntimeError> {
        self.ring.kept(at)
    }

    /// The place of a plan that is to be replayed for a batch with these counts (`own`, `[E]`).
    pub(crate) fn replayed(&self, at: VirtualLayer, own: &[u32]) -> Result<usize, RuntimeError> {
        let place = self.ring.kept(at)?;
        let first = self.rank.index() * own.len();
        let planned = &self.ring.get(place).counts[first..first + own.len()];
        match planned.iter().zip(own).position(|(planned, own)| planned != own) {
            Some(expert) => {
                let (planned, got) = (planned[expert], own[expert]);
                Err(RuntimeError::ReplayDiffers { at, expert, planned, got })
            }
            None => Ok(place),
        }
    }

    /// The plan in force for a virtual layer.
    pub fn plan_of(&self, at: VirtualLayer) -> Result<&Plan, RuntimeError> {
        Ok(&self.ring.get(self.ring.kept(at)?).plan)
    }

    /// Frees a virtual layer's place in the ring.
    pub(crate) fn release(&mut self, place: usize) {
        self.ring.release(place);
    }

    /// Forgets all plans in flight.
    pub(crate) fn abandon(&mut self) {
        self.ring.clear();
    }

    /// All-gathers the counts (`own`: tokens of this rank for every expert, `[E]`), plans, and splits. Nothing else is
    /// exchanged: every rank gets the same plan from the same counts.
    pub(crate) fn plan(
        &mut self,
        endpoint: &mut Endpoint,
        at: VirtualLayer,
        own: &[u32],
    ) -> Result<usize, RuntimeError> {
        endpoint.clock.enter(Part::Plan);
        let place = self.ring.claim(at)?;
        let result = self.plan_at(endpoint, at, place, own);
        if result.is_err() {
            self.ring.release(place);
        }
        result.map(|()| place)
    }

    fn plan_at(
        &mut self,
        endpoint: &mut Endpoint,
        at: VirtualLayer,
        place: usize,
        own: &[u32],
    ) -> Result<(), RuntimeError> {
        let (ranks, experts) = (self.config.topology.ranks(), self.config.topology.experts());
        {
            // The last element is the row's sum, so that a damaged table is refused before anything is planned.
            let mut send = self.counts_send.write::<u32>()?;
            send[..experts].copy_from_slice(own);
            send[experts] = own.iter().sum();
        }
        endpoint.all_gather(&self.counts_send, &self.counts_recv, Part::Plan)?;
        let kept = self.ring.get_mut(place);
        let gathered = self.counts_recv.read::<u32>()?;
        let rows = || gathered.chunks_exact(experts + 1);
        kept.counts.clear();
        rows().for_each(|row| kept.counts.extend_from_slice(&row[..experts]));
        let row_sums = rows().map(|row| u64::from(row[experts]));
        let problem = Problem::with_row_sums(&self.config.topology, &kept.counts, row_sums)
            .map_err(|source| RuntimeError::Counts { at, source })?;
        drop(gathered);
        let policy = &mut self.policies[self.active].layers[at.layer];
        policy.solve(&problem, &mut kept.plan).map_err(|source| RuntimeError::Solve { at, source })?;
        kept.split.resize(ranks * kept.plan.instances().len(), 0);
        split_all(&problem, &kept.plan, &mut self.split_workspace, &mut kept.split)
            .map_err(|source| RuntimeError::Split { at, source })?;
        self.carrier.transfers.plan(&kept.plan, &mut kept.transfers);
        endpoint.clock.pause();
        self.bookkeeping(at, place);
        if self.history == History::Record {
            self.observe(at.layer, place);
        }
        if self.config.checked {
            self.check(endpoint, at, place)?;
        }
        Ok(())
    }

    /// What only the clock needs to know of a plan.
    fn bookkeeping(&mut self, at: VirtualLayer, place: usize) {
        let policy = &mut self.policies[self.active];
        let kept = self.ring.get_mut(place);
        self.carrier.transfers.measure(&mut kept.transfers);
        kept.historical = policy.factory.history().is_some();
        let placement = placement_digest(&kept.plan);
        kept.placement_is_new = policy.placements[at.layer] != placement;
        policy.placements[at.layer] = placement;
    }

    /// Tokens of every expert of a layer over the recorded forwards since the last call, `[E]`.
    pub fn take_loads(&mut self, layer: usize) -> Vec<u64> {
        let experts = self.config.topology.experts();
        self.loads[layer * experts..(layer + 1) * experts].iter_mut().map(std::mem::take).collect()
    }

    fn observe(&mut self, layer: usize, place: usize) {
        let experts = self.config.topology.experts();
        let Ok(problem) = Problem::new(&self.config.topology, &self.ring.get(place).counts) else { return };
        problem.expert_loads(&mut self.expert_loads);
        let loads = &mut self.loads[layer * experts..(layer + 1) * experts];
        loads.iter_mut().zip(&self.expert_loads).for_each(|(load, &count)| *load += u64::from(count));
        self.observed[layer].push(&self.expert_loads);
        show(&mut self.policies, layer, &problem);
    }

    /// Expert loads of the microbatches that historical policies were shown last, `[microbatches, E]`: as many as
    /// [`Manager::replay`] needs to bring them where they are. Empty without historical policies.
    pub fn observed(&self, layer: usize) -> &[u32] {
        self.observed[layer].loads()
    }

    /// Shows historical policies what [`Manager::observed`] gave in the run that goes on here; before the first forward.
    pub fn replay(&mut self, layer: usize, loads: &[u32]) -> Result<(), RuntimeError> {
        let (ranks, experts) = (self.config.topology.ranks(), self.config.topology.experts());
        expect_size("loads seen by historical policies", loads.len(), loads.len() / experts * experts)?;
        let mut counts = vec![0; ranks * experts];
        for microbatch in loads.chunks_exact(experts) {
            // Historical policies look at sums over sources only.
            counts[..experts].copy_from_slice(microbatch);
            let at = VirtualLayer { layer, microbatch: 0 };
            let problem = Problem::new(&self.config.topology, &counts);
            let problem = problem.map_err(|source| RuntimeError::Counts { at, source })?;
            show(&mut self.policies, layer, &problem);
            self.observed[layer].push(microbatch);
        }
        Ok(())
    }

    fn check(&mut self, endpoint: &mut Endpoint, at: VirtualLayer, place: usize) -> Result<(), RuntimeError> {
        let kept = self.ring.get(place);
        let policy = &self.policies[self.active].layers[at.layer];
        let broken = |violation| RuntimeError::Plan { at, policy: policy.name(), violation };
        let problem =
            Problem::new(&self.config.topology, &kept.counts).map_err(|source| RuntimeError::Counts { at, source })?;
        check_plan(&problem, &kept.plan, &policy.rules()).map_err(broken)?;
        check_split(&problem, &kept.plan, &kept.split).map_err(broken)?;
        // Of the counts, too: tables that differ may give one plan, and different splits.
        let ours = digest_plan(&kept.plan) ^ digest_problem(&problem).rotate_left(32);
        self.digest_send.write::<u64>()?[0] = ours;
        let op = Operation::AllGather { send: Span::whole(&self.digest_send), recv: Span::whole(&self.digest_recv) };
        endpoint.aside(op, 0)?;
        let all = self.digest_recv.read::<u64>()?;
        match all.iter().position(|&theirs| theirs != ours) {
            Some(rank) => Err(RuntimeError::DigestMismatch { at, rank, ours, theirs: all[rank] }),
            None => Ok(()),
        }
    }

    /// Starts the weight sync of a kept plan. The backward's is not charged to a historical placement (its replicas have memory
    /// of their own in every layer), the forward's only when the placement is new.
    pub(crate) fn start_sync(
        &mut self,
        endpoint: &mut Endpoint,
        layer: usize,
        place: usize,
        direction: Direction,
    ) -> Result<Syncing, RuntimeError> {
        let kept = self.ring.get(place);
        let charged = !kept.historical || (direction == Direction::Forward && kept.placement_is_new);
        self.carrier.start_sync(endpoint, layer, &kept.transfers, charged)
    }

    /// Waits until the slots have their weights, and gives the moment of virtual time from which they do.
    pub(crate) fn finish_sync(&mut self, endpoint: &mut Endpoint, syncing: Syncing) -> Result<Deadline, RuntimeError> {
        self.carrier.finish_sync(endpoint, syncing)
    }

    /// Virtual time that weight syncs took since the last call, from start to end, hidden or not.
    pub fn take_synced_ns(&mut self) -> u64 {
        self.carrier.take_synced_ns()
    }

    /// Where this rank's physical experts are.
    pub(crate) fn places(&self) -> Places {
        self.carrier.places()
    }

    /// Starts the grad reduce of a kept plan; it runs beside the computation until [`Manager::join_reduce`].
    pub(crate) fn start_reduce(
        &mut self,
        endpoint: &mut Endpoint,
        layer: usize,
        place: usize,
    ) -> Result<(), RuntimeError> {
        self.carrier.start_reduce(endpoint, layer, &self.ring.get(place).transfers)
    }

    /// Waits for the grad reduce that is under way, if any: before the slots' gradients are written again.
    pub fn join_reduce(&mut self, endpoint: &mut Endpoint) -> Result<(), RuntimeError> {
        self.carrier.join_reduce(endpoint)
    }
}

/// Shows a layer's microbatch to the policies that learn from it.
fn show(policies: &mut [PolicyState], layer: usize, problem: &Problem<'_>) {
    for policy in policies.iter_mut().filter(|policy| policy.factory.history().is_some()) {
        policy.layers[layer].observe(problem);
    }
}

pub(crate) fn expect_size(what: &'static str, got: usize, expected: usize) -> Result<(), RuntimeError> {
    if got == expected { Ok(()) } else { Err(RuntimeError::Size { what, got, expected }) }
}

/// A digest of where instances are, whatever their quotas (FNV-1a over ranks and physical indices).
fn placement_digest(plan: &Plan) -> u64 {
    let words = plan.instances().iter().flat_map(|i| [i.rank.index() as u64, i.physical.index() as u64]);
    words.fold(0xCBF2_9CE4_8422_2325, |hash, word| (hash ^ word).wrapping_mul(0x0000_0100_0000_01B3))
}
