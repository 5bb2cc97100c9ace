//! One MoE layer over the EP group, forward and backward.
//!
//! ```text
//! forward:  count -> all-gather -> plan -> weight sync | assign, pack -> dispatch -> experts -> combine
//! backward: weight sync (restore) | pack -> dispatch -> experts' gradients -> combine -> grad reduce (beside what follows)
//! ```
//!
//! Outputs do not depend on the plan, bit for bit: a row's result does not depend on which rows share its GEMM
//! ([`ultraep_device::ROW_TILE`]), replicas hold the same bits as masters, and a token's rows are summed in the order of
//! its choices. Weight gradients are sums over rows, so their rounding follows the plan; for one plan they are the same on
//! every run.

use ultraep_device::{ExpertWorkspace, expert::Backward, math};
use ultraep_fabric::{Operation, Region, Span, WindowId};
use ultraep_plan::TokenChoice;

use crate::config::window;
use crate::exchange::{Exchange, Sizes};
use crate::manager::{Direction, Manager, expect_size};
use crate::{Endpoint, LayerMasters, LayerRecord, Part, RuntimeConfig, RuntimeError, VirtualLayer};

/// What a forward is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Training: what backward needs is kept.
    Train(Recompute),
    /// Training, a forward run again before its backward because a framework recomputes whole layers: the kept plan is
    /// replayed, nothing is planned, and what backward needs is kept anew. The tokens and their choices must be the same.
    Replay(Recompute),
    /// Inference: nothing is kept.
    Inference,
}

/// What backward computes again instead of keeping it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing: experts' inputs and first products are kept.
    #[default]
    Nothing,
    /// The experts' forward: only the plan and the returned rows are kept; backward dispatches the rows again under the
    /// same plan and multiplies again.
    Experts,
}

/// The router's choice for a batch of tokens.
#[derive(Clone, Copy, Debug)]
pub struct Routing<'a> {
    /// Chosen logical experts, `[tokens, top_k]`, distinct for a token.
    pub experts: &'a [u32],
    /// Weight of each choice, `[tokens, top_k]`.
    pub gates: &'a [f32],
}

/// What a forward keeps for its backward, beside the plan.
#[derive(Debug, Default)]
struct Saved {
    exchange: Exchange,
    /// Row of each (token, choice) in the send order.
    rows: Vec<u32>,
    /// Experts' inputs, grouped.
    input: Vec<f32>,
    /// First products, grouped.
    fc1: Vec<f32>,
    /// Experts' outputs as they came back, in send order.
    returned: Vec<f32>,
    recompute: Recompute,
}

/// The expert-parallel part of all MoE layers of one rank.
pub struct ExpertParallel {
    /// The way to the other ranks, and the clock.
    pub endpoint: Endpoint,
    /// Plans and expert state.
    pub manager: Manager,
    /// By the place of the plan in the balancer's ring.
    saved: Vec<Saved>,
    physical_per_rank: usize,
    counts: Vec<u32>,
    ids: Vec<i32>,
    targets: Vec<i32>,
    next_row: Vec<u32>,
    send: Region,
    back: Region,
    expert_rows: Region,
    source_rows: Region,
    grouped_out: Vec<f32>,
    grouped_grad: Vec<f32>,
    workspace: ExpertWorkspace,
    records: Option<Vec<LayerRecord>>,
}

impl ExpertParallel {
    /// Over `endpoint`, whose fabric was started with [`RuntimeConfig::windows`]; `masters` as for [`Manager::new`].
    pub fn new(
        config: RuntimeConfig,
        mut endpoint: Endpoint,
        masters: Vec<LayerMasters>,
    ) -> Result<Self, RuntimeError> {
        let manager = Manager::new(config.clone(), &mut endpoint, masters)?;
        let topology = &config.topology;
        let physical_per_rank = config.balancer()?.physical_per_rank();
        let rows_bytes = config.rows_per_rank() * config.shape.hidden * size_of::<f32>();
        let mut window = |id| endpoint.fabric().window(id).ok_or(RuntimeError::NotHostMemory);
        Ok(Self {
            expert_rows: window(window::EXPERT_ROWS)?,
            source_rows: window(window::SOURCE_ROWS)?,
            endpoint,
            manager,
            saved: (0..config.layers * config.max_microbatches.max(1)).map(|_| Saved::default()).collect(),
            physical_per_rank,
            counts: vec![0; topology.experts()],
            ids: Vec::with_capacity(config.rows_per_rank()),
            targets: Vec::with_capacity(config.rows_per_rank()),
            next_row: Vec::new(),
            send: Region::zeroed(rows_bytes),
            back: Region::zeroed(rows_bytes * topology.ranks()),
            grouped_out: Vec::new(),
            grouped_grad: Vec::new(),
            workspace: ExpertWorkspace::default(),
            records: None,
        })
    }

    fn config(&self) -> &RuntimeConfig {
        self.manager.config()
    }

    /// Records every forward from now on, until [`ExpertParallel::take_records`].
    pub fn record(&mut self) {
        self.records.get_or_insert_default();
    }

    /// The records since the last call, and whether to go on is unchanged.
    pub fn take_records(&mut self) -> Vec<LayerRecord> {
        self.records.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The way to the other ranks, when these experts are done with.
    pub fn into_endpoint(self) -> Endpoint {
        self.endpoint
    }

    /// Forgets all forwards in flight.
    pub fn abandon(&mut self) {
        self.manager.abandon();
    }

    /// `y[t] = sum over k of gates[t,k] * expert[experts[t,k]](x[t])`, for `x` and `y` `[tokens, d]`.
    pub fn forward(
        &mut self,
        at: VirtualLayer,
        pass: Pass,
        routing: Routing<'_>,
        x: &[f32],
        y: &mut [f32],
    ) -> Result<(), RuntimeError> {
        if pass != Pass::Inference && !self.config().trains() {
            return Err(RuntimeError::InferenceOnly { at });
        }
        self.check_sizes(routing, x, y)?;
        self.endpoint.clock.enter(Part::Router);
        self.count(routing.experts)?;
        let place = match pass {
            Pass::Replay(_) => self.manager.replayed(at, &self.counts)?,
            Pass::Train(_) | Pass::Inference => self.plan(at)?,
        };
        let mut saved = std::mem::take(&mut self.saved[place]);
        let result = self.forward_planned(at, &mut saved, pass, routing, x, y);
        self.saved[place] = saved;
        if result.is_err() || pass == Pass::Inference {
            self.manager.release(at);
        }
        result
    }

    /// Plans for the counted batch; gives the place where the plan, and what is saved beside it, is kept.
    fn plan(&mut self, at: VirtualLayer) -> Result<usize, RuntimeError> {
        let place = self.manager.plan(&mut self.endpoint, at, &self.counts)?;
        if let Some(records) = &mut self.records {
            let (policy, planned) = (self.manager.policy().name(), self.manager.planned(at)?);
            records.push(LayerRecord::new(at, policy, planned, &self.manager.config().topology));
        }
        Ok(place)
    }

    fn check_sizes(&self, routing: Routing<'_>, x: &[f32], y: &[f32]) -> Result<(), RuntimeError> {
        let config = self.config();
        let tokens = x.len() / config.shape.hidden;
        expect_size("input", x.len(), tokens.min(config.tokens_per_rank) * config.shape.hidden)?;
        expect_size("output", y.len(), x.len())?;
        expect_size("chosen experts", routing.experts.len(), tokens * config.top_k)?;
        expect_size("gates", routing.gates.len(), tokens * config.top_k)
    }

    /// Takes the batch's choices (or forces balanced ones, for the ideal) and counts them.
    fn count(&mut self, experts: &[u32]) -> Result<(), RuntimeError> {
        let config = self.manager.config();
        let (topology, top_k) = (&config.topology, config.top_k);
        self.ids.clear();
        if let Some(i) = experts.iter().position(|&e| e as usize >= topology.experts()) {
            let (token, expert) = (i / top_k, experts[i]);
            return Err(RuntimeError::Expert { token, expert, experts: topology.experts() });
        }
        let (rank, policy) = (self.manager.rank(), self.manager.policy());
        self.ids.extend(experts.iter().enumerate().map(|(i, &chosen)| {
            let choice = TokenChoice { rank, token: i / top_k, k: i % top_k, top_k };
            policy.forced_choice(topology, choice).map_or(chosen as i32, |expert| expert.index() as i32)
        }));
        self.counts.fill(0);
        self.ids.iter().for_each(|&id| self.counts[id as usize] += 1);
        Ok(())
    }

    fn forward_planned(
        &mut self,
        at: VirtualLayer,
        saved: &mut Saved,
        pass: Pass,
        routing: Routing<'_>,
        x: &[f32],
        y: &mut [f32],
    ) -> Result<(), RuntimeError> {
        let syncing = self.manager.start_sync(&mut self.endpoint, at, Direction::Forward)?;
        self.endpoint.clock.enter(Part::Reroute);
        self.assign(at, saved)?;
        self.pack(saved, |row, token, _| row.copy_from_slice(token), x)?;
        let synced = self.manager.finish_sync(&mut self.endpoint, syncing)?;
        self.endpoint.join(synced, Part::WeightSync);
        self.dispatch(&saved.exchange)?;
        self.group_arrived(&saved.exchange, &mut saved.input)?;

        self.endpoint.clock.enter(Part::Experts);
        let shape = self.config().shape;
        let (d, fc1_width) = (shape.hidden, 2 * shape.intermediate);
        saved.fc1.resize(saved.exchange.grouped_rows * fc1_width, 0.0);
        self.grouped_out.resize(saved.exchange.grouped_rows * d, 0.0);
        {
            let masters = self.manager.masters(at.layer).weights.read::<f32>()?;
            let (places, slots) = (self.manager.places(), self.manager.slot_weights()?);
            for local in &saved.exchange.local {
                let rows = local.group.first_row..local.group.first_row + local.group.padded_rows();
                let (in_slot, range) = places.of(local.physical);
                shape.forward(
                    if in_slot { &slots[range] } else { &masters[range] },
                    &saved.input[rows.start * d..rows.end * d],
                    &mut saved.fc1[rows.start * fc1_width..rows.end * fc1_width],
                    &mut self.grouped_out[rows.start * d..rows.end * d],
                    &mut self.workspace,
                );
            }
        }
        self.endpoint.clock.enter(Part::AllToAll);
        let grouped = std::mem::take(&mut self.grouped_out);
        self.send_back(&saved.exchange, &grouped)?;
        self.grouped_out = grouped;
        let returned = self.source_rows.read::<f32>()?;
        let top_k = self.config().top_k;
        for ((y, gates), rows) in
            y.chunks_exact_mut(d).zip(routing.gates.chunks_exact(top_k)).zip(saved.rows.chunks_exact(top_k))
        {
            y.fill(0.0);
            for (&gate, &row) in gates.iter().zip(rows) {
                let row = row as usize * d;
                math::add_scaled(y, gate, &returned[row..row + d]);
            }
        }
        if let Pass::Train(recompute) | Pass::Replay(recompute) = pass {
            saved.recompute = recompute;
            saved.returned.clear();
            saved.returned.extend_from_slice(&returned[..routing.experts.len() * d]);
            if recompute == Recompute::Experts {
                (saved.input, saved.fc1) = (Vec::new(), Vec::new());
            }
        }
        drop(returned);
        self.endpoint.clock.pause();
        Ok(())
    }

    /// The physical expert of every (token, choice), and its row in the send order.
    fn assign(&mut self, at: VirtualLayer, saved: &mut Saved) -> Result<(), RuntimeError> {
        self.targets.resize(self.ids.len(), 0);
        self.manager.reroute(at, &self.ids, &mut self.targets)?;
        let (planned, config) = (self.manager.planned(at)?, self.manager.config());
        let sizes = Sizes {
            ranks: config.topology.ranks(),
            physical_per_rank: self.physical_per_rank,
            row_bytes: config.shape.hidden * size_of::<f32>(),
        };
        saved.exchange.lay_out(planned.plan(), planned.split(), self.manager.rank(), sizes);
        self.next_row.clone_from(&saved.exchange.first_row);
        saved.rows.clear();
        for &target in &self.targets {
            let next = &mut self.next_row[target as usize];
            saved.rows.push(*next);
            *next += 1;
        }
        Ok(())
    }

    /// Fills the send buffer: `write(row, token's row of source, index of (token, choice))`.
    fn pack(
        &mut self,
        saved: &Saved,
        write: impl Fn(&mut [f32], &[f32], usize),
        source: &[f32],
    ) -> Result<(), RuntimeError> {
        let (d, top_k) = (self.config().shape.hidden, self.config().top_k);
        let mut send = self.send.write::<f32>()?;
        for (i, &row) in saved.rows.iter().enumerate() {
            let (token, at) = (i / top_k * d, row as usize * d);
            write(&mut send[at..at + d], &source[token..token + d], i);
        }
        Ok(())
    }

    /// All-to-all from sources to experts.
    fn dispatch(&mut self, exchange: &Exchange) -> Result<(), RuntimeError> {
        let send = Span::part(&self.send, 0, exchange.send_bytes.iter().sum());
        self.all_to_all(send, &exchange.send_bytes, window::EXPERT_ROWS, &exchange.recv_bytes, exchange.busiest_rows)
    }

    fn all_to_all(
        &mut self,
        send: Span,
        send_bytes: &[usize],
        recv: WindowId,
        recv_bytes: &[usize],
        busiest_rows: u64,
    ) -> Result<(), RuntimeError> {
        let bytes = busiest_rows * (self.config().shape.hidden * size_of::<f32>()) as u64;
        let op = Operation::AllToAll { send, send_bytes, recv, recv_bytes };
        self.endpoint.collective(op, Part::AllToAll, bytes)?;
        Ok(())
    }

    fn group_arrived(&mut self, exchange: &Exchange, grouped: &mut Vec<f32>) -> Result<(), RuntimeError> {
        self.endpoint.clock.enter(Part::AllToAll);
        exchange.group(&self.expert_rows.read::<f32>()?, grouped, self.config().shape.hidden);
        Ok(())
    }

    /// All-to-all from experts back to sources.
    fn send_back(&mut self, exchange: &Exchange, grouped: &[f32]) -> Result<(), RuntimeError> {
        let d = self.config().shape.hidden;
        exchange.ungroup(grouped, &mut self.back.write::<f32>()?, d);
        let send = Span::part(&self.back, 0, exchange.arrived_rows * d * size_of::<f32>());
        self.all_to_all(send, &exchange.recv_bytes, window::SOURCE_ROWS, &exchange.send_bytes, exchange.busiest_rows)
    }

    /// Gradients of a forward: `dx` (`[tokens, d]`) and `d_gates` (`[tokens, top_k]`) are overwritten, weight gradients
    /// are added to the masters' by the time of [`ExpertParallel::finish_backward`]. `x` is the forward's input. Inputs of a
    /// wrong size are refused before anything is exchanged, and the forward's plan stays.
    pub fn backward(
        &mut self,
        at: VirtualLayer,
        gates: &[f32],
        x: &[f32],
        dy: &[f32],
        dx: &mut [f32],
        d_gates: &mut [f32],
    ) -> Result<(), RuntimeError> {
        let place = self.manager.place(at)?;
        let chosen = self.saved[place].rows.len();
        let elements = chosen / self.config().top_k * self.config().shape.hidden;
        expect_size("gates", gates.len(), chosen)?;
        expect_size("input", x.len(), elements)?;
        expect_size("gradient of the output", dy.len(), elements)?;
        expect_size("gradient of the input", dx.len(), elements)?;
        expect_size("gradient of the gates", d_gates.len(), chosen)?;
        let mut saved = std::mem::take(&mut self.saved[place]);
        let result = self.backward_planned(at, &mut saved, (gates, x, dy), (dx, d_gates));
        self.saved[place] = saved;
        self.manager.release(at);
        result
    }

    fn backward_planned(
        &mut self,
        at: VirtualLayer,
        saved: &mut Saved,
        (gates, x, dy): (&[f32], &[f32], &[f32]),
        (dx, d_gates): (&mut [f32], &mut [f32]),
    ) -> Result<(), RuntimeError> {
        let (shape, top_k) = (self.config().shape, self.config().top_k);
        let (d, fc1_width) = (shape.hidden, 2 * shape.intermediate);
        let restoring = self.manager.start_sync(&mut self.endpoint, at, Direction::Backward)?;
        self.endpoint.clock.enter(Part::Reroute);
        for (i, (d_gate, &row)) in d_gates.iter_mut().zip(&saved.rows).enumerate() {
            let (token, row) = (i / top_k * d, row as usize * d);
            *d_gate = math::dot(&dy[token..token + d], &saved.returned[row..row + d]);
        }
        if saved.recompute == Recompute::Experts {
            self.pack(saved, |row, token, _| row.copy_from_slice(token), x)?;
            self.dispatch(&saved.exchange)?;
            self.group_arrived(&saved.exchange, &mut saved.input)?;
            self.endpoint.clock.enter(Part::Reroute);
        }
        self.pack(saved, |row, token, i| math::scale_into(row, gates[i], token), dy)?;
        let restored = self.manager.finish_sync(&mut self.endpoint, restoring)?;
        self.endpoint.join(restored, Part::WeightSync);
        self.dispatch(&saved.exchange)?;
        let mut d_output = std::mem::take(&mut self.grouped_out);
        self.group_arrived(&saved.exchange, &mut d_output)?;
        self.manager.join_reduce(&mut self.endpoint)?;

        self.endpoint.clock.enter(Part::Experts);
        let mut d_input = std::mem::take(&mut self.grouped_grad);
        d_input.resize(saved.exchange.grouped_rows * d, 0.0);
        saved.fc1.resize(saved.exchange.grouped_rows * fc1_width, 0.0);
        {
            let masters = self.manager.masters(at.layer).clone();
            let (master_weights, mut master_grads) = (masters.weights.read::<f32>()?, masters.grads.write::<f32>()?);
            let places = self.manager.places();
            let (slot_weights, slot_grads) = self.manager.slot_weights_and_grads()?;
            for local in &saved.exchange.local {
                let rows = local.group.first_row..local.group.first_row + local.group.padded_rows();
                if rows.is_empty() {
                    continue;
                }
                let (in_slot, range) = places.of(local.physical);
                let weights = if in_slot { &slot_weights[range.clone()] } else { &master_weights[range.clone()] };
                let input = &saved.input[rows.start * d..rows.end * d];
                let fc1 = &mut saved.fc1[rows.start * fc1_width..rows.end * fc1_width];
                if saved.recompute == Recompute::Experts {
                    shape.recompute(weights, input, fc1);
                }
                let work = Backward {
                    weights,
                    weight_grad: if in_slot { &mut slot_grads[range] } else { &mut master_grads[range] },
                    input,
                    fc1,
                    d_output: &d_output[rows.start * d..rows.end * d],
                    d_input: &mut d_input[rows.start * d..rows.end * d],
                };
                shape.backward(work, &mut self.workspace);
            }
        }
        self.endpoint.clock.enter(Part::AllToAll);
        self.send_back(&saved.exchange, &d_input)?;
        (self.grouped_out, self.grouped_grad) = (d_output, d_input);
        {
            let returned = self.source_rows.read::<f32>()?;
            for (dx, rows) in dx.chunks_exact_mut(d).zip(saved.rows.chunks_exact(top_k)) {
                dx.fill(0.0);
                for &row in rows {
                    let row = row as usize * d;
                    math::add(dx, &returned[row..row + d]);
                }
            }
        }
        self.manager.start_reduce(&mut self.endpoint, at)
    }

    /// Waits for the last grad reduce: after this the masters' gradients are complete. On all ranks at the same place.
    pub fn finish_backward(&mut self) -> Result<(), RuntimeError> {
        self.manager.join_reduce(&mut self.endpoint)?;
        self.manager.drain(&mut self.endpoint)
    }
}
