//! The scheduler in virtual time.

use crate::{Arrival, Batch, Limits, LimitsError, Refusal, Request, RequestId, Scheduler};

/// How long a batch takes.
pub trait BatchTime {
    /// Nanoseconds from the start of the batch until its tokens are out. A [`Chunk`](crate::Chunk)'s request is the number of
    /// its arrival.
    fn batch_ns(&mut self, batch: &Batch) -> u64;
}

impl<F: FnMut(&Batch) -> u64> BatchTime for F {
    fn batch_ns(&mut self, batch: &Batch) -> u64 {
        self(batch)
    }
}

/// What became of an arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It was refused when it arrived.
    Refused(Refusal),
    /// It was served.
    Done {
        /// From arrival to the first token (to the end of prefill for a request that produces none), in nanoseconds.
        ttft_ns: u64,
        /// From arrival to the last token, in nanoseconds.
        total_ns: u64,
    },
}

impl Served {
    /// Time to the first token, in nanoseconds.
    pub fn ttft_ns(&self) -> Option<u64> {
        match *self {
            Self::Done { ttft_ns, .. } => Some(ttft_ns),
            Self::Refused(_) => None,
        }
    }
}

/// What a simulation gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Simulation {
    /// One for every arrival, in order.
    pub served: Vec<Served>,
    /// When the last batch ended, in nanoseconds.
    pub end_ns: u64,
    /// Batches run.
    pub batches: u64,
    /// Time in which a batch ran, in nanoseconds.
    pub busy_ns: u64,
}

/// Serves `arrivals` (by time of arrival) in virtual time: requests join the queue when they arrive, batches run one after
/// another, and each takes as long as `time` says.
pub fn simulate(limits: Limits, arrivals: &[Arrival], time: &mut dyn BatchTime) -> Result<Simulation, LimitsError> {
    let mut scheduler = Scheduler::new(limits)?;
    let mut served: Vec<Option<Served>> = vec![None; arrivals.len()];
    let mut first_ns = vec![None; arrivals.len()];
    let (mut now_ns, mut next, mut batches, mut busy_ns) = (0u64, 0, 0, 0u64);
    let mut batch = Batch::default();
    loop {
        while let Some(arrival) = arrivals.get(next).filter(|a| a.at_ns <= now_ns) {
            let id = RequestId(next as u64);
            let request = Request { id, prompt_tokens: arrival.prompt_tokens, new_tokens: arrival.new_tokens };
            served[next] = scheduler.admit(request).err().map(Served::Refused);
            next += 1;
        }
        scheduler.compose(&mut batch);
        if batch.is_empty() {
            match arrivals.get(next) {
                Some(arrival) => now_ns = arrival.at_ns,
                None => break,
            }
            continue;
        }
        let batch_ns = time.batch_ns(&batch);
        (now_ns, busy_ns, batches) = (now_ns + batch_ns, busy_ns + batch_ns, batches + 1);
        for chunk in batch.chunks() {
            let index = chunk.request.0 as usize;
            let since = now_ns - arrivals[index].at_ns;
            if chunk.produces == Some(0) || chunk.ends {
                first_ns[index].get_or_insert(since);
            }
            if let (true, Some(ttft_ns)) = (chunk.ends, first_ns[index]) {
                served[index] = Some(Served::Done { ttft_ns, total_ns: since });
            }
        }
    }
    // Every admitted request has ended: an empty batch with a queue would mean that its head fits no empty rank, and
    // `admit` refused those.
    Ok(Simulation { served: served.into_iter().flatten().collect(), end_ns: now_ns, batches, busy_ns })
}
