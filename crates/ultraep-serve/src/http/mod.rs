//! The HTTP edge: routes, limits on connections, shutdown.
//!
//! ```text
//! access   an id for every request, a line for each in the log
//! guard    the host it names, its key, the type of its body
//! routes   completions, models, the page, health, metrics
//! ```

mod access;
mod answer;
mod api;
mod completions;
mod error;
mod fields;
mod guard;
mod page;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_io_timeout::TimeoutStream;
use ultraep_http::Hosts;

use crate::metrics::Format;
use crate::{EngineHandle, Health, Outcome};
use access::Ids;
use error::ApiError;

pub use access::AccessLog;
pub use guard::{ApiKey, ApiKeyError};

/// Limits of the HTTP edge.
#[derive(Clone, Debug)]
pub struct HttpConfig {
    /// A key that clients of `/v1` must show, if any.
    pub api_key: Option<ApiKey>,
    /// Names under which it may be asked, beside `localhost` and addresses.
    pub hosts: Hosts,
    /// Where a line for each request goes, if anywhere.
    pub access_log: Option<AccessLog>,
    /// Most bytes of a body.
    pub body_bytes_max: usize,
    /// Most tokens that a request may produce.
    pub new_tokens_max: u32,
    /// After this long a request is cancelled.
    pub request_timeout: Duration,
    /// After this long a body must have arrived.
    pub body_timeout: Duration,
    /// After this long a request's head must have arrived; idle connections are closed then too.
    pub head_timeout: Duration,
    /// A client that takes nothing of its answer for this long loses its connection, and what it asked for is cancelled.
    pub write_timeout: Duration,
    /// Most connections at a time; more wait to be accepted.
    pub connections_max: usize,
    /// How long a shutdown waits for what was admitted.
    pub drain_timeout: Duration,
}

impl HttpConfig {
    /// Limits for an engine whose context holds `context_tokens` tokens ([`EngineHandle::context_tokens`], which is what bounds
    /// a prompt).
    pub fn for_context(context_tokens: usize) -> Self {
        Self {
            api_key: None,
            hosts: Hosts::default(),
            access_log: None,
            // A token is at most four characters in a list, six as escaped text.
            body_bytes_max: context_tokens.saturating_mul(8).max(1 << 20),
            new_tokens_max: 256,
            request_timeout: Duration::from_secs(120),
            body_timeout: Duration::from_secs(30),
            head_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(30),
            connections_max: 4096,
            drain_timeout: Duration::from_secs(30),
        }
    }
}

/// What all handlers share.
struct App {
    engine: EngineHandle,
    config: HttpConfig,
    next_id: AtomicU64,
    ids: Ids,
}

impl App {
    fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    fn count_refused(&self, error: &ApiError) {
        let outcome = if error.is_rejection() { Outcome::Rejected } else { Outcome::Refused };
        self.engine.metrics().request(outcome);
    }
}

/// This server's description of itself.
const OPENAPI: &str = include_str!("openapi.json");

fn router(app: Arc<App>) -> Router {
    let api = Router::new()
        .route("/v1/completions", post(completions::complete).layer(from_fn_with_state(app.clone(), guard::check_type)))
        .route("/v1/models", get(models))
        .route("/v1/models/{model}", get(model))
        .layer(from_fn_with_state(app.clone(), guard::check_key));
    Router::new()
        .merge(api)
        .route("/", get(page::page))
        .route("/page.css", get(page::style))
        .route("/page.js", get(page::script))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi))
        .fallback(|request: Request| async move { ApiError::no_route(request.uri().path()) })
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(app.clone(), guard::check_host))
        .layer(from_fn_with_state(app.clone(), access::follow))
        .with_state(app)
}

async fn no_method(request: Request) -> ApiError {
    ApiError::no_method(format!("{} is not for {}", request.method(), request.uri().path()))
}

fn model_object(name: &str) -> serde_json::Value {
    json!({ "id": name, "object": "model", "created": 0, "owned_by": "ultraep" })
}

async fn models(State(app): State<Arc<App>>) -> Json<serde_json::Value> {
    Json(json!({ "object": "list", "data": [model_object(app.engine.model().name())] }))
}

async fn model(
    State(app): State<Arc<App>>,
    name: Result<axum::extract::Path<String>, axum::extract::rejection::PathRejection>,
) -> Result<Json<serde_json::Value>, ApiError> {
    let axum::extract::Path(name) = name.map_err(|error| ApiError::malformed(format!("the path: {error}")))?;
    let served = app.engine.model().name();
    if name == served { Ok(Json(model_object(served))) } else { Err(ApiError::no_model(&name, served)) }
}

/// Status, a word and the reason.
fn described(health: Health) -> (StatusCode, &'static str, Option<String>) {
    let down = StatusCode::SERVICE_UNAVAILABLE;
    match health {
        Health::Serving => (StatusCode::OK, "serving", None),
        Health::Stalled { reason } => (down, "stalled", Some(guard::presentable(&reason))),
        Health::Starting => (down, "starting", None),
        Health::Restarting { reason } => (down, "restarting", Some(guard::presentable(&reason))),
        Health::Draining => (down, "draining", None),
        Health::Stopped => (down, "stopped", None),
    }
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let (status, name, reason) = described(app.engine.health());
    (status, Json(json!({ "status": name, "reason": reason }))).into_response()
}

async fn metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    let accepts = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    let format = Format::asked_for(accepts);
    // Writing into a string does not fail.
    let text = app.engine.metrics().encode(format).unwrap_or_default();
    ([(header::CONTENT_TYPE, HeaderValue::from_static(format.media_type()))], text).into_response()
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], OPENAPI).into_response()
}

/// Serves `engine` at `listener` until `shutdown` comes true: then it takes no connection any more, finishes what was
/// admitted (for as long as the drain timeout says), and comes back.
pub async fn serve(
    listener: TcpListener,
    engine: EngineHandle,
    config: HttpConfig,
    shutdown: impl Future<Output = ()>,
) {
    let app = Arc::new(App {
        engine: engine.clone(),
        config: config.clone(),
        next_id: AtomicU64::new(0),
        ids: Ids::default(),
    });
    let router = router(app);
    let graceful = GracefulShutdown::new();
    let connections = Arc::new(Semaphore::new(config.connections_max));
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = tokio::select! {
            biased;
            () = &mut shutdown => break,
            accepted = accept(&listener, &connections) => accepted,
        };
        let (connection, permit) = accepted;
        connect(connection, permit, &router, &config, &graceful);
    }
    drop(listener);
    engine.drain();
    // Idle connections close at once, busy ones when their answer is out.
    if tokio::time::timeout(config.drain_timeout, graceful.shutdown()).await.is_err() {
        engine.abort();
    }
}

/// The next connection, when there is room for it.
async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> ((TcpStream, SocketAddr), Option<OwnedSemaphorePermit>) {
    // The semaphore is never closed; without a permit the connection would only go uncounted.
    let permit = connections.clone().acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok(connection) => return (connection, permit),
            // A client that went away at once, or no file descriptor left: others may be luckier.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

fn connect(
    (stream, client): (TcpStream, SocketAddr),
    permit: Option<OwnedSemaphorePermit>,
    router: &Router,
    config: &HttpConfig,
    graceful: &GracefulShutdown,
) {
    // Small answers must not wait for each other; a socket that refuses is served all the same.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(config.write_timeout));
    let service = TowerToHyperService::new(router.clone());
    let service = hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
        request.extensions_mut().insert(client);
        let call = hyper::service::Service::call(&service, request.map(axum::body::Body::new));
        async move { Ok::<_, Infallible>(call.await.unwrap_or_else(|never| match never {})) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(config.head_timeout)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(Box::pin(stream)), service);
    let connection = graceful.watch(connection);
    tokio::spawn(async move {
        // A client that breaks off is its own affair.
        let _ = connection.await;
        drop(permit);
    });
}

/// Binds `host`, an address or a name, and `port`; gives the listener and where it really is (port 0 takes a free one).
pub async fn bind(host: &str, port: u16) -> Result<(TcpListener, SocketAddr), crate::ServeError> {
    let io = || crate::ServeError::io(format!("listen at {host}, port {port}"));
    let listener = TcpListener::bind((host, port)).await.map_err(io())?;
    let address = listener.local_addr().map_err(io())?;
    Ok((listener, address))
}
