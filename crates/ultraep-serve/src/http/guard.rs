//! Who may ask for what: the host that a request names, its key, the type of its body; and what clients are told of failures.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

use super::App;
use super::error::ApiError;

/// Most characters of a reason that clients are told.
const REASON_CHARS_MAX: usize = 300;

/// A key that clients show as `Authorization: Bearer KEY`. Its text is in no debug output.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(Arc<str>);

/// A text that is no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiKeyError {
    /// Nothing, or spaces alone: it would open the server to everyone who shows nothing.
    #[error("the API key is empty")]
    Empty,
    /// It cannot be sent in a header.
    #[error("the API key has a character that cannot stand in a header: allowed are visible ASCII characters")]
    Character,
}

impl ApiKey {
    /// A key, without the white space around it.
    pub fn new(text: &str) -> Result<Self, ApiKeyError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(ApiKeyError::Empty);
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ApiKeyError::Character);
        }
        Ok(Self(text.into()))
    }

    /// The text, for a client that shows it.
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Whether a request shows this key. The time tells the length at most.
    fn is_shown(&self, headers: &HeaderMap) -> bool {
        let mut given = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(given), None) = (given.next(), given.next()) else { return false };
        bearer(given).is_some_and(|shown| shown.ct_eq(self.0.as_bytes()).into())
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(***)")
    }
}

/// The token of `Bearer TOKEN`, the scheme in any case (RFC 9110, 11.1).
fn bearer(value: &HeaderValue) -> Option<&[u8]> {
    const SCHEME: &[u8] = b"bearer";
    let (scheme, rest) = value.as_bytes().split_at_checked(SCHEME.len())?;
    let token = rest.trim_ascii();
    (scheme.eq_ignore_ascii_case(SCHEME) && rest.starts_with(b" ") && !token.is_empty()).then_some(token)
}

/// Nothing is answered under a foreign name; see `ultraep-http`.
pub(super) async fn check_host(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if app.config.hosts.know(request.uri(), request.headers()) {
        return next.run(request).await;
    }
    app.refuse(ApiError::foreign_host())
}

pub(super) async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    match &app.config.api_key {
        Some(key) if !key.is_shown(request.headers()) => app.refuse(ApiError::unauthorised()),
        _ => next.run(request).await,
    }
}

/// A page of another site can send forms and plain text here without asking; JSON it cannot.
pub(super) async fn check_type(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if *request.method() != Method::POST || is_json(request.headers()) {
        return next.run(request).await;
    }
    app.refuse(ApiError::no_json())
}

fn is_json(headers: &HeaderMap) -> bool {
    let mut given = headers.get_all(header::CONTENT_TYPE).iter();
    let (Some(given), None) = (given.next().and_then(|value| value.to_str().ok()), given.next()) else { return false };
    let essence = given.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let subtype = essence.strip_prefix("application/");
    subtype.is_some_and(|subtype| subtype == "json" || subtype.len() > 5 && subtype.ends_with("+json"))
}

impl App {
    fn refuse(&self, error: ApiError) -> Response {
        self.count_refused(&error);
        error.into_response()
    }
}

/// What clients are told of a failure inside: its first line, without names of files. The rest is for the operator, who has it
/// on stderr.
pub(super) fn presentable(reason: &str) -> String {
    let line = reason.lines().next().unwrap_or_default();
    let word = |word: &str| if word.contains(['/', '\\']) { "(path)".to_string() } else { word.to_string() };
    let words: Vec<String> = line.split_whitespace().map(word).collect();
    words.join(" ").chars().take(REASON_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_and_refused() {
        assert_eq!(ApiKey::new(" secret\n").unwrap().text(), "secret");
        assert_eq!([ApiKey::new(""), ApiKey::new(" \n")], [const { Err(ApiKeyError::Empty) }; 2]);
        assert_eq!(
            [ApiKey::new("a b"), ApiKey::new("é"), ApiKey::new("a\nb")],
            [const { Err(ApiKeyError::Character) }; 3]
        );
        assert_eq!(format!("{:?}", ApiKey::new("secret")), "Ok(ApiKey(***))");
    }

    #[test]
    fn the_scheme_is_read_in_any_case() {
        let key = ApiKey::new("se=cret").unwrap();
        let shown = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, HeaderValue::from_static(value));
            }
            key.is_shown(&headers)
        };
        for good in ["Bearer se=cret", "bearer se=cret", "BEARER se=cret", "bEaReR   se=cret "] {
            assert!(shown(&[good]), "{good}");
        }
        for bad in [
            "Bearer se=cre",
            "Bearer se=crets",
            "Bearer Se=cret",
            "Bearerse=cret",
            "Basic se=cret",
            "se=cret",
            "Bearer ",
            "",
        ] {
            assert!(!shown(&[bad]), "{bad}");
        }
        assert!(!shown(&[]) && !shown(&["Bearer se=cret", "Bearer other"]));
    }

    #[test]
    fn only_json_is_json() {
        let json = |kind: &'static str| {
            is_json(&HeaderMap::from_iter([(header::CONTENT_TYPE, HeaderValue::from_static(kind))]))
        };
        let good =
            ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json", " application/json "];
        assert!(good.into_iter().all(json));
        for bad in [
            "",
            "text/plain",
            "json",
            "text/json",
            "application/+json",
            "application/jsonp",
            "text/plain;application/json",
        ] {
            assert!(!json(bad), "{bad}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }

    #[test]
    fn reasons_lose_backtraces_and_paths() {
        let reason =
            "rank 3: cannot read /home/me/run/weights.bin: no such file\n   0: std::backtrace\n  at /rustc/lib.rs:3";
        assert_eq!(presentable(reason), "rank 3: cannot read (path) no such file");
        assert_eq!(presentable("C:\\models\\x is gone"), "(path) is gone");
        assert_eq!((presentable(""), presentable(&"x".repeat(1000)).len()), (String::new(), REASON_CHARS_MAX));
    }
}
