//! Policy `ultraep`, the default.
//!
//! # Problem
//!
//! Masters stay; choose replicas and quotas so that, in this order: (1) the largest rank load falls to the target `beta`
//! times the mean, or as low as possible; (2) replicas are few; (3) the rank that sends most copies sends few; (4) few
//! tokens cross ranks. (Paper: section on planning; its Algorithm 1 is policy `greedy`.) Each domain is planned alone.
//!
//! # Method
//!
//! ```text
//! bound  = lower bound on any plan's threshold                     (field)
//! goal   = max(beta * mean, bound)
//! loads already within the goal: masters only
//! build replicas at the goal, in three stages of ways              (construct)
//!   plain: one way, which nearly always fits
//!   tight: ways for few slots
//!   rings: ways for a least quota that most ranks' slack falls short of
//!   none fits: search upwards for a threshold at which one does, in doubling steps, then by bisection, up to where the
//!              published planners get (published)
//! of the first stage in which a way fits, keep the one with fewest replicas, then fewest sends of a rank, then the earlier
//! rewrite pieces so that the busiest rank sends fewer copies       (level)
//! ```
//!
//! The bound is proven, so a plan at the bound is optimal and says so ([`StopReason::LowerBound`]).
//! With speed weights, a rank's load counts as `ceil(load * FULL_SPEED / speed)` and `mean` is the load over the
//! sum of speeds; a rank of weight 0 gets no replica and keeps its masters' load, counted at full speed.
//!
//! The cost-aware objective ([`Ultraep::cost_aware`]) decides by predicted time instead (price).
//!
//! # Determinism
//!
//! Integers only; orders: ranks and experts by their stated key, ties to the lower index; ways in their listed order.
//!
//! # Cost
//!
//! `O(N * E)` once for the column sums, then for each construction `O(G log G + replicas * (G + M))`: one where the plain way
//! fits, thirteen at most at the goal, and as many for each of the about `2 * log2(gap)` steps of the search when the goal is
//! missed. A missed goal also costs what `greedy` and `ultraep-v1` do: no plan is worse than theirs.

mod construct;
mod field;
mod level;
mod price;
mod published;

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use crate::draft::{Emitter, Move, total_slots};
use crate::{
    Domain, DomainOutcome, HardwareModel, Plan, PlanRules, Policy, PolicyFactory, PolicyRefused, Problem, Ratio,
    SlotRule, SolveError, SplitRule, StopReason, Topology, TransferModelError,
};
use construct::{Builder, Order, Small, Style, Waste};
use field::Field;
use level::Leveller;
use price::{PASSES, Pricer, evenly, squares};
use published::Published;

/// Parameters of policy `ultraep`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UltraepParams {
    /// `beta`: tolerated imbalance. Replicas are not spent on getting below it.
    pub beta: Ratio,
    /// `u_min`: least quota of a replica; 0 counts as 1.
    pub min_quota: u32,
}

impl Default for UltraepParams {
    /// As in the paper: 1.01 and 1024 tokens.
    fn default() -> Self {
        Self { beta: Ratio::BETA, min_quota: 1024 }
    }
}

impl PolicyFactory for UltraepParams {
    fn name(&self) -> &'static str {
        "ultraep"
    }

    fn build(&self, topology: &Topology) -> Result<Box<dyn Policy>, PolicyRefused> {
        Ok(Box::new(Ultraep::new(topology, *self)))
    }
}

/// The search above a missed goal starts with steps of the goal over this.
const FIRST_STEP: u32 = 1024;

/// The way tried first. It leaves no replica's work to a rank that is relieved itself.
const PLAIN: [Style; 1] = [way(Order::Smallest, Waste::Leave)];

/// Ways for tight cases, where every slot must count.
const TIGHT: [Style; 6] = [
    way(Order::HottestThenSmallest, Waste::Leave),
    way(Order::Largest, Waste::Hand),
    way(Order::Smallest, Waste::Hand),
    way(Order::Alternate, Waste::Hand),
    way(Order::Fill, Waste::Leave),
    way(Order::Merge, Waste::Hand),
];

/// Ways for cases that `u_min` makes tight.
const RINGS: [Style; 6] = [
    Style { small: Small::Ring, ..way(Order::Largest, Waste::Leave) },
    Style { small: Small::Ring, ..way(Order::Largest, Waste::Hand) },
    Style { small: Small::Ring, ..way(Order::Smallest, Waste::Hand) },
    Style { small: Small::Ring, ..way(Order::Alternate, Waste::Hand) },
    Style { small: Small::Ring, ..way(Order::Merge, Waste::Hand) },
    Style { small: Small::Ring, ..way(Order::Chain, Waste::Hand) },
];

const fn way(order: Order, waste: Waste) -> Style {
    Style { order, waste, small: Small::Round }
}

/// Which moves are meant.
enum Candidate {
    /// Those just built.
    New,
    /// The best so far.
    Best,
}

/// The default planner. See the module's documentation in the source for the method.
#[derive(Clone, Debug)]
pub struct Ultraep {
    topology: Topology,
    params: UltraepParams,
    loads: Vec<u32>,
    field: Field,
    builder: Builder,
    best: Vec<Move>,
    leveller: Leveller,
    published: Published,
    emitter: Emitter,
    /// Present when the predicted time decides instead of `beta`.
    pricer: Option<Pricer>,
}

impl Ultraep {
    /// The policy for one group.
    pub fn new(topology: &Topology, params: UltraepParams) -> Self {
        let params = UltraepParams { min_quota: params.min_quota.max(1), ..params };
        Self {
            topology: topology.clone(),
            params,
            loads: vec![0; topology.experts()],
            field: Field::new(topology, params.min_quota),
            builder: Builder::new(topology),
            best: Vec::with_capacity(total_slots(topology)),
            leveller: Leveller::new(topology),
            published: Published::new(topology, params),
            emitter: Emitter::new(topology),
            pricer: None,
        }
    }

    /// The cost-aware planner, policy `ultraep-cost`: of masters only and of plans at many thresholds from `params.beta`
    /// up, the one with the least predicted time under `model`.
    ///
    /// # Errors
    /// [`TransferModelError`] when an expert of `model` has no size or takes longer than transfers may.
    pub fn cost_aware(
        topology: &Topology,
        params: UltraepParams,
        model: HardwareModel,
    ) -> Result<Self, TransferModelError> {
        Ok(Self { pricer: Some(Pricer::new(topology, model)?), ..Self::new(topology, params) })
    }

    fn solve_domain(&mut self, domain: Domain) -> DomainOutcome {
        self.field.enter(&self.topology, domain, &self.loads);
        self.best.clear();
        let largest = self.field.largest();
        let lower_bound = self.field.lower_bound();
        let target = self.field.target(self.params.beta);
        let goal = target.max(lower_bound);
        let outcome = |threshold: u32| {
            let stop = match threshold {
                _ if largest <= target => StopReason::AlreadyBalanced,
                reached if reached <= target => StopReason::TargetReached,
                reached if reached <= lower_bound => StopReason::LowerBound,
                _ => StopReason::SearchExhausted,
            };
            DomainOutcome { threshold, lower_bound, stop }
        };
        if let Some(mut pricer) = self.pricer.take() {
            let threshold = if largest <= goal { largest } else { self.cheapest(&mut pricer, goal, largest) };
            self.pricer = Some(pricer);
            let stop = if threshold > target { StopReason::LeastCost } else { outcome(threshold).stop };
            return DomainOutcome { stop, ..outcome(threshold) };
        }
        if largest <= goal {
            return outcome(largest);
        }
        if self.keep_best_of_first(goal) {
            return outcome(goal);
        }
        let published = self.published.solve(&self.topology, &self.field, domain, &self.loads);
        let tau = if published <= goal { goal } else { self.search(goal + 1, published) };
        if !self.keep_best_of_first(tau) {
            // No way of ours: `tau` is where the published plan got, or the goal that it met.
            self.best.clone_from(&self.published.moves);
            self.leveller.level(&self.topology, &self.field, tau, &mut self.best);
        }
        outcome(tau)
    }

    /// A threshold in `low..=high` at which a construction fits, one token below which none was seen to: steps from `low`
    /// up that double, then bisection between the last two. At `high` the published plan fits. (Fitting is not monotone in
    /// the threshold; small steps first find a threshold near `low` where a bisection of the whole range may not.)
    fn search(&mut self, mut low: u32, mut high: u32) -> u32 {
        let mut step = (low / FIRST_STEP).max(1);
        while low < high {
            let probe = low.saturating_add(step).min(high);
            if probe == high || self.fits(probe) {
                high = probe;
                break;
            }
            low = probe + 1;
            step = step.saturating_mul(2);
        }
        while low < high {
            let middle = low + (high - low) / 2;
            if self.fits(middle) { high = middle } else { low = middle + 1 }
        }
        high
    }

    /// Whether a construction fits at `tau`.
    fn fits(&mut self, tau: u32) -> bool {
        self.builder.prepare(&self.field, tau);
        self.stages().into_iter().flatten().any(|&style| self.builder.build(&self.field, style))
    }

    /// The ways to build, in the order tried. Without a least quota nothing is gained by rings.
    fn stages(&self) -> [&'static [Style]; 3] {
        [&PLAIN, &TIGHT, if self.params.min_quota > 1 { &RINGS } else { &[] }]
    }

    /// Keeps the best of the first stage in which a way fits. `false` when none does.
    fn keep_best_of_first(&mut self, tau: u32) -> bool {
        self.stages().into_iter().any(|styles| self.keep_best(tau, styles))
    }

    /// Builds in every way of `styles` and keeps the best that fits. `false` when none does.
    fn keep_best(&mut self, tau: u32, styles: &[Style]) -> bool {
        let mut best = None;
        self.builder.prepare(&self.field, tau);
        for &style in styles {
            if !self.builder.build(&self.field, style) {
                continue;
            }
            let replicas = self.builder.moves.len();
            let better = best.is_none_or(|fewest| {
                replicas < fewest
                    || (replicas == fewest
                        && self.most_sends(tau, Candidate::New) < self.most_sends(tau, Candidate::Best))
            });
            if better {
                best = Some(replicas);
                core::mem::swap(&mut self.best, &mut self.builder.moves);
            }
        }
        if best.is_some() {
            self.leveller.level(&self.topology, &self.field, tau, &mut self.best);
        }
        best.is_some()
    }

    fn most_sends(&mut self, tau: u32, candidate: Candidate) -> u16 {
        let moves = match candidate {
            Candidate::New => &self.builder.moves,
            Candidate::Best => &self.best,
        };
        self.leveller.enter(&self.topology, &self.field, tau, moves)
    }

    /// Keeps the candidate with the least predicted time; returns its threshold.
    fn cheapest(&mut self, pricer: &mut Pricer, goal: u32, largest: u32) -> u32 {
        let (price, sends) = pricer.price(&self.topology, &self.field, &[], u64::MAX);
        let mut best = ((price, 0, sends), largest);
        let (mut low, mut high) = (goal, largest);
        for pass in 0..PASSES {
            let points = if pass == 0 { squares(low, high) } else { evenly(low, high) };
            for tau in points {
                self.price_at(pricer, tau, &mut best);
            }
            low = points.into_iter().filter(|&tau| tau < best.1).max().unwrap_or(low);
            high = points.into_iter().filter(|&tau| tau > best.1).min().unwrap_or(high);
        }
        best.1
    }

    /// Builds at `tau` and keeps what is cheaper than `best`: `((price, replicas, sends), threshold)`.
    fn price_at(&mut self, pricer: &mut Pricer, tau: u32, best: &mut ((u64, usize, u32), u32)) {
        self.builder.prepare(&self.field, tau);
        let mut fits = false;
        for styles in self.stages() {
            for &style in styles {
                if !self.builder.build(&self.field, style) {
                    continue;
                }
                fits = true;
                self.leveller.level(&self.topology, &self.field, tau, &mut self.builder.moves);
                let (price, sends) = pricer.price(&self.topology, &self.field, &self.builder.moves, best.0.0);
                let score = (price, self.builder.moves.len(), sends);
                if score < best.0 {
                    *best = (score, tau);
                    core::mem::swap(&mut self.best, &mut self.builder.moves);
                }
            }
            if fits {
                return;
            }
        }
    }
}

impl Policy for Ultraep {
    fn name(&self) -> &'static str {
        if self.pricer.is_some() { "ultraep-cost" } else { "ultraep" }
    }

    fn rules(&self) -> PlanRules {
        PlanRules {
            slots: SlotRule::Replicas,
            min_quota: self.params.min_quota,
            empty_replicas: false,
            within_domain: true,
            speeds: true,
        }
    }

    fn solve(&mut self, problem: &Problem<'_>, plan: &mut Plan) -> Result<(), SolveError> {
        SolveError::check_topology(&self.topology, problem)?;
        problem.expert_loads(&mut self.loads);
        plan.begin(SplitRule::LocalFirstExact);
        for domain in (0..self.topology.domains()).map(Domain::new) {
            if let Some(pricer) = &mut self.pricer {
                pricer.enter(problem, domain);
            }
            let outcome = self.solve_domain(domain);
            self.emitter.emit(&self.topology, domain, &self.loads, &self.best, plan);
            plan.push_domain(outcome);
        }
        Ok(())
    }
}
