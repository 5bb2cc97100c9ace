//! Batches: stateless, within the training part, shifting; validation and prompts.

use std::sync::Arc;

use proptest::prelude::*;
use ultraep_text::{BatchPosition, Corpus, MAX_SEQUENCE_TOKENS, Sampler, SamplerSpec, TextDomain, TextError};

/// Domain `d` consists of the letter `a + d` in its training part and of `A + d` in its held-out 5%.
fn letters(domains: usize, bytes: usize) -> Arc<Corpus> {
    let domain = |d: usize| {
        let mut text = vec![b'a' + d as u8; bytes];
        text[bytes - bytes / 20..].fill(b'A' + d as u8);
        TextDomain { name: format!("d{d}"), bytes: text, files: 1, origin: "a test".into() }
    };
    Arc::new(Corpus { domains: (0..domains).map(domain).collect(), ..Corpus::default() })
}

fn sampler(domains: usize, seed: u64) -> Sampler {
    let spec = SamplerSpec { sequence_tokens: 16, seed, ..SamplerSpec::default() };
    Sampler::new(letters(domains, 4_000), spec).expect("sampler")
}

/// Sequences of each domain in a batch.
fn histogram(batch: &[u8], domains: usize) -> Vec<usize> {
    let mut seen = vec![0; domains];
    for row in batch.chunks(17) {
        seen[usize::from(row[0] - b'a')] += 1;
    }
    seen
}

#[test]
fn training_batches_never_touch_the_held_out_part() {
    let sampler = sampler(5, 1);
    for step in 0..50 {
        let batch = sampler.batch(BatchPosition { step, microbatch: 1, rank: 2 }, 16);
        assert!(batch.iter().all(u8::is_ascii_lowercase));
    }
    for index in 0..50 {
        let batch = sampler.validation_batch(index, 10);
        assert_eq!(batch.len(), 10 * 17);
        assert!(batch.iter().all(u8::is_ascii_uppercase));
        let first: Vec<u8> = batch.chunks(17).map(|row| row[0]).collect();
        assert_eq!(first, b"ABCDEABCDE", "domains in turn");
    }
}

#[test]
fn equal_positions_give_equal_batches_and_other_positions_others() {
    let text: Vec<u8> = (0..200_000_u32).flat_map(|i| format!("{i} ").into_bytes()).collect();
    let domain = TextDomain { name: "n".into(), bytes: text, files: 1, origin: "a test".into() };
    let corpus = Arc::new(Corpus { domains: vec![domain], ..Corpus::default() });
    let spec = SamplerSpec { sequence_tokens: 64, seed: 5, ..SamplerSpec::default() };
    let a = Sampler::new(Arc::clone(&corpus), spec).expect("sampler");
    let other_seed = Sampler::new(Arc::clone(&corpus), SamplerSpec { seed: 6, ..spec }).expect("sampler");
    let base = BatchPosition { step: 9, microbatch: 2, rank: 3 };
    let batch = a.batch(base, 4);
    for position in [
        BatchPosition { step: 10, ..base },
        BatchPosition { microbatch: 3, ..base },
        BatchPosition { rank: 2, ..base },
        BatchPosition { step: 2, microbatch: 9, ..base },
    ] {
        assert_ne!(batch, a.batch(position, 4), "{position:?}");
    }
    assert_ne!(batch, other_seed.batch(base, 4));
    assert_eq!(a.validation_batch(3, 4), other_seed.validation_batch(3, 4), "validation does not depend on the seed");
    assert_eq!(batch, Sampler::new(corpus, spec).expect("sampler").batch(base, 4));
    assert_eq!(batch[..2 * 65], a.batch(base, 2), "fewer sequences are the first of more");
    let mut reused = vec![7; 4 * 65];
    a.fill_batch(base, &mut reused);
    assert_eq!(batch, reused);
}

/// The first batch of a known run. A change here changes every run that resumes.
#[test]
fn the_schedule_and_the_draws_are_pinned() {
    let sampler = sampler(5, 42);
    let weights = |step, rank| sampler.mixture(BatchPosition { step, microbatch: 0, rank }).weights;
    // By hand from the formula: the centre is 0, then 7168 + 27986, there with a burst of 8 * 59802.
    assert_eq!(weights(0, 0), [36_864, 10_650, 4_096, 4_096, 10_648]);
    assert_eq!(weights(7, 3), [4_096, 4_096, 18_984, 28_530, 482_512]);
    let digest = (0..64).fold(0_u64, |digest, step| {
        let batch = sampler.batch(BatchPosition { step, microbatch: 1, rank: 1 }, 8);
        histogram(&batch, 5).iter().fold(digest, |d, &n| d.wrapping_mul(31).wrapping_add(n as u64))
    });
    assert_eq!(digest, 13_691_816_483_172_930_228);
}

#[test]
fn the_mixture_shifts_over_steps_differs_between_ranks_and_bursts() {
    let domains = 5;
    let sampler = sampler(domains, 3);
    let at = |step, rank| BatchPosition { step, microbatch: 0, rank };
    let leading = |step: u64, rank: u32| {
        let weights = sampler.mixture(at(step, rank)).weights;
        (0..domains).max_by_key(|&d| weights[d]).expect("a domain")
    };
    let mut led = vec![0; domains];
    let (mut group_bursts, mut any_burst, mut ranks_differ) = (0, 0, 0);
    for step in 0..640 {
        led[leading(step, 0)] += 1;
        let bursts: Vec<_> = (0..8).map(|rank| sampler.mixture(at(step, rank)).burst).collect();
        group_bursts += usize::from(bursts[0].is_some() && bursts.iter().all(|b| *b == bursts[0]));
        any_burst += bursts.iter().filter(|b| b.is_some()).count();
        ranks_differ += usize::from((1..8).any(|rank| leading(step, rank) != leading(step, 0)));
    }
    assert!(led.iter().all(|&n| n > 640 / domains / 2), "every domain leads in its turn: {led:?}");
    assert!((110..=210).contains(&group_bursts), "about one microbatch in four: {group_bursts} of 640");
    assert!((1_480..=2_030).contains(&any_burst), "1/4 + 3/4 * 1/8 = 34%: {any_burst} of 5120");
    assert!(ranks_differ > 400, "{ranks_differ} of 640");

    for step in (0..640).filter(|&s| sampler.mixture(at(s, 0)).burst.is_some()) {
        let mixture = sampler.mixture(at(step, 0));
        let dominant = mixture.burst.expect("filtered");
        assert!(9 * mixture.weights[dominant] >= 8 * mixture.weights.iter().sum::<u64>());
        let seen = histogram(&sampler.batch(at(step, 0), 64), domains);
        assert!(seen[dominant] >= 44, "{seen:?}");
    }
}

#[test]
fn sequences_follow_the_weights() {
    let sampler = sampler(4, 11);
    let position = (0..).map(|step| BatchPosition { step, microbatch: 0, rank: 0 });
    let position = position.clone().find(|&p| sampler.mixture(p).burst.is_none()).expect("a calm step");
    let (weights, draws) = (sampler.mixture(position).weights, 20_000_u64);
    let seen = histogram(&sampler.batch(position, draws as usize), 4);
    let total: u64 = weights.iter().sum();
    for (domain, &weight) in weights.iter().enumerate() {
        let expected = draws * weight / total;
        let tolerance = 5 * (expected + 1).isqrt();
        assert!((seen[domain] as u64).abs_diff(expected) <= tolerance, "{seen:?} for {weights:?}");
    }
}

#[test]
fn too_little_text_says_how_much_is_needed() {
    let spec = SamplerSpec { sequence_tokens: 16, ..SamplerSpec::default() };
    let error = Sampler::new(letters(2, 33), spec).expect_err("33 bytes");
    assert!(matches!(error, TextError::TooShort { got_bytes: 33, needed_bytes: 34, .. }), "{error:?}");
    assert!(error.to_string().contains("33 bytes") && error.to_string().contains("need 34"), "{error}");
    let exact = Sampler::new(letters(2, 34), spec).expect("34 bytes");
    assert_eq!(exact.batch(BatchPosition::default(), 3).len(), 3 * 17);
    assert!(matches!(Sampler::new(Arc::default(), spec), Err(TextError::TooShort { got_bytes: 0, .. })));
    for tokens in [0, MAX_SEQUENCE_TOKENS + 1] {
        let spec = SamplerSpec { sequence_tokens: tokens, ..spec };
        assert!(matches!(Sampler::new(letters(1, 100), spec), Err(TextError::SequenceTokens { got }) if got == tokens));
    }
    assert!(matches!(Sampler::new(letters(1, 100), SamplerSpec { turn_steps: 0, ..spec }), Err(TextError::TurnSteps)));

    let mut mixed = (*letters(3, 1_000)).clone();
    mixed.domains[1].bytes.truncate(20);
    let sampler = Sampler::new(Arc::new(mixed), spec).expect("two are long enough");
    assert_eq!(sampler.left_out(), ["d1"]);
    assert_eq!(sampler.domain_names().collect::<Vec<_>>(), ["d0", "d2"]);
    assert_eq!(sampler.prompt("d1", 0, 20).expect("prompt").len(), 20, "prompts may come from short domains");
}

#[test]
fn prompts_come_from_the_domain_asked_for() {
    let sampler = sampler(3, 0);
    let prompt = sampler.prompt("d1", 4, 50).expect("prompt");
    assert_eq!(prompt, vec![b'B'; 50], "held-out text where it is long enough");
    assert_eq!(sampler.prompt("d1", 4, 4_000).expect("prompt").len(), 4_000);
    let unknown = sampler.prompt("d7", 4, 50).expect_err("unknown");
    assert_eq!(unknown.to_string(), "no domain \"d7\" in this text; it has: d0, d1, d2");
    for bytes in [0, 4_001] {
        assert!(matches!(sampler.prompt("d0", 0, bytes), Err(TextError::PromptBytes { available: 4_000, .. })));
    }

    let bytes = "aé漢🦀".repeat(2_000).into_bytes();
    let domain = TextDomain { name: "wide".into(), bytes, files: 1, origin: "a test".into() };
    let corpus = Arc::new(Corpus { domains: vec![domain], ..Corpus::default() });
    let sampler = Sampler::new(corpus, SamplerSpec::default()).expect("sampler");
    for seed in 0..100 {
        let prompt = sampler.prompt("wide", seed, 33).expect("prompt");
        let error = std::str::from_utf8(&prompt).err();
        assert!(error.is_none_or(|e| e.error_len().is_none()), "begins at a character: {prompt:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Any position and shape: the right size, only training text, and only domains that exist.
    #[test]
    fn any_position_gives_a_batch(
        domains in 1_usize..9,
        bytes in 40_usize..3_000,
        tokens in 1_usize..19,
        turn_steps in 1_u64..u64::MAX,
        seed: u64,
        step: u64,
        microbatch: u32,
        rank: u32,
    ) {
        let spec = SamplerSpec { sequence_tokens: tokens, seed, turn_steps };
        let sampler = Sampler::new(letters(domains, bytes), spec).expect("long enough");
        let position = BatchPosition { step, microbatch, rank };
        let batch = sampler.batch(position, 5);
        prop_assert_eq!(batch.len(), 5 * (tokens + 1));
        prop_assert!(batch.iter().all(|b| (b'a'..b'a' + domains as u8).contains(b)));
        let mixture = sampler.mixture(position);
        prop_assert_eq!(mixture.weights.len(), domains);
        prop_assert!(mixture.weights.iter().all(|&w| w > 0));
    }
}
