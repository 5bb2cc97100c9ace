//! `POST /v1/completions`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Body as HttpBody, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, extract::State};
use http_body_util::{BodyExt, Limited};
use hyper::body::{Body as _, Frame};
use tokio::time::{Sleep, timeout};

use super::answer::{Answer, Choice, Decoder, Logprobs, Usage, reason_name};
use super::api::{Body, Completion};
use super::error::ApiError;
use super::{App, HttpConfig};
use crate::{Event, FinishReason, ScoredToken, Subscription};

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

pub(super) async fn complete(State(app): State<Arc<App>>, body: HttpBody) -> Result<Response, ApiError> {
    let result = start(&app, body).await;
    match result {
        Ok((completion, outputs)) => answer(&app, completion, outputs).await,
        Err(error) => {
            app.count_refused(&error);
            Err(error)
        }
    }
}

/// Reads and checks the request, and submits its prompts.
async fn start(app: &App, body: HttpBody) -> Result<(Completion, Vec<Output>), ApiError> {
    let bytes = read_body(body, &app.config).await?;
    let mut completion = Body::parse(&bytes)?.check(app.engine.model(), &app.config)?;
    let mut outputs = Vec::with_capacity(completion.generations.len());
    // When one is refused, dropping the others cancels them.
    for (index, generation) in std::mem::take(&mut completion.generations).into_iter().enumerate() {
        let prompt = generation.prompt.clone();
        outputs.push(Output::new(index, prompt, app.engine.submit(generation)?, &completion));
    }
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
            let mut whole = Choice { index: output.index, text: String::new(), logprobs: None, finish_reason: None };
            if completion.logprobs {
                whole.logprobs = Some(Logprobs::default());
            }
            while whole.finish_reason.is_none() {
                let event = output.subscription.next().await;
                output.check(event.as_ref())?;
                if let Some(event) = event {
                    let part = output.take(event, whole.logprobs.as_mut());
                    whole.text.push_str(&part.text);
                    whole.finish_reason = part.finished.map(reason_name);
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

/// One prompt under way.
struct Output {
    index: usize,
    prompt: Vec<u8>,
    subscription: Subscription,
    decoder: Decoder,
    new_tokens: usize,
    echoes: bool,
}

/// What an event adds to the answer.
#[derive(Default)]
struct Part {
    text: String,
    finished: Option<FinishReason>,
}

impl Output {
    fn new(index: usize, prompt: Vec<u8>, subscription: Subscription, completion: &Completion) -> Self {
        let (decoder, echoes) = (Decoder::default(), completion.echo);
        Self { index, prompt, subscription, decoder, new_tokens: 0, echoes }
    }

    /// Refuses to go on when the request was lost.
    fn check(&self, event: Option<&Event>) -> Result<(), ApiError> {
        match event {
            Some(Event::Lost(reason)) => Err(ApiError::unavailable(reason.clone())),
            Some(Event::Expired) => Err(ApiError::expired()),
            None => Err(ApiError::unavailable("the engine has stopped")),
            Some(_) => Ok(()),
        }
    }

    fn take(&mut self, event: Event, mut logprobs: Option<&mut Logprobs>) -> Part {
        let mut text = String::new();
        if std::mem::take(&mut self.echoes) && !matches!(event, Event::Prompt(_)) {
            text.push_str(&self.decoder.push(&self.prompt));
        }
        let mut add = |decoder: &mut Decoder, scored: &ScoredToken| {
            if let Some(logprobs) = logprobs.as_deref_mut() {
                logprobs.push(scored, decoder.offset());
            }
            text.push_str(&decoder.push(&[scored.token]));
        };
        let finished = match event {
            Event::Prompt(scored) => {
                scored.iter().for_each(|scored| add(&mut self.decoder, scored));
                None
            }
            Event::Token(scored) => {
                self.new_tokens += 1;
                add(&mut self.decoder, &scored);
                None
            }
            Event::Finished(reason) => {
                text.push_str(&self.decoder.finish());
                Some(reason)
            }
            Event::Lost(_) | Event::Expired => None,
        };
        Part { text, finished }
    }

    fn add_usage(&self, usage: &mut Usage) {
        usage.prompt_tokens += self.prompt.len();
        usage.completion_tokens += self.new_tokens;
        usage.total_tokens += self.prompt.len() + self.new_tokens;
    }
}

/// A streamed answer: server-sent events, one prompt after another.
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
        let mut logprobs = self.logprobs.then(Logprobs::default);
        let part = output.take(event, logprobs.as_mut());
        if part.text.is_empty() && part.finished.is_none() && logprobs.is_none() {
            return None;
        }
        let finish_reason = part.finished.map(reason_name);
        let choice = Choice { index: output.index, text: part.text, logprobs, finish_reason };
        let mut data = self.data(vec![choice], None);
        if part.finished.is_some() {
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
