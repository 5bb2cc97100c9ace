//! What-if on one microbatch: conserved, checked, and different where settings differ.

use ultraep_baselines::{HistoryParams, PolicyKind, PolicyParams};
use ultraep_load::{LoadParams, Workload, generate};
use ultraep_plan::{Charge, Ratio, Topology, TopologySpec, split_all};
use ultraep_replay::{Anatomy, AnatomyError, Hardware, LeastQuota, Planned, Scenario, plan_of_record, replan};
use ultraep_trace::PlanRecord;

const RANKS: usize = 16;
const EXPERTS: usize = 64;

fn topology(slots_per_rank: usize) -> Topology {
    Topology::new(TopologySpec { ranks: RANKS, experts: EXPERTS, domain_ranks: RANKS, slots_per_rank }).unwrap()
}

fn counts(seed: u64) -> Vec<u32> {
    let ratio = Ratio::new(3, 1).unwrap();
    let params = LoadParams { tokens_per_rank: 4096, top_k: 4, ratio, seed, microbatch: 0 };
    generate(Workload::HotRankZipf, &topology(0), &params).unwrap().counts().to_vec()
}

fn scenario(kind: PolicyKind, slots: usize, min_quota: u32) -> Scenario {
    let least_quota = LeastQuota::Tokens(min_quota);
    Scenario { kind, topology: topology(slots), params: PolicyParams::default(), least_quota }
}

#[test]
fn every_policy_conserves_tokens_and_says_where_copies_go() {
    let counts = counts(3);
    for kind in PolicyKind::ALL {
        let scenario = scenario(kind, 2, 64);
        let replan = replan(&scenario, &counts, &[self::counts(1), self::counts(2)]).unwrap();
        let anatomy = &replan.anatomy;
        let total: u64 = counts.iter().map(|&c| u64::from(c)).sum();
        assert_eq!(anatomy.total_tokens(), total, "{kind}");
        assert_eq!(anatomy.rank_load_after.iter().sum::<u64>(), total, "{kind}");
        assert!(anatomy.remote_tokens <= total, "{kind}");
        // Every replica is received once, from a rank that has the expert.
        let replicas: usize = anatomy.plan.replicas();
        let tasks = anatomy.transfers.tasks();
        assert_eq!(tasks.iter().filter(|t| t.stripe.index == 0).count(), replicas, "{kind}");
        assert!(anatomy.sync_ns <= anatomy.direct_sync_ns, "{kind}");
        assert_eq!(anatomy.sync_ns == 0, replicas == 0, "{kind}");
    }
}

#[test]
fn more_slots_and_smaller_quotas_balance_better() {
    let counts = counts(3);
    let after = |slots, min_quota| {
        replan(&scenario(PolicyKind::Ultraep, slots, min_quota), &counts, &[]).unwrap().anatomy.imbalance_after()
    };
    let none = replan(&scenario(PolicyKind::None, 0, 1), &counts, &[]).unwrap().anatomy;
    assert_eq!(none.imbalance_after(), none.imbalance_before());
    assert!(after(1, 1 << 20) > after(1, 256), "no replica is worth so much");
    assert!(after(2, 64) <= 1.011 && after(2, 64) < none.imbalance_before());
}

#[test]
fn historical_policies_plan_from_what_came_before() {
    let (now, before) = (counts(3), counts(9));
    let mut scenario = scenario(PolicyKind::Eplb, 2, 64);
    scenario.params.eplb.history = HistoryParams { window: 1, interval: 1 };
    let of = |history: &[Vec<u32>]| replan(&scenario, &now, history).unwrap();
    assert_ne!(of(&[]).digest, of(std::slice::from_ref(&now)).digest);
    assert_ne!(of(std::slice::from_ref(&before)).digest, of(std::slice::from_ref(&now)).digest);
    assert_eq!(
        of(&[before, now.clone()]).digest,
        of(std::slice::from_ref(&now)).digest,
        "a window of one forgets the older"
    );
}

#[test]
fn a_recorded_plan_is_the_plan() {
    let scenario = scenario(PolicyKind::Ultraep, 2, 64);
    let made = replan(&scenario, &counts(5), &[]).unwrap().anatomy;
    let mut record = PlanRecord::default();
    record.capture("ultraep", 0, &made.plan);
    let plan = plan_of_record(&record, &scenario.topology);
    assert_eq!(plan.instances(), made.plan.instances());
    let hardware = Hardware::find("h100x8").unwrap().model(ultraep_replay::ExpertShape { hidden: 4096, width: 1536 });
    let planned = |counts: &[u32], plan: &ultraep_plan::Plan, split| Planned {
        counts: counts.to_vec(),
        plan: plan.clone(),
        split,
        charge: Charge::Planned,
    };
    let of = |split| Anatomy::of(&scenario.topology, &hardware, planned(&made.counts, &plan, split));
    assert_eq!(of(Some(made.split.clone())).unwrap().rank_load_after, made.rank_load_after);
    let mut again = vec![0; made.split.len()];
    let problem = ultraep_plan::Problem::new(&scenario.topology, &made.counts).unwrap();
    split_all(&problem, &plan, &mut ultraep_plan::SplitWorkspace::new(&scenario.topology), &mut again).unwrap();
    assert_eq!(of(None).unwrap().split, again);
    assert!(matches!(of(Some(vec![0; 3])), Err(AnatomyError::Shares { got: 3, .. })));
    // Quotas that a hostile or faulty recording may hold.
    for (quota, what) in [(u32::MAX, "all experts"), (0, "an expert")] {
        let mut lying = record.clone();
        lying.instances[0].quota = quota;
        lying.instances[1].quota = quota;
        let plan = plan_of_record(&lying, &scenario.topology);
        let error = Anatomy::of(&scenario.topology, &hardware, planned(&made.counts, &plan, None)).unwrap_err();
        assert!(matches!(error, AnatomyError::Quotas { what: got, .. } if got == what), "{error}");
    }
    let other = Topology::new(TopologySpec { ranks: 2, experts: 4, domain_ranks: 2, slots_per_rank: 1 }).unwrap();
    assert!(matches!(Anatomy::of(&other, &hardware, planned(&[0; 8], &plan, None)), Err(AnatomyError::Group(_))));
}
