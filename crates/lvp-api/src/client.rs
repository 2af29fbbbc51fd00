//! The HTTP client of the API: over the daemon's Unix socket or over TCP. Blocking work is the caller's to avoid: every
//! call is asynchronous. It leaves out retries: the caller knows whether to ask again.

use std::{path::Path, time::Duration};

use reqwest::{Method, RequestBuilder, StatusCode};
use serde::{Serialize, de::DeserializeOwned};
use url::Url;

use crate::{
    BaseVolume, ErrorBody, ErrorCode, Health, Image, ImageVerification, Job, JobId, JobList, JobStatus, PinRequest,
    Plan, PrefetchRequest, ProvisionRequest, Submitted, Volume, VolumeVerification,
};

/// What calls return.
pub type Result<T, E = Box<ErrorBody>> = std::result::Result<T, E>;

/// A daemon that answers every other request may still read a large image to verify it.
const READ_LIMIT: Duration = Duration::from_secs(600);
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// A connection to a daemon.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    /// How a user knows the daemon: the URL or the socket's path.
    address: String,
}

impl Client {
    /// A daemon at a URL such as `http://127.0.0.1:8080`.
    pub fn at(url: &str) -> Result<Self> {
        let invalid = |why: String| own_error(ErrorCode::InvalidUrl, format!("the server address '{url}' {why}"));
        let base: Url = url.parse().map_err(|error| invalid(format!("is not a URL: {error}")))?;
        if !matches!(base.scheme(), "http" | "https") {
            return Err(invalid("does not begin with http:// or https://".to_owned()));
        }
        Self::build(reqwest::Client::builder(), base, url.to_owned())
    }

    /// A daemon at its Unix socket.
    pub fn at_socket(path: &Path) -> Result<Self> {
        let base = Url::parse("http://localhost/").expect("a URL");
        // No TLS is spoken there, and reading the authorities of this machine takes longer than most commands.
        let builder = reqwest::Client::builder().unix_socket(path).tls_certs_only([]);
        Self::build(builder, base, path.display().to_string())
    }

    fn build(builder: reqwest::ClientBuilder, base: Url, address: String) -> Result<Self> {
        let http = builder
            .user_agent(concat!("lvp/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_LIMIT)
            .read_timeout(READ_LIMIT)
            // A proxy for image sources is no way to a daemon of one's own.
            .no_proxy()
            .build()
            .map_err(|error| own_error(ErrorCode::Internal, format!("no HTTP client could be made: {error}")))?;
        Ok(Self { http, base, address })
    }

    /// How a user knows the daemon.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Has a volume provisioned.
    pub async fn provision(&self, request: &ProvisionRequest) -> Result<Submitted> {
        self.send(self.with_body(Method::POST, &["api", "v1", "jobs"], request)).await
    }

    /// What a provision would do.
    pub async fn plan(&self, request: &ProvisionRequest) -> Result<Plan> {
        let request = ProvisionRequest { dry_run: true, ..request.clone() };
        self.send(self.with_body(Method::POST, &["api", "v1", "jobs"], &request)).await
    }

    /// A job.
    pub async fn job(&self, id: JobId) -> Result<Job> {
        self.send(self.request(Method::GET, &["api", "v1", "jobs", &id.to_string()])).await
    }

    /// Follows a job.
    pub async fn follow(&self, id: JobId) -> Result<Followed> {
        let request = self.request(Method::GET, &["api", "v1", "jobs", &id.to_string(), "events"]);
        Ok(Followed { response: self.answered(request).await?, received: Vec::new() })
    }

    /// Jobs, newest first.
    pub async fn jobs(&self, status: Option<JobStatus>, limit: u32) -> Result<JobList> {
        let mut query = vec![("limit", limit.to_string())];
        query.extend(status.map(|status| ("status", status.name().to_owned())));
        self.send(self.request_with(Method::GET, &["api", "v1", "jobs"], &query)).await
    }

    /// Cancels a job.
    pub async fn cancel(&self, id: JobId) -> Result<Job> {
        self.send(self.request(Method::DELETE, &["api", "v1", "jobs", &id.to_string()])).await
    }

    /// The cached images.
    pub async fn images(&self) -> Result<Vec<Image>> {
        self.send(self.request(Method::GET, &["api", "v1", "images"])).await
    }

    /// A cached image.
    pub async fn image(&self, image: &str) -> Result<Image> {
        self.send(self.request(Method::GET, &["api", "v1", "images", image])).await
    }

    /// The base volumes of all targets.
    pub async fn bases(&self) -> Result<Vec<BaseVolume>> {
        self.send(self.request(Method::GET, &["api", "v1", "bases"])).await
    }

    /// Has an image fetched into the cache.
    pub async fn prefetch(&self, request: &PrefetchRequest) -> Result<Submitted> {
        self.send(self.with_body(Method::POST, &["api", "v1", "images"], request)).await
    }

    /// Checks a cached image against its digest.
    pub async fn verify_image(&self, image: &str) -> Result<ImageVerification> {
        self.send(self.request(Method::POST, &["api", "v1", "images", image, "verify"])).await
    }

    /// Pins or unpins a cached image.
    pub async fn pin_image(&self, image: &str, pinned: bool) -> Result<Image> {
        self.send(self.with_body(Method::PUT, &["api", "v1", "images", image, "pin"], &PinRequest { pinned })).await
    }

    /// Deletes a cached image.
    pub async fn delete_image(&self, image: &str) -> Result<()> {
        self.send_for_nothing(self.request(Method::DELETE, &["api", "v1", "images", image])).await
    }

    /// The volumes of a target.
    pub async fn volumes(&self, target: Option<&str>) -> Result<Vec<Volume>> {
        self.send(self.request_with(Method::GET, &["api", "v1", "volumes"], &target_query(target))).await
    }

    /// A volume, and who uses it.
    pub async fn volume(&self, name: &str, target: Option<&str>) -> Result<Volume> {
        self.send(self.request_with(Method::GET, &["api", "v1", "volumes", name], &target_query(target))).await
    }

    /// Reads a volume again and checks it against its receipt.
    pub async fn verify_volume(&self, name: &str, target: Option<&str>) -> Result<VolumeVerification> {
        let path = ["api", "v1", "volumes", name, "verify"];
        self.send(self.request_with(Method::POST, &path, &target_query(target))).await
    }

    /// Takes a volume over: from then on it counts as made by lvp.
    pub async fn adopt_volume(&self, name: &str, target: Option<&str>) -> Result<Volume> {
        let path = ["api", "v1", "volumes", name, "adopt"];
        self.send(self.request_with(Method::POST, &path, &target_query(target))).await
    }

    /// Gives a volume up: lvp forgets that it made it.
    pub async fn release_volume(&self, name: &str, target: Option<&str>) -> Result<Volume> {
        let path = ["api", "v1", "volumes", name, "release"];
        self.send(self.request_with(Method::POST, &path, &target_query(target))).await
    }

    /// Deletes a volume that lvp made.
    pub async fn delete_volume(&self, name: &str, target: Option<&str>, force: bool) -> Result<()> {
        let mut query = target_query(target);
        query.push(("force", force.to_string()));
        self.send_for_nothing(self.request_with(Method::DELETE, &["api", "v1", "volumes", name], &query)).await
    }

    /// The daemon's health; not an error when it is bad.
    pub async fn health(&self) -> Result<Health> {
        let response = self.request(Method::GET, &["health"]).send().await.map_err(|error| self.unreachable(&error))?;
        if response.status() != StatusCode::OK && response.status() != StatusCode::SERVICE_UNAVAILABLE {
            return Err(self.refusal(response).await);
        }
        response.json().await.map_err(|error| self.not_ours(&error))
    }

    fn request(&self, method: Method, path: &[&str]) -> RequestBuilder {
        self.request_with(method, path, &[])
    }

    fn request_with(&self, method: Method, path: &[&str], query: &[(&str, String)]) -> RequestBuilder {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        self.http.request(method, url)
    }

    fn with_body(&self, method: Method, path: &[&str], body: &impl Serialize) -> RequestBuilder {
        self.request(method, path).json(body)
    }

    async fn send<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T> {
        let response = self.answered(request).await?;
        response.json().await.map_err(|error| self.not_ours(&error))
    }

    async fn send_for_nothing(&self, request: RequestBuilder) -> Result<()> {
        self.answered(request).await.map(drop)
    }

    async fn answered(&self, request: RequestBuilder) -> Result<reqwest::Response> {
        let response = request.send().await.map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() { Ok(response) } else { Err(self.refusal(response).await) }
    }

    async fn refusal(&self, response: reqwest::Response) -> Box<ErrorBody> {
        let status = response.status();
        match response.json::<ErrorBody>().await {
            Ok(body) => Box::new(body),
            Err(_) => own_error(
                ErrorCode::DaemonUnreachable,
                format!("what answers at {} is not lvp: HTTP {status}", self.address),
            ),
        }
    }

    fn not_ours(&self, error: &reqwest::Error) -> Box<ErrorBody> {
        own_error(ErrorCode::DaemonUnreachable, format!("the answer from {} cannot be read: {error}", self.address))
    }

    fn unreachable(&self, error: &reqwest::Error) -> Box<ErrorBody> {
        let mut why = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(inner) = cause {
            why = inner.to_string();
            cause = inner.source();
        }
        let mut body =
            own_error(ErrorCode::DaemonUnreachable, format!("no lvp daemon answers at {}: {why}", self.address));
        body.hint = Some("start one with `lvp serve`, or work without: --local".to_owned());
        body
    }
}

/// A job as it changes.
#[derive(Debug)]
pub struct Followed {
    response: reqwest::Response,
    /// What came after the last whole event.
    received: Vec<u8>,
}

impl Followed {
    /// The job, when it has changed; `None` when nothing more comes: it has ended, or the daemon has. It may be dropped
    /// while it waits and loses nothing.
    pub async fn next(&mut self) -> Option<Job> {
        loop {
            if let Some(job) = take_event(&mut self.received) {
                return Some(job);
            }
            // Why the connection broke says the next request.
            let chunk = self.response.chunk().await.ok().flatten()?;
            self.received.extend_from_slice(&chunk);
        }
    }
}

/// The first event that carries a job, taken from the begin of a stream of them (HTML standard, section 9.2).
fn take_event(received: &mut Vec<u8>) -> Option<Job> {
    loop {
        let end = received.windows(2).position(|two| two == b"\n\n")? + 2;
        let event: Vec<u8> = received.drain(..end).collect();
        let mut lines = event.split(|byte| *byte == b'\n');
        // What has no data, such as a comment that keeps the connection alive, is none of ours.
        if let Some(job) = lines.find_map(|line| serde_json::from_slice(line.strip_prefix(b"data: ")?).ok()) {
            return Some(job);
        }
    }
}

fn target_query(target: Option<&str>) -> Vec<(&'static str, String)> {
    target.map(|target| ("target", target.to_owned())).into_iter().collect()
}

fn own_error(code: ErrorCode, message: String) -> Box<ErrorBody> {
    Box::new(ErrorBody {
        error: code,
        message,
        code: code.http_status(),
        retryable: code.retryable(),
        hint: code.usual_hint().map(str::to_owned),
        correlation_id: None,
        details: serde_json::Map::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Progress;

    #[test]
    fn events_are_read_however_they_are_cut() {
        let job = |status: &str| {
            serde_json::json!({
                "job_id": "00000000-0000-0000-0000-000000000000", "kind": "provision", "status": status,
                "progress": Progress::queued(), "image_url": "s3://images/a.qcow2",
                "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z",
            })
        };
        let stream = format!(
            ": alive\n\nevent: progress\ndata: {}\n\nevent: completed\ndata: {}\n\n",
            job("running"),
            job("completed")
        );
        for piece in [1, 7, 100, stream.len()] {
            let (mut received, mut found) = (Vec::new(), Vec::new());
            for bytes in stream.as_bytes().chunks(piece) {
                received.extend_from_slice(bytes);
                found.extend(std::iter::from_fn(|| take_event(&mut received)).map(|job| job.status));
            }
            assert_eq!(found, [JobStatus::Running, JobStatus::Completed], "in pieces of {piece}");
            assert!(received.is_empty());
        }
    }
}
