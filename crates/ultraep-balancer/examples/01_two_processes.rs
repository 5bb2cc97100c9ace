//! Two processes that you start by hand train one layer of experts, balanced by the `Balancer` alone: routing, dispatch, multiplication
//! and memory are the program's own.
//!
//!     RANK=0 WORLD_SIZE=2 cargo run -p ultraep-balancer --example 01_two_processes &
//!     RANK=1 WORLD_SIZE=2 cargo run -p ultraep-balancer --example 01_two_processes

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;
use ultraep_balancer::{Balancer, BalancerConfig, LayerMasters, Release, TransferConfig};
use ultraep_fabric::attach::{Rendezvous, attach};
use ultraep_fabric::stream::{Element, ExpertLayout, Masters, Shard};
use ultraep_fabric::{Fabric, GroupSpec, Operation, Region, Span, WindowId};
use ultraep_plan::{PhysicalIndex, Topology, TopologySpec, UltraepParams};

type AnyError = Box<dyn Error + Send + Sync>;

const EXPERTS: usize = 4;
const WIDTH: usize = 8;
const TOKENS: usize = 64;

/// The router's choice: three of four tokens want expert 0. All numbers are small integers, so that sums are exact.
fn route(rank: usize, token: usize) -> i64 {
    if token % 4 < 3 { 0 } else { ((rank + token / 4) % EXPERTS) as i64 }
}
fn weight(expert: usize, at: usize) -> f32 {
    ((expert * 3 + at * 5) % 7) as f32 - 3.0
}
fn input(rank: usize, token: usize) -> [f32; WIDTH] {
    std::array::from_fn(|i| ((rank * 31 + token * 7 + i) % 5) as f32 - 2.0)
}
fn output_gradient(rank: usize, token: usize) -> [f32; WIDTH] {
    std::array::from_fn(|i| ((rank + token + i) % 3) as f32 - 1.0)
}

/// `y = W x`, and the gradient of `W`: what this program's experts do.
fn multiply(weights: &[f32], x: &[f32; WIDTH]) -> [f32; WIDTH] {
    std::array::from_fn(|i| (0..WIDTH).map(|j| weights[i * WIDTH + j] * x[j]).sum())
}
fn add_gradient(grads: &mut [f32], dy: &[f32; WIDTH], x: &[f32; WIDTH]) {
    grads.iter_mut().enumerate().for_each(|(at, grad)| *grad += dy[at / WIDTH] * x[at % WIDTH]);
}

pub(crate) fn main() -> Result<(), AnyError> {
    // The group: whoever started this process said who it is.
    let place = Rendezvous::from_env(|name| std::env::var(name).ok())?;
    let (_server, mut store) = place.store(Duration::from_secs(60))?;
    let (ranks, me) = (place.size, place.rank.index());
    let layout = ExpertLayout::new(&[Shard::new(Element::F32, WIDTH, WIDTH)])?;
    let config = BalancerConfig {
        topology: Topology::new(TopologySpec { ranks, experts: EXPERTS, domain_ranks: ranks, slots_per_rank: 1 })?,
        layers: 1,
        in_flight: 1,
        release: Release::Explicit,
        weights: layout.clone(),
        gradients: Some(layout.clone()),
        window_ids: [WindowId::new(0), WindowId::new(1)],
        policies: vec![Arc::new(UltraepParams { min_quota: 1, ..UltraepParams::default() })],
        link_bytes_per_s: 25_000_000_000,
        transfer: TransferConfig { sync_workers: 1, ..TransferConfig::default() },
        checked: true,
    };
    let spec = GroupSpec { windows: config.windows().into(), ..GroupSpec::new(ranks) };
    let mut fabric = attach("example", place.rank, &spec, &mut store, Duration::from_secs(60))?;

    // Masters in plain vectors, which stay this program's.
    let own = config.topology.masters(place.rank);
    let vector =
        |of: fn(usize, usize) -> f32| own.clone().flat_map(move |e| (0..WIDTH * WIDTH).map(move |at| of(e, at)));
    let weights = Region::from_vec(vector(weight).collect::<Vec<_>>());
    let grads = Region::from_vec(vector(|_, _| 0.0).collect::<Vec<_>>());
    let registered = |region| Masters::packed(&layout, own.len(), region, layout.bytes());
    let masters = LayerMasters { weights: registered(&weights)?, grads: Some(registered(&grads)?) };
    let mut balancer = Balancer::new(config, &mut fabric, vec![masters])?;

    // Forward.
    let ids: Vec<i64> = (0..TOKENS).map(|token| route(me, token)).collect();
    let mut physical = vec![0; TOKENS];
    let at = balancer.begin(0)?;
    balancer.count(at, &ids)?;
    balancer.plan(&mut fabric, at)?;
    let weights_to_come = balancer.sync_weights(&mut fabric, at)?;
    balancer.reroute(at, &ids, &mut physical)?;
    let everywhere = gather(&mut *fabric, physical)?;
    balancer.wait(&mut fabric, weights_to_come)?;
    let per_rank = balancer.config().physical_per_rank();
    let mine = |row: usize| everywhere[row] as usize / per_rank == me;
    let in_slot = |row: usize| balancer.slot_range(PhysicalIndex::new(everywhere[row] as usize % per_rank));
    // Bytes of each row's expert: in a slot, or among the masters.
    let slots: Vec<_> = (0..ranks * TOKENS).map(in_slot).collect();
    let master = |row: usize| everywhere[row] as usize % per_rank * WIDTH * WIDTH;
    let y = Region::from_vec(vec![0.0_f32; ranks * TOKENS * WIDTH]);
    {
        let (mut y, weights, replicas) = (y.write::<f32>()?, weights.read::<f32>()?, balancer.slot_weights::<f32>()?);
        for row in (0..ranks * TOKENS).filter(|&row| mine(row)) {
            let expert = slots[row].as_ref().map_or(&weights[master(row)..], |slot| &replicas[slot.start / 4..]);
            y[row * WIDTH..][..WIDTH].copy_from_slice(&multiply(expert, &input(row / TOKENS, row % TOKENS)));
        }
    }
    fabric.run(Operation::AllReduceSumF32 { data: Span::whole(&y) })?;

    // Backward: gradients of replicas go into the slots, and home.
    {
        let (mut own, (_, replicas)) = (grads.write::<f32>()?, balancer.slot_weights_and_grads::<f32, f32>()?);
        for row in (0..ranks * TOKENS).filter(|&row| mine(row)) {
            let first = slots[row].as_ref().map_or(master(row), |slot| slot.start / 4);
            let into = if slots[row].is_some() { &mut replicas[first..] } else { &mut own[first..] };
            let (rank, token) = (row / TOKENS, row % TOKENS);
            add_gradient(&mut into[..WIDTH * WIDTH], &output_gradient(rank, token), &input(rank, token));
        }
    }
    let sums_to_come = balancer.reduce_grads(&mut fabric, at)?;
    balancer.wait(&mut fabric, sums_to_come)?;
    let replicas = balancer.planned(at)?.plan().replicas();
    balancer.release(at);

    // The same without balancing: every token on its expert's home.
    let mut expected = vec![0.0_f32; own.len() * WIDTH * WIDTH];
    for (rank, token) in (0..ranks).flat_map(|rank| (0..TOKENS).map(move |token| (rank, token))) {
        let (expert, x) = (route(rank, token) as usize, input(rank, token));
        let weights: Vec<f32> = (0..WIDTH * WIDTH).map(|at| weight(expert, at)).collect();
        assert_eq!(y.read::<f32>()?[(rank * TOKENS + token) * WIDTH..][..WIDTH], multiply(&weights, &x));
        if let Some(first) = expert.checked_sub(own.start).filter(|_| expert < own.end) {
            add_gradient(&mut expected[first * WIDTH * WIDTH..][..WIDTH * WIDTH], &output_gradient(rank, token), &x);
        }
    }
    assert_eq!(grads.read::<f32>()?[..], expected[..]);
    let rows = (0..ranks * TOKENS).filter(|&row| mine(row)).count();
    println!("rank {me}: {rows} of {} rows, {replicas} replicas; outputs and gradients as unbalanced", ranks * TOKENS);
    balancer.drain(&mut fabric)?;
    fabric.leave()?;
    Ok(())
}

/// Everyone's physical experts.
fn gather(fabric: &mut dyn Fabric, own: Vec<i32>) -> Result<Vec<i32>, AnyError> {
    let (send, recv) = (Region::from_vec(own), Region::zeroed(4 * TOKENS * fabric.ranks()));
    fabric.run(Operation::AllGather { send: Span::whole(&send), recv: Span::whole(&recv) })?;
    Ok(recv.read::<i32>()?.to_vec())
}
