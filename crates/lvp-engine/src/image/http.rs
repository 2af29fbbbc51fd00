//! One HTTP request to a source, and what its failure means.
//!
//! Every object, signed or not, is read through here: one client with one set of limits. It never asks for
//! compression, follows at most five redirects and none from https to http, sends no `Referer`, and puts no URL of a
//! request into an error. It leaves out ranges and what the bytes are for: see `source`.

use std::{error::Error as StdError, io, path::Path};

use jiff::Timestamp;
use lvp_api::ErrorCode;
use reqwest::{
    Certificate, Client, Response, StatusCode,
    header::{ACCEPT_ENCODING, CONTENT_ENCODING, HeaderMap, HeaderValue, RETRY_AFTER},
    redirect,
};
use url::Url;

use super::{
    location::{ImageUrl, Location},
    retry::{Again, Failure, retry_after},
    settings::SourceSettings,
};
use crate::error::{Error, Result};

/// Redirects that are followed.
const REDIRECTS: usize = 5;
/// How much of an error's body is looked at.
const ERROR_BODY: usize = 4096;

/// Makes the client that all requests share.
///
/// # Errors
/// `invalid_configuration` when the file of certificate authorities cannot be used, `internal` otherwise.
pub(super) fn client(settings: &SourceSettings) -> Result<Client> {
    let mut headers = HeaderMap::new();
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    let mut builder = Client::builder()
        .user_agent(concat!("lvp/", env!("CARGO_PKG_VERSION")))
        .default_headers(headers)
        .referer(false)
        .redirect(redirect::Policy::custom(follow))
        .connect_timeout(settings.connect_timeout)
        .read_timeout(settings.stall_timeout);
    if let Some(path) = &settings.ca_file {
        builder = builder.tls_certs_merge(authorities(path)?);
    }
    builder.build().map_err(|error| {
        let cause = innermost(&error);
        Error::new(ErrorCode::InvalidConfiguration, "the HTTP client cannot be set up")
            .hint("install the package ca-certificates, and check the file of certificate authorities if one is set")
            .source(cause)
    })
}

/// The authorities in a PEM file.
///
/// # Errors
/// `invalid_configuration`.
pub(super) fn authorities(path: &Path) -> Result<Vec<Certificate>> {
    let refuse = |why: &str| {
        Error::new(
            ErrorCode::InvalidConfiguration,
            format!("the file of certificate authorities {} {why}", path.display()),
        )
        .hint("name a PEM file with at least one BEGIN CERTIFICATE block in LVP_CA_CERT_FILE")
    };
    let pem = std::fs::read(path).map_err(|error| refuse("cannot be read").source(error))?;
    match Certificate::from_pem_bundle(&pem) {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => Err(refuse("holds no certificate in PEM form")),
    }
}

fn follow(attempt: redirect::Attempt<'_>) -> redirect::Action {
    let secure_before = attempt.previous().last().is_some_and(|url| url.scheme() == "https");
    if attempt.previous().len() > REDIRECTS {
        return attempt.error("it redirects more than five times");
    }
    match attempt.url().scheme() {
        "https" => attempt.follow(),
        "http" if !secure_before => attempt.follow(),
        "http" => attempt.error("it redirects from https to http"),
        _ => attempt.error("it redirects to something that is not http or https"),
    }
}

/// Sends one request and gives its answer when its status is one of success.
pub(super) async fn send(
    client: &Client,
    method: &str,
    address: Url,
    headers: HeaderMap,
    of: &ImageUrl,
) -> Result<Response, Failure> {
    let request = if method == "HEAD" { client.head(address) } else { client.get(address) };
    let response = request.headers(headers).send().await.map_err(|error| unanswered(&error, of))?;
    if !response.status().is_success() {
        return Err(refused(response, of).await);
    }
    let encoding = response.headers().get(CONTENT_ENCODING).map(|value| value.as_bytes().to_ascii_lowercase());
    if encoding.is_some_and(|encoding| !encoding.is_empty() && encoding != b"identity") {
        let error = Error::new(
            ErrorCode::SourceFailed,
            format!("{of} is sent with a content encoding, although it was asked for as it is"),
        );
        return Err(Failure::never(error.retry(false).hint("have the server send the file without compression")));
    }
    Ok(response)
}

/// A request without an answer.
fn unanswered(error: &reqwest::Error, of: &ImageUrl) -> Failure {
    let cause = innermost(error);
    let words = cause.to_string().to_ascii_lowercase();
    let host = host(of);
    let unreachable = |what: String| Error::new(ErrorCode::SourceUnreachable, format!("{of} cannot be read: {what}"));
    if error.is_redirect() {
        return Failure::never(Error::new(ErrorCode::SourceFailed, format!("{of}: {cause}")).retry(false));
    }
    if error.is_dns() {
        let error = unreachable(format!("the name {host} cannot be resolved")).source(cause);
        let error = error.hint("check the host name in the URL or in MINIO_ENDPOINT, and this machine's DNS");
        return if words.contains("temporary") { Failure::soon(error) } else { Failure::never(error) };
    }
    if is_tls(error) {
        let error = unreachable(format!("no TLS connection to {host} can be made")).source(cause);
        return Failure::never(error.hint(
            "check that the server speaks https; if its certificate is of a private authority, name that authority's \
             file in LVP_CA_CERT_FILE",
        ));
    }
    if error.is_timeout() {
        let what = if error.is_connect() { "took too long to accept the connection" } else { "did not answer in time" };
        return Failure::soon(unreachable(format!("{host} {what}")));
    }
    if has_kind(error, io::ErrorKind::ConnectionRefused) {
        let error = unreachable(format!("{host} refused the connection"));
        return Failure::soon(error.hint("check the port, and that the server runs"));
    }
    if error.is_connect() {
        return Failure::soon(unreachable(format!("no connection to {host}")).source(cause));
    }
    Failure::soon(
        Error::new(ErrorCode::SourceFailed, format!("{host} ended the connection without an answer for {of}"))
            .source(cause),
    )
}

/// An answer that is not one of success.
async fn refused(response: Response, of: &ImageUrl) -> Failure {
    let status = response.status();
    let wait = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let code = s3_code(response).await;
    let said = match &code {
        Some(code) => format!("{} ({code})", status.as_u16()),
        None => status.as_u16().to_string(),
    };
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Failure::never(denied(&said, code.as_deref(), of)),
        StatusCode::NOT_FOUND | StatusCode::GONE => Failure::never(
            Error::new(ErrorCode::SourceNotFound, format!("{of} is not there: {} answered {said}", host(of)))
                .hint("check the bucket and the path; upper and lower case differ"),
        ),
        StatusCode::PRECONDITION_FAILED | StatusCode::RANGE_NOT_SATISFIABLE => Failure::never(changed(of)),
        _ => {
            let error =
                Error::new(ErrorCode::SourceFailed, format!("{} answered {said} when asked for {of}", host(of)));
            if !passes(status) {
                return Failure::never(error.retry(false));
            }
            let wait = wait.and_then(|value| retry_after(&value, Timestamp::now()));
            Failure { error, again: wait.map_or(Again::Soon, Again::After) }
        }
    }
}

/// Whether an answer of this status may be another one later.
fn passes(status: StatusCode) -> bool {
    matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
        || (status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED)
}

fn denied(said: &str, code: Option<&str>, of: &ImageUrl) -> Error {
    let mut error =
        Error::new(ErrorCode::SourceDenied, format!("{} refuses to give {of}: it answered {said}", host(of)));
    if let Some(code) = code {
        error = error.detail("source_code", code);
    }
    let hint = match (of.location(), code) {
        (_, Some("RequestTimeTooSkewed")) => "set this machine's clock: it differs from the object store's",
        (_, Some("InvalidAccessKeyId" | "NotSignedUp")) => "check MINIO_ACCESS_KEY: the object store does not know it",
        (_, Some("SignatureDoesNotMatch")) => "check MINIO_SECRET_KEY and MINIO_REGION: the signature does not match",
        (Location::Object { .. }, _) => {
            "set MINIO_ACCESS_KEY and MINIO_SECRET_KEY to keys that may read this object; S3 also answers so for an \
             object that is not there, to keys that may not list the bucket"
        }
        _ => "check the permissions; a presigned URL may have expired",
    };
    error.hint(hint)
}

/// The content is not what it was when it was first looked at.
pub(super) fn changed(of: &ImageUrl) -> Error {
    Error::new(ErrorCode::SourceChanged, format!("{of} changed while it was read"))
        .hint("try again once the upload of the new content is complete")
}

/// The transfer ended early, or stalled.
pub(super) fn cut(error: &reqwest::Error, at: u64, of: &ImageUrl) -> Failure {
    let what = if error.is_timeout() { "sent nothing more for too long" } else { "cut the transfer" };
    Failure::soon(
        Error::new(ErrorCode::SourceFailed, format!("{} {what} of {of} at byte {at}", host(of)))
            .source(innermost(error)),
    )
}

/// A transfer that is as good as silent.
pub(super) fn too_slow(of: &ImageUrl) -> Failure {
    let error = Error::new(ErrorCode::SourceFailed, format!("{} sends less than 1 KiB a second of {of}", host(of)));
    Failure::soon(error.hint("look at the server and the network between"))
}

/// `<Code>` of an S3 error document, when it looks like one: letters only, so that nothing hostile gets into a log.
pub(super) async fn s3_code(mut response: Response) -> Option<String> {
    let mut body = Vec::new();
    while body.len() < ERROR_BODY {
        match response.chunk().await {
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            _ => break,
        }
    }
    let text = String::from_utf8_lossy(&body);
    let (_, rest) = text.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    (!code.is_empty() && code.len() <= 64 && code.bytes().all(|byte| byte.is_ascii_alphanumeric()))
        .then(|| code.to_owned())
}

/// The host and port that a source is read from, for sentences.
pub(super) fn host(of: &ImageUrl) -> String {
    let url = match of.location() {
        Location::Object { endpoint, .. } => endpoint,
        Location::Web(url) => url,
        Location::File(_) => return "this machine".to_owned(),
    };
    match (url.host_str().unwrap_or_default(), url.port()) {
        (host, Some(port)) => format!("{host}:{port}"),
        (host, None) => host.to_owned(),
    }
}

fn causes(error: &reqwest::Error) -> impl Iterator<Item = &(dyn StdError + 'static)> {
    type Cause<'a> = &'a (dyn StdError + 'static);
    fn next<'a>(error: &Cause<'a>) -> Option<Cause<'a>> {
        (*error).source()
    }
    std::iter::successors(error.source(), next)
}

/// The last cause in its own words. The outer ones are wrappers, and the outermost knows the URL.
pub(super) fn innermost(error: &reqwest::Error) -> io::Error {
    let words = causes(error).last().map_or_else(|| "no reason was given".to_owned(), ToString::to_string);
    io::Error::other(words)
}

fn has_kind(error: &reqwest::Error, kind: io::ErrorKind) -> bool {
    causes(error).any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == kind))
}

/// Whether TLS failed: its crate's errors are not ours to name, so their words decide.
fn is_tls(error: &reqwest::Error) -> bool {
    error.is_connect()
        && causes(error).any(|cause| {
            let words = cause.to_string().to_ascii_lowercase();
            ["certificate", "tls", "corrupt message", "alert", "handshake", "peer misbehaved", "unknownissuer"]
                .iter()
                .any(|word| words.contains(word))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_file_of_authorities_is_named() {
        for content in [None, Some("not a certificate")] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("ca.pem");
            if let Some(content) = content {
                std::fs::write(&path, content).unwrap();
            }
            let settings = SourceSettings { ca_file: Some(path), ..SourceSettings::default() };
            let error = client(&settings).unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidConfiguration);
            assert!(error.chain().contains("ca.pem"), "{error:?}");
        }
    }
}
