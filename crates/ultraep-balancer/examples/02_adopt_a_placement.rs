//! Another planner's placement is put in force: the balancer shares the tokens, copies weights, reroutes and reduces gradients.
//!
//!     cargo run -p ultraep-balancer --example 02_adopt_a_placement

use std::sync::Arc;
use ultraep_balancer::{Balancer, BalancerConfig, BalancerError, LayerMasters, Quotas, Release, TransferConfig};
use ultraep_fabric::stream::{Element, ExpertLayout, Masters, Shard};
use ultraep_fabric::{GroupSpec, Region, WindowId, run_threads};
use ultraep_plan::{Expert, PhysicalIndex, Topology, TopologySpec, UltraepParams};

/// What the other planner says: two masters and a slot on each rank. Expert 0 also on rank 1, expert 3 also on rank 0.
const PLACEMENT: [i32; 6] = [0, 1, 3, 2, 3, 0];

fn main() {
    let topology = Topology::new(TopologySpec { ranks: 2, experts: 4, domain_ranks: 2, slots_per_rank: 1 });
    let layout = ExpertLayout::new(&[Shard::new(Element::F32, 1, 16)]).expect("it has bytes");
    let config = BalancerConfig {
        topology: topology.expect("a small group"),
        layers: 1,
        in_flight: 1,
        // Places are taken over in turn, as in the released package: nobody calls release.
        release: Release::Cyclic,
        weights: layout.clone(),
        gradients: None,
        window_ids: [WindowId::new(0), WindowId::new(1)],
        policies: vec![Arc::new(UltraepParams::default())],
        link_bytes_per_s: 25_000_000_000,
        transfer: TransferConfig { sync_workers: 1, ..TransferConfig::default() },
        checked: false,
    };
    let group = GroupSpec { windows: config.windows().into(), ..GroupSpec::new(2) };
    let loads = run_threads(&group, |mut fabric| -> Result<[usize; 2], BalancerError> {
        let own = config.topology.masters(fabric.rank());
        let weights = Region::from_vec(own.clone().flat_map(|expert| [expert as f32; 16]).collect::<Vec<_>>());
        let weights = Masters::packed(&layout, own.len(), &weights, layout.bytes())?;
        let masters = vec![LayerMasters { weights, grads: None }];
        let mut balancer = Balancer::new(config.clone(), &mut fabric, masters)?;
        let mut rows = [0; 2];
        for microbatch in 0..3 {
            // 100 tokens a rank: 60 want expert 0, 40 expert 1, 2 or 3 in turn.
            let ids: Vec<u8> =
                (0..100).map(|token| if token < 60 { 0 } else { 1 + (token + microbatch) % 3 }).collect();
            let mut physical = vec![0; ids.len()];
            let at = balancer.begin(0)?;
            balancer.count(at, &ids)?;
            balancer.adopt(&mut fabric, at, &PLACEMENT, Quotas::Balanced)?;
            let pending = balancer.sync_weights(&mut fabric, at)?;
            balancer.reroute(at, &ids, &mut physical)?;
            balancer.wait(&mut fabric, pending)?;
            // The slot holds what the placement says.
            let replica = PLACEMENT[balancer.rank().index() * 3 + 2];
            let slot = balancer.slot_range(PhysicalIndex::new(2)).expect("a slot");
            assert!(balancer.slot_weights::<f32>()?[slot.start / 4..slot.end / 4].iter().all(|&w| w == replica as f32));
            // Every token goes to an instance of the expert that it chose.
            assert!(ids.iter().zip(&physical).all(|(&id, &physical)| PLACEMENT[physical as usize] == i32::from(id)));
            physical.iter().for_each(|&physical| rows[physical as usize / 3] += 1);
            let shares: Vec<u32> = balancer.planned(at)?.plan().of(Expert::new(0)).iter().map(|i| i.quota).collect();
            assert_eq!(shares.iter().sum::<u32>(), 120);
        }
        balancer.drain(&mut fabric)?;
        Ok(rows)
    });
    let loads = loads.expect("both ranks end well");
    // Of both sources: 300 tokens for each rank, where homes alone would have 360 and more on rank 0.
    let total: Vec<usize> = (0..2).map(|rank| loads.iter().map(|rows| rows[rank]).sum()).collect();
    println!("tokens by rank over three microbatches: {total:?}");
    assert_eq!(total, [300, 300]);
}

#[test]
fn runs() {
    main();
}
