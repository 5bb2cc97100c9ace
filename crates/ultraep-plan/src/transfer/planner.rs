//! From the direct list to a plan of transfers: which forest is best.
//!
//! ```text
//! direct          every replica from its home rank
//! two-level       one forest (see trees.rs); it decides expert by expert, by fan-out, and never asks the model
//! deep            for 1, 2, .. stripes and budget 1, 2, .. units a rank sends, up to the direct fan-out: build the forest,
//!                 estimate it, keep the least; stop when sending the next budget's units alone takes longer
//!   adaptive      then the exact model: keep it only if it is faster than direct
//! ```
//!
//! Guarantee: in mode adaptive the deep rule's plan never takes longer than the direct plan under the model, unless the
//! parameters let it trust estimates ([`TransferParams::trusted_gain_percent`]).
//! Complexity: O(B T log T) for B budgets tried, and in adaptive at most two runs of the exact model where relays are an option.
//! All integers; equal inputs give equal plans. Ties: direct, then fewer stripes, then the larger
//! budget (fewer relays).

use super::trees::{Builder, Forest};
use super::{Transfer, TreeRule};
use super::{TransferClock, TransferMode, TransferModel, TransferModelError, TransferParams, TransferPlan, Transfers};
use crate::Topology;
use crate::draft::total_slots;

/// What a planner chose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Experts that a relay forwards; 0 is the direct plan.
    pub relayed_experts: u32,
    /// The most units that one rank sends; a unit is a stripe of a copy.
    pub fanout: u32,
    /// Stripes of every copy.
    pub stripes: u32,
    /// Budget of units a rank under which the forest was built; the fan-out where there was none.
    pub budget: u32,
}

/// Plans transfers. All memory is taken by [`TransferPlanner::new`], for plans within the slots of the topology.
#[derive(Clone, Debug)]
pub struct TransferPlanner {
    model: TransferModel,
    params: TransferParams,
    domain_ranks: usize,
    builder: Builder,
    best: Forest,
    trial: Forest,
    candidate: TransferPlan,
    clock: TransferClock,
}

impl TransferPlanner {
    /// For a group, a fabric and a rule.
    pub fn new(topology: &Topology, model: TransferModel, params: TransferParams) -> Result<Self, TransferModelError> {
        let transfers = total_slots(topology);
        let units = transfers * params.most_stripes() as usize;
        Ok(Self {
            model,
            params,
            domain_ranks: topology.domain_ranks(),
            builder: Builder::new(topology.ranks(), transfers, model, params),
            best: Forest::with_capacity(units),
            trial: Forest::with_capacity(units),
            candidate: TransferPlan::new(topology),
            clock: TransferClock::new(topology, model)?,
        })
    }

    /// The model it plans with.
    pub fn model(&self) -> TransferModel {
        self.model
    }

    /// The rule it plans by.
    pub fn params(&self) -> TransferParams {
        self.params
    }

    /// Plans the copies of `transfers` into `plan`.
    pub fn plan(&mut self, transfers: &Transfers, plan: &mut TransferPlan) -> Choice {
        let all = transfers.all();
        self.builder.begin(all, transfers.sends(), transfers.receives());
        let adaptive = self.params.mode == TransferMode::Adaptive;
        let small = adaptive && self.domain_ranks <= self.params.direct_ranks as usize;
        self.builder.direct(all, &mut self.best);
        let direct_fanout = self.builder.fanout();
        let (mut budget, mut estimate) = (direct_fanout, 0);
        match self.params.tree {
            _ if small || self.params.mode == TransferMode::Direct => {}
            TreeRule::TwoLevel => self.builder.two_level(all, &mut self.best),
            TreeRule::Deep => (budget, estimate) = self.search(all, direct_fanout),
        }
        if self.best.relayed_experts > 0 && adaptive && self.params.tree == TreeRule::Deep {
            self.prefer_direct(transfers, estimate);
        }
        plan.fill(transfers, &self.best);
        let fanout = plan.fanout();
        let budget = if plan.relayed_experts() == 0 { fanout } else { budget };
        Choice { relayed_experts: plan.relayed_experts(), fanout, stripes: plan.stripes(), budget }
    }

    /// What the copies of `transfers` are estimated to take under the rule, without planning them to the end: within a few
    /// percent of the clock's time ([`TransferParams::trusted_gain_percent`]), and far cheaper. The direct list's under
    /// [`TreeRule::TwoLevel`]; 0 for an empty list.
    pub(crate) fn estimate_ns(&mut self, transfers: &Transfers) -> u64 {
        let all = transfers.all();
        if all.is_empty() {
            return 0;
        }
        self.builder.begin(all, transfers.sends(), transfers.receives());
        self.builder.direct(all, &mut self.best);
        let direct_fanout = self.builder.fanout();
        self.search(all, direct_fanout).1
    }

    /// Leaves the forest of least estimate in `best`, and gives its budget and estimate.
    fn search(&mut self, all: &[Transfer], direct_fanout: u32) -> (u32, u64) {
        let forced = self.params.mode == TransferMode::Relay;
        // Direct is what adaptive starts from; in mode relay the largest budget is.
        if forced {
            self.builder.deep(all, &mut self.best, 1, direct_fanout);
        }
        let mut least = self.builder.estimate_ns(all, &self.best);
        let mut chosen = direct_fanout;
        // Copies a rank that the budget of some stripes kept to.
        let mut kept = direct_fanout;
        for stripes in 1..=self.params.most_stripes() {
            let mut chosen_here = false;
            let round = self.model.chunks() / u64::from(stripes) * self.model.send_ns;
            // More stripes share finer: what one copy less was too little for, a part of a copy less may do.
            let finer = if stripes > 1 { kept.saturating_sub(1) * stripes + 1 } else { 1 };
            let first = self.builder.least_budget(all, stripes).max(finer);
            for budget in first..direct_fanout * stripes {
                if u64::from(budget) * round > least {
                    break;
                }
                self.builder.deep(all, &mut self.trial, stripes, budget);
                let keeps = self.builder.even_out(all, &mut self.trial, budget);
                if keeps {
                    kept = kept.min(budget.div_ceil(stripes));
                }
                let gain = direct_fanout.saturating_sub(self.builder.fanout().div_ceil(stripes));
                let estimate = self.builder.estimate_ns(all, &self.trial);
                let better = estimate < least || (estimate == least && chosen_here);
                if better && (forced || gain >= self.params.min_fanout_gain) {
                    (least, chosen, chosen_here) = (estimate, budget, true);
                    core::mem::swap(&mut self.best, &mut self.trial);
                }
                if keeps && stripes > 1 {
                    break;
                }
            }
        }
        (chosen, least)
    }

    /// Puts the direct forest into `best` unless the one there is faster, by the exact model.
    fn prefer_direct(&mut self, transfers: &Transfers, estimate: u64) {
        self.builder.direct(transfers.all(), &mut self.trial);
        let direct_least = u64::from(self.builder.fanout()) * self.model.chunks() * self.model.send_ns;
        if let Some(percent) = self.params.trusted_gain_percent {
            let left = u64::from(100_u32.saturating_sub(percent));
            if u128::from(estimate) * 100 <= u128::from(direct_least) * u128::from(left) {
                return;
            }
        }
        self.candidate.fill(transfers, &self.best);
        let relayed = self.clock.run(&self.candidate);
        // The busiest rank's sends alone take longer: no need to run the direct plan.
        if relayed < direct_least {
            return;
        }
        self.candidate.fill(transfers, &self.trial);
        if self.clock.run(&self.candidate) <= relayed {
            core::mem::swap(&mut self.best, &mut self.trial);
        }
    }
}
