//! HTTP by hand: what a hostile client needs and a library refuses to send.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest wait for an answer. The server ends a request that takes 120 s.
const ANSWER_MAX: Duration = Duration::from_secs(150);
/// How often a client that rests looks whether it is to end.
const REST: Duration = Duration::from_millis(50);

/// The server as clients see it, and when they are to end.
pub(super) struct Ground {
    /// `HOST:PORT`.
    pub(super) address: String,
    pub(super) key: String,
    /// The server's `--context` and `--max-tokens`.
    pub(super) context: usize,
    pub(super) new_tokens_max: usize,
    pub(super) stop: AtomicBool,
}

/// What came back. Status 0: the connection was closed without an answer.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// Random numbers of a seed: SplitMix64.
pub(super) struct Noise(pub(super) u64);

impl Noise {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// A number from `least` to `most`.
    pub(super) fn between(&mut self, least: i64, most: i64) -> i64 {
        least + self.below((most - least + 1) as usize) as i64
    }

    pub(super) fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    pub(super) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(super) fn milliseconds(&mut self, most: usize) -> Duration {
        Duration::from_millis(self.below(most + 1) as u64)
    }
}

impl Ground {
    /// Rests for `time`, or until all are to end.
    pub(super) fn rest(&self, time: Duration) {
        let until = Instant::now() + time;
        while !self.stop.load(Ordering::Relaxed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(REST));
        }
    }

    pub(super) fn connect(&self) -> Result<TcpStream, String> {
        let refuse = |error: std::io::Error| format!("connect: {error}");
        let stream = TcpStream::connect(&self.address).map_err(refuse)?;
        stream.set_read_timeout(Some(ANSWER_MAX)).map_err(refuse)?;
        stream.set_write_timeout(Some(ANSWER_MAX)).map_err(refuse)?;
        Ok(stream)
    }

    /// A request with the right Host and key, and these lines beside them in its head.
    pub(super) fn request(&self, method: &str, path: &str, lines: &str, body: &str) -> Vec<u8> {
        let (address, key, length) = (&self.address, &self.key, body.len());
        let head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {key}\r\n{lines}");
        format!("{head}Content-Length: {length}\r\n\r\n{body}").into_bytes()
    }

    /// A completion on a connection of its own.
    pub(super) fn completion(&self, body: &str) -> Vec<u8> {
        self.request("POST", "/v1/completions", "Content-Type: application/json\r\nConnection: close\r\n", body)
    }

    /// Sends bytes, and reads until the server closes. An error when it does neither answer nor close.
    pub(super) fn exchange(&self, bytes: &[u8]) -> Result<Answer, String> {
        let mut stream = self.connect()?;
        // A server that has refused already may have closed.
        let _ = stream.write_all(bytes);
        Answer::read(&mut stream)
    }
}

impl Answer {
    /// Reads until the server closes.
    pub(super) fn read(stream: &mut TcpStream) -> Result<Self, String> {
        let mut bytes = Vec::new();
        match stream.read_to_end(&mut bytes) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Err(format!("no end of the answer in {} s", ANSWER_MAX.as_secs()))
            }
            _ => Ok(Self::parse(&bytes)),
        }
    }

    fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|w| w == b"\r\n\r\n");
        let head = String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let raw = end.map_or(&[][..], |end| &bytes[end + 4..]);
        let is_chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        let body = if is_chunked { unchunk(raw) } else { raw.to_vec() };
        Self { status, body }
    }

    /// The body as JSON.
    pub(super) fn json(&self) -> Result<serde_json::Value, String> {
        serde_json::from_slice(&self.body)
            .map_err(|error| format!("status {} with a body that is no JSON: {error}", self.status))
    }
}

fn unchunk(mut raw: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = raw.windows(2).position(|w| w == b"\r\n") {
        let size = std::str::from_utf8(&raw[..end]).ok().and_then(|text| usize::from_str_radix(text, 16).ok());
        // The last chunk, or an answer that was cut.
        let Some(size) = size.filter(|&size| size > 0 && raw.len() >= end + 4 + size) else { break };
        body.extend_from_slice(&raw[end + 2..end + 2 + size]);
        raw = &raw[end + 4 + size..];
    }
    body
}
