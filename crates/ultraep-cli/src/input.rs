//! Arguments that several commands share.

use std::path::Path;

use ultraep_baselines::{PolicyKind, PolicyParams};
use ultraep_load::{LoadMatrix, read_file};
use ultraep_plan::{Ratio, Topology, TopologySpec};

use crate::error::CliError;

/// The group beside what the loads say.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct GroupArgs {
    /// Slots for replicas on each rank
    #[arg(long, value_name = "R")]
    pub(crate) slots: usize,
    /// Ranks in a domain; replicas stay in their master's domain [default: all ranks]
    #[arg(long, value_name = "G")]
    pub(crate) domain: Option<usize>,
}

impl GroupArgs {
    pub(crate) fn topology(&self, ranks: usize, experts: usize) -> Result<Topology, CliError> {
        let domain_ranks = self.domain.unwrap_or(ranks);
        let spec = TopologySpec { ranks, experts, domain_ranks, slots_per_rank: self.slots };
        Topology::new(spec).map_err(CliError::input)
    }
}

/// Parameters of policies.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct PolicyArgs {
    /// Tolerated imbalance (largest rank load over the mean), as 1.01 or 101/100
    #[arg(long, default_value = "1.01", value_name = "RATIO")]
    pub(crate) beta: Ratio,
    /// Least tokens worth a replica
    #[arg(long, default_value_t = 1024, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) min_quota: u32,
}

impl PolicyArgs {
    pub(crate) fn params(&self) -> PolicyParams {
        PolicyParams { beta: self.beta, min_quota: self.min_quota, ..PolicyParams::default() }
    }
}

/// All policies, one a line, for `--help`.
pub(crate) fn policy_list() -> String {
    let line = |kind: PolicyKind| format!("  {kind:<11} {}\n", kind.description());
    PolicyKind::ALL.map(line).concat()
}

/// Reads a load file; the problem it poses must be one that `topology` can hold.
pub(crate) fn read_loads(path: &Path) -> Result<LoadMatrix, CliError> {
    read_file(path).map_err(CliError::input)
}
