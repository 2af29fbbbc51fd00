//! Where an image comes from: what is there now, ranges of it, and its bytes as a stream.
//!
//! [`Source::look`], [`Source::read_range`] and [`Source::read_small`] repeat themselves after failures that can pass;
//! [`Source::open`] is one attempt, since only the reader of a stream knows how much of it need not come again.
//! It leaves out the single request (`web`, `file`) and hashing (`download`).

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use lvp_api::ErrorCode;
use reqwest::Client;
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::{
    file, http,
    location::{ImageUrl, Location},
    pace::Pace,
    retry::{Failure, Retries},
    settings::SourceSettings,
    web::{Answer, Web},
};
use crate::{
    error::{Error, Result},
    progress::Progress,
};

/// How much is read from a local file at once, in bytes.
const FILE_CHUNK: usize = 256 << 10;
/// A server without ranges sends everything before an offset again. This much of it is worth throwing away.
const SKIPPED_AT_MOST: u64 = 8 << 20;

/// The detail of an error that says that a source has no ranges, although it announced them.
const SERVES_PARTS: &str = "serves_parts";

/// Whether reading failed only because the source has no ranges after all: the whole can still be had.
pub fn serves_no_parts(error: &Error) -> bool {
    error.to_body().details.contains_key(SERVES_PARTS)
}

/// What a source says about an image now.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SourceInfo {
    /// The size in bytes, if it is said.
    pub size: Option<u64>,
    /// The ETag as it was sent, with its quotes.
    pub etag: Option<String>,
    /// `Last-Modified` as it was sent.
    pub last_modified: Option<String>,
    /// Whether a part can be asked for.
    pub accepts_ranges: bool,
}

impl SourceInfo {
    /// The ETag when it stands for the very same bytes (RFC 9110, section 8.8.1).
    pub(super) fn strong_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| !etag.starts_with("W/"))
    }
}

/// What all sources share: one client, one set of settings.
#[derive(Clone)]
pub(super) struct Sources {
    /// Made when the first source on a network is read: it reads all authorities that this machine trusts.
    client: Arc<OnceLock<Client>>,
    settings: Arc<SourceSettings>,
}

impl Sources {
    /// Checks the settings.
    ///
    /// # Errors
    /// `invalid_configuration` when the file of certificate authorities cannot be used.
    pub fn new(settings: SourceSettings) -> Result<Self> {
        if let Some(path) = &settings.ca_file {
            http::authorities(path)?;
        }
        Ok(Self { client: Arc::default(), settings: Arc::new(settings) })
    }

    fn client(&self) -> Result<&Client> {
        if self.client.get().is_none() {
            let made = http::client(&self.settings)?;
            // Another job may have been quicker.
            let _ = self.client.set(made);
        }
        self.client.get().ok_or_else(|| Error::internal("an HTTP client that was made is gone"))
    }

    /// The source of one image.
    pub fn source(&self, url: &ImageUrl) -> Source {
        Source { sources: self.clone(), url: url.clone() }
    }
}

/// The source of one image. Cheap to clone.
#[derive(Clone)]
pub(super) struct Source {
    sources: Sources,
    url: ImageUrl,
}

impl Source {
    /// The settings, for retries.
    pub fn settings(&self) -> &SourceSettings {
        &self.sources.settings
    }

    /// Whether it is read over a network.
    pub fn is_remote(&self) -> bool {
        !matches!(self.url.location(), Location::File(_))
    }

    fn web(&self) -> Result<Web<'_>> {
        Ok(Web { client: self.sources.client()?, settings: &self.sources.settings, url: &self.url })
    }

    fn path(&self) -> Option<PathBuf> {
        match self.url.location() {
            Location::File(path) => Some(path.clone()),
            _ => None,
        }
    }

    /// What is there now.
    pub async fn look(&self, progress: &Progress) -> Result<SourceInfo> {
        if let Some(path) = self.path() {
            return blocking(move || file::look(&path)).await;
        }
        self.repeat(progress, move || async move { self.web()?.look().await }).await
    }

    /// The `length` bytes from `offset` on, of the content that `info` describes.
    ///
    /// # Errors
    /// Also when there are fewer.
    pub async fn read_range(
        &self,
        info: &SourceInfo,
        offset: u64,
        length: usize,
        progress: &Progress,
    ) -> Result<Bytes> {
        if let Some(path) = self.path() {
            let info = info.clone();
            return blocking(move || {
                let mut buffer = BytesMut::zeroed(length);
                let opened: File = file::open(&path, &info)?;
                let read = opened.read_exact_at(&mut buffer, offset);
                let now = opened.metadata().map_err(|error| file::failed(&path, error))?;
                file::check_unchanged(&path, &now, info.etag.as_deref())?;
                read.map(|()| buffer.freeze()).map_err(|error| file::failed(&path, error))
            })
            .await;
        }
        self.repeat(progress, move || self.range_once(info, offset, length, progress)).await
    }

    async fn range_once(
        &self,
        info: &SourceInfo,
        offset: u64,
        length: usize,
        progress: &Progress,
    ) -> Result<Bytes, Failure> {
        let answer = self.web()?.get(info, offset, Some(length as u64)).await?;
        // A server without ranges sends the whole: what comes before is thrown away, what comes after is not read.
        let mut skip = offset - answer.from;
        if skip > SKIPPED_AT_MOST {
            return Err(Failure::never(
                Error::new(
                    ErrorCode::SourceFailed,
                    format!("{} does not serve parts of {}", http::host(&self.url), self.url),
                )
                .detail(SERVES_PARTS, false)
                .retry(false),
            ));
        }
        let mut transfer = Transfer::web(answer, &self.url, self.settings().stall_timeout);
        let mut bytes = BytesMut::with_capacity(length);
        while bytes.len() < length {
            let Some(mut chunk) = transfer.next(progress).await? else {
                return Err(Failure::soon(self.too_short(offset + bytes.len() as u64)));
            };
            let dropped = skip.min(chunk.len() as u64);
            skip -= dropped;
            let rest = chunk.split_off(dropped as usize);
            bytes.extend_from_slice(&rest[..rest.len().min(length - bytes.len())]);
        }
        Ok(bytes.freeze())
    }

    /// The error for a body that ended before its announced size.
    pub fn too_short(&self, at: u64) -> Error {
        let host = http::host(&self.url);
        Error::new(ErrorCode::SourceFailed, format!("{host} ended the transfer of {} early, at byte {at}", self.url))
    }

    /// The error for a body that goes on behind its announced end.
    pub fn too_long(&self, end: u64) -> Error {
        Error::new(
            ErrorCode::SourceFailed,
            format!("the source sends more of {} than the {end} bytes that it announced", self.url),
        )
        .retry(false)
    }

    /// All of a small file, `limit` bytes at most; `None` when it is definitely not there.
    pub async fn read_small(&self, limit: usize, progress: &Progress) -> Result<Option<Small>> {
        let read = match self.path() {
            Some(path) => blocking(move || read_small_file(&path, limit)).await,
            None => self.repeat(progress, move || self.small_once(limit, progress)).await,
        };
        match read {
            Err(error) if error.code() == ErrorCode::SourceNotFound => Ok(None),
            other => other.map(Some),
        }
    }

    async fn small_once(&self, limit: usize, progress: &Progress) -> Result<Small, Failure> {
        let answer = self.web()?.get(&SourceInfo::default(), 0, None).await?;
        let mut transfer = Transfer::web(answer, &self.url, self.settings().stall_timeout);
        let mut bytes = BytesMut::new();
        while let Some(chunk) = transfer.next(progress).await? {
            if bytes.len() + chunk.len() > limit {
                return Ok(Small::TooLarge);
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Small::Whole(bytes.freeze()))
    }

    /// Begins to read from `from` on, up to `end` or all; the answer may begin at 0 all the same, and a file goes on to
    /// the end that it had when it was looked at. One attempt.
    pub async fn open(&self, info: &SourceInfo, from: u64, end: Option<u64>) -> Result<Transfer, Failure> {
        let Some(path) = self.path() else {
            let answer = self.web()?.get(info, from, end.map(|end| end - from)).await?;
            return Ok(Transfer::web(answer, &self.url, self.settings().stall_timeout));
        };
        let (opened, shared) = (path.clone(), info.clone());
        let mut reader = tokio::fs::File::from_std(blocking(move || file::open(&opened, &shared)).await?);
        reader.seek(std::io::SeekFrom::Start(from)).await.map_err(|error| file::failed(&path, error))?;
        let (pace, body) = (Pace::new(self.settings().stall_timeout), Body::File(reader, path, info.etag.clone()));
        Ok(Transfer { from, at: from, total: info.size, is_range: true, pace, url: self.url.clone(), body })
    }

    async fn repeat<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        progress: &Progress,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T> {
        let mut retries = Retries::new(self.settings());
        loop {
            match progress.until_stopped(attempt()).await? {
                Ok(value) => return Ok(value),
                Err(failure) => retries.pause(failure, false, progress).await?,
            }
        }
    }
}

/// A small file.
pub(super) enum Small {
    /// All of it.
    Whole(Bytes),
    /// It is larger than asked for.
    TooLarge,
}

fn read_small_file(path: &Path, limit: usize) -> Result<Small> {
    if file::look(path)?.size.is_some_and(|size| size > limit as u64) {
        return Ok(Small::TooLarge);
    }
    std::fs::read(path).map(|bytes| Small::Whole(bytes.into())).map_err(|error| file::failed(path, error))
}

/// Bytes on their way.
pub(super) struct Transfer {
    /// Where they begin.
    pub from: u64,
    /// The size of the whole, if the source says it.
    pub total: Option<u64>,
    /// Whether the source sends what was asked for, rather than everything.
    pub is_range: bool,
    at: u64,
    pace: Pace,
    url: ImageUrl,
    body: Body,
}

enum Body {
    Web(reqwest::Response),
    /// With the ETag that it must have at its end too.
    File(tokio::fs::File, PathBuf, Option<String>),
}

impl Transfer {
    fn web(answer: Answer, url: &ImageUrl, stall_timeout: Duration) -> Self {
        let Answer { from, total, is_range, response } = answer;
        let (pace, body) = (Pace::new(stall_timeout), Body::Web(response));
        Self { from, total, is_range, at: from, pace, url: url.clone(), body }
    }

    /// The next bytes, no faster than the limits want; `None` at the end.
    pub async fn next(&mut self, progress: &Progress) -> Result<Option<Bytes>, Failure> {
        let asked = Instant::now();
        let chunk = match &mut self.body {
            Body::Web(response) => response.chunk().await.map_err(|error| http::cut(&error, self.at, &self.url))?,
            Body::File(reader, path, etag) => {
                let mut buffer = BytesMut::with_capacity(FILE_CHUNK);
                let left = self.total.map_or(u64::MAX, |total| total.saturating_sub(self.at));
                let read = (&mut *reader).take(left).read_buf(&mut buffer).await;
                if read.map_err(|error| file::failed(path, error))? == 0 {
                    let now = reader.metadata().await.map_err(|error| file::failed(path, error))?;
                    file::check_unchanged(path, &now, etag.as_deref())?;
                }
                (!buffer.is_empty()).then(|| buffer.freeze())
            }
        };
        let length = chunk.as_ref().map_or(0, |chunk| chunk.len() as u64);
        self.at += length;
        if chunk.is_some() && self.pace.is_too_slow(asked.elapsed(), length) {
            return Err(http::too_slow(&self.url));
        }
        // While nobody asks for more, a connection's own flow control holds the sender back.
        progress.pace_image(length, matches!(self.body, Body::File(..))).await;
        Ok(chunk)
    }
}

/// Runs file work on a thread that may block.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Error::internal("file work of the image cache did not end").source(error)),
    }
}
