//! A checker of plans of transfers that shares only types with the planner.

use ultraep_plan::{Choice, Rank, Topology, TransferMode, TransferParams, TransferPlan, Transfers};

macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}

/// Every replica exactly once, sent by a rank that has the expert, along chains that start at home; within the rule's limits.
pub(crate) fn check(
    topology: &Topology,
    transfers: &Transfers,
    params: &TransferParams,
    plan: &TransferPlan,
    choice: Choice,
) -> Result<(), String> {
    let tasks = plan.tasks();
    let key = |t: &ultraep_plan::Transfer, index: u32| (t.expert, t.to, t.physical, index);
    let stripes = plan.stripes();
    let mut expected: Vec<_> = transfers.all().iter().flat_map(|t| (0..stripes).map(move |s| key(t, s))).collect();
    let mut got: Vec<_> = tasks.iter().map(|task| key(&task.transfer, task.stripe.index)).collect();
    expected.sort();
    got.sort();
    ensure!(expected == got, "the copies are not the replicas");
    ensure!((1..=params.max_stripes.max(1)).contains(&stripes), "{stripes} stripes");
    for (index, task) in tasks.iter().enumerate() {
        ensure!(task.stripe.count == stripes, "task {index}: {:?}", task.stripe);
        let (home, from) = (topology.home(task.transfer.expert), task.transfer.from);
        ensure!((from == home) == task.waits_for.is_none(), "task {index} waits for {:?}", task.waits_for);
        match (plan.feeder(index), task.waits_for) {
            (None, None) => ensure!(task.depth == 1, "task {index} from home at depth {}", task.depth),
            (Some(feeder), Some(physical)) => {
                let feeding = &tasks[feeder].transfer;
                let found = key(feeding, tasks[feeder].stripe.index);
                let expected = (task.transfer.expert, from, physical, task.stripe.index);
                ensure!(found == expected, "task {index} is fed by {found:?}");
                ensure!(task.depth == tasks[feeder].depth + 1, "task {index} at depth {}", task.depth);
            }
            pair => return Err(format!("task {index}: {pair:?}")),
        }
    }
    // Depths fall by one at each feeder, so chains end at home; nothing else can be a cycle.
    check_lists(topology, plan)?;
    check_limits(topology, transfers, params, plan, choice)
}

fn check_lists(topology: &Topology, plan: &TransferPlan) -> Result<(), String> {
    let mut listed = 0;
    ensure!(plan.ranks() == topology.ranks(), "{} ranks", plan.ranks());
    for rank in (0..topology.ranks()).map(Rank::new) {
        let own = plan.sent_by(rank);
        listed += own.len();
        ensure!(own.iter().all(|t| t.transfer.from == rank), "rank {rank} has tasks of others");
        ensure!(own.is_sorted_by_key(|t| t.depth), "rank {rank}: masters first, then by hops");
        let stream = |s: &[ultraep_plan::TransferTask]| (s[0].transfer.expert, s[0].stripe.index);
        let mut experts: Vec<_> = plan.streams(rank).map(stream).collect();
        let streams = experts.len();
        experts.sort();
        experts.dedup();
        ensure!(experts.len() == streams, "rank {rank} has one stripe of one expert in two streams");
    }
    ensure!(listed == plan.tasks().len(), "{listed} of {} tasks are listed", plan.tasks().len());
    ensure!(plan.sent_by(Rank::new(topology.ranks())).is_empty(), "tasks of a rank that is none");
    Ok(())
}

fn check_limits(
    topology: &Topology,
    transfers: &Transfers,
    params: &TransferParams,
    plan: &TransferPlan,
    choice: Choice,
) -> Result<(), String> {
    let mut relayed = 0;
    for of_expert in transfers.all().chunk_by(|a, b| a.expert == b.expert) {
        let forwarded =
            |t: &&ultraep_plan::TransferTask| t.transfer.expert == of_expert[0].expert && t.waits_for.is_some();
        let mut relays: Vec<(u32, Rank)> =
            plan.tasks().iter().filter(forwarded).map(|t| (t.stripe.index, t.transfer.from)).collect();
        relays.sort();
        relays.dedup();
        relayed += u32::from(!relays.is_empty());
        ensure!(relays.is_empty() || of_expert.len() >= params.min_replicas as usize, "{} replicas", of_expert.len());
        for of_stripe in relays.chunk_by(|a, b| a.0 == b.0) {
            ensure!(of_stripe.len() <= params.max_relays as usize, "{} relays", of_stripe.len());
            ensure!(of_stripe.len() < of_expert.len(), "every replica a relay");
        }
    }
    ensure!(relayed == choice.relayed_experts && relayed == plan.relayed_experts(), "{relayed} experts relayed");
    ensure!(choice.fanout == plan.fanout(), "fan-out {}", plan.fanout());
    ensure!(choice.stripes == plan.stripes(), "{} stripes", plan.stripes());
    let small = params.mode == TransferMode::Adaptive && topology.domain_ranks() <= params.direct_ranks as usize;
    ensure!(relayed == 0 || (params.mode != TransferMode::Direct && !small), "relays in {params:?}");
    Ok(())
}
