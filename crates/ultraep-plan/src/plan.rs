//! The plan: instances with quotas, and per domain what was reached, what could be, and why the solver stopped.

use alloc::vec::Vec;
use core::ops::Range;

use crate::{Expert, PhysicalIndex, Rank, Topology};

/// One instance of an expert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Instance {
    /// Rank that holds it.
    pub rank: Rank,
    /// Physical expert index on that rank: masters first, then slots.
    pub physical: PhysicalIndex,
    /// `u[e,t]`: tokens it is to process.
    pub quota: u32,
}

/// How the tokens of one source are shared over an expert's instances.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SplitRule {
    /// Local first, the rest in proportion, both sums exact (ours).
    #[default]
    LocalFirstExact,
    /// As [`SplitRule::LocalFirstExact`] without the local step: all tokens in proportion, both sums exact (MoonEP).
    ProportionalExact,
    /// As released in v1.0.0: rounded per source only, may miss quotas by some tokens; `planner-v1`.
    SourceRounded {
        /// Whether a source's own instance takes its tokens first.
        locality: bool,
    },
    /// Tokens of a source are dealt to the expert's copies in turn, starting at copy `source mod copies` (EPLB). An
    /// instance that stands for several copies ([`Plan::copies`]) takes as many turns, one after another; one that
    /// stands for none takes no token. [`crate::dealt`] is the closed form.
    RoundRobin,
}

impl SplitRule {
    /// A number that stands for the rule in digests and files.
    pub fn code(self) -> u32 {
        match self {
            Self::LocalFirstExact => 0,
            Self::SourceRounded { locality: false } => 1,
            Self::SourceRounded { locality: true } => 2,
            Self::RoundRobin => 3,
            Self::ProportionalExact => 4,
        }
    }
}

/// Why a solver returned the plan it did. Not reaching the target is no error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// Nothing exceeded the target before any replica was made.
    #[default]
    AlreadyBalanced,
    /// The target was reached.
    TargetReached,
    /// The plan meets a proven lower bound above the target: no plan can do better.
    LowerBound,
    /// The search ended above both target and lower bound.
    SearchExhausted,
    /// No other candidate was predicted to be faster (the cost-aware objective): reaching the target would not pay.
    LeastCost,
    /// The policy does not search (a baseline): its plan is what it is.
    NotASearch,
}

/// What was reached in one domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DomainOutcome {
    /// `tau`: the rank load that no rank of the domain exceeds under the quotas. Where ranks have speed weights, a rank's
    /// load counts as `ceil(load * FULL_SPEED / speed)`, at most `u32::MAX` (a rank of weight 0 counts at full speed).
    pub threshold: u32,
    /// A proven lower bound on the largest rank load of any plan in this domain.
    pub lower_bound: u32,
    /// Why the solver stopped.
    pub stop: StopReason,
}

/// Which instances exist and how many tokens each processes.
///
/// Every expert's master comes first (with quota 0 where a baseline moved all its work away), then its replicas, on
/// distinct ranks. Reused from solve to solve: [`Plan::with_capacity`] takes all memory it will ever need.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    offsets: Vec<u32>,
    instances: Vec<Instance>,
    copies: Vec<u16>,
    domains: Vec<DomainOutcome>,
    split_rule: SplitRule,
}

impl Plan {
    /// An empty plan for `topology` with room for `replicas` replicas, so that building one allocates nothing.
    pub fn with_capacity(topology: &Topology, replicas: usize) -> Self {
        Self {
            offsets: Vec::with_capacity(topology.experts() + 1),
            instances: Vec::with_capacity(topology.experts() + replicas),
            copies: Vec::with_capacity(topology.experts() + replicas),
            domains: Vec::with_capacity(topology.domains()),
            split_rule: SplitRule::default(),
        }
    }

    /// An empty plan with room for as many replicas as `topology` has slots.
    pub fn for_slots(topology: &Topology) -> Self {
        Self::with_capacity(topology, crate::draft::total_slots(topology))
    }

    /// Forgets everything but the memory, and sets the split rule.
    pub fn begin(&mut self, split_rule: SplitRule) {
        self.offsets.clear();
        self.offsets.push(0);
        self.instances.clear();
        self.copies.clear();
        self.domains.clear();
        self.split_rule = split_rule;
    }

    /// Appends an instance to the expert being built (master first).
    #[inline]
    pub fn push_instance(&mut self, instance: Instance) {
        self.instances.push(instance);
    }

    /// As [`Plan::push_instance`], for an instance that stands for `copies` copies of the expert on that rank: none
    /// where the work moved away from a master, two and more where a baseline put several copies on one rank.
    pub fn push_copies(&mut self, instance: Instance, copies: u16) {
        self.copies.resize(self.instances.len(), 1);
        self.instances.push(instance);
        self.copies.push(copies);
    }

    /// Ends the expert being built; experts come in order.
    #[inline]
    pub fn end_expert(&mut self) {
        self.offsets.push(self.instances.len() as u32);
    }

    /// Appends `experts` experts with `instances` instances in all, to be filled in: their ends in [`Plan::instances`] and
    /// the instances.
    pub(crate) fn append(&mut self, experts: usize, instances: usize) -> (usize, &mut [u32], &mut [Instance]) {
        let (ends, first) = (self.offsets.len(), self.instances.len());
        self.offsets.extend(core::iter::repeat_n(0, experts));
        self.instances.extend(core::iter::repeat_n(Instance::default(), instances));
        (first, &mut self.offsets[ends..], &mut self.instances[first..])
    }

    /// Ends of the experts' instances, `[E]`: expert `e` has instances `ends[e - 1]..ends[e]`.
    #[inline]
    pub(crate) fn ends(&self) -> &[u32] {
        self.offsets.get(1..).unwrap_or(&[])
    }

    /// Appends the outcome of the next domain.
    pub fn push_domain(&mut self, outcome: DomainOutcome) {
        self.domains.push(outcome);
    }

    /// Experts in the plan, `E`.
    #[inline]
    pub fn experts(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// All instances, by expert.
    #[inline]
    pub fn instances(&self) -> &[Instance] {
        &self.instances
    }

    /// Where an expert's instances lie in [`Plan::instances`]; the first is the master.
    #[inline]
    pub fn range(&self, expert: Expert) -> Range<usize> {
        self.offsets[expert.index()] as usize..self.offsets[expert.index() + 1] as usize
    }

    /// An expert's instances, master first.
    #[inline]
    pub fn of(&self, expert: Expert) -> &[Instance] {
        &self.instances[self.range(expert)]
    }

    /// Copies that instance `index` of [`Plan::instances`] stands for: 1 unless a baseline said otherwise
    /// ([`Plan::push_copies`]). Only [`SplitRule::RoundRobin`] looks at it.
    #[inline]
    pub fn copies(&self, index: usize) -> u32 {
        self.copies.get(index).map_or(1, |&c| u32::from(c))
    }

    /// Copies that share a rank with another copy of the same expert, and so are of no use.
    pub fn wasted_copies(&self) -> usize {
        self.copies.iter().map(|&c| usize::from(c).saturating_sub(1)).sum()
    }

    /// Outcome per domain.
    #[inline]
    pub fn domains(&self) -> &[DomainOutcome] {
        &self.domains
    }

    /// How sources share their tokens over instances.
    #[inline]
    pub fn split_rule(&self) -> SplitRule {
        self.split_rule
    }

    /// Number of replicas.
    #[inline]
    pub fn replicas(&self) -> usize {
        self.instances.len() - self.experts()
    }
}
