//! Every policy on the same drifting load: balance against replicas and traffic.
//!
//! `cargo run -p ultraep-baselines --example 01_frontier`

use ultraep_baselines::{PolicyKind, PolicyParams, build, ideal, plan_for};
use ultraep_load::{LoadParams, Workload, generate};
use ultraep_plan::{Problem, Ratio, Topology, TopologySpec, check_plan};

pub(crate) fn main() {
    let spec = TopologySpec { ranks: 16, experts: 64, domain_ranks: 16, slots_per_rank: 2 };
    let topology = Topology::new(spec).expect("valid");
    let load = |microbatch| {
        let ratio = Ratio::new(3, 1).expect("positive");
        let params = LoadParams { tokens_per_rank: 4096, top_k: 8, ratio, seed: 1, microbatch };
        generate(Workload::Drift, &topology, &params).expect("within reach")
    };
    let mut last = Vec::new();
    println!("policy        worst imbalance  replicas  remote");
    for kind in PolicyKind::ALL {
        let mut policy = build(kind, &topology, &PolicyParams::default()).expect("serves this group");
        let mut plan = plan_for(kind, &topology);
        let (mut worst, mut replicas, mut remote) = (0.0_f64, 0, 0.0);
        for microbatch in 0..12 {
            let load = load(microbatch);
            // `ideal` is a bound on routing, not a plan: it meets balanced counts.
            let balanced = ideal::balanced_counts(&topology, &[4096 * 8; 16]);
            let counts = if kind.forces_routing() { &balanced[..] } else { load.counts() };
            let problem = Problem::new(&topology, counts).expect("valid counts");
            policy.solve(&problem, &mut plan).expect("a plan");
            let report = check_plan(&problem, &plan, &policy.rules()).expect("every rule kept");
            let (num, den) = report.imbalance_after();
            // History has something to say from the fourth microbatch on.
            worst = if microbatch < 3 { 0.0 } else { worst.max(num as f64 / den as f64) };
            replicas = replicas.max(report.replicas);
            remote += report.remote_tokens as f64 / report.total_tokens as f64 / 12.0;
            policy.observe(&problem);
        }
        println!("{kind:<13} {worst:>15.3} {replicas:>9} {:>6.1}%", 100.0 * remote);
        last.push((kind, worst));
    }
    let worst = |wanted| last.iter().find(|(kind, _)| *kind == wanted).expect("in the list").1;
    assert!(worst(PolicyKind::Ultraep) < 1.011, "exact load, every microbatch");
    assert!(worst(PolicyKind::Eplb) > worst(PolicyKind::EplbExact) + 0.1, "history lags behind the drift");
}
