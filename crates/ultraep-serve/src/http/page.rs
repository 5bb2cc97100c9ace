//! The page at `/`: what this server is, its limits, its endpoints, and its health while one looks. Nothing is loaded from
//! elsewhere.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Uri, header};
use axum::response::{IntoResponse, Response};
use ultraep_http::page_headers;

use super::App;

const PAGE: &str = include_str!("page.html");

fn answer(media_type: &'static str, text: impl IntoResponse) -> Response {
    let mut response = text.into_response();
    response.headers_mut().extend(page_headers());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}

pub(super) async fn page(State(app): State<Arc<App>>, target: Uri, headers: HeaderMap) -> Response {
    let (limits, config) = (app.engine.limits(), &app.config);
    let (_, status, reason) = super::described(app.engine.health());
    let host = target.authority().map(|authority| authority.as_str());
    let host = host.or_else(|| headers.get(header::HOST)?.to_str().ok()).unwrap_or("localhost");
    let (key, header) = match config.api_key {
        Some(_) => ("needed: <code>Authorization: Bearer KEY</code>", " \\\n  -H 'Authorization: Bearer KEY'"),
        None => ("none is needed", ""),
    };
    let values: [(&str, String); 12] = [
        ("{model}", escaped(app.engine.model().name())),
        ("{ranks}", limits.ranks.to_string()),
        ("{status}", status.into()),
        ("{reason}", escaped(&reason.unwrap_or_default())),
        ("{context}", app.engine.context_tokens().to_string()),
        ("{new_tokens}", config.new_tokens_max.to_string()),
        ("{body}", config.body_bytes_max.to_string()),
        ("{queue}", limits.queue_max.to_string()),
        ("{timeout}", config.request_timeout.as_secs().to_string()),
        ("{key}", key.into()),
        ("{header}", header.into()),
        ("{url}", format!("http://{}", escaped(host))),
    ];
    answer("text/html; charset=utf-8", filled(PAGE, &values))
}

pub(super) async fn style() -> Response {
    answer("text/css; charset=utf-8", include_str!("page.css"))
}

pub(super) async fn script() -> Response {
    answer("text/javascript; charset=utf-8", include_str!("page.js"))
}

/// Puts values in, in one pass: what a value says is not looked at again.
fn filled(template: &str, values: &[(&str, String)]) -> String {
    let mut text = String::with_capacity(template.len() * 2);
    let mut rest = template;
    while let Some(at) = rest.find('{') {
        text.push_str(&rest[..at]);
        rest = &rest[at..];
        let found = values.iter().find(|(name, _)| rest.starts_with(name));
        let (put, skip) = found.map_or(("{", 1), |(name, value)| (value.as_str(), name.len()));
        text.push_str(put);
        rest = &rest[skip..];
    }
    text.push_str(rest);
    text
}

/// Text for HTML, also within quotes.
fn escaped(text: &str) -> String {
    let of = |character: char| match character {
        '&' => "&amp;".into(),
        '<' => "&lt;".into(),
        '>' => "&gt;".into(),
        '"' => "&quot;".into(),
        '\'' => "&#39;".into(),
        other => other.to_string(),
    };
    text.chars().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_put_in_once_and_escaped() {
        let values = [("{a}", escaped("<b>&'\"")), ("{b}", "{a}".into())];
        assert_eq!(filled("{b} {a} {\"x\": 1} {", &values), "{a} &lt;b&gt;&amp;&#39;&quot; {\"x\": 1} {");
        // Only the example's braces are no names.
        assert_eq!(PAGE.matches("{\"").count(), 2);
    }
}
