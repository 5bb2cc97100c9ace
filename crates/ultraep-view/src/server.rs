//! The HTTP side: pages, JSON, events; and what is refused.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::stream::{self, Stream};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use ultraep_http::{Hosts, page_headers};

use crate::assets;
use crate::entry::Entry;
use crate::settings::WhatIf;
use crate::{ANSWER_BYTES_MAX, ViewError, Viewer};

/// Requests that read or plan at a time.
const WORKERS: usize = 4;
/// Shortest time between two events of a live view.
const EVENT_PAUSE: Duration = Duration::from_millis(250);

#[derive(Clone)]
struct Shared {
    viewer: Arc<Viewer>,
    workers: Arc<Semaphore>,
    hosts: Hosts,
}

/// Answers on `listener` until `stop` is done. `host` is the name that the user gave for this machine, if it is one.
pub async fn serve(
    listener: std::net::TcpListener,
    viewer: Arc<Viewer>,
    host: &str,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let shared = Shared { viewer, workers: Arc::new(Semaphore::new(WORKERS)), hosts: Hosts::new([host]) };
    let app = Router::new()
        .route("/", get(|| asset(Path("index.html".to_owned()))))
        .route("/assets/{file}", get(asset))
        .route("/api/recordings", get(recordings))
        .route("/api/recordings/{index}/overview", get(overview))
        .route("/api/recordings/{index}/layers/{layer}", get(layer))
        .route("/api/recordings/{index}/microbatch", get(microbatch))
        .route("/api/recordings/{index}/split", get(split))
        .route("/api/recordings/{index}/events", get(events))
        .fallback(|| async { refusal(StatusCode::NOT_FOUND, "no such page") })
        .layer(middleware::from_fn_with_state(shared.clone(), guard))
        .with_state(shared);
    // A browser that still listens to events would hold a graceful end up.
    let server = axum::serve(TcpListener::from_std(listener)?, app);
    tokio::select! {
        result = async { server.await } => result,
        () = stop => Ok(()),
    }
}

/// Only reading, only under a host that is no foreign name, no path that climbs; and the headers of every answer.
async fn guard(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let mut response = if !matches!(*request.method(), Method::GET | Method::HEAD) {
        refusal(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered")
    } else if !shared.hosts.know(request.uri(), request.headers()) {
        refusal(StatusCode::MISDIRECTED_REQUEST, "asked for under a name that is not this machine's")
    } else if path.contains("..") || path.contains('\\') || path.to_ascii_lowercase().contains("%2e") {
        refusal(StatusCode::BAD_REQUEST, "a path with ..")
    } else {
        next.run(request).await
    };
    response.headers_mut().extend(page_headers());
    response
}

#[derive(Serialize)]
struct Refusal<'a> {
    error: &'a str,
}

fn refusal(status: StatusCode, error: &str) -> Response {
    (status, axum::Json(Refusal { error })).into_response()
}

impl IntoResponse for ViewError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NotFound { .. } => StatusCode::NOT_FOUND,
            error if error.is_input() => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        refusal(status, &self.to_string())
    }
}

async fn asset(Path(file): Path<String>) -> Response {
    match assets::find(&file) {
        Some(asset) => ([(header::CONTENT_TYPE, asset.media_type)], asset.text).into_response(),
        None => refusal(StatusCode::NOT_FOUND, "no such file"),
    }
}

type Query_ = Query<BTreeMap<String, String>>;

async fn recordings(State(shared): State<Shared>) -> Response {
    let viewer = shared.viewer.clone();
    shared.answer(move || Ok(crate::overview::recordings(viewer.entries()))).await
}

async fn overview(State(shared): State<Shared>, Path(index): Path<usize>) -> Response {
    let entry = shared.viewer.entry(index);
    shared.answer(move || Ok(entry?.overview())).await
}

async fn layer(State(shared): State<Shared>, Path((index, layer)): Path<(usize, u32)>) -> Response {
    let entry = shared.viewer.entry(index);
    shared.answer(move || entry?.layer(layer)).await
}

/// `step`, `microbatch`, `layer`; with any setting of what-if beside them the microbatch is planned anew.
async fn microbatch(State(shared): State<Shared>, Path(index): Path<usize>, Query(query): Query_) -> Response {
    let entry = shared.viewer.entry(index);
    let work = move || {
        let (entry, place) = (entry?, place(&query)?);
        entry.picture(place, asked(&entry, &query)?.as_ref())
    };
    shared.answer(work).await
}

/// As [`microbatch`], and `expert`: how the tokens of each source are shared over its instances.
async fn split(State(shared): State<Shared>, Path(index): Path<usize>, Query(query): Query_) -> Response {
    let entry = shared.viewer.entry(index);
    let work = move || {
        let (entry, place) = (entry?, place(&query)?);
        entry.split(place, number(&query, "expert")?, asked(&entry, &query)?.as_ref())
    };
    shared.answer(work).await
}

fn place(query: &BTreeMap<String, String>) -> Result<(u64, u32, u32), ViewError> {
    Ok((number(query, "step")?, number(query, "microbatch")?, number(query, "layer")?))
}

/// The settings of a query that has any.
fn asked(entry: &Entry, query: &BTreeMap<String, String>) -> Result<Option<WhatIf>, ViewError> {
    let is_setting = |key: &String| !["step", "microbatch", "layer", "expert"].contains(&key.as_str());
    query.keys().any(is_setting).then(|| entry.source.planned.with_query(query)).transpose()
}

fn number<T: std::str::FromStr>(query: &BTreeMap<String, String>, what: &'static str) -> Result<T, ViewError> {
    let got = query.get(what).map_or("", String::as_str);
    let refuse =
        |_| ViewError::Setting { what, got: got.chars().take(80).collect(), allowed: "numbers from 0".to_owned() };
    got.parse().map_err(refuse)
}

impl Shared {
    /// Works on a thread that may block, and answers with JSON of bounded size.
    async fn answer<T: Serialize>(&self, work: impl FnOnce() -> Result<T, ViewError> + Send + 'static) -> Response {
        let Ok(permit) = self.workers.clone().acquire_owned().await else {
            return refusal(StatusCode::SERVICE_UNAVAILABLE, "the server is ending");
        };
        let work = move || {
            let _permit = permit;
            work().map(|value| serde_json::to_vec(&value))
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(Ok(Ok(json))) if json.len() <= ANSWER_BYTES_MAX => {
                ([(header::CONTENT_TYPE, "application/json")], Body::from(json)).into_response()
            }
            Ok(Ok(Ok(json))) => {
                let error = format!("an answer of {} bytes: allowed are {ANSWER_BYTES_MAX}", json.len());
                refusal(StatusCode::INTERNAL_SERVER_ERROR, &error)
            }
            Ok(Err(error)) => error.into_response(),
            Ok(Ok(Err(error))) => refusal(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
            Err(error) => refusal(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }
}

/// An event for every change, at most four a second: its number, and whether more may come.
async fn events(State(shared): State<Shared>, Path(index): Path<usize>) -> Result<impl IntoResponse, ViewError> {
    let entry = shared.viewer.entry(index)?;
    Ok(Sse::new(changes(entry)).keep_alive(KeepAlive::default()))
}

#[derive(Serialize)]
struct Change {
    revision: u64,
    is_live: bool,
}

fn changes(entry: Arc<Entry>) -> impl Stream<Item = Result<Event, Infallible>> {
    let receiver = entry.changes();
    stream::unfold((entry, receiver, true), |(entry, mut receiver, is_first)| async move {
        if !is_first {
            tokio::time::sleep(EVENT_PAUSE).await;
            receiver.changed().await.ok()?;
        }
        receiver.mark_unchanged();
        let about = entry.about(&entry.state());
        let change = Change { revision: about.revision, is_live: about.is_live };
        let event = Event::default().json_data(change).ok()?;
        Some((Ok(event), (entry, receiver, false)))
    })
}
