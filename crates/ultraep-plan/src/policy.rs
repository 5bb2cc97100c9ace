//! What a policy is: anything that turns a problem into a plan, and says which rules its plans keep.

use alloc::boxed::Box;
use alloc::string::String;

use crate::{Expert, Plan, Problem, ProblemError, Rank, Topology};

/// How many instances a rank may hold under a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SlotRule {
    /// At most the rank's slots hold replicas (the system's rule).
    Replicas,
    /// At most masters plus slots hold instances *with a quota*; masters may be moved away (EPLB).
    Physical,
    /// No limit; the report says what the fullest rank needs (LLEP, MoonEP).
    Unlimited,
}

/// The rules that a policy's plans keep; the checker verifies them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanRules {
    /// Room on a rank.
    pub slots: SlotRule,
    /// Least quota of a replica (`u_min`), at least 1.
    pub min_quota: u32,
    /// Whether replicas with no tokens are possible (historical policies place before they know).
    pub empty_replicas: bool,
    /// Whether replicas stay in their master's domain.
    pub within_domain: bool,
    /// Whether thresholds take the ranks' speed weights into account (otherwise they are in tokens).
    pub speeds: bool,
}

/// Why a policy returned no plan. Never "target missed": that is a plan with its bound and the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SolveError {
    /// The problem's group is not the one the policy was sized for.
    #[error(
        "the policy was built for another group: {expected_ranks} ranks and {expected_experts} experts, got {ranks} and \
         {experts} (or other domains, slots or speeds)"
    )]
    Topology {
        /// `N` it was built with.
        expected_ranks: usize,
        /// `E` it was built with.
        expected_experts: usize,
        /// `N` of the problem.
        ranks: usize,
        /// `E` of the problem.
        experts: usize,
    },
    /// The counts were refused.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// The policy cannot serve such problems.
    #[error("{policy}: {reason}")]
    Unsupported {
        /// Its name.
        policy: &'static str,
        /// What it needs.
        reason: &'static str,
    },
}

impl SolveError {
    /// Checks that a problem is for the group that a policy was built for.
    pub fn check_topology(expected: &Topology, problem: &Problem<'_>) -> Result<(), Self> {
        let got = problem.topology();
        if expected == got {
            return Ok(());
        }
        Err(Self::Topology {
            expected_ranks: expected.ranks(),
            expected_experts: expected.experts(),
            ranks: got.ranks(),
            experts: got.experts(),
        })
    }
}

/// A balancing policy. Built for one topology, holds its own workspace, so that [`Policy::solve`] allocates nothing.
pub trait Policy: Send {
    /// Name on the command line, in tables and in files.
    fn name(&self) -> &'static str;

    /// The rules its plans keep.
    fn rules(&self) -> PlanRules;

    /// Shows it a microbatch that is over. Historical policies plan from these; exact ones ignore them.
    fn observe(&mut self, _problem: &Problem<'_>) {}

    /// Plans for `problem` into `plan`, whose memory is reused.
    fn solve(&mut self, problem: &Problem<'_>, plan: &mut Plan) -> Result<(), SolveError>;
}

/// Makes policies: what a runtime is given to plan with. One instance of a policy serves one layer.
pub trait PolicyFactory: core::fmt::Debug + Send + Sync {
    /// Name of its policies.
    fn name(&self) -> &'static str;

    /// The policy of one layer of a group.
    ///
    /// # Errors
    /// [`PolicyRefused`] when the policy cannot serve such a group.
    fn build(&self, topology: &Topology) -> Result<Box<dyn Policy>, PolicyRefused>;

    /// Physical experts that a rank needs room for: the largest over all ranks. Every physical index of its plans is below it. By
    /// default masters and slots.
    fn physical_per_rank(&self, topology: &Topology) -> usize {
        let ranks = (0..topology.ranks()).map(Rank::new);
        ranks.map(|rank| topology.physical_experts(rank)).max().unwrap_or(0)
    }

    /// For a policy that plans from earlier microbatches ([`Policy::observe`]): how many it looks back at, and after how many it
    /// places anew. `None`, the default, for those that plan from the exact counts.
    fn history(&self) -> Option<Lookback> {
        None
    }

    /// The expert that a token takes in place of the router's choice, for bounds that force routing. `None`, the default, leaves
    /// routing alone.
    fn forced_choice(&self, _topology: &Topology, _choice: TokenChoice) -> Option<Expert> {
        None
    }
}

/// How far back a historical policy looks, in microbatches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookback {
    /// Microbatches whose loads it plans from.
    pub window: usize,
    /// Microbatches from one placement to the next.
    pub interval: usize,
}

/// One choice of one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenChoice {
    /// Its source.
    pub rank: Rank,
    /// The token, from 0 on its rank.
    pub token: usize,
    /// Which of its choices.
    pub k: usize,
    /// How many it has.
    pub top_k: usize,
}

/// Why a factory made no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("policy {policy}: {reason}")]
pub struct PolicyRefused {
    /// Name of the policy.
    pub policy: &'static str,
    /// Why.
    pub reason: String,
}
