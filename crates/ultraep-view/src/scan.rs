//! Reading a trace from beginning to end into a [`Summary`], and on while it grows.

use std::collections::HashMap;

use ultraep_plan::measure::Measure;
use ultraep_replay::{Evaluated, Evaluator, Scenario, imbalance, quotient, untimed};
use ultraep_trace::Record;

use crate::ViewError;
use crate::source::{Source, Trace, open_trace};
use crate::summary::{Measured, Summary};

/// Reads records in order and measures each.
pub(crate) struct Scanner {
    trace: Trace,
    next: u64,
    record: Record,
    planner: Planner,
    /// Name of the policy that made the plans so far: as recorded, or ours where there was none.
    policy: Option<String>,
    planned: u64,
    finer: u64,
}

/// Plans loads that were recorded without a plan.
struct Planner {
    scenario: Scenario,
    /// One for all layers, or, of a historical policy, one a layer (else layer 0 stands for all).
    evaluators: HashMap<u32, Evaluator>,
}

/// Where a scanner stands.
#[derive(Clone, Debug, Default)]
pub(crate) struct Progress {
    /// Records read, and those that there are.
    pub(crate) read: u64,
    pub(crate) records: u64,
    /// Whether the trace was closed: nothing will be added.
    pub(crate) is_closed: bool,
    /// Whose plans are shown.
    pub(crate) policy: Option<String>,
    /// Records that had no plan and were planned here.
    pub(crate) planned: u64,
    /// Of these, plans that a least quota of one token would make more even.
    pub(crate) finer: u64,
}

impl Scanner {
    pub(crate) fn new(source: &Source) -> Result<Self, ViewError> {
        let scenario = source.planned.scenario(source.meta.ranks, source.meta.experts)?;
        Ok(Self {
            trace: open_trace(&source.trace)?,
            next: 0,
            record: Record::default(),
            planner: Planner { scenario, evaluators: HashMap::new() },
            policy: None,
            planned: 0,
            finer: 0,
        })
    }

    pub(crate) fn progress(&self) -> Progress {
        Progress {
            read: self.next,
            records: self.trace.records(),
            is_closed: self.trace.ending().is_closed,
            policy: self.policy.clone(),
            planned: self.planned,
            finer: self.finer,
        }
    }

    /// What is missing at the end of the trace, in words.
    pub(crate) fn ending(&self) -> Option<String> {
        self.trace.ending().describe()
    }

    /// Looks for what was added since.
    pub(crate) fn refresh(&mut self, source: &Source) -> Result<(), ViewError> {
        let refuse = |error| ViewError::Trace { path: source.trace.clone(), source: error };
        self.trace.refresh().map_err(refuse)
    }

    /// Reads up to `most` records and gives each to `take`, with its counts; false at the end, for now.
    pub(crate) fn advance(&mut self, source: &Source, most: usize, summary: &mut Summary) -> Result<bool, ViewError> {
        let refuse = |error| ViewError::Trace { path: source.trace.clone(), source: error };
        for _ in 0..most {
            if self.next >= self.trace.records() {
                return Ok(false);
            }
            self.trace.read(self.next, &mut self.record).map_err(refuse)?;
            self.next += 1;
            let measured = self.measure(source)?;
            summary.add(measured, &self.record.before);
        }
        Ok(true)
    }

    fn measure(&mut self, source: &Source) -> Result<Measured, ViewError> {
        let Record { step, microbatch, layer, .. } = self.record;
        let loads = self.record.rank_loads(&source.meta);
        let total_tokens = loads.iter().sum();
        let mut measured = Measured {
            step,
            microbatch,
            layer,
            before: imbalance(&loads),
            after: None,
            replicas: 0,
            remote_tokens: None,
            total_tokens,
        };
        match &self.record.after {
            Some(plan) => {
                if self.policy.as_deref() != Some(plan.policy.as_str()) {
                    self.policy = Some(plan.policy.clone());
                }
                measured.after = Some(imbalance(&plan.rank_loads(source.meta.ranks)));
                measured.replicas = plan.instances.len().saturating_sub(source.meta.experts) as u32;
                let measure = |split| Measure::of_split(source.meta.ranks, &plan.instances, split);
                measured.remote_tokens = plan.split.as_deref().map(|split| measure(split).remote_tokens());
            }
            None => {
                self.planned += 1;
                self.policy = Some(self.planner.scenario.kind.name().to_owned());
                if let Some((evaluated, has_finer)) = self.planner.plan(layer, &self.record.before)? {
                    self.finer += u64::from(has_finer);
                    measured.after = Some(quotient(evaluated.imbalance_after));
                    measured.replicas = evaluated.report.replicas as u32;
                    measured.remote_tokens = Some(evaluated.report.remote_tokens);
                }
            }
        }
        Ok(measured)
    }
}

impl Planner {
    /// Plans for a layer's counts, and whether a least quota of one token would do better; `None` where the policy refuses
    /// them.
    fn plan(&mut self, layer: u32, counts: &[u32]) -> Result<Option<(Evaluated, bool)>, ViewError> {
        let key = if self.scenario.kind.is_historical() { layer } else { 0 };
        let evaluator = match self.evaluators.entry(key) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(Evaluator::new(&self.scenario, untimed)?),
        };
        let met = evaluator.met_counts(counts);
        match evaluator.microbatch(&met, 1) {
            Ok(evaluated) => Ok(Some((evaluated, evaluator.finer(&met, 1)?.is_some()))),
            Err(error) if error.is_input() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
