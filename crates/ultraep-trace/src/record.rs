//! One record: the load of one (step, microbatch, layer) and, where there was one, the plan made for it.

use ultraep_plan::measure::Measure;
use ultraep_plan::{Instance, MAX_TOKENS, Plan};

use crate::TraceMeta;

/// Longest policy name, in bytes.
pub const MAX_POLICY_BYTES: usize = 64;
/// In [`TopKIds::ids`]: no expert (a padded or dropped choice).
pub const NO_EXPERT: u16 = u16::MAX;

/// Load and plan of one layer in one microbatch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// Optimizer step or forward pass; never goes back within a trace.
    pub step: u64,
    /// Microbatch within the step.
    pub microbatch: u32,
    /// MoE layer, below [`TraceMeta::layers`].
    pub layer: u32,
    /// `lambda[r,e]`, tokens of source rank r for logical expert e, `[N, E]` row-major.
    pub before: Vec<u32>,
    /// What was planned, if anything.
    pub after: Option<PlanRecord>,
    /// The routing itself, if it was recorded.
    pub top_k: Option<TopKIds>,
}

/// A plan as recorded. Laid out as [`Plan`] is, so that capturing one copies two slices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanRecord {
    /// Name of the policy, at most [`MAX_POLICY_BYTES`].
    pub policy: String,
    /// Canonical digest of the plan, 0 where its maker has none.
    pub digest: u64,
    /// Where each expert's instances begin, `[E + 1]`, from 0.
    pub offsets: Vec<u32>,
    /// Instances by expert, on distinct ranks; the first of an expert is its master unless the policy moves masters.
    /// The physical index may exceed masters + slots: some baselines have no limit on instances.
    pub instances: Vec<Instance>,
    /// `q[r,e,t]`, the realised split: tokens of source r for each instance, `[N, instances]` row-major. Over the
    /// instances of e a row adds up to `lambda[r,e]`.
    pub split: Option<Vec<u32>>,
}

/// Token-level routing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TopKIds {
    /// Tokens of each source rank, `[N]`.
    pub tokens: Vec<u32>,
    /// Chosen experts, `[sum of tokens, K]` row-major, sources in order; [`NO_EXPERT`] where there is none.
    pub ids: Vec<u16>,
}

/// Why a record does not fit its trace.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A layer that the header does not have.
    #[error("layer {got}: the trace has {layers}")]
    Layer {
        /// As given.
        got: u32,
        /// [`TraceMeta::layers`].
        layers: usize,
    },
    /// A step before that of the record before.
    #[error("step {got} after step {last}: steps never go back")]
    StepBack {
        /// As given.
        got: u64,
        /// Of the record before.
        last: u64,
    },
    /// A list of another length than the group asks for.
    #[error("{what}: {got} values, expected {expected}")]
    Length {
        /// Which list.
        what: &'static str,
        /// Its length.
        got: usize,
        /// Needed.
        expected: usize,
    },
    /// More tokens than a problem may hold.
    #[error("{0} tokens in one record: allowed are up to {MAX_TOKENS}")]
    TooManyTokens(u64),
    /// A policy name too long.
    #[error("policy name of {0} bytes: allowed are up to {MAX_POLICY_BYTES}")]
    PolicyName(usize),
    /// The offsets do not begin at 0, go back, or do not end with the instances.
    #[error("instance offsets of expert {expert} are not in order")]
    Offsets {
        /// Where.
        expert: usize,
    },
    /// An instance on a rank that the group does not have, or two of one expert on one rank.
    #[error("expert {expert}: instance on rank {rank}, which {why}")]
    InstanceRank {
        /// Whose.
        expert: usize,
        /// Where.
        rank: usize,
        /// What is wrong.
        why: &'static str,
    },
    /// A split that loses or makes tokens.
    #[error("split of source {source_rank} for expert {expert} adds up to {got}; the count is {expected}")]
    Split {
        /// `r`.
        source_rank: usize,
        /// `e`.
        expert: usize,
        /// Sum over the instances.
        got: u64,
        /// `lambda[r,e]`.
        expected: u32,
    },
    /// Top-k ids in a trace whose header has no `top_k`.
    #[error("top-k ids, but the header has no top_k")]
    NoTopK,
    /// An id that is no expert.
    #[error("token of source {source_rank}: expert {got} of {experts}")]
    TopKExpert {
        /// `r`.
        source_rank: usize,
        /// As given.
        got: u16,
        /// `E`.
        experts: usize,
    },
    /// Ids that do not give the counts.
    #[error("source {source_rank}, expert {expert}: {got} tokens by top-k ids, {expected} by counts")]
    TopKCounts {
        /// `r`.
        source_rank: usize,
        /// `e`.
        expert: usize,
        /// By ids.
        got: u32,
        /// By counts.
        expected: u32,
    },
}

impl PlanRecord {
    /// Copies a plan into memory that is reused; the split is left out.
    pub fn capture(&mut self, policy: &str, digest: u64, plan: &Plan) {
        self.policy.clear();
        self.policy.push_str(policy);
        self.digest = digest;
        self.offsets.clear();
        self.offsets.push(0);
        for expert in 0..plan.experts() {
            self.offsets.push(plan.range(ultraep_plan::Expert::new(expert)).end as u32);
        }
        self.instances.clear();
        self.instances.extend_from_slice(plan.instances());
        self.split = None;
    }

    /// An expert's instances as a range of [`PlanRecord::instances`].
    pub fn range(&self, expert: usize) -> std::ops::Range<usize> {
        self.offsets[expert] as usize..self.offsets[expert + 1] as usize
    }

    /// Tokens that each rank processes, `[ranks]`: by the realised split where there is one, else by quotas.
    pub fn rank_loads(&self, ranks: usize) -> Vec<u64> {
        if let Some(split) = &self.split {
            return Measure::of_split(ranks, &self.instances, split).processed().to_vec();
        }
        let mut loads = vec![0; ranks];
        self.instances.iter().for_each(|instance| loads[instance.rank.index()] += u64::from(instance.quota));
        loads
    }
}

impl Record {
    /// `l[r]`: tokens that each rank's masters would process, `[N]`, before balancing. The record fits the header.
    pub fn rank_loads(&self, meta: &TraceMeta) -> Vec<u64> {
        let mut first = 0;
        let of_masters = |masters: &u32| {
            let experts = first..first + *masters as usize;
            first = experts.end;
            let rows = self.before.chunks_exact(meta.experts);
            rows.flat_map(|row| &row[experts.clone()]).map(|&count| u64::from(count)).sum()
        };
        meta.masters_per_rank.iter().map(of_masters).collect()
    }

    /// Whether it fits a trace with this header. Cost: one pass over its values.
    pub fn check(&self, meta: &TraceMeta) -> Result<(), RecordError> {
        if self.layer as usize >= meta.layers {
            return Err(RecordError::Layer { got: self.layer, layers: meta.layers });
        }
        length("counts", self.before.len(), meta.counts())?;
        let total: u64 = self.before.iter().map(|&c| u64::from(c)).sum();
        if total > u64::from(MAX_TOKENS) {
            return Err(RecordError::TooManyTokens(total));
        }
        if let Some(after) = &self.after {
            check_instances(after, meta)?;
            if let Some(split) = &after.split {
                check_split(split, after, &self.before, meta)?;
            }
        }
        self.top_k.as_ref().map_or(Ok(()), |ids| check_top_k(ids, &self.before, meta))
    }
}

fn length(what: &'static str, got: usize, expected: usize) -> Result<(), RecordError> {
    if got == expected { Ok(()) } else { Err(RecordError::Length { what, got, expected }) }
}

fn check_instances(after: &PlanRecord, meta: &TraceMeta) -> Result<(), RecordError> {
    if after.policy.len() > MAX_POLICY_BYTES {
        return Err(RecordError::PolicyName(after.policy.len()));
    }
    length("instance offsets", after.offsets.len(), meta.experts + 1)?;
    if after.offsets[0] != 0 || after.offsets[meta.experts] as usize != after.instances.len() {
        return Err(RecordError::Offsets { expert: 0 });
    }
    // Which expert was last seen on a rank: finds two instances of one expert on one rank in one pass.
    let mut last_on_rank = vec![usize::MAX; meta.ranks];
    for expert in 0..meta.experts {
        // Offsets in order that end at the length stay within it.
        if after.offsets[expert] > after.offsets[expert + 1] {
            return Err(RecordError::Offsets { expert });
        }
    }
    for expert in 0..meta.experts {
        for instance in &after.instances[after.range(expert)] {
            let rank = instance.rank.index();
            let refuse = |why| Err(RecordError::InstanceRank { expert, rank, why });
            match last_on_rank.get_mut(rank) {
                None => return refuse("the group does not have"),
                Some(last) if *last == expert => return refuse("already has one"),
                Some(last) => *last = expert,
            }
        }
    }
    Ok(())
}

/// Instances have been checked.
fn check_split(split: &[u32], after: &PlanRecord, before: &[u32], meta: &TraceMeta) -> Result<(), RecordError> {
    let instances = after.instances.len();
    length("split", split.len(), meta.ranks * instances)?;
    for source_rank in 0..meta.ranks {
        let row = &split[source_rank * instances..][..instances];
        for expert in 0..meta.experts {
            let got = row[after.range(expert)].iter().map(|&q| u64::from(q)).sum();
            let expected = before[source_rank * meta.experts + expert];
            if got != u64::from(expected) {
                return Err(RecordError::Split { source_rank, expert, got, expected });
            }
        }
    }
    Ok(())
}

fn check_top_k(top_k: &TopKIds, before: &[u32], meta: &TraceMeta) -> Result<(), RecordError> {
    let choices = meta.top_k.ok_or(RecordError::NoTopK)?;
    length("tokens of sources", top_k.tokens.len(), meta.ranks)?;
    let tokens: u64 = top_k.tokens.iter().map(|&t| u64::from(t)).sum();
    if tokens > u64::from(MAX_TOKENS) {
        return Err(RecordError::TooManyTokens(tokens));
    }
    length("top-k ids", top_k.ids.len(), tokens as usize * choices)?;
    let mut ids = top_k.ids.as_slice();
    let mut counted = vec![0_u32; meta.experts];
    for (source_rank, &tokens) in top_k.tokens.iter().enumerate() {
        let (of_source, rest) = ids.split_at(tokens as usize * choices);
        ids = rest;
        counted.fill(0);
        for &id in of_source.iter().filter(|&&id| id != NO_EXPERT) {
            match counted.get_mut(usize::from(id)) {
                Some(count) => *count += 1,
                None => return Err(RecordError::TopKExpert { source_rank, got: id, experts: meta.experts }),
            }
        }
        let row = &before[source_rank * meta.experts..][..meta.experts];
        if let Some(expert) = (0..meta.experts).find(|&e| counted[e] != row[e]) {
            let (got, expected) = (counted[expert], row[expert]);
            return Err(RecordError::TopKCounts { source_rank, expert, got, expected });
        }
    }
    Ok(())
}
