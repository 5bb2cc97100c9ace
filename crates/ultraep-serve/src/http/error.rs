//! Errors of the API: a status and a JSON body in the form that OpenAI's clients know.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::guard::presentable;
use crate::SubmitError;
use ultraep_schedule::Refusal;

/// Seconds after which a client that found the server full should come again.
const RETRY_AFTER_S: u64 = 1;

/// An error answer.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<&'static str>,
    code: Option<&'static str>,
}

#[derive(Serialize)]
struct Body<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    r#type: &'a str,
    param: Option<&'a str>,
    code: Option<&'a str>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None }
    }

    /// The request is wrong: which parameter, and what is allowed. The message begins with the parameter's name.
    pub(crate) fn invalid(param: &'static str, message: impl std::fmt::Display) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", format!("{param}: {message}"));
        Self { param: Some(param), ..error }
    }

    /// The body is not what it should be.
    pub(crate) fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    pub(crate) fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than {limit} bytes, which is the limit");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// Prompt and new tokens are more than the context holds.
    pub(crate) fn too_long(message: impl std::fmt::Display) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::invalid("prompt", message) }
    }

    pub(crate) fn no_model(asked: &str, served: &str) -> Self {
        let message = format!("no model {asked:?} here; this server has {served:?}");
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        Self { param: Some("model"), code: Some("model_not_found"), ..error }
    }

    /// There is nothing at `path`.
    pub(crate) fn no_route(path: &str) -> Self {
        let hint = if path.trim_end_matches('/').ends_with("chat/completions") {
            "; this model has no chat: POST /v1/completions completes a prompt"
        } else {
            ""
        };
        let error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", format!("nothing at {path}{hint}"));
        Self { code: Some("unknown_url"), ..error }
    }

    pub(crate) fn no_method(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// It names a host that is not this server.
    pub(crate) fn foreign_host() -> Self {
        let message = "asked for under a name that is not this server's; names are allowed with --allow-host";
        Self::new(StatusCode::MISDIRECTED_REQUEST, "invalid_request_error", message)
    }

    pub(crate) fn no_json() -> Self {
        let message = "the body must be JSON, with the header Content-Type: application/json";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    pub(crate) fn unauthorised() -> Self {
        let message = "a valid API key is needed: Authorization: Bearer KEY";
        let error = Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message);
        Self { code: Some("invalid_api_key"), ..error }
    }

    /// The body did not come in time.
    pub(crate) fn slow_body() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "timeout_error", "the body did not arrive in time")
    }

    /// The answer was not complete in time.
    pub(crate) fn timeout() -> Self {
        Self::new(
            StatusCode::GATEWAY_TIMEOUT,
            "timeout_error",
            "the request was not complete in time; it was cancelled",
        )
    }

    /// It waited in the queue for as long as a request may.
    pub(crate) fn expired() -> Self {
        let message = "the request waited too long to start; the server is overloaded";
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("rate_limit_exceeded"), ..error }
    }

    /// Something was wrong with this request alone, and not the client's fault.
    pub(crate) fn failed(reason: &str) -> Self {
        let message = format!("the request failed: {}", presentable(reason));
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// A failure inside. Clients get the reason without what is only for the operator.
    pub(crate) fn unavailable(reason: impl AsRef<str>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", presentable(reason.as_ref()))
    }

    /// The JSON body.
    pub(crate) fn body(&self) -> serde_json::Value {
        let Self { kind, message, param, code, .. } = self;
        let inner = Inner { message, r#type: kind, param: *param, code: *code };
        // Strings always serialise.
        serde_json::to_value(Body { error: inner }).unwrap_or_default()
    }

    /// Whether the client may just come again.
    pub(crate) fn is_rejection(&self) -> bool {
        matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE)
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::Refused(Refusal::QueueFull { .. }) => {
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
                Self { code: Some("rate_limit_exceeded"), ..error }
            }
            SubmitError::TooLong { .. } | SubmitError::Refused(Refusal::NeverFits { .. }) => Self::too_long(message),
            SubmitError::Refused(_) => Self::invalid("prompt", message),
            SubmitError::Unavailable(_) => Self::unavailable(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if self.is_rejection() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
