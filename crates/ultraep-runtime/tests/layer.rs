//! One MoE layer over a group of ranks, against a sequential oracle and against itself under other policies.

mod noise;

use std::time::Duration;

use noise::noise;
use ultraep_baselines::{PolicyKind, PolicyParams, Recipe};
use ultraep_device::{ExpertShape, ExpertWorkspace, expert::Backward};
use ultraep_fabric::{
    Capabilities, Completion, Fabric, FabricError, GroupSpec, Operation, Region, Ticket, WindowId, run_threads,
};
use ultraep_plan::{Rank, Topology, TopologySpec};
use ultraep_runtime::{
    Endpoint, ExpertParallel, History, LayerMasters, LayerRecord, Link, Pass, Recompute, Routing, RuntimeConfig,
    RuntimeError, TransferConfig, VirtualLayer,
};

const SHAPE: ExpertShape = ExpertShape { hidden: 16, intermediate: 8 };
const TOKENS: usize = 40;
const TOP_K: usize = 2;

#[derive(Clone)]
struct Case {
    config: RuntimeConfig,
    pass: Pass,
}

fn case(ranks: usize, experts: usize, slots: usize, kinds: &[PolicyKind]) -> Case {
    let spec = TopologySpec { ranks, experts, domain_ranks: ranks, slots_per_rank: slots };
    let config = RuntimeConfig {
        topology: Topology::new(spec).unwrap(),
        layers: 2,
        max_microbatches: 2,
        shape: SHAPE,
        tokens_per_rank: TOKENS,
        top_k: TOP_K,
        policies: Recipe::all(kinds, small_quota()),
        link: Link::default(),
        transfer: TransferConfig::default(),
        checked: true,
    };
    Case { config, pass: Pass::Train(Recompute::Nothing) }
}

fn small_quota() -> PolicyParams {
    PolicyParams::default()
}

fn weights(layer: usize, expert: usize) -> Vec<f32> {
    noise(SHAPE.weight_len(), (layer * 1000 + expert + 1) as u64)
}

/// Skewed choices: half of all tokens take expert 0 first.
fn choices(rank: usize, experts: usize) -> Vec<u32> {
    let pick = |t: usize| {
        let first = if t.is_multiple_of(2) { 0 } else { (t * 7 + rank * 3) % experts };
        let second = (first + 1 + (t * 5 + rank) % (experts - 1)) % experts;
        [first as u32, second as u32]
    };
    (0..TOKENS).flat_map(pick).collect()
}

struct Inputs {
    x: Vec<f32>,
    gates: Vec<f32>,
    dy: Vec<f32>,
    chosen: Vec<u32>,
}

fn inputs(rank: usize, experts: usize) -> Inputs {
    Inputs {
        x: noise(TOKENS * SHAPE.hidden, 100 + rank as u64),
        gates: noise(TOKENS * TOP_K, 200 + rank as u64),
        dy: noise(TOKENS * SHAPE.hidden, 300 + rank as u64),
        chosen: choices(rank, experts),
    }
}

#[derive(Debug, PartialEq)]
struct RankResult {
    y: Vec<f32>,
    dx: Vec<f32>,
    d_gates: Vec<f32>,
    grads: Vec<f32>,
    records: Vec<LayerRecord>,
}

fn runtime(case: &Case, fabric: Box<dyn Fabric>) -> Result<ExpertParallel, RuntimeError> {
    let own = case.config.topology.masters(fabric.rank());
    let layer = |layer| LayerMasters {
        weights: Region::from_vec(own.clone().flat_map(|e| weights(layer, e)).collect::<Vec<_>>()),
        grads: Region::zeroed(own.len() * SHAPE.weight_bytes()),
    };
    let masters = (0..case.config.layers).map(layer).collect();
    ExpertParallel::new(case.config.clone(), Endpoint::new(fabric, case.config.link), masters)
}

fn group(case: &Case) -> GroupSpec {
    GroupSpec {
        windows: case.config.windows(),
        timeout: Duration::from_secs(20),
        cores: 2,
        ..GroupSpec::new(case.config.topology.ranks())
    }
}

/// Two microbatches through two layers, both forwards before both backwards.
fn run(case: &Case) -> Vec<RankResult> {
    run_on(case, |fabric| fabric)
}

/// The same over what `wrap` makes of the fabric.
fn run_on(case: &Case, wrap: impl Fn(Box<dyn Fabric>) -> Box<dyn Fabric> + Sync) -> Vec<RankResult> {
    let experts = case.config.topology.experts();
    let result = run_threads(&group(case), |fabric| {
        let mut moe = runtime(case, wrap(fabric))?;
        moe.record();
        let Inputs { x, gates, dy, chosen } = inputs(moe.manager.rank().index(), experts);
        let routing = Routing { experts: &chosen, gates: &gates };
        let (mut y, mut dx, mut d_gates) = (vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; gates.len()]);
        for microbatch in 0..2 {
            for layer in 0..2 {
                moe.forward(VirtualLayer { layer, microbatch }, case.pass, routing, &x, &mut y)?;
            }
        }
        for microbatch in 0..2 {
            for layer in [1, 0] {
                moe.backward(VirtualLayer { layer, microbatch }, &gates, &x, &dy, &mut dx, &mut d_gates)?;
            }
        }
        moe.finish_backward()?;
        assert!(moe.endpoint.finish_step()?.total_ns > 0);
        let grads = moe.manager.masters(1).grads.read::<f32>()?.to_vec();
        let records = moe.take_records();
        moe.endpoint.leave()?;
        Ok::<_, RuntimeError>(RankResult { y, dx, d_gates, grads, records })
    });
    result.unwrap_or_else(|error| panic!("{error}"))
}

/// One row through an expert, forward and backward, alone in a tile: the output row and the weight gradient.
fn one_row(expert: usize, row: &[f32], d_row: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let d = SHAPE.hidden;
    let tile = |row: &[f32]| [row, &vec![0.0; 7 * d]].concat();
    let (input, d_output, w) = (tile(row), tile(d_row), weights(1, expert));
    let (mut fc1, mut out) = (vec![0.0; 8 * 2 * SHAPE.intermediate], vec![0.0; 8 * d]);
    let mut ws = ExpertWorkspace::default();
    SHAPE.forward(&w, &input, &mut fc1, &mut out, &mut ws);
    let (mut grad, mut d_input) = (vec![0.0; w.len()], vec![0.0; 8 * d]);
    let work = Backward {
        weights: &w,
        weight_grad: &mut grad,
        input: &input,
        fc1: &mut fc1,
        d_output: &d_output,
        d_input: &mut d_input,
    };
    SHAPE.backward(work, &mut ws);
    (out[..d].to_vec(), grad)
}

/// Outputs of a rank's tokens, and the gradients of all experts' weights in `f64`, computed row by row on one rank.
fn oracle(ranks: usize, experts: usize) -> (Vec<Vec<f32>>, Vec<Vec<f64>>) {
    let d = SHAPE.hidden;
    let mut outputs = vec![vec![0.0; TOKENS * d]; ranks];
    let mut grads = vec![vec![0f64; SHAPE.weight_len()]; experts];
    for (rank, y) in outputs.iter_mut().enumerate() {
        let Inputs { x, gates, dy, chosen } = inputs(rank, experts);
        for (i, (&expert, &gate)) in chosen.iter().zip(&gates).enumerate() {
            let token = i / TOP_K * d;
            let d_row: Vec<f32> = dy[token..token + d].iter().map(|g| g * gate).collect();
            let (out, grad) = one_row(expert as usize, &x[token..token + d], &d_row);
            y[token..token + d].iter_mut().zip(out).for_each(|(y, o)| *y += gate * o);
            let sum = &mut grads[expert as usize];
            sum.iter_mut().zip(grad).for_each(|(s, g)| *s += 2.0 * f64::from(g));
        }
    }
    (outputs, grads)
}

fn relative_difference(a: &[f32], b: &[f64]) -> f64 {
    let squares = a.iter().zip(b).map(|(&a, b)| ((f64::from(a) - b).powi(2), b * b));
    let (difference, norm) = squares.fold((0.0, 0.0), |(d, n), (x, y)| (d + x, n + y));
    (difference / f64::max(norm, 1e-30)).sqrt()
}

fn exact_policies() -> impl Iterator<Item = PolicyKind> {
    PolicyKind::ALL.into_iter().filter(|kind| !kind.forces_routing())
}

#[test]
fn outputs_are_the_oracles_bit_for_bit_and_gradients_agree_under_every_policy() {
    for (ranks, experts, slots) in [(4, 8, 2), (1, 4, 0), (5, 7, 1)] {
        let (outputs, grads) = oracle(ranks, experts);
        for kind in exact_policies() {
            let case = case(ranks, experts, slots, &[kind]);
            for (rank, result) in run(&case).iter().enumerate() {
                assert!(result.y == outputs[rank], "{kind}: outputs of rank {rank} of {ranks}");
                let own = case.config.topology.masters(Rank::new(rank));
                for (expert, got) in own.zip(result.grads.chunks_exact(SHAPE.weight_len())) {
                    let difference = relative_difference(got, &grads[expert]);
                    assert!(difference < 1e-5, "{kind}: gradient of expert {expert} differs by {difference:e}");
                }
            }
        }
    }
}

#[test]
fn input_and_gate_gradients_do_not_depend_on_the_policy() {
    let base = run(&case(4, 8, 2, &[PolicyKind::EplbExact]));
    assert!(base[0].records[0].imbalance_before() > 1.5, "the case must be skewed");
    for kind in exact_policies() {
        for (rank, (a, b)) in base.iter().zip(run(&case(4, 8, 2, &[kind]))).enumerate() {
            assert!(a.dx == b.dx, "{kind}: rank {rank}");
            assert!(a.d_gates == b.d_gates, "{kind}: rank {rank}");
        }
    }
}

#[test]
fn recomputation_replays_the_plan_and_changes_no_bit() {
    let mut case = case(4, 8, 2, &[PolicyKind::EplbExact]);
    let kept = run(&case);
    assert!(kept[0].records.iter().any(|r| r.replicas() > 0), "the case must make replicas");
    case.pass = Pass::Train(Recompute::Experts);
    assert!(kept == run(&case), "a bit changed");
}

#[test]
fn a_forward_run_again_replays_its_plan_even_after_other_layers() {
    let case = case(4, 8, 2, &[PolicyKind::EplbExact, PolicyKind::None]);
    let result = run_threads(&group(&case), |fabric| {
        let mut moe = runtime(&case, fabric)?;
        moe.record();
        let Inputs { x, gates, dy, chosen } = inputs(moe.manager.rank().index(), 8);
        let routing = Routing { experts: &chosen, gates: &gates };
        let at = VirtualLayer { layer: 0, microbatch: 3 };
        let (mut y, mut again, mut other) = (vec![0.0; x.len()], vec![0.0; x.len()], vec![0.0; x.len()]);
        let replay = Pass::Replay(Recompute::Nothing);
        let none_yet = moe.forward(at, replay, routing, &x, &mut y);
        assert!(matches!(none_yet, Err(RuntimeError::NoPlan { .. })), "{none_yet:?}");
        moe.forward(at, case.pass, routing, &x, &mut y)?;
        // Another layer takes the slots, and another policy is in force when the forward runs again.
        moe.forward(VirtualLayer { layer: 1, microbatch: 3 }, case.pass, routing, &x, &mut other)?;
        moe.manager.set_policy(PolicyKind::None.name())?;
        let digest = ultraep_plan::digest_plan(moe.manager.plan_of(at)?);
        moe.forward(at, replay, routing, &x, &mut again)?;
        assert!(y == again, "a bit changed");
        assert_eq!(digest, ultraep_plan::digest_plan(moe.manager.plan_of(at)?));
        assert_eq!(moe.take_records().len(), 2, "a replay plans nothing");
        let mut swapped = chosen.clone();
        swapped[0] = (0..8).find(|e| !swapped[..2].contains(e)).unwrap();
        let wrong = Routing { experts: &swapped, gates: &gates };
        let refused = moe.forward(at, replay, wrong, &x, &mut again);
        assert!(matches!(refused, Err(RuntimeError::ReplayDiffers { .. })), "{refused:?}");
        let (mut dx, mut d_gates) = (vec![0.0; x.len()], vec![0.0; gates.len()]);
        moe.backward(at, &gates, &x, &dy, &mut dx, &mut d_gates)?;
        moe.finish_backward()?;
        moe.endpoint.leave()?;
        Ok::<_, RuntimeError>(dx)
    });
    let replayed = result.unwrap_or_else(|error| panic!("{error}"));
    let plain = run(&case);
    for (rank, (dx, result)) in replayed.iter().zip(plain).enumerate() {
        // The plain run's last backward is of layer 0.
        assert!(*dx == result.dx, "rank {rank}: the gradient differs");
    }
}

#[test]
fn two_runs_are_equal_bit_for_bit() {
    let case = case(4, 8, 2, &[PolicyKind::EplbExact]);
    assert!(run(&case) == run(&case), "the runs differ");
}

#[test]
fn the_ideal_balances_every_rank() {
    for record in &run(&case(4, 8, 2, &[PolicyKind::Ideal]))[0].records {
        assert_eq!(record.imbalance_after(), 1.0);
    }
}

#[test]
fn a_full_ring_names_the_layer_and_inference_keeps_nothing() {
    let case = case(2, 4, 1, &[PolicyKind::EplbExact]);
    let result = run_threads(&group(&case), |fabric| {
        let mut moe = runtime(&case, fabric)?;
        moe.manager.set_history(History::Frozen);
        let Inputs { x, gates, chosen, .. } = inputs(moe.manager.rank().index(), 4);
        let routing = Routing { experts: &chosen, gates: &gates };
        let mut y = vec![0.0; x.len()];
        for microbatch in 0..5 {
            moe.forward(VirtualLayer { layer: 1, microbatch }, Pass::Inference, routing, &x, &mut y)?;
        }
        for microbatch in 0..2 {
            moe.forward(VirtualLayer { layer: 1, microbatch }, case.pass, routing, &x, &mut y)?;
        }
        let full = moe.forward(VirtualLayer { layer: 1, microbatch: 2 }, case.pass, routing, &x, &mut y);
        let Err(RuntimeError::RingExhausted { at, max_microbatches: 2 }) = full else { panic!("{full:?}") };
        assert_eq!(at.layer, 1);
        let wrong = Routing { experts: &vec![9; chosen.len()], gates: &gates };
        let refused = moe.forward(VirtualLayer { layer: 0, microbatch: 0 }, case.pass, wrong, &x, &mut y);
        assert!(matches!(refused, Err(RuntimeError::Expert { token: 0, expert: 9, experts: 4 })), "{refused:?}");
        let (mut dx, mut d_gates) = (vec![0.0; x.len()], vec![0.0; gates.len()]);
        let first = VirtualLayer { layer: 1, microbatch: 0 };
        let again = moe.forward(first, case.pass, routing, &x, &mut y);
        assert!(matches!(again, Err(RuntimeError::InFlight { at }) if at == first), "{again:?}");
        let short = moe.backward(first, &gates[1..], &x, &y, &mut dx, &mut d_gates);
        assert!(matches!(short, Err(RuntimeError::Size { what: "gates", .. })), "{short:?}");
        let short = moe.backward(first, &gates, &x, &y, &mut dx[1..], &mut d_gates);
        assert!(matches!(short, Err(RuntimeError::Size { what: "gradient of the input", .. })), "{short:?}");
        moe.backward(first, &gates, &x, &y, &mut dx, &mut d_gates)?;
        moe.abandon();
        moe.forward(VirtualLayer { layer: 1, microbatch: 2 }, case.pass, routing, &x, &mut y)?;
        moe.endpoint.leave()?;
        Ok::<_, RuntimeError>(())
    });
    result.unwrap_or_else(|error| panic!("{error}"));
}

/// Modes of transfer, sizes of tiles and worker threads change who moves which bytes when, and nothing else.
#[test]
fn how_weights_and_gradients_move_changes_no_bit() {
    use ultraep_fabric::stream::TileSizes;
    use ultraep_plan::{TransferMode, TransferParams};
    let base = case(4, 8, 2, &[PolicyKind::EplbExact]);
    let results = run(&base);
    assert!(results[0].records.iter().any(|r| r.replicas() > 0), "the case must make replicas");
    let small = TileSizes { tile_bytes: 64, chunk_bytes: 256 };
    for (mode, sync_workers, reduce_workers) in
        [(TransferMode::Direct, 0, 0), (TransferMode::Relay, 0, 1), (TransferMode::Relay, 2, 2)]
    {
        let mut other = base.clone();
        let params = TransferParams { mode, max_stripes: 2, ..TransferParams::default() };
        let (weights, gradients) = (small, small);
        other.config.transfer =
            TransferConfig { params, weights, gradients, sync_workers, reduce_workers, ..TransferConfig::default() };
        assert!(results == run(&other), "{mode}, {sync_workers} and {reduce_workers} workers: a bit changed");
    }
}

/// A fabric whose windows cannot be touched directly.
struct Indirect(Box<dyn Fabric>);

impl Fabric for Indirect {
    fn rank(&self) -> Rank {
        self.0.rank()
    }

    fn ranks(&self) -> usize {
        self.0.ranks()
    }

    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn window(&self, id: WindowId) -> Option<Region> {
        self.0.window(id)
    }

    fn submit_stamped(&mut self, operation: Operation<'_>, stamp: u64) -> Result<Ticket, FabricError> {
        self.0.submit_stamped(operation, stamp)
    }

    fn poll(&mut self, ticket: &Ticket) -> Result<Option<Completion>, FabricError> {
        self.0.poll(ticket)
    }

    fn wait(&mut self, ticket: Ticket) -> Result<Completion, FabricError> {
        self.0.wait(ticket)
    }

    fn leave(self: Box<Self>) -> Result<(), FabricError> {
        self.0.leave()
    }
}

#[test]
fn put_and_get_move_the_same_bits() {
    let case = case(4, 8, 2, &[PolicyKind::EplbExact]);
    assert!(run(&case) == run_on(&case, |fabric| Box::new(Indirect(fabric))), "a bit changed");
}

/// The clock charges what the transfers' plan takes under the link: a slower link, a longer sync, whatever it moved here.
#[test]
fn a_sync_is_charged_what_its_plan_takes_under_the_link() {
    let synced_ns = |gbps: f64| {
        let mut case = case(4, 8, 2, &[PolicyKind::EplbExact]);
        case.config.link = Link::new(gbps).unwrap();
        let result = run_threads(&group(&case), |fabric| {
            let mut moe = runtime(&case, fabric)?;
            let Inputs { x, gates, chosen, .. } = inputs(moe.manager.rank().index(), 8);
            let (routing, mut y) = (Routing { experts: &chosen, gates: &gates }, vec![0.0; x.len()]);
            moe.forward(VirtualLayer { layer: 0, microbatch: 0 }, case.pass, routing, &x, &mut y)?;
            let synced_ns = moe.manager.take_synced_ns();
            moe.endpoint.leave()?;
            Ok::<_, RuntimeError>(synced_ns)
        });
        result.unwrap_or_else(|error| panic!("{error}"))
    };
    let (slow, fast) = (synced_ns(1.0), synced_ns(10.0));
    assert!(slow.windows(2).all(|pair| pair[0] == pair[1]), "ranks disagree: {slow:?}");
    // One copy of 1536 bytes takes 12.288 us at 1 Gbit/s; the busiest rank sends or receives at least one.
    assert!(slow[0] >= 12_288 && slow[0] % 12_288 == 0, "{slow:?}");
    assert!(fast[0].abs_diff(slow[0] / 10) <= slow[0] / 12_288, "{fast:?} against {slow:?}");
}
