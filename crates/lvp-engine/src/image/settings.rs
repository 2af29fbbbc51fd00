//! How sources are reached: the object store's address and keys, trust, time limits, retries.
//!
//! Keys are held in [`Secret`], which prints as `***`. It leaves out where the values come from: the front ends read
//! configuration.

use std::{fmt, path::PathBuf, time::Duration};

use lvp_api::ErrorCode;
use url::Url;

use crate::error::{Error, Result};

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for signing only.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// The keys of an account of the object store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The access key's id (`MINIO_ACCESS_KEY`). Not secret by itself, but shown nowhere either.
    pub access_key: Secret,
    /// The secret key (`MINIO_SECRET_KEY`).
    pub secret_key: Secret,
}

/// How sources are reached.
#[derive(Debug, Clone)]
pub struct SourceSettings {
    /// The object store (`MINIO_ENDPOINT`): scheme, host and port; see [`parse_endpoint`].
    pub endpoint: Option<Url>,
    /// Its keys. Without them, requests to it are not signed, which public buckets allow.
    pub credentials: Option<Credentials>,
    /// Its region, part of each signature (`MINIO_REGION`).
    pub region: String,
    /// A PEM file of certificate authorities to trust beside the system's.
    pub ca_file: Option<PathBuf>,
    /// How often a failed request is tried again after the first time (`MINIO_RETRY_ATTEMPTS`).
    pub retry_attempts: u32,
    /// How long to wait before each of these; the last value serves for all further ones (`MINIO_RETRY_BACKOFF_MS`).
    pub retry_backoff: Vec<Duration>,
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// How long a source may send nothing: before its answer and between two pieces of it.
    pub stall_timeout: Duration,
}

impl Default for SourceSettings {
    fn default() -> Self {
        Self {
            endpoint: None,
            credentials: None,
            region: "us-east-1".to_owned(),
            ca_file: None,
            retry_attempts: 3,
            retry_backoff: [100, 1_000, 10_000].map(Duration::from_millis).to_vec(),
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
        }
    }
}

/// Reads the object store's address: `http://host:9000` or `https://host`, with nothing after the port.
///
/// # Errors
/// `invalid_configuration` that says which rule is broken; a password in it is not repeated.
pub fn parse_endpoint(text: &str) -> Result<Url> {
    let refuse = |why: &str| {
        Error::new(ErrorCode::InvalidConfiguration, format!("MINIO_ENDPOINT {why}"))
            .hint("write the object store's scheme, host and port, such as https://minio.example.org:9000")
    };
    let url = Url::parse(text.trim()).map_err(|error| refuse("is not a URL").source(error))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
        return Err(refuse("does not begin with http:// or https://"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(refuse("has a user or password in it").hint("use MINIO_ACCESS_KEY and MINIO_SECRET_KEY"));
    }
    if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
        return Err(refuse("has a path or query; buckets are addressed below the root"));
    }
    Ok(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_scheme_host_and_port() {
        assert_eq!(parse_endpoint(" http://127.0.0.1:9000/ ").unwrap().port(), Some(9000));
        for text in ["", "minio:9000", "ftp://minio", "https://u:hidden@minio", "https://minio/path", "https://m/?a=b"]
        {
            let error = parse_endpoint(text).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidConfiguration, "{text}");
            assert!(!format!("{error:?}").contains("hidden"));
        }
    }

    #[test]
    fn keys_are_never_printed() {
        let settings = SourceSettings {
            credentials: Some(Credentials { access_key: Secret::new("AKIA"), secret_key: Secret::new("hush") }),
            ..SourceSettings::default()
        };
        let text = format!("{settings:?}");
        assert!(!text.contains("AKIA") && !text.contains("hush"), "{text}");
    }
}
