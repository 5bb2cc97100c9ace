//! Malformed HTTP and JSON: told what is wrong, never a 5xx, never a hang, and no harm to others.

mod common;

use std::io::Write;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use common::{Server, connect, engine_config, exchange, http_config, request};
use proptest::prelude::*;
use serde_json::json;
use ultraep_baselines::PolicyKind;
use ultraep_serve::http::HttpConfig;

/// A server that waits this long for a head and for a body.
fn server(wait: Duration) -> Server {
    let times = HttpConfig { head_timeout: wait, body_timeout: wait, ..http_config() };
    Server::start(engine_config(2, PolicyKind::Ultraep, 64), times)
}

const BODY: &str = r#"{"prompt":"p","max_tokens":1}"#;

/// A request with these lines in its head, and then this.
fn with(lines: &str, then: &str) -> Vec<u8> {
    format!(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n\
         {lines}\r\n{then}"
    )
    .into_bytes()
}

/// What is wrong, the bytes, and the statuses that say so; 0 for a connection that is closed without a word, or while more is on
/// its way than the server reads, where the answer may be lost.
fn malformed() -> Vec<(&'static str, Vec<u8>, &'static [u16])> {
    let long = "a".repeat(1 << 18);
    let many: String = (0..5000).map(|i| format!("X-{i}: a\r\n")).collect();
    let sized = |length: &str| with(&format!("Content-Length: {length}\r\n"), BODY);
    let chunked = |body: &str| with("Transfer-Encoding: chunked\r\n", body);
    let get =
        |target: &str| format!("GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").into_bytes();
    vec![
        ("a header of 256 KiB", with(&format!("X: {long}\r\n"), ""), &[0, 431]),
        ("5000 headers", with(&many, ""), &[0, 431]),
        ("a folded header", with("X: a\r\n b\r\n", ""), &[400]),
        ("a header without a name", with(": a\r\n", ""), &[400]),
        ("a path of 256 KiB", get(&format!("/{long}")), &[0, 414, 431]),
        ("a path with a zero", get("/\0"), &[400]),
        ("a model that is no UTF-8", get("/v1/models/%ff"), &[400]),
        ("half an address", get("http://[::1"), &[400]),
        ("a method of nobody", b"BREW / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".to_vec(), &[405]),
        ("HTTP/9.9", b"GET / HTTP/9.9\r\n\r\n".to_vec(), &[400]),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), &[0, 400]),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00\x00\x00".to_vec(), &[400]),
        ("a length too small", sized("5"), &[400]),
        ("a length too large for any number", sized("99999999999999999999999"), &[400]),
        ("the largest length", sized("18446744073709551615"), &[413, 431]),
        ("a length below zero", sized("-5"), &[400]),
        ("a length in words", sized("many"), &[400]),
        ("two lengths", with("Content-Length: 5\r\nContent-Length: 29\r\n", BODY), &[400]),
        ("a length above the limit", sized("100000000"), &[413]),
        (
            "length and chunks",
            with("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "1\r\nx\r\n0\r\n\r\n"),
            &[400],
        ),
        ("a chunk of no size", chunked("zz\r\nhello\r\n0\r\n\r\n"), &[400]),
        ("a chunk larger than any number", chunked("fffffffffffffffff\r\nhello\r\n0\r\n\r\n"), &[400]),
        ("a chunk larger than the limit", chunked(&format!("40000\r\n{long}\r\n0\r\n\r\n")), &[0, 413]),
        ("a chunk with a long remark", chunked(&format!("1d;{long}\r\n{BODY}\r\n0\r\n\r\n")), &[0, 400]),
        ("an encoding of nobody", with("Transfer-Encoding: gzip, foo\r\n", BODY), &[400]),
        ("JSON of 50000 levels", with("Content-Length: 50000\r\n", &"[".repeat(50_000)), &[400]),
        ("a body that never ends", with("Content-Length: 100\r\n", BODY), &[408]),
        ("a head that never ends", b"POST /v1/completions HTTP/1.1\r\nHost".to_vec(), &[0, 408]),
        ("nothing", Vec::new(), &[0, 408]),
    ]
}

#[test]
fn malformed_http_is_refused_in_time() {
    let wait = Duration::from_millis(300);
    let server = server(wait);
    for (what, bytes, statuses) in malformed() {
        let since = Instant::now();
        // It panics when the server neither answers nor closes.
        let status = exchange(server.address, &bytes).map_or(0, |response| response.status);
        assert!(statuses.contains(&status), "{what}: {status} after {:?}", since.elapsed());
    }
    // What is nearly right is answered.
    for lines in ["Expect: 100-continue\r\n", "Expect: nonsense\r\n", "Content-Encoding: gzip\r\n"] {
        let bytes = with(&format!("{lines}Content-Length: {}\r\n", BODY.len()), BODY);
        assert!(exchange(server.address, &bytes).is_some_and(|r| r.status == 200 || r.status == 100), "{lines}");
    }
    assert_eq!(server.complete(json!({ "prompt": "a" })).status, 200);
}

/// JSON that is nearly a request.
fn nearly() -> impl Strategy<Value = String> {
    let names =
        ["prompt", "max_tokens", "temperature", "top_p", "stop", "stream", "logprobs", "echo", "seed", "n", "x"];
    let value = prop_oneof![
        Just("null".to_string()),
        any::<bool>().prop_map(|b| b.to_string()),
        any::<i64>().prop_map(|n| n.to_string()),
        (-2..9i64).prop_map(|n| n.to_string()),
        any::<f64>().prop_map(|n| json!(n).to_string()),
        ".{0,12}".prop_map(|s| json!(s).to_string()),
        proptest::collection::vec(-1..258i64, 0..5).prop_map(|v| json!(v).to_string()),
        proptest::collection::vec(".{0,4}", 0..3).prop_map(|v| json!(v).to_string()),
        Just("[[1],[2,3]]".to_string()),
        Just("{\"include_usage\":1}".to_string()),
        Just("[".repeat(300)),
    ];
    let field =
        (proptest::sample::select(names.to_vec()), value).prop_map(|(name, value)| format!("\"{name}\":{value}"));
    let cut = proptest::option::weighted(0.2, 0..60usize);
    (proptest::collection::vec(field, 0..6), cut).prop_map(|(fields, cut)| {
        let mut text = format!("{{\"prompt\":\"p\",\"max_tokens\":2,{}}}", fields.join(","));
        if let Some(cut) = cut {
            text = text.chars().take(cut).collect();
        }
        text
    })
}

/// Bytes that are nearly HTTP.
fn nearly_http() -> impl Strategy<Value = Vec<u8>> {
    let valid =
        request("POST", "/v1/completions", "Content-Type: application/json\r\n", "{\"prompt\":\"p\"}").into_bytes();
    let edit = (0..valid.len(), any::<u8>());
    let edits = proptest::collection::vec(edit, 1..6);
    let cut = proptest::option::weighted(0.3, 0..valid.len());
    (edits, cut, proptest::collection::vec(any::<u8>(), 0..40)).prop_map(move |(edits, cut, noise)| {
        let mut bytes = valid.clone();
        edits.into_iter().for_each(|(at, byte)| bytes[at] = byte);
        bytes.truncate(cut.unwrap_or(bytes.len()));
        bytes.extend(noise);
        bytes
    })
}

#[test]
fn nonsense_never_gives_a_5xx_or_a_hang() {
    let server = server(Duration::from_millis(200));
    let address = server.address;
    let runner = || proptest::test_runner::TestRunner::new(ProptestConfig { cases: 96, ..ProptestConfig::default() });
    let bodies = runner().run(&nearly(), |body| {
        let response = common::post(address, "/v1/completions", &body);
        prop_assert!((200..500).contains(&response.status), "{body}: {response:?}");
        prop_assert!(response.status == 200 || response.json()["error"]["message"].is_string());
        Ok(())
    });
    bodies.unwrap_or_else(|error| panic!("{error}"));
    let bytes = runner().run(&nearly_http(), |bytes| {
        let mut stream = connect(address);
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        drop(stream);
        if let Some(response) = exchange(address, &bytes) {
            prop_assert!(response.status < 500, "{:?}: {response:?}", String::from_utf8_lossy(&bytes));
        }
        Ok(())
    });
    bytes.unwrap_or_else(|error| panic!("{error}"));
    // Bytes of nothing, after a head that began well or not.
    let noise = runner().run(&(0..60usize, proptest::collection::vec(any::<u8>(), 0..2000)), |(start, noise)| {
        let bytes = [&with("", "")[..start], &noise].concat();
        let status = exchange(address, &bytes).map_or(0, |response| response.status);
        prop_assert!(status < 500, "{:?}: {status}", String::from_utf8_lossy(&bytes));
        Ok(())
    });
    noise.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(server.complete(json!({ "prompt": "a" })).status, 200);
}
