//! Once a layer's loads have been seen, planning them and moving expert state allocates nothing on the rank's thread: counts, plan,
//! split, transfers, weight sync, grad reduce. (The engine's own threads are counted in `ultraep-fabric/tests/no_allocation.rs`;
//! the experts' GEMM is a library's, which allocates a few bytes a call.)

use ultraep_baselines::{PolicyKind, PolicyParams, Recipe};
use ultraep_device::ExpertShape;
use ultraep_fabric::{GroupSpec, Region, run_threads};
use ultraep_plan::{Topology, TopologySpec, TransferMode, TransferParams};

use crate::manager::{Direction, LayerMasters, Manager};
use crate::{Endpoint, Link, RuntimeConfig, RuntimeError, TransferConfig, VirtualLayer};

const RANKS: usize = 4;
const EXPERTS: usize = 8;
const LAYERS: usize = 2;
const MICROBATCHES: u64 = 5;

fn config(kind: PolicyKind, mode: TransferMode) -> RuntimeConfig {
    let spec = TopologySpec { ranks: RANKS, experts: EXPERTS, domain_ranks: RANKS, slots_per_rank: 2 };
    let params = TransferParams { mode, ..TransferParams::default() };
    RuntimeConfig {
        topology: Topology::new(spec).expect("a small group"),
        layers: LAYERS,
        max_microbatches: 2,
        shape: ExpertShape { hidden: 64, intermediate: 32 },
        tokens_per_rank: 64,
        top_k: 2,
        policies: Recipe::all(&[kind], PolicyParams { min_quota: 1, ..PolicyParams::default() }),
        link: Link::default(),
        transfer: TransferConfig { params, ..TransferConfig::default() },
        // The checker takes memory of its own.
        checked: false,
    }
}

/// Allocations of each rank's thread, and how many copies of experts were moved on it.
fn counted(config: &RuntimeConfig) -> Vec<(u64, usize)> {
    let group = GroupSpec { windows: config.windows(), ..GroupSpec::new(RANKS) };
    let results = run_threads(&group, |fabric| -> Result<(u64, usize), RuntimeError> {
        let rank = fabric.rank();
        let mut endpoint = Endpoint::new(fabric, config.link);
        let bytes = config.topology.masters(rank).len() * config.shape.weight_bytes();
        let layer = |_| LayerMasters { weights: Region::zeroed(bytes), grads: Region::zeroed(bytes) };
        let mut manager = Manager::new(config.clone(), &mut endpoint, (0..LAYERS).map(layer).collect())?;
        let mut words = Vec::new();
        let mut round = |number: u64, copies: &mut usize| {
            for (layer, m) in (0..LAYERS).flat_map(|layer| (0..MICROBATCHES).map(move |m| (layer, m))) {
                let at = VirtualLayer { layer, microbatch: number * MICROBATCHES + m };
                let mut own = [4_u32; EXPERTS];
                own[(layer + m as usize * 3) % EXPERTS] += 64;
                manager.plan(&mut endpoint, at, &own)?;
                *copies += manager.plan_of(at)?.instances().len() - EXPERTS;
                let syncing = manager.start_sync(&mut endpoint, at, Direction::Forward)?;
                manager.finish_sync(&mut endpoint, syncing)?;
                manager.start_reduce(&mut endpoint, at)?;
                manager.join_reduce(&mut endpoint)?;
                manager.release(at);
            }
            endpoint.clock.take_segments(&mut words);
            Ok(())
        };
        let mut copies = 0;
        (0..2).try_for_each(|number| round(number, &mut copies))?;
        copies = 0;
        let mut result = Ok(());
        let info = allocation_counter::measure(|| result = (2..5).try_for_each(|number| round(number, &mut copies)));
        result.map(|()| (info.count_total, copies))
    });
    results.expect("all ranks end well")
}

#[test]
fn plans_and_moved_state_allocate_nothing_after_the_start() {
    let one = allocation_counter::measure(|| drop(std::hint::black_box(vec![1_u8]))).count_total;
    assert_eq!(one, 1, "the counter counts");
    for kind in [PolicyKind::Ultraep, PolicyKind::UltraepV1, PolicyKind::None] {
        for mode in [TransferMode::Adaptive, TransferMode::Relay] {
            for (allocations, copies) in counted(&config(kind, mode)) {
                assert_eq!(copies > 0, kind != PolicyKind::None, "{kind:?}: the case must move experts");
                assert_eq!(allocations, 0, "{kind:?}, {mode:?}");
            }
        }
    }
}
