//! An id for every request, and a line for each in the access log.
//!
//! ```text
//! 2026-11-24T15:00:00.123Z id=7f0c… client=127.0.0.1:50412 method=POST path=/v1/completions status=200 end=whole ms=12.3 prompt_tokens=17 new_tokens=32
//! ```
//!
//! A line is written when the answer is out, or when its client has gone: `end=cut` in the middle of the answer, and `status=-`
//! before it. Lines are written by a thread of their own; when the disk is slower than the requests lines are dropped, and
//! counted.

use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Body as _, Frame, SizeHint};
use ultraep_run::UtcTime;

use super::App;

/// The header that carries an id, of requests and of answers.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Most characters of an id that is taken over from a client, and of a path or method in the log.
const TEXT_MAX: usize = 128;
/// Lines that may wait for the disk.
const LINES_MAX: usize = 4096;

/// A log with a line for each request. Cheap to clone; clones are the same. When the last is dropped all lines are written.
#[derive(Clone, Debug)]
pub struct AccessLog(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    lines: Mutex<Option<SyncSender<String>>>,
    /// Lines that were not taken since the last one that was.
    dropped: Arc<AtomicU64>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl AccessLog {
    /// Writes lines to `to`, flushed whenever no more wait. `failed` hears of the first error; nothing is written after it.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn new(to: impl Write + Send + 'static, failed: impl FnOnce(io::Error) + Send + 'static) -> io::Result<Self> {
        let (sender, lines) = sync_channel(LINES_MAX);
        let dropped = Arc::new(AtomicU64::new(0));
        let seen = dropped.clone();
        let work = move || {
            if let Err(error) = write_lines(to, &lines, &seen) {
                failed(error);
            }
        };
        let writer = std::thread::Builder::new().name("access log".into()).spawn(work)?;
        Ok(Self(Arc::new(Inner { lines: Mutex::new(Some(sender)), dropped, writer: Mutex::new(Some(writer)) })))
    }

    fn write(&self, line: String) {
        let lines = self.0.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(TrySendError::Full(_))) = lines.as_ref().map(|lines| lines.try_send(line)) {
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        drop(self.lines.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(writer) = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A panic of the writer was reported by its thread.
            let _ = writer.join();
        }
    }
}

/// Writes until all senders are gone.
fn write_lines(mut to: impl Write, lines: &Receiver<String>, dropped: &AtomicU64) -> io::Result<()> {
    loop {
        let line = match lines.try_recv() {
            Ok(line) => line,
            Err(TryRecvError::Disconnected) => return to.flush(),
            Err(TryRecvError::Empty) => {
                to.flush()?;
                let Ok(line) = lines.recv() else { return Ok(()) };
                line
            }
        };
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            writeln!(to, "{} dropped={lost}", now())?;
        }
        to.write_all(line.as_bytes())?;
    }
}

/// Tokens of a request, counted by its handler.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    pub(super) prompt: AtomicU64,
    pub(super) new: AtomicU64,
}

/// What a line will say. Written when it is dropped.
struct Entry {
    log: Option<AccessLog>,
    id: String,
    client: Option<SocketAddr>,
    method: String,
    path: String,
    since: Instant,
    status: Option<StatusCode>,
    is_whole: bool,
    tokens: Arc<Tokens>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let Some(log) = self.log.take() else { return };
        let Self { id, method, path, .. } = self;
        let client = self.client.map_or_else(|| "-".into(), |client| client.to_string());
        let status = self.status.map_or_else(|| "-".into(), |status| status.as_u16().to_string());
        let end = if self.is_whole { "whole" } else { "cut" };
        let ms = self.since.elapsed().as_secs_f64() * 1e3;
        let [prompt, new] = [&self.tokens.prompt, &self.tokens.new].map(|n| n.load(Ordering::Relaxed));
        log.write(format!(
            "{} id={id} client={client} method={method} path={path} status={status} end={end} ms={ms:.1} \
             prompt_tokens={prompt} new_tokens={new}\n",
            now()
        ));
    }
}

/// Now in UTC, with milliseconds.
fn now() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = UtcTime::from_unix_s(now.as_secs()).to_string();
    format!("{}.{:03}Z", seconds.trim_end_matches('Z'), now.subsec_millis())
}

/// Ids of requests that bring none: the count of requests, hashed with keys of this process.
#[derive(Debug, Default)]
pub(super) struct Ids {
    keys: RandomState,
    next: AtomicU64,
}

impl Ids {
    /// The client's id when it is one that may stand in a header and in a log, or else a new one.
    fn of(&self, headers: &HeaderMap) -> String {
        let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(|id| is_sane(id));
        given.map_or_else(
            || format!("{:016x}", self.keys.hash_one(self.next.fetch_add(1, Ordering::Relaxed))),
            str::to_string,
        )
    }
}

fn is_sane(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(&byte);
    (1..=TEXT_MAX).contains(&id.len()) && id.bytes().all(allowed)
}

/// Gives a request its id, and writes its line when all is over.
pub(super) async fn follow(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let id = app.ids.of(request.headers());
    let tokens = Arc::new(Tokens::default());
    let short = |text: &str| text.chars().take(TEXT_MAX).collect();
    let mut entry = Entry {
        log: app.config.access_log.clone(),
        id: id.clone(),
        client: request.extensions().get::<SocketAddr>().copied(),
        method: short(request.method().as_str()),
        path: short(request.uri().path()),
        since: Instant::now(),
        status: None,
        is_whole: false,
        tokens: tokens.clone(),
    };
    request.extensions_mut().insert(tokens);
    let mut response = next.run(request).await;
    entry.status = Some(response.status());
    if let Ok(id) = HeaderValue::try_from(id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response.map(|inner| Body::new(Followed { inner, entry }))
}

/// A body that knows whether it was read to its end.
struct Followed {
    inner: Body,
    entry: Entry,
}

impl hyper::body::Body for Followed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(context);
        self.entry.is_whole |= matches!(polled, Poll::Ready(None)) || self.inner.is_end_stream();
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Followed {
    fn drop(&mut self) {
        // An empty body is not polled at all.
        self.entry.is_whole |= self.inner.is_end_stream();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_clients_are_taken_over_when_sane() {
        let ids = Ids::default();
        let of = |id: &'static [u8]| {
            let value = HeaderValue::from_bytes(id).unwrap();
            ids.of(&HeaderMap::from_iter([(REQUEST_ID, value)]))
        };
        assert_eq!(of(b"0f8c-11:a/b_c.d+e="), "0f8c-11:a/b_c.d+e=");
        let long = [b'a'; TEXT_MAX + 1];
        let others: Vec<String> = [&b""[..], b"a b", b"a\tb", b"\xff", b"<script>"]
            .into_iter()
            .map(of)
            .chain([ids.of(&HeaderMap::new())])
            .collect();
        assert!(others.iter().all(|id| id.len() == 16 && is_sane(id)), "{others:?}");
        assert!((1..others.len()).all(|i| !others[..i].contains(&others[i])));
        assert!(!is_sane(std::str::from_utf8(&long).unwrap()));
    }

    /// A writer whose bytes can be looked at.
    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn all_lines_are_there_when_the_log_is_closed_and_an_error_is_told_once() {
        let shared = Shared::default();
        let log = AccessLog::new(shared.clone(), |error| panic!("{error}")).unwrap();
        let clone = log.clone();
        (0..1000).for_each(|i| log.write(format!("{i}\n")));
        drop(log);
        clone.write("last\n".into());
        drop(clone);
        let text = String::from_utf8(shared.0.lock().unwrap().clone()).unwrap();
        assert_eq!((text.lines().count(), text.lines().last()), (1001, Some("last")));

        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::Error::other("no space left"))
            }

            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (tell, told) = std::sync::mpsc::channel();
        let log = AccessLog::new(Full, move |error| tell.send(error.to_string()).unwrap()).unwrap();
        (0..10).for_each(|i| log.write(format!("{i}\n")));
        drop(log);
        assert_eq!(told.iter().collect::<Vec<_>>(), ["no space left"]);
    }
}
