//! The scheduler's rules, on chosen cases and on random ones.

use std::collections::BTreeMap;

use proptest::prelude::*;
use ultraep_schedule::{
    Arrival, ArrivalSpec, Batch, Lengths, Limits, LimitsError, Phase, Refusal, Request, RequestId, Scheduler, Served,
    arrivals, simulate,
};

const LIMITS: Limits = Limits {
    ranks: 2,
    chunk_tokens: 16,
    context_per_token: 0,
    kv_tokens_per_rank: 64,
    sequences_per_rank: 4,
    queue_max: 8,
};

fn request(id: u64, prompt_tokens: u32, new_tokens: u32) -> Request {
    Request { id: RequestId(id), prompt_tokens, new_tokens }
}

fn scheduler(requests: &[Request]) -> Scheduler {
    let mut scheduler = Scheduler::new(LIMITS).unwrap();
    requests.iter().for_each(|&r| scheduler.admit(r).unwrap());
    scheduler
}

/// (request, rank, start, tokens) of the next batch's chunks.
fn next(scheduler: &mut Scheduler) -> Vec<(u64, usize, u32, u32)> {
    let mut batch = Batch::default();
    scheduler.compose(&mut batch);
    batch.chunks().iter().map(|c| (c.request.0, c.rank, c.start, c.tokens)).collect()
}

#[test]
fn a_batch_is_filled_up_to_the_budget_of_every_rank() {
    let mut s = scheduler(&[request(0, 20, 1), request(1, 3, 1), request(2, 9, 1)]);
    // 0 takes rank 0's 8; 1 goes to rank 1, and 2 gets what is left there.
    assert_eq!(next(&mut s), [(0, 0, 0, 8), (1, 1, 0, 3), (2, 1, 0, 5)]);
    assert_eq!(s.waiting_tokens(), 12 + 4);
    assert_eq!(next(&mut s), [(0, 0, 8, 8), (2, 1, 5, 4)]);
    assert_eq!(next(&mut s), [(0, 0, 16, 4)]);
    assert_eq!(next(&mut s), []);
    assert!(s.is_idle() && s.kv_used(0) == 0 && s.kv_used(1) == 0);
}

#[test]
fn decode_comes_first_and_produces_every_token_once() {
    let mut s = scheduler(&[request(0, 2, 3)]);
    let mut batch = Batch::default();
    let mut seen = Vec::new();
    for round in 0..4 {
        s.compose(&mut batch);
        seen.extend(batch.chunks().iter().filter(|c| c.request.0 == 0).map(|c| (c.start, c.phase, c.produces, c.ends)));
        if round == 0 {
            s.admit(request(1, 30, 1)).unwrap();
            s.admit(request(2, 30, 1)).unwrap();
        } else if round == 1 {
            // One token of rank 0's budget is the decode's.
            assert_eq!(batch.tokens_of_rank(0), 8);
            assert_eq!(batch.of_rank(0)[1].tokens, 7);
        }
    }
    let prefill = (0, Phase::Prefill, Some(0), false);
    assert_eq!(seen, [prefill, (2, Phase::Decode, Some(1), false), (3, Phase::Decode, Some(2), true)]);
}

#[test]
fn a_prefill_alone_produces_nothing_and_ends() {
    let mut s = scheduler(&[request(0, 9, 0)]);
    let mut batch = Batch::default();
    s.compose(&mut batch);
    assert_eq!((batch.chunks()[0].produces, batch.chunks()[0].ends), (None, false));
    s.compose(&mut batch);
    assert_eq!((batch.chunks()[0].produces, batch.chunks()[0].ends), (None, true));
}

#[test]
fn what_can_never_fit_or_finds_a_full_queue_is_refused() {
    let mut s = Scheduler::new(LIMITS).unwrap();
    assert_eq!(s.admit(request(0, 64, 2)), Err(Refusal::NeverFits { needed: 65, limit: 64 }));
    assert_eq!(s.admit(request(0, 0, 2)), Err(Refusal::Empty));
    (0..8).for_each(|id| s.admit(request(id, 64, 1)).unwrap());
    assert_eq!(s.admit(request(8, 1, 1)), Err(Refusal::QueueFull { queued: 8 }));
    assert_eq!(next(&mut s).len(), 2);
    assert!(s.admit(request(8, 1, 1)).is_ok());
}

#[test]
fn the_queue_waits_for_kv_in_order_and_cancelling_frees_it() {
    let mut s = scheduler(&[request(0, 40, 1), request(1, 40, 1), request(2, 40, 1), request(3, 2, 1)]);
    assert_eq!(next(&mut s), [(0, 0, 0, 8), (1, 1, 0, 8)]);
    // 2 fits nowhere and 3 does not overtake it.
    assert_eq!(next(&mut s), [(0, 0, 8, 8), (1, 1, 8, 8)]);
    assert!(s.cancel(RequestId(1)) && !s.cancel(RequestId(1)));
    let mut batch = Batch::default();
    s.compose(&mut batch);
    assert_eq!(batch.released()[0].request, RequestId(1));
    assert_eq!(batch.of_rank(1)[0].request, RequestId(2));
    assert_eq!(batch.of_rank(1)[0].reserves, Some(40));
    assert!(s.cancel(RequestId(3)), "waiting requests can be cancelled too");
    let mut left = s.reset();
    left.sort();
    assert_eq!(left, [RequestId(0), RequestId(2)]);
    assert!(s.is_idle());
}

#[test]
fn where_context_counts_chunks_shrink_as_it_grows() {
    // A token at position p weighs 1 + p / 4; a rank's share is 8, that is 32 quarters.
    let limits = Limits { context_per_token: 4, ..LIMITS };
    let mut s = Scheduler::new(limits).unwrap();
    s.admit(request(0, 40, 1)).unwrap();
    s.admit(request(1, 2, 1)).unwrap();
    s.admit(request(2, 9, 1)).unwrap();
    // 4 + 5 + 6 + 7 + 8 = 30: 5 tokens. On the other rank 4 + 5, then 4 + 5 + 6 + 7 of the 23 that are left.
    assert_eq!(next(&mut s), [(0, 0, 0, 5), (1, 1, 0, 2), (2, 1, 0, 4)]);
    // 9 + 10 + 11; 8 + 9 + 10.
    assert_eq!(next(&mut s), [(0, 0, 5, 3), (2, 1, 4, 3)]);
    // 12 + 13; 11 + 12.
    assert_eq!(next(&mut s), [(0, 0, 8, 2), (2, 1, 7, 2)]);
    // Far in, one token alone is over the budget; it goes on all the same.
    let mut rest = Vec::new();
    while !s.is_idle() {
        rest.extend(next(&mut s).into_iter().filter(|c| c.0 == 0).map(|c| (c.2, c.3)));
    }
    assert_eq!(rest.last(), Some(&(39, 1)));
    assert!(rest.windows(2).all(|w| w[0].0 + w[0].1 == w[1].0 && w[0].1 >= w[1].1), "{rest:?}");
}

#[test]
fn limits_must_fit_together() {
    let check = |limits: Limits| limits.validate().unwrap_err();
    assert!(matches!(check(Limits { chunk_tokens: 1, ..LIMITS }), LimitsError::Budget { .. }));
    assert!(matches!(check(Limits { sequences_per_rank: 9, ..LIMITS }), LimitsError::Sequences { share: 8, .. }));
    assert!(matches!(check(Limits { ranks: 0, ..LIMITS }), LimitsError::Zero(_)));
    assert!(matches!(check(Limits { queue_max: 0, ..LIMITS }), LimitsError::Zero(_)));
}

#[test]
fn simulated_times_are_those_of_the_batches() {
    let at = |at_ns, prompt_tokens| Arrival { at_ns, prompt: 0, prompt_tokens, new_tokens: 2 };
    let list = [at(0, 8), at(5, 20), at(1000, 99)];
    let simulation = simulate(LIMITS, &list, &mut |batch: &Batch| 10 * batch.tokens()).unwrap();
    // Batch 1: 8 tokens until 80. Then: a decode and 8 of 20 until 170; 8 until 250; 4 until 290; a decode until 300.
    let refused = Served::Refused(Refusal::NeverFits { needed: 100, limit: 64 });
    let done = |ttft_ns, total_ns| Served::Done { ttft_ns, total_ns };
    assert_eq!(simulation.served, [done(80, 170), done(285, 295), refused]);
    assert_eq!((simulation.end_ns, simulation.batches, simulation.busy_ns), (1000, 5, 300));
}

#[test]
fn more_load_waits_longer() {
    let pool = Lengths::new(4, 60).unwrap().draw(20, 1);
    let mean = |gap: u64| {
        let spec = ArrivalSpec { requests: 400, mean_gap_ns: gap, new_tokens: 1, seed: 2 };
        let limits = Limits { queue_max: 400, ..LIMITS };
        let simulation = simulate(limits, &arrivals(&spec, &pool), &mut |b: &Batch| 100 + b.tokens()).unwrap();
        simulation.served.iter().filter_map(Served::ttft_ns).sum::<u64>() / 400
    };
    assert!(mean(100) > 3 * mean(2000), "{} {}", mean(100), mean(2000));
}

#[derive(Clone, Debug)]
enum Step {
    Admit(u32, u32),
    Cancel(usize),
    Compose,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (1..70u32, 0..5u32).prop_map(|(p, n)| Step::Admit(p, n)),
        1 => (0..40usize).prop_map(Step::Cancel),
        4 => Just(Step::Compose),
    ];
    proptest::collection::vec(step, 1..80)
}

proptest! {
    /// Whatever happens: budgets hold, positions of a sequence follow each other on one rank, every token comes once, KV is
    /// within its budget and all given back.
    #[test]
    fn every_batch_keeps_the_rules(steps in steps(), ranks in 1usize..4, context in prop_oneof![Just(0u32), 1..60u32]) {
        let limits = Limits { ranks, chunk_tokens: 8 * ranks as u32 + ranks as u32 - 1, context_per_token: context, ..LIMITS };
        let mut s = Scheduler::new(limits).unwrap();
        let mut live: BTreeMap<u64, (Request, u32, Option<usize>, u32)> = BTreeMap::new();
        let mut ids = 0;
        let mut batch = Batch::default();
        let drain = std::iter::repeat_n(Step::Compose, 4000);
        for step in steps.into_iter().chain(drain) {
            match step {
                Step::Admit(prompt, new) => {
                    let request = request(ids, prompt, new);
                    match s.admit(request) {
                        Ok(()) => { live.insert(ids, (request, 0, None, 0)); }
                        Err(Refusal::NeverFits { needed, .. }) => prop_assert!(needed > 64),
                        Err(refusal) => prop_assert_eq!(refusal, Refusal::QueueFull { queued: 8 }),
                    }
                    ids += 1;
                }
                Step::Cancel(nth) => {
                    let id = live.keys().nth(nth).copied().unwrap_or(u64::MAX);
                    prop_assert_eq!(s.cancel(RequestId(id)), live.remove(&id).is_some());
                }
                Step::Compose => {
                    s.compose(&mut batch);
                    for rank in 0..ranks {
                        prop_assert!(batch.tokens_of_rank(rank) <= u64::from(limits.chunk_tokens_per_rank()));
                        // What is beyond the budget of work is decode and one token of the oldest prompt.
                        let weight = |c: &ultraep_schedule::Chunk| {
                            (c.start..c.start + c.tokens).map(|p| u64::from(context + p)).sum::<u64>()
                        };
                        let prompts = batch.of_rank(rank).iter().filter(|c| c.phase == Phase::Prefill);
                        let oldest_alone = prompts.clone().count() == 1 && prompts.clone().all(|c| c.tokens == 1);
                        let work: u64 = prompts.map(weight).sum();
                        let share = u64::from(limits.chunk_tokens_per_rank() * context);
                        prop_assert!(context == 0 || oldest_alone || work <= share, "{:?}", batch.of_rank(rank));
                        prop_assert!(s.kv_used(rank) <= 64);
                    }
                    for chunk in batch.chunks() {
                        let Some((request, computed, rank, produced)) = live.get_mut(&chunk.request.0) else {
                            return Err(TestCaseError::fail(format!("{chunk:?} of nobody")));
                        };
                        prop_assert!(chunk.tokens > 0);
                        prop_assert_eq!(chunk.start, *computed);
                        prop_assert_eq!(*rank.get_or_insert(chunk.rank), chunk.rank);
                        prop_assert_eq!(chunk.reserves.is_some(), chunk.start == 0);
                        *computed += chunk.tokens;
                        if let Some(n) = chunk.produces {
                            prop_assert_eq!(n, *produced);
                            *produced += 1;
                        }
                        let ends = u64::from(*computed) == request.kv_tokens();
                        prop_assert_eq!(chunk.ends, ends);
                        if ends {
                            prop_assert_eq!(*produced, request.new_tokens);
                            live.remove(&chunk.request.0);
                        }
                    }
                }
            }
        }
        prop_assert!(live.is_empty(), "left over: {:?}", live);
        prop_assert!((0..ranks).all(|r| s.kv_used(r) == 0) && s.is_idle());
    }
}
