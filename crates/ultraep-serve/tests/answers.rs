//! What clients compute with: scores, seeds, choices, stop sequences, offsets; whole and streamed.

mod common;

use common::{Server, engine_config, http_config};
use serde_json::{Value, json};
use ultraep_baselines::PolicyKind;

fn server() -> Server {
    Server::start(engine_config(2, PolicyKind::Ultraep, 64), http_config())
}

fn ask(server: &Server, body: Value) -> Value {
    let response = server.complete(body.clone());
    assert_eq!(response.status, 200, "{body}: {response:?}");
    response.json()
}

/// The choices of a streamed answer, put together as clients do, and its usage.
fn streamed(server: &Server, mut body: Value) -> (Vec<Value>, Value) {
    body["stream"] = json!(true);
    body["stream_options"] = json!({ "include_usage": true });
    let response = server.complete(body);
    assert_eq!(response.status, 200, "{response:?}");
    let text = response.text();
    let mut events: Vec<&str> = text.split("\n\n").filter(|event| !event.is_empty()).collect();
    assert_eq!(events.pop(), Some("data: [DONE]"));
    let events = events.iter().map(|event| serde_json::from_str::<Value>(&event["data: ".len()..]).unwrap());
    let (mut choices, mut usage) = (Vec::<Value>::new(), Value::Null);
    for event in events {
        if !event["usage"].is_null() {
            usage = event["usage"].clone();
        }
        for part in event["choices"].as_array().unwrap() {
            let index = part["index"].as_u64().unwrap() as usize;
            if choices.len() == index {
                choices.push(part.clone());
                continue;
            }
            let whole = &mut choices[index];
            assert_eq!(whole["finish_reason"], Value::Null, "nothing comes after the end");
            whole["text"] = json!([whole["text"].as_str().unwrap(), part["text"].as_str().unwrap()].concat());
            whole["finish_reason"] = part["finish_reason"].clone();
            if let Some(seed) = part.get("seed") {
                whole["seed"] = seed.clone();
            }
            let lists = part["logprobs"].as_object().into_iter().flatten();
            for (name, list) in lists {
                whole["logprobs"][name].as_array_mut().unwrap().extend(list.as_array().unwrap().iter().cloned());
            }
        }
    }
    (choices, usage)
}

fn texts(answer: &Value) -> Vec<String> {
    answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_string()).collect()
}

/// What lm-eval makes of a scored prompt: the sum over the continuation, and whether it is the greedy one.
fn lm_eval(choice: &Value, context: usize) -> (f64, bool) {
    let list = |name: &str| choice["logprobs"][name].as_array().unwrap().clone();
    let (tokens, top) = (list("token_logprobs"), list("top_logprobs"));
    let range = context..tokens.len() - 1;
    let value = |token: &Value| token.as_f64().unwrap();
    let greedy = range.clone().all(|at| {
        let likeliest = top[at].as_object().unwrap().values().map(value).fold(f64::MIN, f64::max);
        value(&tokens[at]) == likeliest
    });
    (tokens[range].iter().map(value).sum(), greedy)
}

#[test]
fn lm_eval_finds_greedy_continuations_greedy_and_others_not() {
    let server = server();
    let greedy = ask(&server, json!({ "prompt": "context", "max_tokens": 6, "temperature": 0, "logprobs": 1 }));
    let tokens = greedy["choices"][0]["logprobs"]["tokens"].as_array().unwrap();
    let byte = |token: &Value| match token.as_str().unwrap() {
        text if text.len() == 1 => text.as_bytes()[0],
        text => u8::from_str_radix(text.strip_prefix("bytes:\\x").unwrap(), 16).unwrap(),
    };
    let continuation: Vec<u8> = tokens.iter().map(byte).collect();
    let mut other = continuation.clone();
    other[3] = other[3].wrapping_add(1);
    let prompt = |continuation: &[u8]| [b"context", continuation].concat();
    // The payload of lm-eval's `local-completions`.
    let score = json!({
        "model": server.engine.model().name(), "prompt": [prompt(&continuation), prompt(&other)], "temperature": 0,
        "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": true,
    });
    let scored = ask(&server, score.clone());
    let (sum, is_greedy) = lm_eval(&scored["choices"][0], 7);
    assert!(is_greedy && sum < 0.0, "{scored}");
    assert!(!lm_eval(&scored["choices"][1], 7).1);
    // The same tokens have the same numbers, to the digit, when they were produced.
    let produced = &greedy["choices"][0]["logprobs"]["token_logprobs"];
    assert_eq!(
        &scored["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap()[7..13],
        produced.as_array().unwrap()
    );
    // OpenAI's own way to score: no new token at all.
    let mut none = score;
    none["max_tokens"] = json!(0);
    let none = ask(&server, none);
    assert_eq!(none["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap().len(), 13);
    assert_eq!(none["usage"], json!({ "prompt_tokens": 26, "completion_tokens": 0, "total_tokens": 26 }));
}

#[test]
fn every_token_is_among_its_top_logprobs_with_the_same_digits() {
    let server = server();
    for top in 0..=5 {
        let body = json!({ "prompt": "digits \u{e9}\u{20ac}", "max_tokens": 24, "temperature": 2, "logprobs": top, "echo": true });
        let response = server.complete(body);
        // As text: the digits themselves, not what a parser makes of them.
        let text = response.text();
        let answer = response.json();
        let logprobs = &answer["choices"][0]["logprobs"];
        let list = |name: &str| logprobs[name].as_array().unwrap();
        assert_eq!(list("tokens").len(), 12 + 24);
        assert!(["token_logprobs", "top_logprobs", "text_offset"].iter().all(|n| list(n).len() == 12 + 24));
        assert!(list("token_logprobs")[0].is_null() && list("top_logprobs")[0].is_null());
        for at in 1..36 {
            let (token, value) = (list("tokens")[at].as_str().unwrap(), &list("token_logprobs")[at]);
            let likeliest = list("top_logprobs")[at].as_object().unwrap();
            assert_eq!(likeliest.get(token), Some(value), "{token} of {likeliest:?}");
            assert!((top.max(1)..=top + 1).contains(&likeliest.len()), "{top}: {likeliest:?}");
            let written = format!("{}:{value}", json!(token));
            assert!(text.contains(&written), "{written} in {text}");
        }
    }
}

#[test]
fn without_a_seed_answers_differ_and_each_says_how_to_repeat_it() {
    let server = server();
    let free = json!({ "prompt": ["equal", "equal"], "max_tokens": 12, "n": 2, "temperature": 1 });
    let (first, second) = (ask(&server, free.clone()), ask(&server, free));
    let mut all = [texts(&first), texts(&second)].concat();
    for choice in [&first, &second].into_iter().flat_map(|answer| answer["choices"].as_array().unwrap()) {
        let seed = choice["seed"].as_i64().unwrap();
        assert!((0..1 << 53).contains(&seed), "{seed} is exact for every JSON reader");
        let again = ask(&server, json!({ "prompt": "equal", "max_tokens": 12, "temperature": 1, "seed": seed }));
        assert_eq!(again["choices"][0]["text"], choice["text"]);
    }
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 8, "eight draws of twelve tokens");
    // A server that is started anew and asked the same gives the same.
    let restarted = self::server();
    let again = ask(&restarted, json!({ "prompt": ["equal", "equal"], "max_tokens": 12, "n": 2, "temperature": 1 }));
    assert_eq!(again["choices"], first["choices"]);
    // Where nothing is drawn there is nothing to differ.
    let greedy = ask(&server, json!({ "prompt": ["equal", "equal"], "max_tokens": 12, "temperature": 0, "n": 2 }));
    assert!(texts(&greedy).windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn choice_i_of_a_seed_is_that_of_the_seed_plus_i() {
    let server = server();
    let base = json!({ "prompt": ["ab", "xyz"], "max_tokens": 9, "temperature": 1, "seed": -1, "n": 3, "best_of": 3 });
    let answer = ask(&server, base.clone());
    assert_eq!(ask(&server, base.clone())["choices"], answer["choices"], "a seed repeats");
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 6);
    for (at, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], at);
        let (prompt, seed) = (["ab", "xyz"][at / 3], at as i64 % 3 - 1);
        assert_eq!(choice["seed"], seed);
        let alone = ask(&server, json!({ "prompt": prompt, "max_tokens": 9, "temperature": 1, "seed": seed }));
        assert_eq!(alone["choices"][0]["text"], choice["text"], "prompt {prompt}, seed {seed}");
    }
    // A prompt counts once, what came of it each time.
    assert_eq!(answer["usage"], json!({ "prompt_tokens": 5, "completion_tokens": 54, "total_tokens": 59 }));
    let (streamed, usage) = streamed(&server, base);
    assert_eq!((json!(streamed), usage), (answer["choices"].clone(), answer["usage"].clone()));
}

#[test]
fn text_ends_before_a_stop_sequence_and_a_stream_never_shows_its_start() {
    let server = server();
    let base = json!({ "prompt": "stop", "max_tokens": 60, "temperature": 1, "logprobs": 0, "seed": 11 });
    let whole = ask(&server, base.clone());
    let tokens: Vec<&str> =
        whole["choices"][0]["logprobs"]["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    // Runs of ASCII of the output as stop sequences: they span tokens, and streamed pieces.
    let mut tried = 0;
    for at in 1..58 {
        let Some(run) = tokens.get(at..at + 2).filter(|run| run.iter().all(|t| t.len() == 1)) else { continue };
        let stop = run.concat();
        let first = (0..59).find(|&i| tokens[i..i + 2].concat() == stop).unwrap();
        let mut body = base.clone();
        body["stop"] = json!([stop, "never in it"]);
        let stopped = ask(&server, body.clone());
        let choice = &stopped["choices"][0];
        assert_eq!(choice["finish_reason"], "stop");
        assert!(!choice["text"].as_str().unwrap().contains(&stop), "{choice}");
        assert_eq!(choice["logprobs"]["tokens"], json!(tokens[..first]));
        // What was produced counts, shown or not.
        assert_eq!(stopped["usage"]["completion_tokens"], first + 2);
        let (parts, usage) = streamed(&server, body);
        assert_eq!((&parts[0], &usage), (choice, &stopped["usage"]));
        tried += 1;
    }
    assert!(tried >= 3, "{tokens:?}");
    // The longest of those that end in one place, and what only began.
    let last = tokens[59];
    let mut body = base;
    body["stop"] = json!([format!("{last}{last}{last}x")]);
    assert_eq!(ask(&server, body)["choices"][0]["text"], whole["choices"][0]["text"]);
}

#[test]
fn text_and_offsets_are_the_same_streamed_and_whole_for_bytes_that_are_no_text() {
    let server = server();
    let prompts = [json!("caf\u{e9} \u{20ac}"), json!([0xe2, 0x82]), json!([0xff, 0x80, 0x41, 0xf0, 0x9f])];
    for (seed, prompt) in prompts.iter().cycle().take(12).enumerate() {
        for echo in [false, true] {
            let body = json!({
                "prompt": prompt, "max_tokens": 40, "temperature": 2, "logprobs": 2, "seed": seed, "echo": echo,
            });
            let whole = ask(&server, body.clone());
            let (parts, usage) = streamed(&server, body);
            assert_eq!((json!(parts), &usage), (whole["choices"].clone(), &whole["usage"]));
            let choice = &whole["choices"][0];
            let characters: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
            let logprobs = &choice["logprobs"];
            let offsets: Vec<usize> =
                logprobs["text_offset"].as_array().unwrap().iter().map(|o| o.as_u64().unwrap() as usize).collect();
            assert!(offsets.windows(2).all(|w| w[0] <= w[1] && w[1] <= w[0] + 1), "{offsets:?}");
            assert_eq!((offsets.first(), offsets.last().map(|last| last + 1)), (Some(&0), Some(characters.len())));
            for (token, &offset) in logprobs["tokens"].as_array().unwrap().iter().zip(&offsets) {
                // A token that is a character is the one at its offset; one that is not is part of another.
                let token = token.as_str().unwrap();
                let ascii = characters[offset].is_ascii().then(|| characters[offset].to_string());
                assert_eq!(ascii.as_deref(), (token.len() == 1).then_some(token), "{token} at {offset}");
            }
        }
    }
}
