//! What hostile and ordinary clients do. An act gives what came of it in a word, or what was wrong.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use serde_json::{Value, json};

use super::wire::{Answer, Ground, Noise};

type Outcome = Result<String, String>;

/// The status as the outcome, when it is one of `allowed`; 429 is the server's to say at any time. Errors are JSON.
fn expect(answer: &Answer, allowed: &[u16], what: &dyn std::fmt::Display) -> Outcome {
    let Answer { status, .. } = answer;
    if !allowed.contains(status) && *status != 429 {
        let text: String = String::from_utf8_lossy(&answer.body).chars().take(300).collect();
        return Err(format!("{what}: status {status}, allowed are {allowed:?}: {text}"));
    }
    if *status >= 400 && !answer.json()?["error"]["message"].is_string() {
        return Err(format!("{what}: status {status} without an error in JSON"));
    }
    Ok(status.to_string())
}

fn complete(ground: &Ground, body: &Value, allowed: &[u16]) -> Outcome {
    let text = body.to_string();
    let shown: String = text.chars().take(200).collect();
    expect(&ground.exchange(&ground.completion(&text))?, allowed, &shown)
}

fn prompt(noise: &mut Noise, tokens: usize) -> Value {
    (0..tokens).map(|_| noise.below(256)).collect()
}

/// A completion in one piece, and its counts.
pub(super) fn ordinary(ground: &Ground, noise: &mut Noise) -> Outcome {
    let (tokens, new) = (1 + noise.below(600), noise.below(9));
    let body = json!({ "prompt": prompt(noise, tokens), "max_tokens": new });
    let answer = ground.exchange(&ground.completion(&body.to_string()))?;
    if answer.status != 200 {
        return expect(&answer, &[200], &"an ordinary request");
    }
    let answer = answer.json()?;
    let usage = [&answer["usage"]["prompt_tokens"], &answer["usage"]["completion_tokens"]].map(Value::as_u64);
    let choices = answer["choices"].as_array().map_or(0, Vec::len);
    if usage == [Some(tokens as u64), Some(new as u64)] && choices == 1 {
        Ok("200".into())
    } else {
        Err(format!("{tokens} tokens and {new} new: usage {usage:?} and {choices} choices"))
    }
}

/// Two streams, one after another on one connection.
pub(super) fn streams(ground: &Ground, noise: &mut Noise) -> Outcome {
    let mut body = || {
        let tokens = 1 + noise.below(200);
        json!({ "prompt": prompt(noise, tokens), "max_tokens": 1 + noise.below(8), "stream": true }).to_string()
    };
    let json = "Content-Type: application/json\r\n";
    let mut bytes = ground.request("POST", "/v1/completions", json, &body());
    bytes.extend(ground.completion(&body()));
    let mut stream = ground.connect()?;
    stream.write_all(&bytes).map_err(|error| format!("two streams: {error}"))?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text).map_err(|error| format!("two streams: {error}"))?;
    let text = String::from_utf8_lossy(&text);
    match (text.matches("HTTP/1.1 200").count(), text.matches("data: [DONE]").count()) {
        (2, 2) => Ok("whole".into()),
        _ if text.contains("HTTP/1.1 429") => Ok("429".into()),
        (heads, ends) => Err(format!("of 2 streams {heads} began and {ends} came to their end")),
    }
}

/// What can be looked at.
pub(super) fn pages(ground: &Ground, noise: &mut Noise) -> Outcome {
    let path = noise.pick(&["/", "/openapi.json", "/v1/models", "/health", "/metrics"]);
    expect(&ground.exchange(&ground.request("GET", path, "Connection: close\r\n", ""))?, &[200], path)
}

/// Parameters within, at and beyond their limits, and of wrong types.
pub(super) fn parameters(ground: &Ground, noise: &mut Noise) -> Outcome {
    let mut body = json!({ "max_tokens": noise.below(4) });
    let most = ground.new_tokens_max as i64;
    let length = noise.below(40);
    body["prompt"] = match noise.below(8) {
        0 => json!(vec!["a"; noise.below(19)]),
        1 => (0..noise.below(18)).map(|_| prompt(noise, 3)).collect(),
        2 => json!([noise.between(-1, 257), 1.0]),
        3 => json!(noise.pick(&["", "text", "é€\u{10348}", "\0", "\u{fffd}"])),
        _ => prompt(noise, length),
    };
    for _ in 0..noise.below(5) {
        let (name, value) = match noise.below(16) {
            0 => ("max_tokens", json!(*noise.pick(&[-1, 0, 1, most - 1, most, most + 1, i64::MAX, i64::MIN]))),
            1 => ("temperature", json!(noise.between(-2, 22) as f64 * 0.1)),
            2 => ("top_p", json!(noise.between(-1, 11) as f64 * 0.1)),
            3 => ("seed", json!(*noise.pick(&[i64::MIN, -1, 0, 1, i64::MAX]))),
            4 => ("stop", json!(vec!["x".repeat(noise.below(70)); noise.below(6)])),
            5 => ("stream", json!(noise.one_in(2))),
            6 => ("stream_options", json!({ "include_usage": noise.one_in(2) })),
            7 => ("echo", json!(noise.one_in(2))),
            8 => ("logprobs", json!(noise.between(-1, 7))),
            9 => ("n", json!(noise.between(-1, 6))),
            10 => ("best_of", json!(noise.between(-1, 6))),
            11 => ("suffix", json!(*noise.pick(&["", "s"]))),
            12 => ("presence_penalty", json!(noise.between(-3, 3))),
            13 => ("logit_bias", json!({ "1": noise.between(-1, 1) })),
            14 => ("model", json!("another")),
            _ => (
                *noise.pick(&["prompt", "max_tokens", "temperature", "stop", "stream", "user"]),
                noise
                    .pick(&[json!(null), json!({}), json!([]), json!([[]]), json!("x"), json!(1e300), json!(true)])
                    .clone(),
            ),
        };
        body[name] = value;
    }
    let outcome = complete(ground, &body, &[200, 400, 404])?;
    Ok(outcome)
}

/// A prompt and its new tokens, together about as long as a sequence may be: 200 up to the limit, 400 beyond.
pub(super) fn around_the_context(ground: &Ground, noise: &mut Noise) -> Outcome {
    let most = ground.new_tokens_max;
    let tokens = ground.context - noise.below(most + 4) + noise.below(8);
    let new = *noise.pick(&[0, 1, most / 4, most - 1, most]);
    let body = json!({ "prompt": "c".repeat(tokens), "max_tokens": new, "stream": noise.one_in(2) });
    let allowed = if tokens + new <= ground.context { 200 } else { 400 };
    let answer = ground.exchange(&ground.completion(&body.to_string()))?;
    let outcome = expect(&answer, &[allowed], &format!("{tokens} tokens and {new} new of {}", ground.context))?;
    if answer.status == 400 && answer.json()?["error"]["code"] != "context_length_exceeded" {
        return Err(format!("{tokens} tokens and {new} new: 400 without the code context_length_exceeded"));
    }
    Ok(outcome)
}

/// The head of a completion without its end, with these lines in it.
fn head(ground: &Ground, lines: &str) -> String {
    let Ground { address, key, .. } = ground;
    format!(
        "POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\
         Content-Type: application/json\r\n{lines}"
    )
}

/// Bytes that are no HTTP, or too much of it: closed or told so.
pub(super) fn malformed(ground: &Ground, noise: &mut Noise) -> Outcome {
    let long = "a".repeat(1 << 18);
    let many: String = (0..5000).map(|i| format!("X-{i}: a\r\n")).collect();
    let with = |lines: &str, then: &str| format!("{}\r\n{then}", head(ground, lines)).into_bytes();
    let body = r#"{"prompt":"p"}"#;
    let get = |target: &str| format!("GET {target} HTTP/1.1\r\nHost: {}\r\n\r\n", ground.address).into_bytes();
    let bytes = match noise.below(20) {
        0 => with(&format!("X: {long}\r\n"), ""),
        1 => with(&many, ""),
        2 => with("X: a\r\n b\r\n", ""),
        3 => with(": a\r\n", ""),
        4 => get(&format!("/{long}")),
        5 => get("/\0"),
        6 => get("http://[::1"),
        7 => b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        8 => b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        9 => b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x00\x00\x00\x00".to_vec(),
        10 => with("Content-Length: 5\r\n", body),
        11 => with("Content-Length: 99999999999999999999999\r\n", body),
        12 => with("Content-Length: 18446744073709551615\r\n", body),
        13 => with("Content-Length: -5\r\n", body),
        14 => with("Content-Length: 5\r\nContent-Length: 29\r\n", body),
        15 => with("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "1\r\nx\r\n0\r\n\r\n"),
        16 => with("Transfer-Encoding: chunked\r\n", "zz\r\nhello\r\n0\r\n\r\n"),
        17 => with("Transfer-Encoding: chunked\r\n", "fffffffffffffffff\r\nhello\r\n0\r\n\r\n"),
        18 => with("Transfer-Encoding: gzip, foo\r\n", body),
        _ => (0..1 + noise.below(2000)).map(|_| noise.next() as u8).collect(),
    };
    let mut stream = ground.connect()?;
    // A server that has refused already may have closed.
    let _ = stream.write_all(&bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let Answer { status, .. } = Answer::read(&mut stream)?;
    let shown: String = String::from_utf8_lossy(&bytes).chars().take(300).collect();
    match status {
        0 => Ok("closed".into()),
        400..500 => Ok(status.to_string()),
        _ => Err(format!("status {status} to {shown:?}")),
    }
}

/// A request with a few bytes changed, cut off somewhere: anything but a 5xx.
pub(super) fn nearly_http(ground: &Ground, noise: &mut Noise) -> Outcome {
    let mut bytes = ground.completion(r#"{"prompt": "nearly", "max_tokens": 2}"#);
    for _ in 0..1 + noise.below(5) {
        let at = noise.below(bytes.len());
        bytes[at] = noise.next() as u8;
    }
    if noise.one_in(3) {
        bytes.truncate(noise.below(bytes.len()));
    }
    let mut stream = ground.connect()?;
    let _ = stream.write_all(&bytes);
    let _ = stream.shutdown(Shutdown::Write);
    match Answer::read(&mut stream)?.status {
        0 => Ok("closed".into()),
        status @ 200..500 => Ok(status.to_string()),
        status => Err(format!("status {status} to {:?}", String::from_utf8_lossy(&bytes))),
    }
}

/// JSON that is no object, and what is no JSON.
pub(super) fn no_request(ground: &Ground, noise: &mut Noise) -> Outcome {
    let deep = "[".repeat(50_000);
    let bodies = [
        "[]",
        "[1]",
        "[\"prompt\"]",
        "[null,\"p\",1]",
        "null",
        "1",
        "\"prompt\"",
        "true",
        "",
        "{",
        "{\"prompt\": \"p\"",
        "{\"prompt\": \"p\"} x",
        "prompt=p",
        "\u{feff}{}",
        &deep,
    ];
    let body = noise.pick(&bodies);
    let shown: String = body.chars().take(40).collect();
    expect(&ground.exchange(&ground.completion(body))?, &[400], &shown)
}

/// Bodies beyond any limit, said and unsaid. While more is on its way than is read, the answer may be lost.
pub(super) fn huge(ground: &Ground, noise: &mut Noise) -> Outcome {
    let long = "x".repeat(3 << 20);
    let (bytes, allowed): (Vec<u8>, &[u16]) = match noise.below(3) {
        0 => (format!("{}Content-Length: 1000000000\r\n\r\n{{", head(ground, "")).into_bytes(), &[413]),
        1 => (ground.completion(&json!({ "prompt": long }).to_string()), &[0, 413]),
        _ => {
            let chunks: String = (0..3).map(|_| format!("100000\r\n{}\r\n", &long[..1 << 20])).collect();
            (format!("{}Transfer-Encoding: chunked\r\n\r\n{chunks}", head(ground, "")).into_bytes(), &[0, 413])
        }
    };
    expect(&ground.exchange(&bytes)?, allowed, &"a huge body")
}

pub(super) fn wrong_type(ground: &Ground, noise: &mut Noise) -> Outcome {
    let kind = *noise.pick(&["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"]);
    let line = if kind.is_empty() { String::new() } else { format!("Content-Type: {kind}\r\n") };
    let lines = format!("{line}Connection: close\r\n");
    let bytes = ground.request("POST", "/v1/completions", &lines, r#"{"prompt": "p", "max_tokens": 1}"#);
    expect(&ground.exchange(&bytes)?, &[415], &kind)
}

pub(super) fn wrong_key(ground: &Ground, noise: &mut Noise) -> Outcome {
    let key = &ground.key;
    let shown = match noise.below(6) {
        0 => String::new(),
        1 => format!("Authorization: Bearer {key}x\r\n"),
        2 => format!("Authorization: Bearer {}\r\n", &key[1..]),
        3 => format!("Authorization: {key}\r\n"),
        4 => format!("Authorization: Basic {key}\r\n"),
        _ => "Authorization: Bearer \r\n".into(),
    };
    let (method, path) = *noise.pick(&[("GET", "/v1/models"), ("POST", "/v1/completions")]);
    let Ground { address, .. } = ground;
    let head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: 0\r\n");
    expect(&ground.exchange(format!("{head}{shown}\r\n").as_bytes())?, &[401], &shown)
}

pub(super) fn wrong_host(ground: &Ground, noise: &mut Noise) -> Outcome {
    let hosts = match noise.below(4) {
        0 => "Host: evil.example\r\n".into(),
        1 => format!("Host: {}\r\nHost: evil.example\r\n", ground.address),
        2 => format!("Host: {}.evil.example\r\n", ground.address.replace(':', ".")),
        _ => String::new(),
    };
    let path = noise.pick(&["/", "/health", "/metrics", "/v1/models"]);
    let key = &ground.key;
    let text = format!("GET {path} HTTP/1.1\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n{hosts}\r\n");
    expect(&ground.exchange(text.as_bytes())?, &[421], &hosts)
}

pub(super) fn wrong_place(ground: &Ground, noise: &mut Noise) -> Outcome {
    let (method, path, status) = *noise.pick(&[
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models", 405),
        ("BREW", "/", 405),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/v1/models/another", 404),
        ("GET", "/favicon.ico", 404),
    ]);
    let answer = ground.exchange(&ground.request(method, path, "Connection: close\r\n", ""))?;
    expect(&answer, &[status], &format!("{method} {path}"))
}

/// A head that comes byte by byte and never ends: closed or told so.
pub(super) fn slow_head(ground: &Ground, noise: &mut Noise) -> Outcome {
    let mut stream = ground.connect()?;
    for byte in b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: " {
        if stream.write_all(&[*byte]).is_err() {
            return Ok("closed".into());
        }
        ground.rest(noise.milliseconds(400));
    }
    if noise.one_in(2) {
        return Ok("gone".into());
    }
    match Answer::read(&mut stream)?.status {
        0 => Ok("closed".into()),
        408 => Ok("408".into()),
        status => Err(format!("status {status} to a head without an end")),
    }
}

/// A body that does not come.
pub(super) fn slow_body(ground: &Ground, noise: &mut Noise) -> Outcome {
    let mut stream = ground.connect()?;
    let text = format!("{}Content-Length: 100\r\n\r\n{{\"pro", head(ground, ""));
    stream.write_all(text.as_bytes()).map_err(|error| format!("a slow body: {error}"))?;
    if noise.one_in(2) {
        ground.rest(noise.milliseconds(10_000));
        return Ok("gone".into());
    }
    expect(&Answer::read(&mut stream)?, &[408], &"a body that does not come")
}

/// A stream that is more than the socket's buffers hold.
fn long_stream(ground: &Ground) -> Vec<u8> {
    let prompts: Vec<_> = (0..16).map(|i| format!("prompt {i}")).collect();
    let body = json!({ "prompt": prompts, "max_tokens": ground.new_tokens_max, "stream": true, "logprobs": 5 });
    ground.completion(&body.to_string())
}

/// Reads a long stream in sips; to its end, or not.
pub(super) fn slow_reader(ground: &Ground, noise: &mut Noise) -> Outcome {
    let mut stream = ground.connect()?;
    stream.write_all(&long_stream(ground)).map_err(|error| format!("a slow reader: {error}"))?;
    let mut some = [0; 512];
    for _ in 0..noise.below(20) {
        if !matches!(stream.read(&mut some), Ok(1..)) {
            return Ok("cut".into());
        }
        ground.rest(noise.milliseconds(500));
    }
    if noise.one_in(2) {
        return Ok("gone".into());
    }
    let mut text = Vec::new();
    match stream.read_to_end(&mut text) {
        Ok(_) if text.ends_with(b"data: [DONE]\n\n\r\n0\r\n\r\n") => Ok("whole".into()),
        _ => Ok("cut".into()),
    }
}

/// Asks for long streams and reads nothing.
pub(super) fn stopped_reader(ground: &Ground, noise: &mut Noise) -> Outcome {
    let mut stream = ground.connect()?;
    stream.write_all(&long_stream(ground)).map_err(|error| format!("a reader that stops: {error}"))?;
    ground.rest(Duration::from_secs(5) + noise.milliseconds(60_000));
    Ok("gone".into())
}

/// Goes away in the middle of a stream.
pub(super) fn gone_in_a_stream(ground: &Ground, noise: &mut Noise) -> Outcome {
    let mut stream = ground.connect()?;
    let body = json!({ "prompt": "gone", "max_tokens": ground.new_tokens_max, "stream": true }).to_string();
    stream.write_all(&ground.completion(&body)).map_err(|error| format!("gone in a stream: {error}"))?;
    let mut some = vec![0; 20 + noise.below(2000)];
    let _ = stream.read(&mut some);
    Ok("gone".into())
}

/// Goes away before there is an answer; sometimes while it still sends.
pub(super) fn gone_before(ground: &Ground, noise: &mut Noise) -> Outcome {
    let mut stream = ground.connect()?;
    let tokens = 1 + noise.below(2000);
    let body = json!({ "prompt": "g".repeat(tokens), "max_tokens": noise.below(9), "stream": noise.one_in(2) });
    let mut bytes = ground.completion(&body.to_string());
    if noise.one_in(3) {
        bytes.truncate(noise.below(bytes.len()));
    }
    let _ = stream.write_all(&bytes);
    ground.rest(noise.milliseconds(100));
    Ok("gone".into())
}

/// Connections that say nothing.
pub(super) fn idle(ground: &Ground, noise: &mut Noise) -> Outcome {
    let connections = (0..50).map(|_| ground.connect()).collect::<Result<Vec<_>, _>>()?;
    ground.rest(noise.milliseconds(3000));
    drop(connections);
    Ok("gone".into())
}

/// Connections that are there when the server is told to end: idle ones, a head without an end, a reader that stopped.
pub(super) fn held(ground: &Ground) -> Result<Vec<std::net::TcpStream>, String> {
    let mut held = (0..10).map(|_| ground.connect()).collect::<Result<Vec<_>, _>>()?;
    let half = head(ground, "").into_bytes();
    for (stream, bytes) in held.iter_mut().zip([half, long_stream(ground), ground.completion("{\"prompt\": \"end\"}")])
    {
        stream.write_all(&bytes).map_err(|error| format!("a connection at the end: {error}"))?;
    }
    Ok(held)
}
