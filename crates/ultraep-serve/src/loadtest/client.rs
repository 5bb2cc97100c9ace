//! One streamed completion over HTTP/1.1, timed.

use std::fmt;
use std::time::Instant;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Request, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Where to send requests.
#[derive(Clone, Debug)]
pub struct Target {
    /// Host and port.
    authority: String,
    /// What comes before `/completions`.
    base: String,
    key: Option<String>,
}

/// An address that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("url {url:?}: {reason}; it must be http://HOST[:PORT][/v1]")]
pub struct TargetError {
    url: String,
    reason: String,
}

impl Target {
    /// A server at `url`, with or without the `/v1` at its end.
    pub fn new(url: &str, key: Option<String>) -> Result<Self, TargetError> {
        let refuse = |reason: &str| TargetError { url: url.into(), reason: reason.into() };
        let uri: Uri = url.parse().map_err(|error| refuse(&format!("{error}")))?;
        if uri.scheme_str() != Some("http") {
            return Err(refuse("only http is spoken"));
        }
        let host = uri.host().ok_or_else(|| refuse("there is no host"))?;
        let path = uri.path().trim_end_matches('/');
        let base = if path.ends_with("/v1") { path.to_string() } else { format!("{path}/v1") };
        Ok(Self { authority: format!("{host}:{}", uri.port_u16().unwrap_or(80)), base, key })
    }
}

/// Why a request was not answered to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    Status(StatusCode),
    Timeout,
    Connection,
    /// The server said in the stream what went wrong.
    InStream,
    Broken,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "{}", status.as_u16()),
            Self::Timeout => f.write_str("timeout"),
            Self::Connection => f.write_str("connection"),
            Self::InStream => f.write_str("error in the stream"),
            Self::Broken => f.write_str("broken answer"),
        }
    }
}

/// Asks for a completion and reads it to its end; gives when its first token came.
pub(super) async fn ask(target: &Target, prompt: &[u8], new_tokens: u32) -> Result<Instant, Failure> {
    let stream = TcpStream::connect(&target.authority).await.map_err(|_| Failure::Connection)?;
    let _ = stream.set_nodelay(true);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|_| Failure::Connection)?;
    let connection = tokio::spawn(connection);
    let body = serde_json::json!({ "prompt": prompt, "max_tokens": new_tokens, "stream": true, "temperature": 0 });
    let mut request = Request::post(format!("{}/completions", target.base))
        .header(header::HOST, &target.authority)
        .header(header::CONTENT_TYPE, "application/json");
    if let Some(key) = &target.key {
        request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
    }
    let request = request.body(Full::new(Bytes::from(body.to_string()))).map_err(|_| Failure::Broken)?;
    let response = sender.send_request(request).await.map_err(|_| Failure::Connection)?;
    if response.status() != StatusCode::OK {
        return Err(Failure::Status(response.status()));
    }
    let mut body = response.into_body();
    let (mut first, mut last) = (None, Vec::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Failure::Broken)?;
        if let Some(data) = frame.data_ref().filter(|data| !data.is_empty()) {
            first.get_or_insert_with(Instant::now);
            last.extend_from_slice(data);
            // From the last event on that is complete: the next to come may be the end.
            let events = last.windows(2).rposition(|w| w == b"\n\n").map_or(0, |end| end);
            let begin = last[..events].windows(2).rposition(|w| w == b"\n\n").map_or(0, |end| end + 2);
            last.drain(..begin);
        }
    }
    connection.abort();
    if last == END {
        first.ok_or(Failure::Broken)
    } else if last.starts_with(ERROR) {
        Err(Failure::InStream)
    } else {
        Err(Failure::Broken)
    }
}

/// How a stream ends that was not cut.
const END: &[u8] = b"data: [DONE]\n\n";
/// How the last event of a stream begins that says what went wrong.
const ERROR: &[u8] = b"data: {\"error\"";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_with_and_without_their_end() {
        let target = |url| Target::new(url, None).map(|t| (t.authority, t.base));
        let expected = Ok(("here:8000".to_string(), "/v1".to_string()));
        assert_eq!(target("http://here:8000"), expected);
        assert_eq!(target("http://here:8000/v1/"), expected);
        assert_eq!(target("http://here/x"), Ok(("here:80".into(), "/x/v1".into())));
        for wrong in ["https://here", "here:8000", "http://", "\n"] {
            assert!(target(wrong).is_err(), "{wrong}");
        }
    }
}
