//! The model of transfers, nanosecond by nanosecond: the oracle for the clock.

use ultraep_plan::{Stripe, TransferModel, TransferPlan};

/// One copy; `feeder` is the copy that brings the expert to `from`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copying {
    pub(crate) expert: usize,
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) feeder: Option<usize>,
    pub(crate) stripe: Stripe,
}

pub(crate) fn copies_of(plan: &TransferPlan) -> Vec<Copying> {
    let copying = |(index, task): (usize, &ultraep_plan::TransferTask)| {
        let transfer = task.transfer;
        let (from, to) = (transfer.from.index(), transfer.to.index());
        Copying { expert: transfer.expert.index(), from, to, feeder: plan.feeder(index), stripe: task.stripe }
    };
    plan.tasks().iter().enumerate().map(copying).collect()
}

/// When the last chunk is complete. Copies of one rank stand in its order, those of one stripe of one expert together.
pub(crate) fn finish_ns(ranks: usize, model: &TransferModel, copies: &[Copying]) -> u64 {
    let chunks = model.chunks();
    let (mut busy, mut taking) = (vec![0; ranks], vec![0; ranks]);
    // Next chunk of each copy, by its number in the expert.
    let mut next: Vec<u64> = copies.iter().map(|c| u64::from(c.stripe.index)).collect();
    let mut complete: Vec<Vec<u64>> = vec![Vec::new(); copies.len()];
    let mut queue: Vec<Vec<usize>> = vec![Vec::new(); ranks];
    let mut now = 0;
    while next.iter().any(|&n| n < chunks) {
        for rank in (0..ranks).filter(|&r| busy[r] <= now).collect::<Vec<_>>() {
            if queue[rank].is_empty() {
                let ready = |&c: &usize| {
                    copies[c].from == rank
                        && next[c] < chunks
                        && copies[c]
                            .feeder
                            .is_none_or(|f| complete[f].get(complete[c].len()).is_some_and(|&t| t <= now))
                };
                let Some(first) = (0..copies.len()).filter(ready).min_by_key(|&c| next[c]) else { continue };
                let stream = |c: usize| (copies[c].from, copies[c].expert, copies[c].stripe);
                let same = |&c: &usize| stream(c) == stream(first);
                queue[rank] = (0..copies.len()).filter(same).collect();
            }
            let copy = queue[rank].remove(0);
            let to = copies[copy].to;
            let begin = (now + model.hop_ns).max(taking[to]);
            taking[to] = begin + model.receive_ns;
            complete[copy].push(taking[to].max(now + model.hop_ns + model.send_ns));
            next[copy] += u64::from(copies[copy].stripe.count);
            busy[rank] = now + model.send_ns;
        }
        now += 1;
    }
    complete.into_iter().flatten().max().unwrap_or(0)
}
