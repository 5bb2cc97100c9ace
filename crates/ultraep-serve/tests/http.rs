//! The server through a real socket: answers, streams, refusals, limits.

mod common;

use common::{Server, engine_config, exchange, get, http_config, post, request};
use serde_json::{Value, json};
use ultraep_baselines::PolicyKind;
use ultraep_serve::Generation;
use ultraep_serve::http::HttpConfig;

fn server() -> Server {
    Server::start(engine_config(2, PolicyKind::Ultraep, 64), http_config())
}

fn prompt(tokens: usize) -> Vec<u8> {
    (0..tokens).map(|i| (i * i % 251) as u8).collect()
}

/// Bits of all log-probabilities of a prompt and what follows it.
fn scores(response: &Value) -> Vec<Option<u32>> {
    let logprobs = response["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
    logprobs.iter().map(|l| l.as_f64().map(|l| (l as f32).to_bits())).collect()
}

#[test]
fn a_prefill_scores_the_same_bit_for_bit_under_every_policy_chunk_and_neighbour() {
    let ask = json!({ "prompt": prompt(300), "max_tokens": 5, "temperature": 0, "echo": true, "logprobs": 2 });
    let mut reference = None;
    let engines = [
        engine_config(1, PolicyKind::None, 512),
        engine_config(2, PolicyKind::Ultraep, 64),
        engine_config(4, PolicyKind::EplbExact, 100),
        engine_config(4, PolicyKind::Eplb, 28),
    ];
    for config in engines {
        let server = Server::start(config, http_config());
        // Others run beside it.
        let neighbour = |seed: usize| Generation { prompt: prompt(70 + seed), new_tokens: 30, ..Generation::default() };
        let beside: Vec<_> = (0..3).map(|seed| server.engine.submit(neighbour(seed)).unwrap()).collect();
        let response = server.complete(ask.clone());
        assert_eq!(response.status, 200, "{response:?}");
        let response = response.json();
        assert_eq!(scores(&response).len(), 305);
        assert!(scores(&response)[0].is_none() && scores(&response)[1..].iter().all(Option::is_some));
        let outcome = (scores(&response), response["choices"][0]["text"].clone());
        assert_eq!(reference.get_or_insert_with(|| outcome.clone()), &outcome);
        drop(beside);
    }
}

#[test]
fn text_and_tokens_are_the_same_prompt_and_usage_is_counted() {
    let server = server();
    let of = |prompt: Value| server.complete(json!({ "prompt": prompt, "max_tokens": 4, "temperature": 0 })).json();
    let (text, tokens) = (of(json!("fn main")), of(json!(b"fn main")));
    assert_eq!(text["choices"], tokens["choices"]);
    assert_eq!(text["object"], "text_completion");
    assert_eq!(text["choices"][0]["finish_reason"], "length");
    assert_eq!(text["usage"], json!({ "prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11 }));
    let many = of(json!(["fn main", "let x"]));
    assert_eq!(many["choices"][0]["text"], text["choices"][0]["text"]);
    assert_eq!(many["choices"][1]["index"], 1);
    let none = server.complete(json!({ "prompt": "ab", "max_tokens": 0, "echo": true })).json();
    assert_eq!(none["choices"][0]["text"], "ab");
    let sampled = |seed| server.complete(json!({ "prompt": "a", "seed": seed })).json()["choices"][0]["text"].clone();
    assert_eq!(sampled(1), sampled(1));
    assert_ne!(sampled(1), sampled(2));
}

#[test]
fn a_stop_sequence_ends_the_output() {
    let server = server();
    let whole = server.complete(json!({ "prompt": "stop", "max_tokens": 40, "temperature": 2, "seed": 5 })).json();
    let text = whole["choices"][0]["text"].as_str().unwrap().to_string();
    let stop: String = text.chars().filter(char::is_ascii).take(1).collect();
    let ask = json!({ "prompt": "stop", "max_tokens": 40, "temperature": 2, "seed": 5, "stop": [stop] });
    let ended = server.complete(ask).json();
    assert_eq!(ended["choices"][0]["finish_reason"], "stop");
    assert_eq!(ended["choices"][0]["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap() + stop.len()]);
}

#[test]
fn a_stream_adds_up_to_the_answer() {
    let server = server();
    let mut ask = json!({ "prompt": ["abc", "xyz"], "max_tokens": 9, "temperature": 0, "echo": true, "logprobs": 1 });
    let whole = server.complete(ask.clone()).json();
    ask["stream"] = json!(true);
    ask["stream_options"] = json!({ "include_usage": true });
    let response = server.complete(ask);
    assert_eq!(response.header("content-type"), Some("text/event-stream"));
    let text = response.text();
    let mut events: Vec<&str> = text.split("\n\n").filter(|e| !e.is_empty()).collect();
    assert_eq!(events.pop(), Some("data: [DONE]"));
    let events: Vec<Value> = events.iter().map(|e| serde_json::from_str(&e["data: ".len()..]).unwrap()).collect();
    for choice in whole["choices"].as_array().unwrap() {
        let mut parts = events.iter().filter_map(|e| e["choices"].get(0)).filter(|c| c["index"] == choice["index"]);
        let text: String = parts.clone().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(choice["text"], json!(text));
        let logprobs = parts.clone().flat_map(|c| c["logprobs"]["token_logprobs"].as_array().unwrap().clone());
        assert_eq!(choice["logprobs"]["token_logprobs"], Value::from_iter(logprobs));
        assert_eq!(parts.next_back().unwrap()["finish_reason"], "length");
    }
    assert_eq!(events.last().unwrap()["usage"], whole["usage"]);
}

#[test]
fn wrong_requests_are_told_what_is_wrong() {
    let server = server();
    let long = "x".repeat(4097);
    let cases = [
        (json!({}), 400, "prompt"),
        (json!({ "prompt": "" }), 400, "prompt"),
        (json!({ "prompt": [] }), 400, "prompt"),
        (json!({ "prompt": [256] }), 400, ""),
        (json!({ "prompt": long }), 400, "prompt"),
        (json!({ "prompt": vec!["a"; 17] }), 400, "prompt"),
        (json!({ "prompt": "a", "model": "another" }), 404, "model"),
        (json!({ "prompt": "a", "max_tokens": 257 }), 400, "max_tokens"),
        (json!({ "prompt": "a", "max_tokens": -1 }), 400, ""),
        (json!({ "prompt": "a", "temperature": 3 }), 400, "temperature"),
        (json!({ "prompt": "a", "top_p": -0.5 }), 400, "top_p"),
        (json!({ "prompt": "a", "logprobs": 6 }), 400, "logprobs"),
        (json!({ "prompt": "a", "n": 2 }), 400, "n"),
        (json!({ "prompt": "a", "stop": ["a", "b", "c", "d", "e"] }), 400, "stop"),
        (json!({ "prompt": "a", "suffix": "b" }), 400, "suffix"),
        (json!({ "prompt": "a", "presence_penalty": 1 }), 400, "presence_penalty"),
        (json!({ "prompt": "a", "logit_bias": { "1": 2 } }), 400, "logit_bias"),
        (json!([1]), 400, ""),
    ];
    for (body, status, param) in cases {
        let response = server.complete(body.clone());
        assert_eq!(response.status, status, "{body}: {response:?}");
        let error = response.json()["error"].clone();
        assert_eq!(error["param"].as_str().unwrap_or(""), param, "{body}: {error}");
        assert!(!error["message"].as_str().unwrap().is_empty());
    }
    let broken = post(server.address, "/v1/completions", "{\"prompt\": \"a\"");
    assert_eq!(broken.status, 400);
    let large = server.complete(json!({ "prompt": "a", "user": "u".repeat(70_000) }));
    assert_eq!((large.status, large.json()["error"]["type"].as_str()), (413, Some("invalid_request_error")));
    assert_eq!(get(server.address, "/v1/completions").status, 405);
    assert_eq!(get(server.address, "/nothing").json()["error"]["code"], Value::Null);
    // All of it is still there for others.
    assert_eq!(server.complete(json!({ "prompt": "a", "max_tokens": 1 })).status, 200);
}

#[test]
fn what_can_never_fit_the_kv_cache_is_refused_at_once() {
    let mut config = engine_config(2, PolicyKind::Ultraep, 64);
    config.limits.kv_tokens_per_rank = 100;
    let server = Server::start(config, http_config());
    let response = server.complete(json!({ "prompt": prompt(95), "max_tokens": 10 }));
    assert_eq!((response.status, response.json()["error"]["code"].as_str()), (400, Some("context_length_exceeded")));
    assert_eq!(server.complete(json!({ "prompt": prompt(95), "max_tokens": 6 })).status, 200);
}

#[test]
fn a_key_is_asked_for_where_there_is_one() {
    let http = HttpConfig { api_key: Some("secret".into()), ..http_config() };
    let server = Server::start(engine_config(2, PolicyKind::Ultraep, 64), http);
    let with = |header: &str| exchange(server.address, request("GET", "/v1/models", header, "").as_bytes()).unwrap();
    for wrong in
        ["", "Authorization: Bearer secre\r\n", "Authorization: Bearer secrets\r\n", "Authorization: secret\r\n"]
    {
        let response = with(wrong);
        assert_eq!((response.status, response.header("www-authenticate")), (401, Some("Bearer")), "{wrong}");
    }
    let models = with("Authorization: Bearer secret\r\n").json();
    assert_eq!(models["data"][0]["id"], server.engine.model().name());
    assert_eq!(get(server.address, "/health").status, 200);
}

#[test]
fn the_metrics_have_a_fixed_number_of_series_and_count() {
    let server = server();
    let series = || {
        let text = get(server.address, "/metrics").text();
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_string).collect::<Vec<_>>()
    };
    let run = |prompt: &str| server.complete(json!({ "prompt": prompt, "max_tokens": 3 }));
    run("first");
    let before = series().len();
    (0..5).for_each(|i| assert_eq!(run(&format!("number {i}")).status, 200));
    let after = series();
    assert_eq!(after.len(), before);
    let value = |name: &str| {
        let line = after.iter().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {after:?}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    assert_eq!(value("ultraep_requests_total{outcome=\"Finished\"}"), 6.0);
    assert_eq!(value("ultraep_tokens_total{kind=\"Prompt\"}"), 5.0 + 5.0 * 8.0);
    assert_eq!(value("ultraep_tokens_total{kind=\"New\"}"), 6.0 * 2.0);
    assert_eq!(value("ultraep_time_to_first_token_seconds_count"), 6.0);
    assert_eq!(value("ultraep_kv_tokens"), 0.0);
    assert!(value("ultraep_imbalance_after_sum") <= value("ultraep_imbalance_before_sum"));
    assert!(value("ultraep_plan_seconds_total") > 0.0);
}

#[test]
fn the_description_names_every_route() {
    let server = server();
    let document = get(server.address, "/openapi.json").json();
    assert_eq!(document["openapi"], "3.1.0");
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let path = path.replace("{model}", server.engine.model().name());
            let text = request(&method.to_uppercase(), &path, "", "");
            let status = exchange(server.address, text.as_bytes()).unwrap().status;
            assert!(status == 200 || (method == "post" && status == 400), "{method} {path}: {status}");
        }
    }
    let limits = &document["components"]["schemas"]["CompletionRequest"]["properties"];
    assert_eq!(limits["max_tokens"]["maximum"], http_config().new_tokens_max);
}
