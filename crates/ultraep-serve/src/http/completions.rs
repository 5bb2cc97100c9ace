//! `POST /v1/completions`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Body as HttpBody, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, extract::State};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body as _, Frame};
use tokio::time::{Sleep, timeout};

use super::access::Tokens;
use super::answer::{Answer, Choice, Decoder, Logprobs, Usage, reason_name};
use super::api::Completion;
use super::error::ApiError;
use super::{App, HttpConfig};
use crate::{Event, ScoredToken, Subscription};

/// What all parts of an answer share.
#[derive(Clone)]
struct Envelope {
    id: String,
    created: u64,
    model: String,
}

impl Envelope {
    fn answer(&self, choices: Vec<Choice>, usage: Option<Usage>) -> Answer<'_> {
        let Self { id, created, model } = self;
        Answer { id, object: "text_completion", created: *created, model, choices, usage }
    }
}

pub(super) async fn complete(
    State(app): State<Arc<App>>,
    Extension(tokens): Extension<Arc<Tokens>>,
    body: HttpBody,
) -> Result<Response, ApiError> {
    let result = start(&app, &tokens, body).await;
    match result {
        Ok((completion, outputs)) => answer(&app, completion, outputs).await,
        Err(error) => {
            app.count_refused(&error);
            Err(error)
        }
    }
}

/// Reads and checks the request, and submits its prompts.
async fn start(app: &App, tokens: &Arc<Tokens>, body: HttpBody) -> Result<(Completion, Vec<Output>), ApiError> {
    let bytes = read_body(body, &app.config).await?;
    let mut completion = Completion::parse(&bytes, &app.engine, &app.config)?;
    let generations = std::mem::take(&mut completion.generations);
    let prompts: Vec<Vec<u8>> = generations.iter().map(|generation| generation.prompt.clone()).collect();
    let subscriptions = app.engine.submit_all(generations)?;
    let outputs = prompts.into_iter().zip(subscriptions).enumerate();
    let output =
        |(index, (prompt, subscription))| Output::new(index, prompt, subscription, &completion, tokens.clone());
    let outputs = outputs.map(output).collect();
    Ok((completion, outputs))
}

async fn read_body(body: HttpBody, config: &HttpConfig) -> Result<Bytes, ApiError> {
    let limit = config.body_bytes_max;
    // One that says that it is too large is not waited for.
    if body.size_hint().lower() > limit as u64 {
        return Err(ApiError::too_large(limit));
    }
    let collected = timeout(config.body_timeout, Limited::new(body, limit).collect()).await;
    match collected {
        Err(_) => Err(ApiError::slow_body()),
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => Err(ApiError::too_large(limit)),
        Ok(Err(error)) => Err(ApiError::malformed(format!("the body: {error}"))),
    }
}

async fn answer(app: &App, completion: Completion, mut outputs: Vec<Output>) -> Result<Response, ApiError> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let envelope = Envelope {
        id: format!("cmpl-{}", app.next_id()),
        created: since.as_secs(),
        model: app.engine.model().name().to_string(),
    };
    if completion.stream {
        // The first event decides the status: a rank lost before it is an error, not an empty stream.
        let first = timeout(app.config.request_timeout, outputs[0].subscription.next()).await;
        let first = first.map_err(|_| ApiError::timeout())?;
        outputs[0].check(first.as_ref())?;
        let stream = EventStream::new(envelope, completion, outputs, first, app.config.request_timeout);
        let mut response = HttpBody::new(stream).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        return Ok(response);
    }
    let whole = async {
        let (mut choices, mut usage) = (Vec::new(), Usage::default());
        for mut output in outputs {
            let mut whole = output.choice(completion.logprobs);
            while whole.finish_reason.is_none() {
                let event = output.subscription.next().await;
                output.check(event.as_ref())?;
                if let Some(event) = event {
                    output.take(event, &mut whole);
                }
            }
            output.add_usage(&mut usage);
            choices.push(whole);
        }
        Ok::<_, ApiError>((choices, usage))
    };
    let (choices, usage) = timeout(app.config.request_timeout, whole).await.map_err(|_| ApiError::timeout())??;
    Ok(Json(envelope.answer(choices, Some(usage))).into_response())
}

/// One choice under way.
struct Output {
    index: usize,
    prompt: Vec<u8>,
    subscription: Subscription,
    decoder: Decoder,
    new_tokens: usize,
    echoes: bool,
    /// Whether it is its prompt's first choice: the prompt's tokens count once.
    first: bool,
    /// Of the whole request, for the access log.
    tokens: Arc<Tokens>,
}

impl Output {
    fn new(
        index: usize,
        prompt: Vec<u8>,
        subscription: Subscription,
        completion: &Completion,
        tokens: Arc<Tokens>,
    ) -> Self {
        let (echoes, first) = (completion.echo, index.is_multiple_of(completion.n));
        if first {
            tokens.prompt.fetch_add(prompt.len() as u64, Ordering::Relaxed);
        }
        Self { index, prompt, subscription, decoder: Decoder::default(), new_tokens: 0, echoes, first, tokens }
    }

    /// An answer, or a part of one, with nothing in it yet.
    fn choice(&self, logprobs: bool) -> Choice {
        let logprobs = logprobs.then(Logprobs::default);
        Choice { index: self.index, text: String::new(), logprobs, finish_reason: None, seed: None }
    }

    /// Refuses to go on when the request was lost.
    fn check(&self, event: Option<&Event>) -> Result<(), ApiError> {
        match event {
            Some(Event::Lost(reason)) => Err(ApiError::unavailable(reason.clone())),
            Some(Event::Failed(reason)) => Err(ApiError::failed(reason)),
            Some(Event::Expired) => Err(ApiError::expired()),
            None => Err(ApiError::unavailable("the engine has stopped")),
            Some(_) => Ok(()),
        }
    }

    /// Adds what an event brings.
    fn take(&mut self, event: Event, to: &mut Choice) {
        if std::mem::take(&mut self.echoes) && !matches!(event, Event::Prompt(_)) {
            to.text.push_str(&self.decoder.extend(&self.prompt));
        }
        match event {
            Event::Prompt(scored) => scored.iter().for_each(|scored| self.add(scored, to)),
            Event::Token(scored) => {
                self.count(self.new_tokens + 1);
                self.add(&scored, to);
            }
            Event::Finished { reason, new_tokens } => {
                self.count(new_tokens as usize);
                to.text.push_str(&self.decoder.finish());
                to.finish_reason = Some(reason_name(reason));
                to.seed = self.subscription.seed().map(u64::cast_signed);
            }
            Event::Lost(_) | Event::Failed(_) | Event::Expired => {}
        }
    }

    /// There are `new_tokens` new tokens by now.
    fn count(&mut self, new_tokens: usize) {
        let more = new_tokens.saturating_sub(self.new_tokens);
        self.tokens.new.fetch_add(more as u64, Ordering::Relaxed);
        self.new_tokens = new_tokens;
    }

    fn add(&mut self, scored: &ScoredToken, to: &mut Choice) {
        let (text, offset) = self.decoder.push(scored.token);
        if let Some(logprobs) = &mut to.logprobs {
            logprobs.push(scored, offset);
        }
        to.text.push_str(&text);
    }

    fn add_usage(&self, usage: &mut Usage) {
        let prompt_tokens = if self.first { self.prompt.len() } else { 0 };
        usage.prompt_tokens += prompt_tokens;
        usage.completion_tokens += self.new_tokens;
        usage.total_tokens += prompt_tokens + self.new_tokens;
    }
}

/// A streamed answer: server-sent events, one choice after another.
struct EventStream {
    envelope: Envelope,
    logprobs: bool,
    usage: Option<Usage>,
    outputs: VecDeque<Output>,
    first: Option<Event>,
    deadline: Pin<Box<Sleep>>,
    done: bool,
}

impl EventStream {
    fn new(
        envelope: Envelope,
        completion: Completion,
        outputs: Vec<Output>,
        first: Option<Event>,
        limit: std::time::Duration,
    ) -> Self {
        let usage = completion.include_usage.then(Usage::default);
        let deadline = Box::pin(tokio::time::sleep(limit));
        Self { envelope, logprobs: completion.logprobs, usage, outputs: outputs.into(), first, deadline, done: false }
    }

    fn end(&mut self, last: &str) -> String {
        self.done = true;
        self.outputs.clear();
        last.to_string()
    }

    fn error(&mut self, error: &ApiError) -> String {
        let body = format!("data: {}\n\n", error.body());
        self.end(&body)
    }

    fn data(&self, choices: Vec<Choice>, usage: Option<Usage>) -> String {
        // Text and numbers always serialise.
        format!("data: {}\n\n", serde_json::to_string(&self.envelope.answer(choices, usage)).unwrap_or_default())
    }

    /// The next part, or none when an event adds nothing to see.
    fn event(&mut self, event: Event) -> Option<String> {
        let output = self.outputs.front_mut()?;
        let mut part = output.choice(self.logprobs);
        output.take(event, &mut part);
        let finished = part.finish_reason.is_some();
        let scored = part.logprobs.as_ref().is_some_and(|logprobs| !logprobs.is_empty());
        if part.text.is_empty() && !scored && !finished {
            return None;
        }
        let mut data = self.data(vec![part], None);
        if finished {
            if let (Some(usage), Some(output)) = (&mut self.usage, self.outputs.front()) {
                output.add_usage(usage);
            }
            self.outputs.pop_front();
            if self.outputs.is_empty() {
                if let Some(usage) = self.usage {
                    data.push_str(&self.data(Vec::new(), Some(usage)));
                }
                data.push_str(&self.end("data: [DONE]\n\n"));
            }
        }
        Some(data)
    }
}

impl hyper::body::Body for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = |data: String| Poll::Ready(Some(Ok(Frame::data(Bytes::from(data)))));
        loop {
            if self.done {
                return Poll::Ready(None);
            }
            if self.deadline.as_mut().poll(context).is_ready() {
                return frame(self.error(&ApiError::timeout()));
            }
            let event = match self.first.take() {
                Some(first) => Some(first),
                None => match self.outputs.front_mut() {
                    Some(output) => ready!(output.subscription.poll_next(context)),
                    None => None,
                },
            };
            let lost = self.outputs.front().map_or(Ok(()), |output| output.check(event.as_ref()));
            match (lost, event) {
                (Err(error), _) => return frame(self.error(&error)),
                (Ok(()), Some(event)) => {
                    if let Some(data) = self.event(event) {
                        return frame(data);
                    }
                }
                (Ok(()), None) => return frame(self.end("data: [DONE]\n\n")),
            }
        }
    }
}
