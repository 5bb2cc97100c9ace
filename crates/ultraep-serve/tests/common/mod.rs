//! A server over a small model on a port of its own, and a client that speaks HTTP/1.1 by hand, so that it can also speak
//! it wrongly.

#![allow(dead_code, reason = "every test binary uses its own part")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::oneshot;
use ultraep_baselines::{PolicyKind, PolicyParams};
use ultraep_model::{ModelConfig, RouterKind};
use ultraep_runtime::Link;
use ultraep_schedule::Limits;
use ultraep_serve::http::{HttpConfig, bind, serve};
use ultraep_serve::{Engine, EngineConfig, EngineHandle, GroupConfig, ServedModel};

/// Longest wait of any test for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Tokens that the context of [`model`] holds.
pub(crate) const CONTEXT: usize = 8192;

pub(crate) fn model() -> ServedModel {
    model_of(CONTEXT)
}

/// The same for sequences of up to so many tokens.
pub(crate) fn model_of(context_tokens: usize) -> ServedModel {
    let config = ModelConfig {
        hidden: 32,
        heads: 2,
        layers: 2,
        experts: 8,
        top_k: 2,
        intermediate: 16,
        sequence_tokens: 64,
        router: RouterKind::Softmax { aux_coefficient: 0.0 },
    };
    ServedModel::initial(config, 3, context_tokens).unwrap()
}

pub(crate) fn engine_config(ranks: usize, policy: PolicyKind, chunk_tokens: u32) -> EngineConfig {
    let limits = Limits {
        ranks,
        chunk_tokens,
        context_per_token: 0,
        kv_tokens_per_rank: 8192,
        sequences_per_rank: 4,
        queue_max: 8,
    };
    EngineConfig {
        group: GroupConfig {
            ranks,
            slots: 2,
            policies: if policy == PolicyKind::None { vec![policy] } else { vec![policy, PolicyKind::None] },
            params: PolicyParams { min_quota: 1, ..PolicyParams::default() },
            tokens_per_rank: limits.chunk_tokens_per_rank() as usize,
            link: Link::default(),
            checked: true,
            timeout: Duration::from_secs(10),
            cores: 2,
        },
        limits,
        queue_timeout: Duration::from_secs(60),
    }
}

pub(crate) fn http_config() -> HttpConfig {
    HttpConfig { body_bytes_max: 64 << 10, head_timeout: Duration::from_secs(5), ..HttpConfig::for_context(CONTEXT) }
}

/// A server of its own.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) engine: EngineHandle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(engine: EngineConfig, http: HttpConfig) -> Self {
        Self::serving(model(), engine, http)
    }

    pub(crate) fn serving(model: ServedModel, engine: EngineConfig, http: HttpConfig) -> Self {
        let engine = Engine::start(model, engine, None).unwrap_or_else(|error| panic!("{error}"));
        let handle = engine.handle();
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let (listener, address) = bind("127.0.0.1", 0).await.unwrap();
                tell.send(address).unwrap();
                let stop = async move { drop(stopped.await) };
                serve(listener, engine.handle(), http, stop).await;
            });
            engine.stop();
        });
        let server = Self { address: told.recv().unwrap(), engine: handle, stop: Some(stop), thread: Some(thread) };
        server.wait_for("/health", |response| response.status == 200);
        server
    }

    /// Asks until the answer is as it should be.
    pub(crate) fn wait_for(&self, path: &str, good: impl Fn(&Response) -> bool) -> Response {
        let since = Instant::now();
        loop {
            let response = get(self.address, path);
            if good(&response) {
                return response;
            }
            assert!(since.elapsed() < PATIENCE, "{path}: {response:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A number of the metrics; 0 where there is none yet.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = get(self.address, "/metrics").text();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.parse().unwrap())
    }

    pub(crate) fn complete(&self, body: Value) -> Response {
        post(self.address, "/v1/completions", &body.to_string())
    }

    /// Tells it to stop, without waiting for the end.
    pub(crate) fn begin_stop(&mut self) {
        self.stop.take().map(|stop| stop.send(()));
    }

    /// Waits for the end.
    pub(crate) fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.begin_stop();
        if !std::thread::panicking() {
            self.join();
        }
    }
}

#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.into_iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A request; what is posted is said to be JSON unless these headers say otherwise.
pub(crate) fn request(method: &str, path: &str, headers: &str, body: &str) -> String {
    let says = method != "POST" || headers.to_ascii_lowercase().contains("content-type:");
    let kind = if says { "" } else { "Content-Type: application/json\r\n" };
    format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n{kind}{headers}\r\n{body}",
        body.len()
    )
}

/// Sends bytes and reads until the server closes. None when it gave no well-formed answer.
pub(crate) fn exchange(address: SocketAddr, bytes: &[u8]) -> Option<Response> {
    let mut stream = connect(address);
    // A server that has refused already may have closed.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => panic!("the server hangs"),
        _ => {}
    }
    parse(&answer)
}

fn parse(answer: &[u8]) -> Option<Response> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let raw = &answer[end + 4..];
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunk(raw) } else { raw.to_vec() };
    Some(Response { status, head, body })
}

fn unchunk(mut raw: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = raw.windows(2).position(|w| w == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&raw[..end]).unwrap(), 16).unwrap();
        if size == 0 {
            break;
        }
        body.extend_from_slice(&raw[end + 2..end + 2 + size]);
        raw = &raw[end + 4 + size..];
    }
    body
}

pub(crate) fn get(address: SocketAddr, path: &str) -> Response {
    exchange(address, request("GET", path, "", "").as_bytes()).expect("an answer")
}

pub(crate) fn post(address: SocketAddr, path: &str, body: &str) -> Response {
    exchange(address, request("POST", path, "", body).as_bytes()).expect("an answer")
}
