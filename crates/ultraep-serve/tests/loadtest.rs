//! The load test against servers that answer in every way: what is counted as what, and over which time.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use ultraep_serve::bench::Prompt;
use ultraep_serve::loadtest::{LoadResult, LoadSpec, Target, run};

const DONE: &str = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: {\"choices\":[]}\n\ndata: [DONE]\n\n";

/// A server that gives the `i`-th connection an answer after a time.
fn server(answer: impl Fn(usize) -> (Duration, String) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    let serve = move |mut stream: TcpStream, (time, text): (Duration, String)| {
        // The head and the body of a request as small as these come together or nearly.
        let mut bytes = [0; 4096];
        let _ = stream.read(&mut bytes);
        std::thread::sleep(time);
        let _ = stream.write_all(text.as_bytes());
    };
    std::thread::spawn(move || {
        for (i, stream) in listener.incoming().enumerate() {
            let answer = answer.clone();
            std::thread::spawn(move || serve(stream.unwrap(), answer(i)));
        }
    });
    address
}

fn load(address: SocketAddr, requests: usize, timeout_ms: u64) -> LoadResult {
    let pool = Arc::new(vec![Prompt { domain: "test".into(), tokens: vec![b'a'; 10] }]);
    let spec =
        LoadSpec { requests_per_1000_s: 100_000, requests, new_tokens: 1, ttft_limit_ms: 60_000, timeout_ms, seed: 1 };
    let target = Target::new(&format!("http://{address}"), None).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(run(&target, &pool, &spec, &|_| ()))
}

/// A request that hangs until it is given up is in no figure of those that were answered.
#[test]
fn throughput_is_over_the_time_that_answers_took_and_failures_are_apart() {
    let hangs =
        server(|i| if i == 3 { (Duration::from_secs(3600), String::new()) } else { (Duration::ZERO, DONE.into()) });
    let result = load(hangs, 20, 5000);
    assert_eq!((result.requests, result.finished, result.failed()), (20, 19, 1), "{result:?}");
    let timeout = result.errors["timeout"];
    assert!(
        timeout.count == 1 && timeout.mean_ns >= 5_000_000_000 && timeout.longest_ns == timeout.mean_ns,
        "{result:?}"
    );
    assert!(result.elapsed_ns >= 5_000_000_000 && result.answered_ns < result.elapsed_ns, "{result:?}");
    let seconds = result.answered_ns as f64 * 1e-9;
    let close = |a: f64, b: f64| (a - b).abs() < 1e-6 * b;
    assert!(close(result.finished_rps, 19.0 / seconds) && close(result.tokens_per_s, 190.0 / seconds), "{result:?}");
    assert!(close(result.goodput_rps, 19.0 / seconds) && result.ttft.served == 19, "{result:?}");
    assert_eq!((result.planned_ns, result.rps), (200_000_000, 100.0));
    assert!(close(result.sent_rps, 20.0 / (result.sending_ns as f64 * 1e-9)) && result.sending_ns > 0, "{result:?}");
}

#[test]
fn failures_are_told_apart_by_kind() {
    let part = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: {\"choices\":[]}\n\n";
    let answers = [
        DONE.to_string(),
        "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n".into(),
        "HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n".into(),
        part.into(),
        format!("{part}data: {{\"error\":{{\"message\":\"lost\"}}}}\n\n"),
        String::new(),
    ];
    let result = load(server(move |i| (Duration::ZERO, answers[i % 6].clone())), 12, 60_000);
    assert_eq!((result.finished, result.failed()), (2, 10), "{result:?}");
    let counts: Vec<_> = result.errors.iter().map(|(kind, failed)| (kind.as_str(), failed.count)).collect();
    let each = ["429", "503", "broken answer", "connection", "error in the stream"].map(|kind| (kind, 2));
    assert_eq!(counts, each);
    assert_eq!((result.ttft.served, result.tokens_per_s > 0.0), (2, true));
    // No answer at all is no throughput, and no division by nothing.
    let none = load(server(|_| (Duration::ZERO, String::new())), 2, 60_000);
    assert_eq!((none.finished, none.tokens_per_s, none.finished_rps, none.answered_ns), (0, 0.0, 0.0, 0));
}
