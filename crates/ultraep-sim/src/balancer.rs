//! One layer under one system: the real policy on the counts, the real split, the real transfer planner.

use ultraep_baselines::{
    EplbParams, HistoryParams, LplbLinks, LplbParams, PolicyKind, PolicyParams, build, ideal, plan_for,
};
use ultraep_plan::measure::{Measure, imbalance, master_loads, shares};
use ultraep_plan::{
    Expert, Instance, Plan, PlannedTransfers, Policy, Problem, Rank, SplitWorkspace, SyncPlanner, Topology,
    TransferModel, TransferParams, check_plan, split_all,
};

use crate::SimError;

/// When replicas get their weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncRule {
    /// There are none.
    Never,
    /// In every microbatch, by this project's transfers (forward, and again in backward); gradients are reduced behind the
    /// backward of the rest.
    Transfers(TransferParams),
    /// In every microbatch by collectives at this rate, exposed: weights before the experts, gradients after them.
    Collectives {
        /// Start of each.
        start_ns: u64,
        /// Bytes a second that a rank takes in.
        bytes_per_s: u64,
    },
    /// When experts are placed anew; between, replicas live in buffers of their own in every layer.
    Placement {
        /// Bytes a second that a rank takes in while it is moved.
        bytes_per_s: u64,
    },
}

/// A system under test: a policy and how its replicas are kept.
#[derive(Clone, Debug, PartialEq)]
pub struct System {
    /// Name in tables.
    pub name: String,
    /// What plans.
    pub policy: PolicyKind,
    /// When replicas get their weights.
    pub sync: SyncRule,
    /// Time to plan a layer, on the critical path.
    pub plan_ns: u64,
    /// Least quota of a replica.
    pub min_quota: u32,
    /// What historical policies remember, in microbatches.
    pub history: HistoryParams,
    /// Most variables of a linear program that is solved; larger ones are split evenly (`lplb`).
    pub max_variables: usize,
    /// Which ranks share an expert (`lplb`).
    pub links: LplbLinks,
}

/// What one layer's microbatch comes to, on every rank. All counts are rows: a token through one expert.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerLoad {
    /// Where each rank's instances lie in `rows`, `[N + 1]`.
    pub offsets: Vec<u32>,
    /// Rows of the instances that have any, by rank.
    pub rows: Vec<u32>,
    /// Rows that a rank sends to others of its domain, `[N]`.
    pub sent: Vec<u64>,
    /// Rows that a rank receives from others of its domain, `[N]`.
    pub received: Vec<u64>,
    /// Of those received, the ones above the even share of their pair, `[N]`.
    pub excess: Vec<u64>,
    /// Of those sent, the ones above the even share of their pair (combine receives them), `[N]`.
    pub excess_out: Vec<u64>,
    /// Rows to other domains, `[N]`.
    pub sent_far: Vec<u64>,
    /// Rows from other domains, `[N]`.
    pub received_far: Vec<u64>,
    /// Rows from rank to rank, `[N, N]` row-major; the diagonal stays at home.
    pub flows: Vec<u32>,
    /// Rows that an even pair of ranks exchanges, rounded up.
    pub even_share: u32,
    /// When each rank has its replicas' weights, `[N]`, nanoseconds after the plan; 0 without.
    pub sync_ns: Vec<u64>,
    /// Most copies of experts that one rank sends or receives in the direct list.
    pub most_copies: u32,
    /// Most copies that one rank receives.
    pub most_received: u32,
    /// Most instances on one rank that were elsewhere in the plan before.
    pub moved: u32,
    /// Replicas in all.
    pub replicas: u32,
    /// Most replicas of one expert.
    pub fanout: u32,
    /// Experts that a relay forwards.
    pub relayed: u32,
    /// Rows in all.
    pub total: u64,
    /// Rows of the busiest rank as routed, masters only.
    pub largest_before: u64,
}

impl LayerLoad {
    /// `N`.
    pub fn ranks(&self) -> usize {
        self.sent.len()
    }

    /// Rows of the instances of a rank.
    pub fn rows_of(&self, rank: usize) -> &[u32] {
        &self.rows[self.offsets[rank] as usize..self.offsets[rank + 1] as usize]
    }

    /// Rows of a rank.
    pub fn rank_rows(&self, rank: usize) -> u64 {
        self.rows_of(rank).iter().map(|&rows| u64::from(rows)).sum()
    }

    /// Rows of the busiest rank.
    pub fn largest(&self) -> u64 {
        (0..self.ranks()).map(|rank| self.rank_rows(rank)).max().unwrap_or(0)
    }

    /// Max over mean of rank loads after balancing, for reports.
    pub fn imbalance(&self) -> f64 {
        let (num, den) = imbalance((0..self.ranks()).map(|rank| self.rank_rows(rank)));
        num as f64 / den as f64
    }

    /// Max over mean of rank loads as routed, for reports.
    pub fn imbalance_before(&self) -> f64 {
        ratio(self.largest_before * self.ranks() as u64, self.total)
    }

    /// Share of rows that another rank than their source processes, for reports.
    pub fn remote_fraction(&self) -> f64 {
        ratio(self.sent.iter().sum::<u64>() + self.sent_far.iter().sum::<u64>(), self.total)
    }
}

fn ratio(num: u64, den: u64) -> f64 {
    if den == 0 { 1.0 } else { num as f64 / den as f64 }
}

/// A system at work on one layer (historical policies remember that layer).
pub struct Balancer {
    system: System,
    topology: Topology,
    policy: Box<dyn Policy>,
    plan: Plan,
    scaled: Plan,
    before: Vec<(Expert, Rank)>,
    instances: Vec<(Expert, Rank)>,
    split: SplitWorkspace,
    shares: Vec<u32>,
    balanced: Vec<u32>,
    measure: Measure,
    transfers: PlannedTransfers,
    syncs: SyncPlanner,
}

impl Balancer {
    /// `topology` gives slots, domains and speeds.
    pub fn new(system: &System, topology: &Topology, model: TransferModel) -> Result<Self, SimError> {
        let params = PolicyParams {
            min_quota: system.min_quota,
            eplb: EplbParams { history: system.history, groups: None },
            lplb: LplbParams { history: system.history, max_variables: system.max_variables, links: system.links },
            ..PolicyParams::default()
        };
        let params_of_sync = match system.sync {
            SyncRule::Transfers(params) => params,
            _ => TransferParams::default(),
        };
        Ok(Self {
            system: system.clone(),
            topology: topology.clone(),
            policy: build(system.policy, topology, &params)?,
            plan: plan_for(system.policy, topology),
            scaled: plan_for(system.policy, topology),
            before: Vec::new(),
            instances: Vec::new(),
            split: SplitWorkspace::new(topology),
            shares: Vec::new(),
            balanced: Vec::new(),
            measure: Measure::default(),
            transfers: PlannedTransfers::new(topology),
            syncs: SyncPlanner::new(topology, model, params_of_sync)?,
        })
    }

    /// Plans for `counts` `[N, E]` and says what comes of it. Historical policies then take the microbatch in.
    pub fn microbatch(&mut self, counts: &[u32], load: &mut LayerLoad) -> Result<(), SimError> {
        self.planned_for(counts, counts, load)
    }

    /// As [`Balancer::microbatch`], but the plan is made for `seen` and meets `counts`: each expert's tokens are shared over
    /// its instances in proportion to the quotas planned.
    pub fn planned_for(&mut self, seen: &[u32], counts: &[u32], load: &mut LayerLoad) -> Result<(), SimError> {
        let topology = self.topology.clone();
        let stale = seen != counts;
        if self.system.policy.forces_routing() {
            let sums: Vec<u32> = counts.chunks(topology.experts()).map(|row| row.iter().sum()).collect();
            self.balanced = ideal::balanced_counts(&topology, &sums);
        } else {
            self.balanced.clear();
            self.balanced.extend_from_slice(counts);
        }
        let routed = std::mem::take(&mut self.balanced);
        let result = self.evaluate(&topology, if stale { seen } else { &routed }, &routed, stale, load);
        load.largest_before = master_loads(&topology, counts).into_iter().max().unwrap_or(0);
        self.balanced = routed;
        result
    }

    fn evaluate(
        &mut self,
        topology: &Topology,
        seen: &[u32],
        counts: &[u32],
        stale: bool,
        load: &mut LayerLoad,
    ) -> Result<(), SimError> {
        let problem = Problem::new(topology, counts)?;
        self.policy.solve(&Problem::new(topology, seen)?, &mut self.plan)?;
        if stale {
            self.rescale(&problem);
            std::mem::swap(&mut self.plan, &mut self.scaled);
        } else {
            let check = check_plan(&problem, &self.plan, &self.policy.rules());
            check.map_err(|violation| SimError::Plan { policy: self.system.policy.name(), violation })?;
        }
        self.policy.observe(&problem);
        let instances = self.plan.instances().len();
        self.shares.resize(topology.ranks() * instances, 0);
        split_all(&problem, &self.plan, &mut self.split, &mut self.shares)?;
        self.spread(topology, load);
        self.sync(load);
        Ok(())
    }

    /// The same instances, with quotas for the load of `problem`.
    fn rescale(&mut self, problem: &Problem<'_>) {
        let experts = problem.topology().experts();
        self.scaled.begin(self.plan.split_rule());
        for expert in (0..experts).map(Expert::new) {
            let actual: u64 = problem.counts().chunks(experts).map(|row| u64::from(row[expert.index()])).sum();
            let planned: u64 = self.plan.of(expert).iter().map(|i| u64::from(i.quota)).sum();
            let (mut upto, mut given) = (0, 0);
            for (index, &instance) in self.plan.range(expert).zip(self.plan.of(expert)) {
                upto += u64::from(instance.quota);
                // Without a plan for it, the master takes all.
                let until = (actual * upto).checked_div(planned).unwrap_or(actual);
                let quota = (until - given) as u32;
                given = until;
                self.scaled.push_copies(Instance { quota, ..instance }, self.plan.copies(index) as u16);
            }
            self.scaled.end_expert();
        }
        self.plan.domains().iter().for_each(|&outcome| self.scaled.push_domain(outcome));
    }

    /// Rows of every instance and flows between ranks, from the split.
    fn spread(&mut self, topology: &Topology, load: &mut LayerLoad) {
        let (ranks, instances) = (topology.ranks(), self.plan.instances());
        load.flows.clear();
        load.flows.resize(ranks * ranks, 0);
        for (source, _, instance, share) in shares(instances, &self.shares) {
            load.flows[source.index() * ranks + instance.rank.index()] += share;
        }
        self.measure.take_split(ranks, instances, &self.shares);
        let rows = instances.iter().zip(self.measure.instances());
        let busy = rows.filter(|&(_, &rows)| rows > 0);
        let mut by_rank: Vec<(usize, u32)> = busy.map(|(i, &rows)| (i.rank.index(), rows as u32)).collect();
        by_rank.sort_by_key(|&(rank, _)| rank);
        load.rows.clear();
        load.rows.extend(by_rank.iter().map(|&(_, rows)| rows));
        load.offsets.clear();
        load.offsets.extend((0..=ranks).map(|rank| by_rank.partition_point(|&(r, _)| r < rank) as u32));
        load.total = self.measure.total_tokens();
        self.links(topology, load);
        self.instances.clear();
        for expert in (0..self.plan.experts()).map(Expert::new) {
            let busy = self.plan.of(expert).iter().filter(|i| i.rank != topology.home(expert) || i.quota > 0);
            self.instances.extend(busy.map(|i| (expert, i.rank)));
        }
        self.instances.sort_unstable();
        let mut arrivals = vec![0u32; ranks];
        for &(expert, rank) in &self.instances {
            let there = self.before.binary_search(&(expert, rank)).is_ok();
            arrivals[rank.index()] += u32::from(!there && topology.home(expert) != rank);
        }
        std::mem::swap(&mut self.before, &mut self.instances);
        // By collectives, replicas get their weights in every microbatch: what is above a rank's slots are experts placed anew.
        let kept = match self.system.sync {
            SyncRule::Collectives { .. } => topology.slots(Rank::new(0)) as u32,
            _ => 0,
        };
        load.moved = arrivals.into_iter().max().unwrap_or(0).saturating_sub(kept);
        load.replicas = self.plan.replicas() as u32;
        let most = (0..self.plan.experts()).map(|e| self.plan.of(Expert::new(e)).len() - 1).max();
        load.fanout = most.unwrap_or(0) as u32;
    }

    fn links(&self, topology: &Topology, load: &mut LayerLoad) {
        let (ranks, size) = (topology.ranks(), topology.domain_ranks());
        let even = load.total.div_ceil((ranks * ranks) as u64);
        load.even_share = even as u32;
        let LayerLoad { sent, received, excess, excess_out, sent_far, received_far, .. } = load;
        for list in [sent, received, excess, excess_out, sent_far, received_far] {
            list.clear();
            list.resize(ranks, 0);
        }
        for (from, flows) in load.flows.chunks(ranks).enumerate() {
            for (to, rows) in flows.iter().map(|&rows| u64::from(rows)).enumerate().filter(|&(to, _)| to != from) {
                if from / size == to / size {
                    load.sent[from] += rows;
                    load.received[to] += rows;
                    load.excess[to] += rows.saturating_sub(even);
                    load.excess_out[from] += rows.saturating_sub(even);
                } else {
                    load.sent_far[from] += rows;
                    load.received_far[to] += rows;
                }
            }
        }
    }

    fn sync(&mut self, load: &mut LayerLoad) {
        load.sync_ns.clear();
        load.sync_ns.resize(load.ranks(), 0);
        (load.relayed, load.most_copies, load.most_received) = (0, 0, 0);
        if load.replicas == 0 {
            return;
        }
        match self.system.sync {
            SyncRule::Transfers(_) => self.syncs.plan(&self.plan, &mut self.transfers),
            _ => self.transfers.list(&self.topology, &self.plan),
        }
        let direct = self.transfers.direct();
        let sends = direct.sends().iter().copied().max().unwrap_or(0);
        load.most_received = direct.receives().iter().copied().max().unwrap_or(0);
        if let SyncRule::Collectives { .. } = self.system.sync {
            load.most_received = load.most_received.min(self.topology.slots(Rank::new(0)) as u32);
        }
        load.most_copies = sends.max(load.most_received);
        if let SyncRule::Transfers(_) = self.system.sync {
            load.relayed = self.transfers.choice().relayed_experts;
            self.syncs.measure(&mut self.transfers);
            load.sync_ns.iter_mut().zip(self.syncs.complete_ns()).for_each(|(ns, complete)| *ns = complete);
        }
    }

    /// Shows it a microbatch that is over, without planning.
    pub fn observe(&mut self, counts: &[u32]) -> Result<(), SimError> {
        self.policy.observe(&Problem::new(&self.topology, counts)?);
        Ok(())
    }

    /// The plan of the last microbatch.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The system it runs.
    pub fn system(&self) -> &System {
        &self.system
    }
}
