//! Clients that go away, load beyond the limits, ranks that die, shutdown.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use common::{Server, connect, engine_config, get, http_config, request};
use serde_json::json;
use ultraep_baselines::PolicyKind;
use ultraep_serve::http::HttpConfig;
use ultraep_serve::{EngineConfig, Event, Generation, Health, SubmitError};

fn server() -> Server {
    Server::start(engine_config(2, PolicyKind::Ultraep, 64), http_config())
}

/// Runs for seconds if nobody stops it.
fn endless() -> Generation {
    Generation { prompt: b"endless".to_vec(), new_tokens: 8000, ..Generation::default() }
}

fn idle(server: &Server) {
    server.wait_for("/metrics", |response| {
        let text = response.text();
        ["ultraep_running_requests 0\n", "ultraep_queued_requests 0\n", "ultraep_kv_tokens 0\n"]
            .iter()
            .all(|line| text.contains(line))
    });
}

/// A stream of many tokens, after its first part has arrived.
fn begin_stream(server: &Server) -> TcpStream {
    let body = json!({ "prompt": "s", "max_tokens": 256, "stream": true, "temperature": 0, "logprobs": 0 }).to_string();
    let mut stream = connect(server.address);
    stream.write_all(request("POST", "/v1/completions", "", &body).as_bytes()).unwrap();
    let mut first = [0; 600];
    stream.read_exact(&mut first[..400]).unwrap();
    assert!(String::from_utf8_lossy(&first).contains("data: {"), "{}", String::from_utf8_lossy(&first));
    stream
}

#[test]
fn a_client_that_goes_away_frees_its_work() {
    let server = server();
    drop(begin_stream(&server));
    // One that waits for a whole answer.
    let body = json!({ "prompt": "w", "max_tokens": 256, "temperature": 0 }).to_string();
    let mut stream = connect(server.address);
    stream.write_all(request("POST", "/v1/completions", "", &body).as_bytes()).unwrap();
    server.wait_for("/metrics", |r| !r.text().contains("ultraep_running_requests 0\n"));
    drop(stream);
    drop(server.engine.submit(endless()).unwrap());
    idle(&server);
    let text = get(server.address, "/metrics").text();
    assert!(text.contains("outcome=\"Cancelled\""), "{text}");
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let server = server();
    // KV for one of these on each of 2 ranks, 8 places in the queue.
    let mut held: Vec<_> = (0..2).map(|_| server.engine.submit(endless()).unwrap()).collect();
    server.wait_for("/metrics", |r| r.text().contains("ultraep_queued_requests 0\n"));
    held.extend((0..8).map(|_| server.engine.submit(endless()).unwrap()));
    let response = server.complete(json!({ "prompt": "a" }));
    assert_eq!((response.status, response.header("retry-after")), (429, Some("1")), "{response:?}");
    assert_eq!(response.json()["error"]["code"], "rate_limit_exceeded");
    drop(held);
    idle(&server);
    assert_eq!(server.complete(json!({ "prompt": "a" })).status, 200);
}

#[test]
fn a_request_that_takes_too_long_is_cancelled() {
    let http = HttpConfig { request_timeout: Duration::from_millis(1), ..http_config() };
    let server = Server::start(engine_config(2, PolicyKind::Ultraep, 64), http);
    let response = server.complete(json!({ "prompt": "a", "max_tokens": 256 }));
    assert_eq!(response.status, 504, "{response:?}");
    idle(&server);
}

#[test]
fn a_request_that_waits_too_long_to_start_is_refused_and_the_others_go_on() {
    let config = EngineConfig { queue_timeout: Duration::from_millis(50), ..engine_config(2, PolicyKind::Ultraep, 64) };
    let server = Server::start(config, http_config());
    // KV for one of these on each of 2 ranks.
    let running: Vec<_> = (0..2).map(|_| server.engine.submit(endless()).unwrap()).collect();
    server.wait_for("/metrics", |r| r.text().contains("ultraep_running_requests 2\n"));
    for stream in [false, true] {
        let response = server.complete(json!({ "prompt": "late".repeat(100), "max_tokens": 1, "stream": stream }));
        assert_eq!((response.status, response.header("retry-after")), (429, Some("1")), "{response:?}");
        assert!(response.json()["error"]["message"].as_str().unwrap().contains("waited too long"), "{response:?}");
    }
    assert!(get(server.address, "/metrics").text().contains("ultraep_running_requests 2\n"));
    drop(running);
    idle(&server);
    assert_eq!(server.complete(json!({ "prompt": "now", "max_tokens": 1 })).status, 200);
}

#[test]
fn a_lost_rank_ends_its_requests_with_503_and_the_ranks_come_back() {
    let server = server();
    let ask = json!({ "prompt": "steady", "max_tokens": 8, "temperature": 0 });
    let before = server.complete(ask.clone()).json();
    for rank in [1, 0] {
        let waiting = server.engine.submit(endless()).unwrap();
        let address = server.address;
        let body = json!({ "prompt": "lost", "max_tokens": 256 }).to_string();
        let client = std::thread::spawn(move || common::post(address, "/v1/completions", &body));
        server.wait_for("/metrics", |r| r.text().contains("ultraep_running_requests 2\n"));
        server.engine.fail_rank(rank);
        let lost = client.join().unwrap();
        assert_eq!((lost.status, lost.header("retry-after")), (503, Some("1")), "{lost:?}");
        assert!(lost.json()["error"]["message"].as_str().unwrap().contains(&format!("rank {rank}")), "{lost:?}");
        let mut waiting = waiting;
        let last = std::iter::from_fn(|| waiting.next_blocking()).last();
        assert!(matches!(last, Some(Event::Lost(_))), "{last:?}");
        server.wait_for("/health", |r| r.status == 200);
        let after = server.complete(ask.clone()).json();
        assert_eq!(before["choices"], after["choices"]);
    }
    assert!(get(server.address, "/metrics").text().contains("ultraep_restarts_total 2\n"));
    idle(&server);
}

#[test]
fn health_is_red_while_the_ranks_are_down() {
    let server = server();
    let mut waiting = server.engine.submit(endless()).unwrap();
    server.engine.fail_rank(1);
    let lost = std::iter::from_fn(|| waiting.next_blocking()).last();
    assert!(matches!(&lost, Some(Event::Lost(_))), "{lost:?}");
    // The ranks rest before they start again, so this is seen; if the machine slept meanwhile they are up.
    match server.engine.health() {
        Health::Restarting { reason } => {
            assert!(reason.contains("rank 1"), "{reason}");
            let refused = server.engine.submit(endless()).err();
            assert!(refused.is_none_or(|e| matches!(e, SubmitError::Unavailable(_))));
        }
        health => assert_eq!(health, Health::Serving),
    }
    server.wait_for("/health", |r| r.status == 200);
}

#[test]
fn a_rank_that_hangs_makes_health_red_within_the_timeout_and_green_when_it_is_back() {
    for (ranks, rank) in [(1, 0), (2, 0), (2, 1)] {
        let mut config = engine_config(ranks, PolicyKind::Ultraep, 64);
        config.group.timeout = Duration::from_secs(2);
        let server = Server::start(config, http_config());
        let ask = json!({ "prompt": "steady", "max_tokens": 8, "temperature": 0 });
        let before = server.complete(ask.clone()).json();
        let hold = server.engine.hang_rank(rank);
        let red = server.wait_for("/health", |response| response.status == 503).json();
        let reason = red["reason"].as_str().unwrap();
        assert!(reason.contains("no sign of"), "{ranks} ranks, rank {rank}: {red}");
        let refused = server.complete(ask.clone());
        assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")), "{refused:?}");
        drop(hold);
        server.wait_for("/health", |response| response.status == 200);
        assert_eq!(server.complete(ask).json()["choices"], before["choices"]);
        // A single rank is missed by no other: when it is back nothing was lost.
        assert!(ranks > 1 || server.metric("ultraep_restarts_total") == 0.0);
    }
}

#[test]
fn a_shutdown_finishes_what_was_admitted() {
    let mut server = server();
    let mut stream = begin_stream(&server);
    // An idle connection does not keep it.
    let idle = connect(server.address);
    server.begin_stop();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert!(rest.contains("\"finish_reason\":\"length\""));
    server.join();
    assert!(TcpStream::connect(server.address).is_err());
    drop(idle);
    assert!(matches!(server.engine.submit(endless()), Err(SubmitError::Unavailable(_))));
    assert_eq!(server.engine.health(), Health::Stopped);
}

#[test]
fn slow_and_idle_clients_are_dropped_and_do_not_hurt_others() {
    let times = HttpConfig {
        head_timeout: Duration::from_millis(300),
        body_timeout: Duration::from_millis(300),
        ..http_config()
    };
    let server = Server::start(engine_config(2, PolicyKind::Ultraep, 64), times);
    let idle: Vec<_> = (0..100).map(|_| connect(server.address)).collect();
    let mut slow_head = connect(server.address);
    slow_head.write_all(b"POST /v1/completions HTTP/1.1\r\nHost").unwrap();
    let mut slow_body = connect(server.address);
    slow_body.write_all(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"pro").unwrap();
    assert_eq!(server.complete(json!({ "prompt": "a", "max_tokens": 2 })).status, 200);
    let mut answer = String::new();
    slow_body.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    for mut stream in idle.into_iter().chain([slow_head]) {
        // Closed, with or without a word.
        let _ = stream.read_to_end(&mut Vec::new());
    }
}

#[test]
fn a_load_test_counts_what_the_server_did() {
    use std::sync::Arc;
    use ultraep_serve::bench::Prompt;
    use ultraep_serve::loadtest::{LoadSpec, Target, run};

    let server = server();
    let pool = (1..5).map(|i| Prompt { domain: "test".into(), tokens: vec![b'a'; 40 * i] }).collect();
    let pool = Arc::new(pool);
    let spec = LoadSpec {
        requests_per_1000_s: 200_000,
        requests: 60,
        new_tokens: 1,
        ttft_limit_ms: 20_000,
        timeout_ms: 20_000,
        seed: 1,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let target = |address| Target::new(&format!("http://{address}"), None).unwrap();
    let result = runtime.block_on(run(&target(server.address), &pool, &spec, &|_| ()));
    assert_eq!((result.requests, result.finished + result.failed()), (60, 60), "{result:?}");
    // The queue has eight places: at this rate some may be refused, and nothing else goes wrong.
    assert!(result.errors.keys().all(|kind| kind == "429") && result.finished > 0, "{result:?}");
    assert_eq!(result.ttft.served, result.finished);
    assert!(result.goodput_rps > 0.0 && result.tokens_per_s > 0.0);
    let gone = server.address;
    drop(server);
    let result = runtime.block_on(run(&target(gone), &pool, &LoadSpec { requests: 3, ..spec }, &|_| ()));
    assert_eq!(result.errors["connection"].count, 3);
}
