//! A whole server in a directory of its own, and what tests ask of it.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    hash::{DefaultHasher, Hasher},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use e2e::{images, s3::ObjectStore};
use lvp_engine::{
    Credentials, Engine, EngineSettings, IoPriority, LibvirtSetting, LockRetry, Recovery, Secret, SourceSettings,
    parse_endpoint,
};
use lvp_server::{
    Limits,
    listen::{self, Addresses},
};
use reqwest::{Method, RequestBuilder, header::HeaderMap};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinHandle};

pub const MIB: u64 = 1 << 20;
/// The size of the disk in [`Bed::publish`]'s images, and of most volumes.
pub const DISK: u64 = 8 * MIB;
const ACCESS_KEY: &str = "an-access-key";
const SECRET_KEY: &str = "a-very-secret-key";
/// A job that has not ended by then hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running server, its engine and its object store.
pub struct Bed {
    root: TempDir,
    pub store: ObjectStore,
    settings: EngineSettings,
    limits: Limits,
    running: Option<Running>,
}

/// What a restart ends.
struct Running {
    engine: Engine,
    tcp: Door,
    unix: Door,
    stop: watch::Sender<bool>,
    server: JoinHandle<()>,
}

/// A way to the server.
pub struct Door {
    http: reqwest::Client,
    base: String,
}

/// What the server answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub text: String,
}

impl Answer {
    pub async fn of(request: RequestBuilder) -> Self {
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Self { status, headers, text: response.text().await.unwrap() }
    }

    /// The body, which must be JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The body of an answer with this status.
    #[track_caller]
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text);
        if self.text.is_empty() { Value::Null } else { self.json() }
    }

    /// Asserts that this is an error as documented, and gives its body.
    #[track_caller]
    pub fn refusal(&self, code: &str) -> Value {
        let body = self.json();
        assert_eq!(body["error"], code, "{body:#}");
        assert_eq!(body["code"], self.status, "{body:#}");
        assert!(body["message"].as_str().is_some_and(|words| !words.is_empty()), "{body:#}");
        assert!(body["retryable"].is_boolean(), "{body:#}");
        assert_eq!(body["correlation_id"], self.headers["x-request-id"].to_str().unwrap(), "{body:#}");
        body
    }
}

impl Door {
    /// `host:port`, of the one over TCP.
    pub fn address(&self) -> &str {
        self.base.trim_start_matches("http://")
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.base))
    }

    pub async fn get(&self, path: &str) -> Answer {
        Answer::of(self.request(Method::GET, path)).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        Answer::of(self.request(Method::DELETE, path)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        Answer::of(self.request(Method::POST, path).json(body)).await
    }

    pub async fn put(&self, path: &str, body: &Value) -> Answer {
        Answer::of(self.request(Method::PUT, path).json(body)).await
    }
}

fn settings(root: &Path, endpoint: &str) -> EngineSettings {
    let target = |name: &str| lvp_api::TargetSpec::Directory { path: root.join(name) }.into();
    let milliseconds = |number| vec![Duration::from_millis(number)];
    EngineSettings {
        state_directory: root.join("state"),
        database: None,
        cache_directory: Some(root.join("cache")),
        cache_max_bytes: None,
        sources: SourceSettings {
            endpoint: Some(parse_endpoint(endpoint).unwrap()),
            credentials: Some(Credentials { access_key: Secret::new(ACCESS_KEY), secret_key: Secret::new(SECRET_KEY) }),
            retry_attempts: 1,
            retry_backoff: milliseconds(2),
            ..SourceSettings::default()
        },
        targets: BTreeMap::from([
            ("default".to_owned(), target("volumes")),
            ("other".to_owned(), target("other")),
            ("broken".to_owned(), target("file")),
        ]),
        lock_retry: LockRetry { attempts: 0, backoff: milliseconds(1) },
        libvirt: LibvirtSetting::Off,
        max_concurrent_jobs: 2,
        max_queued_jobs: 1000,
        workers: 2,
        download_limit: None,
        write_limit: None,
        courtesy: None,
        io_priority: IoPriority::default(),
        leftover_grace: Some(Duration::from_secs(86400)),
        stop_grace: Duration::ZERO,
        job_history: 1000,
        thin_floor: 5,
        recovery: Recovery::Resume,
    }
}

impl Running {
    async fn start(settings: &EngineSettings, limits: Limits, engine: Engine) -> Self {
        let socket = settings.state_directory.join("lvp.sock");
        let addresses = Addresses { tcp: Some(("127.0.0.1".to_owned(), 0)), unix: Some(socket.clone()) };
        let listeners = listen::bind(&addresses).await.unwrap();
        let base = format!("http://{}", listeners.tcp_address().unwrap());
        let (stop, stopped) = watch::channel(false);
        let server =
            tokio::spawn(listen::serve(listeners, lvp_server::router(engine.clone(), limits), limits, stopped));
        // A server that does not answer fails the test instead of holding it up.
        let client = || reqwest::Client::builder().no_proxy().timeout(PATIENCE);
        let tcp = Door { http: client().build().unwrap(), base };
        let unix = Door { http: client().unix_socket(socket).build().unwrap(), base: "http://localhost".to_owned() };
        Self { engine, tcp, unix, stop, server }
    }

    async fn stop(self) {
        self.engine.shutdown().await;
        self.stop.send(true).unwrap();
        self.server.await.unwrap();
    }
}

impl Bed {
    pub async fn new() -> Self {
        Self::with(|_| {}).await
    }

    /// With other settings.
    pub async fn with(change: impl FnOnce(&mut EngineSettings)) -> Self {
        Self::limited(Limits::default(), change).await
    }

    /// With other settings, and limits of what clients may have of it.
    pub async fn limited(limits: Limits, change: impl FnOnce(&mut EngineSettings)) -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = ObjectStore::start(ACCESS_KEY, SECRET_KEY).unwrap();
        for folder in ["state", "cache", "volumes", "other", "images"] {
            fs::create_dir(root.path().join(folder)).unwrap();
        }
        // In place of a directory of volumes.
        fs::write(root.path().join("file"), "no directory").unwrap();
        let mut settings = settings(root.path(), &store.endpoint());
        change(&mut settings);
        let engine = Engine::open(settings.clone()).await.unwrap();
        let running = Some(Running::start(&settings, limits, engine).await);
        Self { root, store, settings, limits, running }
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("the server runs")
    }

    /// As anybody on this machine reaches it.
    pub fn tcp(&self) -> &Door {
        &self.running().tcp
    }

    /// As its administrator reaches it.
    pub fn unix(&self) -> &Door {
        &self.running().unix
    }

    /// Stops everything and starts it again on the same state. Running jobs are interrupted.
    pub async fn restart(&mut self) {
        self.restart_after(|_| ()).await;
    }

    /// As [`Bed::restart`], with something done to the state directory while nothing runs.
    pub async fn restart_after(&mut self, change: impl FnOnce(&Path)) {
        self.running.take().expect("the server runs").stop().await;
        change(&self.settings.state_directory);
        // The locks go with the last clone of the engine, which the last connection holds for a moment.
        let begun = Instant::now();
        let engine = loop {
            match Engine::open(self.settings.clone()).await {
                Ok(engine) => break engine,
                Err(error) => assert!(begun.elapsed() < PATIENCE, "{error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        self.running = Some(Running::start(&self.settings, self.limits, engine).await);
    }

    pub fn path(&self, inside: &str) -> PathBuf {
        self.root.path().join(inside)
    }

    /// The file of a volume of the default target.
    pub fn volume(&self, name: &str) -> PathBuf {
        self.path(&format!("volumes/{name}.raw"))
    }

    /// Makes a qcow2 image with data in a disk of [`DISK`] bytes; the same seed gives the same one.
    pub fn image(&self, name: &str, seed: u64) -> PathBuf {
        let (raw, image) = (self.path(&format!("images/{name}.disk")), self.path(&format!("images/{name}")));
        images::raw_with_data(&raw, DISK, 40, seed).unwrap();
        let options = images::Qcow2Options { compression: Some("zlib"), ..Default::default() };
        images::qcow2_from(&raw, &image, &options).unwrap();
        fs::remove_file(raw).unwrap();
        image
    }

    /// Puts a file into the bucket `images`, with its `.sha256` as sha256sum writes it.
    pub fn upload(&self, file: &Path) -> String {
        let name = file.file_name().and_then(OsStr::to_str).unwrap();
        let sum = images::run("sha256sum", &[file]).unwrap();
        let digest = sum.split_whitespace().next().unwrap().to_owned();
        self.store.put_file("images", name, file).unwrap();
        self.store.put("images", &format!("{name}.sha256"), format!("{digest}  {name}\n").as_bytes()).unwrap();
        digest
    }

    /// [`Bed::image`] and [`Bed::upload`]: gives the image's file.
    pub fn publish(&self, name: &str, seed: u64) -> PathBuf {
        let image = self.image(name, seed);
        self.upload(&image);
        image
    }

    /// The URL of an object in the bucket `images`, as the seed writes it.
    pub fn url(&self, name: &str) -> String {
        format!("{}/images/{name}", self.store.endpoint())
    }

    /// A request for an object of the bucket `images` on a volume of [`DISK`] bytes.
    pub fn order(&self, image: &str, volume: &str) -> Value {
        json!({ "image_url": self.url(image), "volume_name": volume, "size": DISK, "image_type": "qcow2" })
    }

    /// Submits over TCP; gives the job's id.
    pub async fn submit(&self, order: &Value) -> String {
        let answer = self.tcp().post("/api/v1/jobs", order).await;
        answer.expect(202)["job_id"].as_str().unwrap().to_owned()
    }

    pub async fn job(&self, id: &str) -> Value {
        self.tcp().get(&format!("/api/v1/jobs/{id}")).await.expect(200)
    }

    /// The job, once this is so.
    pub async fn job_when(&self, id: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let begun = Instant::now();
        loop {
            let job = self.job(id).await;
            if wanted(&job) {
                return job;
            }
            let ended = is_ended(&job);
            assert!(!ended && begun.elapsed() < PATIENCE, "the job did not come so far: {job:#}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn ended(&self, id: &str) -> Value {
        self.job_when(id, is_ended).await
    }

    /// Submits, waits, and gives the completed job.
    pub async fn provision(&self, order: &Value) -> Value {
        let job = self.ended(&self.submit(order).await).await;
        assert_eq!(job["status"], "completed", "{job:#}");
        job
    }

    /// Submits, waits, and gives the failed job.
    pub async fn fail(&self, order: &Value, code: &str) -> Value {
        let job = self.ended(&self.submit(order).await).await;
        assert_eq!((&job["status"], &job["error_code"]), (&json!("failed"), &json!(code)), "{job:#}");
        job
    }

    /// All jobs, newest first.
    pub async fn all_jobs(&self) -> Vec<Value> {
        let list = self.tcp().get("/api/v1/jobs?limit=500").await.expect(200);
        list["jobs"].as_array().unwrap().clone()
    }

    /// What is in the directories of volumes and images: names, sizes, and of volumes the content.
    pub fn listing(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders: Vec<PathBuf> = ["volumes", "other", "cache"].map(|name| self.path(name)).into();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(self.root.path()).unwrap().display().to_string();
                if path.is_dir() {
                    found.push(name);
                    folders.push(path);
                } else if name.ends_with(".raw") {
                    found.push(format!("{name} {:x}", hash(&path)));
                } else {
                    found.push(name);
                }
            }
        }
        found.sort();
        found
    }

    /// Asserts by `qemu-img` that a volume holds an image and then zeros, and has this size.
    #[track_caller]
    pub fn assert_holds(&self, volume: &Path, image: &Path, format: &str, size: u64) {
        let reference = self.path("images/reference");
        images::raw_from(image, format, &reference).unwrap();
        let (wanted, found) = (fs::read(&reference).unwrap(), fs::read(volume).unwrap());
        assert_eq!(found.len() as u64, size, "the volume's size");
        let (head, tail) = found.split_at(wanted.len());
        assert!(head == wanted, "{} is not what qemu-img makes of the image", volume.display());
        assert!(tail.iter().all(|byte| *byte == 0), "{} is not zero past the image", volume.display());
        assert!(wanted.iter().any(|byte| *byte != 0), "the image is empty, so this shows nothing");
    }
}

pub fn is_ended(job: &Value) -> bool {
    ["completed", "failed", "cancelled"].iter().any(|status| job["status"] == *status)
}

fn hash(path: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(&fs::read(path).unwrap());
    hasher.finish()
}
