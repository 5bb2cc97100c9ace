//! What a policy is: anything that turns a problem into a plan, and says which rules its plans keep.

use crate::{Plan, Problem, ProblemError, Topology};

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
