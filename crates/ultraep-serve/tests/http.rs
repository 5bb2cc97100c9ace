//! The server through a real socket: answers, streams, refusals, limits.

mod common;

use common::{CONTEXT, Server, engine_config, exchange, get, http_config, post, request};
use serde_json::{Value, json};
use ultraep_baselines::PolicyKind;
use ultraep_serve::Generation;
use ultraep_serve::http::{ApiKey, HttpConfig};

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
    let floats: Vec<f64> = b"fn main".iter().map(|&b| f64::from(b)).collect();
    assert_eq!(of(json!(floats))["choices"], text["choices"]);
    assert_eq!(text["object"], "text_completion");
    assert_eq!(text["choices"][0]["finish_reason"], "length");
    assert_eq!(text["usage"], json!({ "prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11 }));
    assert!(text["choices"][0].get("seed").is_none(), "nothing was drawn");
    let many = of(json!(["fn main", "let x"]));
    assert_eq!(many["choices"][0]["text"], text["choices"][0]["text"]);
    assert_eq!(many["choices"][1]["index"], 1);
    let none = server.complete(json!({ "prompt": "ab", "max_tokens": 0, "echo": true })).json();
    assert_eq!(none["choices"][0]["text"], "ab");
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
    assert_eq!(ended["choices"][0]["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()]);
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
    let long = "x".repeat(CONTEXT - 15);
    let cases = [
        (json!({}), 400, "prompt"),
        (json!({ "prompt": "" }), 400, "prompt"),
        (json!({ "prompt": [] }), 400, "prompt"),
        (json!({ "prompt": [256] }), 400, "prompt"),
        (json!({ "prompt": [1.5] }), 400, "prompt"),
        (json!({ "prompt": ["a", 1] }), 400, "prompt"),
        (json!({ "prompt": [1, "a"] }), 400, "prompt"),
        (json!({ "prompt": { "text": "a" } }), 400, "prompt"),
        (json!({ "prompt": long }), 400, "prompt"),
        (json!({ "prompt": vec!["a"; 129] }), 400, "prompt"),
        (json!({ "prompt": vec!["a"; 9] }), 400, "prompt"),
        (json!({ "prompt": ["a", ""] }), 400, "prompt"),
        (json!({ "prompt": "a", "model": "another" }), 404, "model"),
        (json!({ "prompt": "a", "max_tokens": 257 }), 400, "max_tokens"),
        (json!({ "prompt": "a", "max_tokens": -1 }), 400, "max_tokens"),
        (json!({ "prompt": "a", "max_tokens": 1.5 }), 400, "max_tokens"),
        (json!({ "prompt": "a", "max_tokens": "many" }), 400, "max_tokens"),
        (json!({ "prompt": "a", "max_tokens": 18_446_744_073_709_551_615u64 }), 400, "max_tokens"),
        (json!({ "prompt": "a", "stream": "yes" }), 400, "stream"),
        (json!({ "prompt": "a", "stream_options": [true] }), 400, "stream_options"),
        (json!({ "prompt": "a", "stream_options": { "include_usage": 1 } }), 400, "include_usage"),
        (json!({ "prompt": "a", "echo": 1 }), 400, "echo"),
        (json!({ "prompt": "a", "seed": 0.5 }), 400, "seed"),
        (json!({ "prompt": "a", "model": 1 }), 400, "model"),
        (json!({ "prompt": "a", "stop": 1 }), 400, "stop"),
        (json!({ "prompt": "a", "stop": [1] }), 400, "stop"),
        (json!({ "prompt": "a", "stop": "x".repeat(65) }), 400, "stop"),
        (json!({ "prompt": "a", "temperature": 3 }), 400, "temperature"),
        (json!({ "prompt": "a", "top_p": -0.5 }), 400, "top_p"),
        (json!({ "prompt": "a", "logprobs": 6 }), 400, "logprobs"),
        (json!({ "prompt": "a", "n": 0 }), 400, "n"),
        (json!({ "prompt": "a", "n": 129 }), 400, "n"),
        // The queue has eight places.
        (json!({ "prompt": ["a", "b", "c"], "n": 3 }), 400, "n"),
        (json!({ "prompt": "a", "best_of": 2 }), 400, "best_of"),
        (json!({ "prompt": "a", "stop": vec!["a"; 17] }), 400, "stop"),
        (json!({ "prompt": "a", "suffix": "b" }), 400, "suffix"),
        (json!({ "prompt": "a", "presence_penalty": 1 }), 400, "presence_penalty"),
        (json!({ "prompt": "a", "frequency_penalty": 3 }), 400, "frequency_penalty"),
        (json!({ "prompt": "a", "logit_bias": { "1": 2 } }), 400, "logit_bias"),
        // A list is no object, whatever its places would mean.
        (json!([1]), 400, ""),
        (json!([null, "a", 1]), 400, ""),
        (json!("a"), 400, ""),
        (json!(null), 400, ""),
    ];
    for (body, status, param) in cases {
        let response = server.complete(body.clone());
        assert_eq!(response.status, status, "{body}: {response:?}");
        let error = response.json()["error"].clone();
        assert_eq!(error["param"].as_str().unwrap_or(""), param, "{body}: {error}");
        // The message says which one, too: many clients show nothing else.
        let message = error["message"].as_str().unwrap();
        assert!(!message.is_empty() && message.contains(param), "{body}: {error}");
    }
    let broken = post(server.address, "/v1/completions", "{\"prompt\": \"a\"");
    assert_eq!(broken.status, 400);
    let large = server.complete(json!({ "prompt": "a", "user": "u".repeat(70_000) }));
    assert_eq!((large.status, large.json()["error"]["type"].as_str()), (413, Some("invalid_request_error")));
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
    assert_eq!(server.complete(json!({ "prompt": prompt(95), "max_tokens": 5 })).status, 200);
}

#[test]
fn a_key_is_asked_for_where_there_is_one() {
    let http = HttpConfig { api_key: Some(ApiKey::new("secret").unwrap()), ..http_config() };
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
fn every_error_is_json_in_openai_s_shape() {
    let server = server();
    let send = |method: &str, path: &str, body: &[u8]| {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        );
        exchange(server.address, &[head.as_bytes(), body].concat()).expect("an answer")
    };
    let cases: [(&str, &str, &[u8], u16); 11] = [
        ("POST", "/v1/completions", b"{\"prompt\": \"a\"", 400),
        ("POST", "/v1/completions", b"", 400),
        ("POST", "/v1/completions", b"{\"prompt\": \"\xff\"}", 400),
        ("POST", "/v1/completions", b"{\"prompt\": \"\\ud800\"}", 400),
        ("POST", "/v1/completions", b"[\"model\", \"a\", 1]", 400),
        ("POST", "/v1/completions", &[b' '; 70_000], 413),
        ("GET", "/v1/completions", b"", 405),
        ("GET", "/nothing", b"", 404),
        ("GET", "/v1/models/another", b"", 404),
        ("GET", "/v1/models/%ff", b"", 400),
        ("POST", "/v1/chat/completions", b"{\"messages\": []}", 404),
    ];
    for (method, path, body, status) in cases {
        let response = send(method, path, body);
        assert_eq!(response.status, status, "{method} {path}: {response:?}");
        assert_eq!(response.header("content-type"), Some("application/json"), "{method} {path}: {response:?}");
        let error = &response.json()["error"];
        let all_there = ["message", "type", "param", "code"].iter().all(|key| error.get(key).is_some());
        assert!(all_there && error["message"].is_string() && error["type"].is_string(), "{method} {path}: {error}");
    }
    let chat = send("POST", "/v1/chat/completions", b"{}").json();
    assert!(chat["error"]["message"].as_str().unwrap().contains("/v1/completions completes a prompt"), "{chat}");
    assert_eq!(chat["error"]["code"], "unknown_url");
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
