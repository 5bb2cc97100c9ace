//! What the HTTP edges of the viewer and of serving share: for whom a request is ([`Hosts`]), and the headers of every page
//! ([`page_headers`]).
//!
//! A page of another site can make its own name point at this machine (DNS rebinding) and then ask as if it were of the same
//! origin, but it cannot make a browser send another `Host` than that name. So a server that answers only under addresses,
//! `localhost` and the names it was told answers no such page.
//!
//! What it must never do: route, read bodies, or know what is served.

#![forbid(unsafe_code)]

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::http::{HeaderMap, HeaderName, HeaderValue, Uri, header};

/// Names under which a server may be asked, beside `localhost` and addresses. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts {
    names: Arc<[String]>,
}

impl Hosts {
    /// These names, in any case, without ports; empty ones are left out.
    pub fn new<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().map(|name| name.as_ref().trim().to_ascii_lowercase());
        Self { names: names.filter(|name| !name.is_empty()).collect() }
    }

    /// Whether a request is for this server: exactly one `Host`, and it is known; and so is the target's, where the target is a
    /// whole URI.
    pub fn know(&self, target: &Uri, headers: &HeaderMap) -> bool {
        let mut given = headers.get_all(header::HOST).iter();
        let (Some(given), None) = (given.next().and_then(|value| value.to_str().ok()), given.next()) else {
            return false;
        };
        self.has(given) && target.authority().is_none_or(|authority| self.has(authority.as_str()))
    }

    /// Whether `given`, a host with or without a port, is known.
    fn has(&self, given: &str) -> bool {
        if given.parse::<SocketAddr>().is_ok() || given.parse::<IpAddr>().is_ok() {
            return true;
        }
        let name = match given.rsplit_once(':') {
            Some((name, port)) if port.parse::<u16>().is_ok() => name,
            _ => given,
        };
        let is_address = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).is_some_and(is_v6);
        is_address
            || name.parse::<IpAddr>().is_ok()
            || name.eq_ignore_ascii_case("localhost")
            || self.names.iter().any(|known| name.eq_ignore_ascii_case(known))
    }
}

fn is_v6(text: &str) -> bool {
    text.parse::<std::net::Ipv6Addr>().is_ok()
}

/// Headers of every answer that a browser may show: scripts, styles and data from here alone, no frames, no guessing of types,
/// nothing kept.
pub fn page_headers() -> [(HeaderName, HeaderValue); 6] {
    [
        (
            header::CONTENT_SECURITY_POLICY,
            HeaderValue::from_static(
                "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
                 base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            ),
        ),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin")),
        (HeaderName::from_static("cross-origin-opener-policy"), HeaderValue::from_static("same-origin")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(target: &'static str, hosts: &[&'static str]) -> bool {
        let mut headers = HeaderMap::new();
        for host in hosts {
            headers.append(header::HOST, HeaderValue::from_static(host));
        }
        Hosts::new(["gpu7.cluster", "Balancer", ""]).know(&Uri::from_static(target), &headers)
    }

    #[test]
    fn addresses_localhost_and_told_names_are_known() {
        for good in [
            "127.0.0.1",
            "127.0.0.1:80",
            "localhost:8123",
            "LOCALHOST",
            "[::1]:9",
            "[::1]",
            "gpu7.cluster:1",
            "GPU7.cluster",
            "balancer",
        ] {
            assert!(known("/", &[good]), "{good}");
            assert!(known("http://localhost:8000/v1/models", &[good]), "{good}");
            assert!(!known("http://evil.example/", &[good]), "{good}");
        }
    }

    #[test]
    fn foreign_names_several_hosts_and_none_are_not() {
        let bad = [
            "evil.example",
            "evil.example:80",
            "localhost.evil.example",
            "127.0.0.1.evil.example:1",
            "gpu7.cluster.evil.example",
            "",
            "a:b:c",
            "[127.0.0.1",
            "localhost:99999",
            "[evil]",
        ];
        for bad in bad {
            assert!(!known("/", &[bad]), "{bad}");
        }
        assert!(!known("/", &[]));
        assert!(!known("/", &["localhost", "evil.example"]));
        assert!(!known("/", &["localhost", "localhost"]));
    }
}
