//! An object behind HTTP: what is there, and its bytes from some offset on. One attempt each; `source` repeats them.
//!
//! Objects of the configured store are signed anew for each request; everything else is the same for both kinds.
//! Whatever is read after the first look must carry the same ETag, be of the same size, and begin where it was asked
//! to. It leaves out retries and what the bytes are for.

use jiff::Timestamp;
use lvp_api::ErrorCode;
use reqwest::{
    Client, Response, StatusCode,
    header::{
        ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MATCH,
        LAST_MODIFIED, RANGE,
    },
};
use url::Url;

use super::{
    http,
    location::{ImageUrl, Location},
    retry::{Again, Failure},
    settings::SourceSettings,
    sign,
    source::SourceInfo,
};
use crate::error::Error;

/// An answer to a GET, positioned: its body is what follows byte `from` of the object.
pub(super) struct Answer {
    /// Where the body begins in the object.
    pub from: u64,
    /// The object's whole size, if the server says it.
    pub total: Option<u64>,
    /// Whether it is the range that was asked for, rather than everything.
    pub is_range: bool,
    /// The body.
    pub response: Response,
}

/// What an HTTP object is read with.
pub(super) struct Web<'a> {
    pub client: &'a Client,
    pub settings: &'a SourceSettings,
    pub url: &'a ImageUrl,
}

impl Web<'_> {
    /// Looks at the object. HEAD; where that is refused (a presigned URL signs GET only) or does not say enough, a GET
    /// of one byte.
    pub async fn look(&self) -> Result<SourceInfo, Failure> {
        match self.send("HEAD", HeaderMap::new()).await {
            Ok(response) => {
                let mut info = describe(&response);
                let ranges = text(&response, &ACCEPT_RANGES).map(|value| value.trim().to_ascii_lowercase());
                // S3 always has ranges, but not every store says so.
                let is_object = matches!(self.url.location(), Location::Object { .. });
                info.accepts_ranges = ranges.as_deref().map_or(is_object, |ranges| ranges == "bytes");
                let says_enough = info.size.is_some_and(|size| size > 0) && (ranges.is_some() || is_object);
                if !says_enough && let Ok(probed) = self.probe().await {
                    info.size = probed.size.or(info.size);
                    info.accepts_ranges = probed.accepts_ranges;
                }
                Ok(info)
            }
            Err(failure) if head_is_refused(&failure) => self.probe().await,
            Err(failure) => Err(failure),
        }
    }

    async fn probe(&self) -> Result<SourceInfo, Failure> {
        let mut headers = HeaderMap::new();
        headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
        let response = self.send("GET", headers).await?;
        let mut info = describe(&response);
        if response.status() == StatusCode::PARTIAL_CONTENT {
            info.size = content_range(&response).and_then(|(_, total)| total);
            info.accepts_ranges = true;
        }
        Ok(info)
    }

    /// Asks for the object from byte `from` on, `length` bytes or all. The answer may begin at 0 all the same: then
    /// the server has no ranges.
    pub async fn get(&self, info: &SourceInfo, from: u64, length: Option<u64>) -> Result<Answer, Failure> {
        let mut headers = HeaderMap::new();
        if from > 0 || length.is_some() {
            let end = length.map_or_else(String::new, |length| (from + length).saturating_sub(1).to_string());
            headers.insert(RANGE, ascii(&format!("bytes={from}-{end}"))?);
        }
        if let Some(etag) = info.strong_etag() {
            headers.insert(IF_MATCH, ascii(etag)?);
        }
        let response = self.send("GET", headers.clone()).await?;
        let answer = self.position(response, headers.contains_key(RANGE).then_some(from))?;
        self.same_content(info, &answer)?;
        Ok(answer)
    }

    /// Where the body of an answer begins.
    fn position(&self, response: Response, asked: Option<u64>) -> Result<Answer, Failure> {
        if response.status() != StatusCode::PARTIAL_CONTENT {
            return Ok(Answer { from: 0, total: content_length(&response), is_range: false, response });
        }
        match (asked, content_range(&response)) {
            (Some(asked), Some((from, total))) if from == asked => Ok(Answer { from, total, is_range: true, response }),
            _ => Err(Failure::never(
                Error::new(
                    ErrorCode::SourceFailed,
                    format!("{} answered with another part of {} than was asked for", http::host(self.url), self.url),
                )
                .retry(false),
            )),
        }
    }

    /// That an answer is of the content that was looked at first. Servers that know `If-Match` have said so already.
    fn same_content(&self, info: &SourceInfo, answer: &Answer) -> Result<(), Failure> {
        let etag = text(&answer.response, &ETAG);
        let other_etag = matches!((&info.etag, &etag), (Some(then), Some(now)) if then != now);
        let other_size = matches!((info.size, answer.total), (Some(then), Some(now)) if then != now);
        if other_etag || other_size { Err(Failure::never(http::changed(self.url))) } else { Ok(()) }
    }

    async fn send(&self, method: &str, headers: HeaderMap) -> Result<Response, Failure> {
        let unsigned = matches!(self.url.location(), Location::Object { .. }) && self.settings.credentials.is_none();
        http::send(self.client, method, self.address(method)?, headers, self.url).await.map_err(|failure| {
            if unsigned && failure.error.code() == ErrorCode::SourceDenied {
                let hint = "MINIO_ACCESS_KEY and MINIO_SECRET_KEY are not set, and this object needs them";
                return Failure { error: failure.error.hint(hint).detail("signed", false), again: failure.again };
            }
            failure
        })
    }

    /// The address of one request, signed when the object is the store's and there are keys.
    fn address(&self, method: &str) -> Result<Url, Error> {
        match self.url.location() {
            Location::Web(url) => Ok(url.clone()),
            Location::Object { endpoint, bucket, key } => {
                let url = sign::object_url(endpoint, bucket, key);
                Ok(match &self.settings.credentials {
                    Some(keys) => sign::presign(method, &url, &self.settings.region, keys, Timestamp::now()),
                    None => url,
                })
            }
            Location::File(_) => Err(Error::internal("a file was asked for by HTTP")),
        }
    }
}

/// Whether a failed HEAD says nothing about a GET.
fn head_is_refused(failure: &Failure) -> bool {
    failure.again == Again::Never && matches!(failure.error.code(), ErrorCode::SourceDenied | ErrorCode::SourceFailed)
}

fn describe(response: &Response) -> SourceInfo {
    SourceInfo {
        size: content_length(response),
        etag: text(response, &ETAG),
        last_modified: text(response, &LAST_MODIFIED),
        accepts_ranges: false,
    }
}

fn text(response: &Response, name: &HeaderName) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_owned)
}

fn content_length(response: &Response) -> Option<u64> {
    text(response, &CONTENT_LENGTH)?.trim().parse().ok()
}

/// `bytes FIRST-LAST/TOTAL`: the first byte and the total (RFC 9110, section 14.4).
fn content_range(response: &Response) -> Option<(u64, Option<u64>)> {
    let value = text(response, &CONTENT_RANGE)?;
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, _) = range.split_once('-')?;
    Some((first.trim().parse().ok()?, total.trim().parse().ok()))
}

fn ascii(value: &str) -> Result<HeaderValue, Error> {
    HeaderValue::from_str(value).map_err(|_| Error::internal("a header value has characters that cannot be sent"))
}
