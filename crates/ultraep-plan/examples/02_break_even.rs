//! From which batch size on does balancing pay? Predicted for one layer at several sizes, by the default hardware model.
//!
//! `cargo run -p ultraep-plan --example 02_break_even`

use ultraep_plan::{
    Charge, HardwareModel, Plan, Policy, Predictor, Problem, Topology, TopologySpec, Ultraep, UltraepParams, Unbalanced,
};

pub(crate) fn main() {
    let topology =
        Topology::new(TopologySpec { ranks: 64, experts: 128, domain_ranks: 64, slots_per_rank: 2 }).expect("valid");
    let model = HardwareModel::default();
    let params = UltraepParams { min_quota: 1, ..UltraepParams::default() };
    let mut policies: [Box<dyn Policy>; 3] = [
        Box::new(Unbalanced::new(&topology)),
        Box::new(Ultraep::new(&topology, params)),
        Box::new(Ultraep::cost_aware(&topology, params, model).expect("a model")),
    ];
    let mut predictor = Predictor::new(&topology, model).expect("a model");
    println!("tokens a rank | predicted us: none, ultraep, ultraep-cost | replicas of ultraep, ultraep-cost");
    let mut replicas_at = Vec::new();
    for tokens in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192] {
        let counts = power_law(&topology, tokens * 8);
        let problem = Problem::new(&topology, &counts).expect("valid");
        let mut plan = Plan::for_slots(&topology);
        let results = policies.each_mut().map(|policy| {
            policy.solve(&problem, &mut plan).expect("a plan");
            // As if all three planned: what is compared is what they make of it.
            predictor.take_plan(&problem, &plan).expect("fits");
            (predictor.predict(&plan, Charge::Planned).total_ps(), plan.replicas())
        });
        let us = results.map(|(ps, _)| ps as f64 / 1e6);
        println!(
            "{tokens:>13} | {:>8.0} {:>8.0} {:>8.0} | {:>3} {:>3}",
            us[0], us[1], us[2], results[1].1, results[2].1
        );
        // It prices transfers by an estimate, within 5% of their time.
        assert!(results[2].0 <= results[0].0.min(results[1].0 + results[1].0 / 20));
        replicas_at.push(results[2].1);
    }
    assert_eq!(replicas_at[0], 0, "a small batch is left alone");
    assert!(replicas_at.last().is_some_and(|&r| r > 0), "a large one is balanced");
}

/// Every source routes `tokens` tokens; the expert at place `i` of a fixed shuffle gets a share like `1 / (i + 4)`.
fn power_law(topology: &Topology, tokens: u32) -> Vec<u32> {
    let experts = topology.experts() as u32;
    let weight = |e: u32| 1_000_000 / (e * 77 % experts + 4);
    let total: u32 = (0..experts).map(weight).sum();
    let share = |e: u32| (u64::from(tokens) * u64::from(weight(e)) / u64::from(total)) as u32;
    let rounded: u32 = (0..experts).map(share).sum();
    let row: Vec<u32> = (0..experts).map(|e| share(e) + u32::from(e < tokens - rounded)).collect();
    row.repeat(topology.ranks())
}
