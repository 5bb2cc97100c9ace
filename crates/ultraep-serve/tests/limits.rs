//! Requests around every limit: each is answered rightly, and no rank ever starts again.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Server, engine_config, get, http_config, model_of};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};
use ultraep_baselines::PolicyKind;
use ultraep_schedule::Limits;
use ultraep_serve::{EngineConfig, Event, Generation, SubmitError};

/// Tokens of the context of these servers.
const CONTEXT: usize = 96;

/// A server whose context holds [`CONTEXT`] tokens, with a KV budget of `kv` tokens on each rank.
fn server(kv: u32) -> Server {
    let config = engine_config(2, PolicyKind::Ultraep, 32);
    let limits = Limits { kv_tokens_per_rank: kv, ..config.limits };
    Server::serving(model_of(CONTEXT), EngineConfig { limits, ..config }, http_config())
}

fn restarts(server: &Server) -> f64 {
    server.metric("ultraep_restarts_total")
}

#[test]
fn a_prompt_with_its_new_tokens_over_the_context_is_refused_and_nobody_notices() {
    // By the model's context, and by the KV of a rank where that is less.
    for (kv, context) in [(4 * CONTEXT as u32, CONTEXT), (64, 64)] {
        let server = server(kv);
        assert_eq!(server.engine.context_tokens(), context);
        let steady = json!({ "prompt": "steady", "max_tokens": 8, "temperature": 0 });
        let before = server.complete(steady.clone()).json();
        let of =
            |prompt: usize, new: Value| server.complete(json!({ "prompt": "x".repeat(prompt), "max_tokens": new }));
        // The last one of each line is the first that does not fit.
        for (prompt, new) in [(context, 0), (context - 1, 1), (context - 16, 16), (1, context - 1)] {
            assert_eq!(of(prompt, json!(new)).status, 200, "{prompt} and {new} of {context}");
            for (prompt, new) in [(prompt + 1, new), (prompt, new + 1)] {
                let refused = of(prompt, json!(new));
                assert_eq!(refused.status, 400, "{prompt} and {new} of {context}: {refused:?}");
                let error = refused.json()["error"].clone();
                assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("prompt")));
                let message = error["message"].as_str().unwrap();
                let numbers = [context, prompt, new, prompt + new].map(|n| n.to_string());
                assert!(numbers.iter().all(|n| message.contains(n)) && message.contains("max_tokens"), "{message}");
            }
        }
        // The default of max_tokens counts.
        assert_eq!((of(context - 16, json!(null)).status, of(context - 15, json!(null)).status), (200, 400));
        let direct = Generation { prompt: vec![b'x'; context], new_tokens: 1, ..Generation::default() };
        assert!(matches!(server.engine.submit(direct), Err(SubmitError::TooLong { .. })));
        assert_eq!(server.complete(steady).json()["choices"], before["choices"]);
        assert_eq!(restarts(&server), 0.0);
    }
}

#[test]
fn a_fault_in_one_request_ends_that_request_and_the_others_go_on_with_the_same_bits() {
    let server = Server::start(engine_config(2, PolicyKind::Ultraep, 64), http_config());
    let other = |seed: u64| Generation {
        prompt: format!("the prompt of request {seed}, which is long enough for two chunks").into_bytes(),
        new_tokens: 40,
        score_prompt: true,
        top: Some(2),
        ..Generation::default()
    };
    let events = |mut subscription: ultraep_serve::Subscription| {
        std::iter::from_fn(move || subscription.next_blocking()).collect::<Vec<_>>()
    };
    let alone: Vec<_> = (0..3).map(|seed| events(server.engine.submit(other(seed)).unwrap())).collect();
    // In the queue, in its prompt, while it decodes.
    for after in [0, 1, 5] {
        let beside: Vec<_> = (0..3).map(|seed| server.engine.submit(other(seed)).unwrap()).collect();
        let mut faulty = server.engine.submit(Generation { new_tokens: 4000, ..other(9) }).unwrap();
        (0..after).for_each(|_| drop(faulty.next_blocking()));
        faulty.spoil();
        let last = std::iter::from_fn(|| faulty.next_blocking()).last();
        assert!(matches!(&last, Some(Event::Failed(reason)) if reason.contains("without tokens")), "{last:?}");
        assert_eq!(beside.into_iter().map(events).collect::<Vec<_>>(), alone);
    }
    assert_eq!(server.metric("ultraep_requests_total{outcome=\"Failed\"}"), 3.0);
    assert_eq!((restarts(&server), get(server.address, "/health").status), (0.0, 200));
    server.wait_for("/metrics", |response| response.text().contains("ultraep_kv_tokens 0\n"));
}

/// A request, and what must come of it.
#[derive(Clone, Debug)]
struct Asked {
    prompts: Vec<usize>,
    /// As token ids instead of text.
    ids: bool,
    max_tokens: Option<i64>,
    n: Option<i64>,
    logprobs: Option<i64>,
    echo: Option<bool>,
    stream: bool,
    stop: Vec<String>,
    temperature: f64,
    seed: Option<i64>,
}

/// Numbers at and around a limit.
fn around(limit: i64) -> impl Strategy<Value = i64> {
    prop_oneof![3 => limit - 2..=limit + 2, 1 => 0..=limit]
}

fn asked() -> impl Strategy<Value = Asked> {
    // The longest prompts that leave room for the new tokens, give or take one.
    let lengths = prop_oneof![
        6 => proptest::collection::vec(0..12usize, 1..4),
        4 => around(CONTEXT as i64).prop_map(|n| vec![n as usize]),
        2 => around(CONTEXT as i64 - 16).prop_map(|n| vec![n as usize]),
        1 => proptest::collection::vec(1..4usize, 0..11),
    ];
    let new = prop_oneof![
        3 => Just(None),
        3 => Just(Some(0)),
        6 => (1..5i64).prop_map(Some),
        2 => around(CONTEXT as i64).prop_map(Some),
        1 => around(256).prop_map(Some),
        1 => Just(Some(-1)),
    ];
    let stop = proptest::collection::vec(".{0,3}", 0..3);
    let n = proptest::option::weighted(0.3, prop_oneof![4 => 1..4i64, 1 => 0..12i64]);
    let flags = (any::<bool>(), proptest::option::of(any::<bool>()), any::<bool>());
    let rest = (proptest::option::of(-1..7i64), stop, prop_oneof![Just(0.0), Just(1.0)], proptest::option::of(0..9i64));
    (lengths, new, n, flags, rest).prop_map(|(prompts, max_tokens, n, (ids, echo, stream), rest)| {
        let (logprobs, stop, temperature, seed) = rest;
        Asked { prompts, ids, max_tokens, n, logprobs, echo, stream, stop, temperature, seed }
    })
}

impl Asked {
    fn body(&self) -> Value {
        let text = |&length: &usize| match self.ids {
            false => json!("prompt ".chars().cycle().take(length).collect::<String>()),
            true => json!((0..length).map(|at| at * 37 % 256).collect::<Vec<_>>()),
        };
        let mut prompts: Vec<Value> = self.prompts.iter().map(text).collect();
        let prompt = if prompts.len() == 1 { prompts.remove(0) } else { json!(prompts) };
        json!({
            "prompt": prompt, "max_tokens": self.max_tokens, "n": self.n, "logprobs": self.logprobs, "echo": self.echo,
            "stream": self.stream, "stop": self.stop, "temperature": self.temperature, "seed": self.seed,
            "stream_options": { "include_usage": true },
        })
    }

    /// The refusal that is due: code and the parameters that it may be about.
    fn refusal(&self) -> Option<(Value, Vec<&'static str>)> {
        let out = |value: Option<i64>, least: i64, most: i64| value.is_some_and(|v| !(least..=most).contains(&v));
        let mut wrong = Vec::new();
        wrong.extend(out(self.max_tokens, 0, 256).then_some("max_tokens"));
        wrong.extend(out(self.n, 1, 128).then_some("n"));
        wrong.extend(out(self.logprobs, 0, 5).then_some("logprobs"));
        let choices = self.prompts.len() as i64 * self.n.unwrap_or(1);
        if self.prompts.is_empty() || self.prompts.contains(&0) || choices > 8 {
            wrong.extend(["prompt", "n"]);
        }
        if !wrong.is_empty() {
            return Some((Value::Null, wrong));
        }
        let new = self.max_tokens.unwrap_or(16) as usize;
        let too_long = self.prompts.iter().any(|prompt| prompt + new > CONTEXT);
        too_long.then(|| (json!("context_length_exceeded"), vec!["prompt"]))
    }

    /// Checks a whole answer.
    fn check(&self, answer: &Value) -> Result<(), TestCaseError> {
        let (n, new) = (self.n.unwrap_or(1) as usize, self.max_tokens.unwrap_or(16) as usize);
        let choices = answer["choices"].as_array().cloned().unwrap_or_default();
        prop_assert_eq!(choices.len(), self.prompts.len() * n);
        let prompts: usize = self.prompts.iter().sum();
        let mut produced = 0;
        for (at, choice) in choices.iter().enumerate() {
            prop_assert_eq!(&choice["index"], at);
            let stopped = choice["finish_reason"] == "stop";
            prop_assert!(stopped || choice["finish_reason"] == "length");
            let echoed = if self.echo == Some(true) { self.prompts[at / n] } else { 0 };
            let lists = &choice["logprobs"];
            prop_assert_eq!(lists.is_null(), self.logprobs.is_none());
            if self.logprobs.is_some() {
                let length = |name: &str| lists[name].as_array().map_or(0, Vec::len);
                let tokens = length("tokens");
                let right = if stopped { tokens < echoed + new } else { tokens == echoed + new };
                prop_assert!(right, "{tokens} tokens: {choice}");
                let same = ["token_logprobs", "top_logprobs", "text_offset"].iter().all(|name| length(name) == tokens);
                prop_assert!(same, "{}", lists);
            }
            if !stopped {
                produced += new;
            }
        }
        let usage = |name: &str| answer["usage"][name].as_u64().unwrap_or(u64::MAX) as usize;
        prop_assert_eq!(usage("prompt_tokens"), prompts);
        prop_assert!((produced..=choices.len() * new).contains(&usage("completion_tokens")), "{}", answer["usage"]);
        prop_assert_eq!(usage("total_tokens"), prompts + usage("completion_tokens"));
        Ok(())
    }
}

/// The events of a stream as one answer, as far as [`Asked::check`] looks at it.
fn whole(stream: &str) -> Option<Value> {
    let mut events: Vec<&str> = stream.split("\n\n").filter(|event| !event.is_empty()).collect();
    (events.pop()? == "data: [DONE]").then_some(())?;
    let mut answer = json!({ "choices": [], "usage": null });
    for event in events {
        let event: Value = serde_json::from_str(event.strip_prefix("data: ")?).ok()?;
        if !event["usage"].is_null() {
            answer["usage"] = event["usage"].clone();
        }
        let choices = answer["choices"].as_array_mut()?;
        for part in event["choices"].as_array()? {
            let index = part["index"].as_u64()? as usize;
            if choices.len() == index {
                choices.push(part.clone());
                continue;
            }
            choices[index]["finish_reason"] = part["finish_reason"].clone();
            for (name, list) in part["logprobs"].as_object().into_iter().flatten() {
                let to = choices[index]["logprobs"][name].as_array_mut()?;
                to.extend(list.as_array()?.iter().cloned());
            }
        }
    }
    Some(answer)
}

#[test]
fn thousands_of_requests_around_every_limit_are_answered_rightly_and_no_rank_restarts() {
    const CLIENTS: u32 = 6;
    const REQUESTS: u32 = 400;
    let server = server(2 * CONTEXT as u32);
    let (answered, refused, full) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let client = |number: u32| {
        let config = Config { cases: REQUESTS, failure_persistence: None, ..Config::default() };
        let seed: [u8; 32] = std::array::from_fn(|at| (at as u32 + 7 * number) as u8);
        let mut runner = TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
        let result = runner.run(&asked(), |asked| {
            let response = server.complete(asked.body());
            if response.status == 429 {
                full.fetch_add(1, Ordering::Relaxed);
                prop_assert!(asked.refusal().is_none());
                prop_assert_eq!(&response.json()["error"]["code"], "rate_limit_exceeded");
                return Ok(());
            }
            if let Some((code, params)) = asked.refusal() {
                refused.fetch_add(1, Ordering::Relaxed);
                prop_assert_eq!(response.status, 400, "{:?}", response);
                let error = response.json()["error"].clone();
                prop_assert_eq!(&error["code"], &code);
                prop_assert!(params.iter().any(|param| error["param"] == *param), "{}", error);
                return Ok(());
            }
            answered.fetch_add(1, Ordering::Relaxed);
            prop_assert_eq!(response.status, 200, "{:?}", response);
            let answer = if asked.stream { whole(&response.text()) } else { Some(response.json()) };
            let answer = answer.ok_or_else(|| TestCaseError::fail(format!("a broken stream: {}", response.text())))?;
            asked.check(&answer)
        });
        result.unwrap_or_else(|error| panic!("client {number}: {error}"));
    };
    std::thread::scope(|scope| (0..CLIENTS).for_each(|number| drop(scope.spawn(move || client(number)))));
    let counts = [&answered, &refused, &full].map(|count| count.load(Ordering::Relaxed));
    assert!(counts[0] > 400 && counts[1] > 400, "{counts:?}");
    assert_eq!(counts.iter().sum::<usize>(), (CLIENTS * REQUESTS) as usize);
    assert_eq!((restarts(&server), get(server.address, "/health").status), (0.0, 200));
    server.wait_for("/metrics", |response| response.text().contains("ultraep_kv_tokens 0\n"));
}
