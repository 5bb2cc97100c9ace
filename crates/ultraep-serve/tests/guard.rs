//! What the edge lets in and what it tells: hosts, keys, types, ids, the access log, the page, metrics, slow readers.

mod common;

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{PATIENCE, Response, Server, connect, engine_config, exchange, get, http_config, request};
use serde_json::json;
use ultraep_baselines::PolicyKind;
use ultraep_http::Hosts;
use ultraep_serve::http::{AccessLog, ApiKey, HttpConfig};
use ultraep_serve::{EngineConfig, Generation};

fn server(http: HttpConfig) -> Server {
    Server::start(engine_config(2, PolicyKind::Ultraep, 64), http)
}

fn raw(server: &Server, text: &str) -> Response {
    exchange(server.address, text.as_bytes()).expect("an answer")
}

/// An error as OpenAI's clients read it.
fn is_error(response: &Response, status: u16) -> bool {
    response.status == status
        && response.header("content-type") == Some("application/json")
        && response.json()["error"]["message"].is_string()
}

#[test]
fn foreign_hosts_are_refused_everywhere_and_told_names_are_not() {
    let server = server(HttpConfig { hosts: Hosts::new(["balancer.example"]), ..http_config() });
    for path in ["/", "/health", "/metrics", "/openapi.json", "/v1/models", "/nothing"] {
        for hosts in ["Host: evil.example\r\n", "", "Host: localhost\r\nHost: evil.example\r\n"] {
            let response = raw(&server, &format!("GET {path} HTTP/1.1\r\n{hosts}Connection: close\r\n\r\n"));
            assert!(is_error(&response, 421), "{path} {hosts}: {response:?}");
        }
        let absolute =
            format!("GET http://evil.example{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        assert!(is_error(&raw(&server, &absolute), 421), "{path}");
        let told =
            raw(&server, &format!("GET {path} HTTP/1.1\r\nHost: Balancer.example:80\r\nConnection: close\r\n\r\n"));
        assert_ne!(told.status, 421, "{path}");
    }
}

#[test]
fn only_json_is_taken() {
    let server = server(http_config());
    let body = json!({ "prompt": "a", "max_tokens": 1 }).to_string();
    let with =
        |kind: &str| raw(&server, &request("POST", "/v1/completions", &format!("Content-Type: {kind}\r\n"), &body));
    for kind in ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"] {
        assert!(is_error(&with(kind), 415), "{kind}");
    }
    assert_eq!(with("application/json; charset=utf-8").status, 200);
    let none = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    assert!(is_error(&raw(&server, &none), 415));
}

#[test]
fn the_key_is_read_in_any_case_and_needed_under_v1_alone() {
    let server = server(HttpConfig { api_key: Some(ApiKey::new("secret").unwrap()), ..http_config() });
    let with = |path: &str, header: &str| raw(&server, &request("GET", path, header, ""));
    for good in ["Bearer secret", "bearer secret", "BEARER  secret"] {
        assert_eq!(with("/v1/models", &format!("Authorization: {good}\r\n")).status, 200, "{good}");
    }
    for bad in ["", "Authorization: Bearer\r\n", "Authorization: Bearer SECRET\r\n", "Authorization: Basic secret\r\n"]
    {
        assert!(is_error(&with("/v1/models", bad), 401), "{bad}");
        assert!(is_error(&with("/v1/models/x", bad), 401), "{bad}");
    }
    for open in ["/", "/health", "/metrics", "/openapi.json"] {
        assert_eq!(with(open, "").status, 200, "{open}");
    }
}

/// A log whose text can be looked at.
#[derive(Clone, Default)]
struct Text(Arc<Mutex<Vec<u8>>>);

impl Write for Text {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Text {
    /// The line of a request, once it is there.
    fn line(&self, id: &str) -> String {
        let since = Instant::now();
        loop {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            if let Some(line) = text.lines().find(|line| line.contains(&format!(" id={id} "))) {
                return line.to_string();
            }
            assert!(since.elapsed() < PATIENCE, "no line of {id}: {text}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn every_answer_has_an_id_and_a_line_in_the_log() {
    let text = Text::default();
    let log = AccessLog::new(text.clone(), |error| panic!("{error}")).unwrap();
    let server = server(HttpConfig { access_log: Some(log), ..http_config() });
    let body = json!({ "prompt": "seven b", "max_tokens": 3, "stream": true }).to_string();
    let asked = raw(&server, &request("POST", "/v1/completions?secret=1", "X-Request-Id: mine-1\r\n", &body));
    assert_eq!((asked.status, asked.header("x-request-id")), (200, Some("mine-1")));
    let line = text.line("mine-1");
    for part in [
        " client=127.0.0.1:",
        " method=POST path=/v1/completions status=200 end=whole ms=",
        " prompt_tokens=7 new_tokens=3",
    ] {
        assert!(line.contains(part), "{line}");
    }
    assert!(!line.contains("secret") && line.as_bytes()[..24].ends_with(b"Z"), "{line}");
    // Refusals of every layer have one, and one that is not sane is not taken over.
    let mut ids = Vec::new();
    for (method, path, headers, status) in [
        ("GET", "/nothing", "X-Request-Id: a b\r\n", 404),
        ("GET", "/v1/completions", "", 405),
        ("POST", "/v1/completions", "Content-Type: text/plain\r\n", 415),
        ("POST", "/v1/completions", "", 400),
    ] {
        let response = raw(&server, &request(method, path, headers, "x"));
        let id = response.header("x-request-id").unwrap().to_string();
        assert!(response.status == status && id.len() == 16, "{response:?}");
        assert!(text.line(&id).contains(&format!(" status={status} end=whole ")), "{}", text.line(&id));
        ids.push(id);
    }
    let foreign = raw(&server, "GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n");
    assert!(text.line(foreign.header("x-request-id").unwrap()).contains(" status=421 "));
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 4);
}

#[test]
fn a_client_that_goes_is_logged_as_gone() {
    let text = Text::default();
    let log = AccessLog::new(text.clone(), |error| panic!("{error}")).unwrap();
    let server = server(HttpConfig { access_log: Some(log), ..http_config() });
    let busy: Vec<_> = (0..2).map(|_| server.engine.submit(endless()).unwrap()).collect();
    server.wait_for("/metrics", |r| r.text().contains("ultraep_running_requests 2\n"));
    let mut stream = connect(server.address);
    let body = json!({ "prompt": "g", "max_tokens": 200 }).to_string();
    stream.write_all(request("POST", "/v1/completions", "X-Request-Id: gone\r\n", &body).as_bytes()).unwrap();
    server.wait_for("/metrics", |r| r.text().contains("ultraep_queued_requests 1\n"));
    drop(stream);
    assert!(text.line("gone").contains(" status=- end=cut "), "{}", text.line("gone"));
    drop(busy);
}

/// Runs for seconds if nobody stops it.
fn endless() -> Generation {
    Generation { prompt: b"endless".to_vec(), new_tokens: 8000, ..Generation::default() }
}

/// The sum of all answers is more than sockets hold: the server cannot write on, and must not wait for ever.
#[test]
fn a_reader_that_stops_loses_its_connection() {
    let text = Text::default();
    let log = AccessLog::new(text.clone(), |error| panic!("{error}")).unwrap();
    let http = HttpConfig { write_timeout: Duration::from_millis(300), access_log: Some(log), ..http_config() };
    let server = server(http);
    let mut stream = connect(server.address);
    // 256 descriptions of megabytes together, on one connection, read by nobody.
    let one = "GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: stopped\r\n\r\n";
    let _ = stream.write_all(one.repeat(4000).as_bytes());
    let since = Instant::now();
    loop {
        let lines = String::from_utf8(text.0.lock().unwrap().clone()).unwrap();
        if lines.contains("id=stopped") && lines.lines().any(|line| line.contains("end=cut")) {
            break;
        }
        // Closed: what is left of the requests cannot be sent any more.
        if stream.write_all(b"x").is_err() {
            break;
        }
        assert!(since.elapsed() < PATIENCE, "the connection is still there");
        std::thread::sleep(Duration::from_millis(20));
    }
    // What was in the sockets comes, and then the end.
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() < 4000 * get(server.address, "/openapi.json").body.len());
    assert_eq!(server.complete(json!({ "prompt": "a", "max_tokens": 1 })).status, 200);
}

#[test]
fn the_page_says_what_this_is_and_loads_nothing_from_elsewhere() {
    let http = HttpConfig { api_key: Some(ApiKey::new("secret").unwrap()), ..http_config() };
    let server = server(http);
    let page = get(server.address, "/");
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(page.header("content-security-policy").unwrap().contains("default-src 'none'"));
    let text = page.text();
    let model = server.engine.model().name();
    for part in [
        model,
        "up to 8192 tokens",
        "up to 256 a request",
        "data-status=\"serving\"",
        "curl http://localhost/v1/completions",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    for endpoint in ["/v1/completions", "/v1/models", "/health", "/metrics", "/openapi.json"] {
        assert!(text.contains(endpoint), "{endpoint}");
    }
    assert!(!text.contains("secret") && text.matches("://").count() == 1, "{text}");
    for (path, kind) in [("/page.js", "text/javascript; charset=utf-8"), ("/page.css", "text/css; charset=utf-8")] {
        let response = get(server.address, path);
        assert_eq!((response.status, response.header("content-type")), (200, Some(kind)));
        assert!(text.contains(&format!("\"{path}\"")) && !response.text().contains("://"), "{path}");
    }
    // A Host is part of the page, and of nothing but the page's text.
    let hostile = raw(&server, "GET / HTTP/1.1\r\nHost: [::1]:80\r\nConnection: close\r\n\r\n").text();
    assert!(hostile.contains("curl http://[::1]:80/v1/completions"), "{hostile}");
}

#[test]
fn metrics_are_negotiated_and_all_there_from_the_start() {
    let server = server(http_config());
    let with = |accept: &str| raw(&server, &request("GET", "/metrics", &format!("Accept: {accept}\r\n"), ""));
    let plain = get(server.address, "/metrics");
    assert_eq!(plain.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    for outcome in ["Finished", "Cancelled", "Lost", "Failed", "Rejected"] {
        assert!(plain.text().contains(&format!("ultraep_requests_total{{outcome=\"{outcome}\"}} 0\n")), "{outcome}");
    }
    assert!(plain.text().contains("ultraep_tokens_total{kind=\"New\"} 0\n"));
    let open = with("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1");
    assert_eq!(open.header("content-type"), Some("application/openmetrics-text; version=1.0.0; charset=utf-8"));
    assert!(open.text().ends_with("# EOF\n") && !plain.text().contains("# EOF"));
    assert_eq!(with("text/html").header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
}

/// With `RUST_BACKTRACE` an error of the tensor library has a backtrace in its text.
#[test]
fn clients_get_neither_backtraces_nor_paths() {
    let config = EngineConfig { ..engine_config(2, PolicyKind::Ultraep, 64) };
    let server = Server::start(config, http_config());
    let address = server.address;
    let client = std::thread::spawn(move || {
        common::post(address, "/v1/completions", &json!({ "prompt": "lost", "max_tokens": 256 }).to_string())
    });
    server.wait_for("/metrics", |r| r.text().contains("ultraep_running_requests 1\n"));
    server.engine.fail_rank(1);
    let lost = client.join().unwrap();
    let message = lost.json()["error"]["message"].as_str().unwrap().to_string();
    assert!(is_error(&lost, 503) && message.contains("rank 1"), "{lost:?}");
    assert!(!message.contains('\n') && !message.contains('/') && !message.contains(".rs"), "{message}");
}

#[test]
fn a_name_can_be_listened_at_and_a_wrong_one_is_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (_, address) = runtime.block_on(ultraep_serve::http::bind("localhost", 0)).unwrap();
    assert!(address.ip().is_loopback() && address.port() != 0);
    let error = runtime.block_on(ultraep_serve::http::bind("no such host", 0)).unwrap_err().to_string();
    assert!(error.contains("no such host"), "{error}");
}
