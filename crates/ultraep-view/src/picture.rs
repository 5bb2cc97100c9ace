//! One microbatch as JSON: what every picture on its page shows, in bounded size.

use serde::Serialize;
use ultraep_baselines::PolicyKind;
use ultraep_plan::measure::{Measure, shares};
use ultraep_plan::{Charge, Expert, Prediction, Rank, StopReason, Topology};
use ultraep_replay::{Anatomy, Planned, Replan, Scenario, plan_of_record, quotient, replan};
use ultraep_trace::PlanRecord;

use crate::ViewError;
use crate::entry::Entry;
use crate::settings::{WhatIf, WhatIfJson};

/// Most rows and columns of the flow of tokens; ranks beyond are taken together.
const FLOW_MAX: usize = 128;
/// Most copies and tasks of transfer listed.
const COPIES_MAX: usize = 1500;

/// Where a microbatch is and what is around it.
#[derive(Debug, Serialize)]
pub(crate) struct Microbatch {
    step: u64,
    microbatch: u32,
    layer: u32,
    previous: Option<(u64, u32)>,
    next: Option<(u64, u32)>,
    layer_below: Option<u32>,
    layer_above: Option<u32>,
    ranks: usize,
    experts: usize,
    domain: usize,
    total_tokens: u64,
    /// Experts of each rank, as the number of masters, `[N]`.
    masters: Vec<usize>,
    /// `lambda[e]`, `[E]`.
    expert_loads: Vec<u64>,
    /// Whether the plan is the recorded one.
    is_recorded: bool,
    settings: WhatIfJson,
    plan: PlanJson,
}

/// A plan and what follows from it.
#[derive(Debug, Serialize)]
pub(crate) struct PlanJson {
    policy: String,
    digest: Option<String>,
    slots: Vec<usize>,
    imbalance_before: f64,
    imbalance_after: f64,
    /// Tokens of the fullest rank.
    most_before: u64,
    most_after: u64,
    /// Proven bound on it, where the policy knows one; and why it stopped.
    lower_bound: Option<u64>,
    stop: Option<&'static str>,
    replicas: usize,
    remote_tokens: u64,
    remote_share: f64,
    rank_before: Vec<u64>,
    rank_after: Vec<u64>,
    /// Instances of each rank after balancing: expert, physical index, tokens, 1 for a replica; flattened.
    instances: Vec<Vec<u64>>,
    /// Replicas with the most tokens first: expert, home rank, rank, tokens.
    copies: Vec<(usize, usize, usize, u32)>,
    /// Replicas that are not listed.
    copies_left_out: usize,
    flow: Flow,
    transfers: TransfersJson,
    times: Times,
}

/// Tokens from sources to the ranks that process them.
#[derive(Debug, Serialize)]
struct Flow {
    /// Ranks that a row and a column stand for.
    ranks_per_group: usize,
    /// `[sources, ranks]`, row-major.
    tokens: Vec<u64>,
}

#[derive(Debug, Serialize)]
struct TransfersJson {
    /// Expert, sender, receiver, hops from home, stripe, stripes.
    tasks: Vec<(usize, usize, usize, u32, u32, u32)>,
    left_out: usize,
    relayed_experts: u32,
    fanout: u32,
    depth: u32,
    sync_ns: u64,
    direct_sync_ns: u64,
}

/// Predicted times of the layer's forward, masters only and under the plan.
#[derive(Debug, Serialize)]
struct Times {
    hardware: String,
    before: Parts,
    after: Parts,
}

#[derive(Debug, Serialize)]
struct Parts {
    plan_ns: u64,
    reroute_ns: u64,
    weight_sync_ns: u64,
    all_to_all_ns: u64,
    experts_ns: u64,
    total_ns: u64,
}

/// How the tokens of each source for one expert are shared over its instances.
#[derive(Debug, Serialize)]
pub(crate) struct SplitJson {
    expert: usize,
    ranks: usize,
    ranks_per_row: usize,
    /// Rank, tokens, and 1 for a replica; the first [`FLOW_MAX`].
    instances: Vec<(usize, u64, u8)>,
    instances_left_out: usize,
    /// `[sources, instances]`, row-major.
    tokens: Vec<u64>,
}

impl Entry {
    /// The split of an expert in a microbatch, planned as recorded or, with `asked`, anew.
    pub(crate) fn split(
        &self,
        (step, microbatch, layer): (u64, u32, u32),
        expert: usize,
        asked: Option<&WhatIf>,
    ) -> Result<SplitJson, ViewError> {
        let meta = &self.source.meta;
        if expert >= meta.experts {
            let known = format!("there are 0 to {}", meta.experts - 1);
            return Err(ViewError::NotFound { what: format!("expert {expert}"), known });
        }
        let settings = asked.unwrap_or(&self.source.planned);
        let found = self.find(step, microbatch, layer, settings.window)?;
        let recorded = found.record.after.as_ref().filter(|_| asked.is_none());
        let anatomy = match recorded {
            Some(plan) => self.recorded_anatomy(plan, found.record.before.clone())?.1,
            None => {
                replan(&settings.scenario(meta.ranks, meta.experts)?, &found.record.before, &found.history)?.anatomy
            }
        };
        Ok(SplitJson::of(&self.source.topology, Expert::new(expert), &anatomy))
    }

    /// The picture of a microbatch, planned as recorded or, with `asked`, anew.
    pub(crate) fn picture(
        &self,
        (step, microbatch, layer): (u64, u32, u32),
        asked: Option<&WhatIf>,
    ) -> Result<Microbatch, ViewError> {
        let settings = asked.unwrap_or(&self.source.planned);
        let found = self.find(step, microbatch, layer, settings.window)?;
        let recorded = found.record.after.as_ref().filter(|_| asked.is_none());
        let is_recorded = recorded.is_some();
        let (topology, plan) = if let Some(plan) = recorded {
            (self.source.topology.clone(), self.recorded(plan, found.record.before.clone())?)
        } else {
            let scenario = settings.scenario(self.source.meta.ranks, self.source.meta.experts)?;
            let Replan { anatomy, digest, .. } = replan(&scenario, &found.record.before, &found.history)?;
            let plan = PlanJson::of(&scenario, &settings.hardware.name, scenario.kind.name(), Some(digest), &anatomy)?;
            (scenario.topology, plan)
        };
        let mut expert_loads = vec![0; topology.experts()];
        for row in found.record.before.chunks_exact(topology.experts()) {
            expert_loads.iter_mut().zip(row).for_each(|(load, &count)| *load += u64::from(count));
        }
        Ok(Microbatch {
            step,
            microbatch,
            layer,
            previous: found.previous,
            next: found.next,
            layer_below: found.layer_below,
            layer_above: found.layer_above,
            ranks: topology.ranks(),
            experts: topology.experts(),
            domain: topology.domain_ranks(),
            total_tokens: expert_loads.iter().sum(),
            masters: (0..topology.ranks()).map(|r| topology.masters(Rank::new(r)).len()).collect(),
            expert_loads,
            is_recorded,
            settings: settings.json(),
            plan,
        })
    }

    fn recorded(&self, record: &PlanRecord, counts: Vec<u32>) -> Result<PlanJson, ViewError> {
        let (scenario, anatomy) = self.recorded_anatomy(record, counts)?;
        let digest = (record.digest != 0).then_some(record.digest);
        PlanJson::of(&scenario, &self.source.planned.hardware.name, &record.policy, digest, &anatomy)
    }

    fn recorded_anatomy(&self, record: &PlanRecord, counts: Vec<u32>) -> Result<(Scenario, Anatomy), ViewError> {
        let settings = &self.source.planned;
        let topology = &self.source.topology;
        let mut scenario = settings.scenario(topology.ranks(), topology.experts())?;
        scenario.topology = topology.clone();
        let plan = plan_of_record(record, topology);
        // A placement from history may have been there before; what is shown is what it costs when it is new.
        let charge = record.policy.parse().map_or(Charge::Planned, |kind: PolicyKind| kind.charge(true));
        let planned = Planned { counts, plan, split: record.split.clone(), charge };
        let anatomy = Anatomy::of(topology, &scenario.params.hardware, planned)?;
        Ok((scenario, anatomy))
    }
}

impl PlanJson {
    fn of(
        scenario: &Scenario,
        hardware: &str,
        policy: &str,
        digest: Option<u64>,
        anatomy: &Anatomy,
    ) -> Result<Self, ViewError> {
        let (topology, plan) = (&scenario.topology, &anatomy.plan);
        let total = anatomy.total_tokens();
        let most = |loads: &[u64]| loads.iter().copied().max().unwrap_or(0);
        let stop = plan.domains().iter().map(|domain| domain.stop).max_by_key(|&stop| stop_order(stop));
        let is_search = stop.is_some_and(|stop| stop != StopReason::NotASearch);
        let lower_bound = plan.domains().iter().map(|domain| u64::from(domain.lower_bound)).max();
        let (copies, copies_left_out) = copies(topology, anatomy);
        Ok(Self {
            policy: policy.to_owned(),
            digest: digest.map(|digest| format!("{digest:016x}")),
            slots: (0..topology.ranks()).map(|r| topology.slots(Rank::new(r))).collect(),
            imbalance_before: round(anatomy.imbalance_before()),
            imbalance_after: round(anatomy.imbalance_after()),
            most_before: most(&anatomy.rank_load_before),
            most_after: most(&anatomy.rank_load_after),
            lower_bound: lower_bound.filter(|_| is_search),
            stop: stop.filter(|_| is_search).map(stop_words),
            replicas: plan.replicas(),
            remote_tokens: anatomy.remote_tokens,
            remote_share: round(quotient((anatomy.remote_tokens, total))),
            rank_before: anatomy.rank_load_before.clone(),
            rank_after: anatomy.rank_load_after.clone(),
            instances: instances(topology, anatomy),
            copies,
            copies_left_out,
            flow: flow(topology, anatomy),
            transfers: transfers(anatomy),
            times: times(scenario, hardware, anatomy)?,
        })
    }
}

impl SplitJson {
    fn of(topology: &Topology, expert: Expert, anatomy: &Anatomy) -> Self {
        let ranks = topology.ranks();
        let ranks_per_row = ranks.div_ceil(FLOW_MAX);
        let range = anatomy.plan.range(expert);
        let shown = range.start..range.end.min(range.start + FLOW_MAX);
        let mut tokens = vec![0; ranks.div_ceil(ranks_per_row) * shown.len()];
        for (source, row) in anatomy.split.chunks_exact(anatomy.plan.instances().len().max(1)).enumerate() {
            for (column, &share) in row[shown.clone()].iter().enumerate() {
                tokens[source / ranks_per_row * shown.len() + column] += u64::from(share);
            }
        }
        let column = |column: usize| tokens.iter().skip(column).step_by(shown.len()).sum();
        let home = topology.home(expert);
        let instances = anatomy.plan.instances()[shown.clone()].iter().enumerate();
        let instances = instances.map(|(place, i)| (i.rank.index(), column(place), u8::from(i.rank != home))).collect();
        let instances_left_out = range.len() - shown.len();
        Self { expert: expert.index(), ranks, ranks_per_row, instances, instances_left_out, tokens }
    }
}

/// To four places: what a picture can show.
pub(crate) fn round(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

/// Of several domains the one that is furthest from what was asked.
fn stop_order(stop: StopReason) -> u8 {
    match stop {
        StopReason::AlreadyBalanced => 0,
        StopReason::TargetReached => 1,
        StopReason::LowerBound => 2,
        StopReason::LeastCost => 3,
        StopReason::SearchExhausted => 4,
        _ => 5,
    }
}

fn stop_words(stop: StopReason) -> &'static str {
    match stop {
        StopReason::AlreadyBalanced => "nothing exceeded the target",
        StopReason::TargetReached => "the target was reached",
        StopReason::LowerBound => "no plan with this least quota can do better (proven bound)",
        StopReason::LeastCost => "more would not pay",
        StopReason::SearchExhausted => "the search ended above the target",
        _ => "the policy does not search",
    }
}

fn instances(topology: &Topology, anatomy: &Anatomy) -> Vec<Vec<u64>> {
    let mut of_rank = vec![Vec::new(); topology.ranks()];
    let measure = Measure::of_split(topology.ranks(), anatomy.plan.instances(), &anatomy.split);
    for expert in (0..anatomy.plan.experts()).map(Expert::new) {
        for index in anatomy.plan.range(expert) {
            let instance = anatomy.plan.instances()[index];
            let is_replica = instance.rank != topology.home(expert);
            let physical = instance.physical.index() as u64;
            let row = [expert.index() as u64, physical, measure.instances()[index], u64::from(is_replica)];
            of_rank[instance.rank.index()].extend(row);
        }
    }
    of_rank
}

type Copies = Vec<(usize, usize, usize, u32)>;

fn copies(topology: &Topology, anatomy: &Anatomy) -> (Copies, usize) {
    let mut copies = Vec::new();
    for expert in (0..anatomy.plan.experts()).map(Expert::new) {
        let home = topology.home(expert);
        let replicas = anatomy.plan.of(expert).iter().filter(|instance| instance.rank != home);
        copies.extend(replicas.map(|i| (expert.index(), home.index(), i.rank.index(), i.quota)));
    }
    copies.sort_by_key(|&(expert, _, rank, tokens)| (std::cmp::Reverse(tokens), expert, rank));
    let left_out = copies.len().saturating_sub(COPIES_MAX);
    copies.truncate(COPIES_MAX);
    (copies, left_out)
}

fn flow(topology: &Topology, anatomy: &Anatomy) -> Flow {
    let ranks_per_group = topology.ranks().div_ceil(FLOW_MAX);
    let groups = topology.ranks().div_ceil(ranks_per_group);
    let mut tokens = vec![0; groups * groups];
    for (source, _, instance, share) in shares(anatomy.plan.instances(), &anatomy.split) {
        let to = instance.rank.index();
        tokens[source.index() / ranks_per_group * groups + to / ranks_per_group] += u64::from(share);
    }
    Flow { ranks_per_group, tokens }
}

fn transfers(anatomy: &Anatomy) -> TransfersJson {
    let plan = &anatomy.transfers;
    let row = |task: &ultraep_plan::TransferTask| {
        let transfer = task.transfer;
        let (from, to) = (transfer.from.index(), transfer.to.index());
        (transfer.expert.index(), from, to, task.depth, task.stripe.index, task.stripe.count)
    };
    let mut tasks: Vec<_> = plan.tasks().iter().map(row).collect();
    tasks.sort_by_key(|&(expert, from, to, depth, stripe, _)| (expert, stripe, depth, from, to));
    let left_out = tasks.len().saturating_sub(COPIES_MAX);
    tasks.truncate(COPIES_MAX);
    TransfersJson {
        tasks,
        left_out,
        relayed_experts: plan.relayed_experts(),
        fanout: plan.fanout(),
        depth: plan.depth(),
        sync_ns: anatomy.sync_ns,
        direct_sync_ns: anatomy.direct_sync_ns,
    }
}

/// Masters only need no plan, no weight sync and no reroute.
fn times(scenario: &Scenario, hardware: &str, anatomy: &Anatomy) -> Result<Times, ViewError> {
    let none = Scenario { kind: PolicyKind::None, ..scenario.clone() };
    let before = replan(&none, &anatomy.counts, &[])?.anatomy.prediction;
    Ok(Times { hardware: hardware.to_owned(), before: Parts::of(&before), after: Parts::of(&anatomy.prediction) })
}

impl Parts {
    fn of(prediction: &Prediction) -> Self {
        let &Prediction { plan_ps, reroute_ps, weight_sync_ps, all_to_all_ps, experts_ps } = prediction;
        let ns = |ps: u64| ps.div_ceil(1000);
        Self {
            plan_ns: ns(plan_ps),
            reroute_ns: ns(reroute_ps),
            weight_sync_ns: ns(weight_sync_ps),
            all_to_all_ns: ns(all_to_all_ps),
            experts_ns: ns(experts_ps),
            total_ns: ns(prediction.total_ps()),
        }
    }
}
