//! A look at the object store for `lvp doctor`: does it answer, does it take the keys, is the clock right.

use std::time::Duration;

use jiff::{Timestamp, fmt::rfc2822};
use lvp_api::ErrorCode;
use reqwest::header::DATE;

use super::{http, settings::SourceSettings, sign};
use crate::error::{Error, Result};

/// A signature is refused when the clocks differ by more than this (S3: `RequestTimeTooSkewed`).
const LARGEST_SKEW: Duration = Duration::from_secs(15 * 60);

/// What was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreProbe {
    /// How far this machine's clock is from the store's, if the store says its time.
    pub clock_skew: Option<Duration>,
    /// Whether the keys were taken; `None` without keys.
    pub keys_accepted: Option<bool>,
}

impl StoreProbe {
    /// Whether the clocks differ so much that every signature will be refused.
    pub fn clock_is_wrong(&self) -> bool {
        self.clock_skew.is_some_and(|skew| skew > LARGEST_SKEW)
    }
}

/// Asks the configured object store for its list of buckets, signed if there are keys. `None` without a store.
///
/// # Errors
/// `source_unreachable` when it does not answer, `invalid_configuration` for a bad file of authorities.
pub async fn probe_store(settings: &SourceSettings) -> Result<Option<StoreProbe>> {
    let Some(endpoint) = &settings.endpoint else { return Ok(None) };
    let client = http::client(settings)?;
    let now = Timestamp::now();
    let url = match &settings.credentials {
        Some(credentials) => sign::presign("GET", endpoint, &settings.region, credentials, now),
        None => endpoint.clone(),
    };
    let response = client.get(url).send().await.map_err(|error| {
        // The URL in it is signed.
        Error::new(ErrorCode::SourceUnreachable, format!("the object store {endpoint} does not answer"))
            .source(http::innermost(&error))
            .hint("check MINIO_ENDPOINT, the network, and (for https) LVP_CA_CERT_FILE")
    })?;
    let theirs = response.headers().get(DATE).and_then(|date| rfc2822::parse(date.to_str().ok()?).ok());
    let clock_skew = theirs.map(|theirs| theirs.timestamp().duration_since(now).unsigned_abs());
    let accepted = response.status().is_success();
    // A key that is known but may not list buckets is a good key.
    let accepted = accepted || http::s3_code(response).await.as_deref() == Some("AccessDenied");
    Ok(Some(StoreProbe { clock_skew, keys_accepted: settings.credentials.as_ref().map(|_| accepted) }))
}
