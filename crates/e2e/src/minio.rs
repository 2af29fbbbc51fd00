//! MinIO, the real one, beside the tests: started, filled, asked what was fetched from it, stopped.
//!
//! It listens on the host's loopback, which the test machine reaches as 10.0.2.2. Requests are signed by curl. It
//! leaves out faults of the wire: `s3` has an object store in process for those.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use axum::{Router, body::Bytes, extract::State, routing::post};
use serde_json::Value;
use xtask::{
    boot,
    cache::{self, Artefact, Scratch},
    process::{self, Attached, Input},
};

/// Where the test machine sees the host.
const HOST_IN_VM: &str = "10.0.2.2";
const START: Duration = Duration::from_secs(60);
const REQUEST: Duration = Duration::from_secs(300);

/// What was fetched of one object.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fetched {
    /// How many GETs it answered, ranged ones too.
    pub requests: u32,
    /// How many bytes of content it sent for them.
    pub bytes: u64,
}

/// A running MinIO with its own data. Dropping it, or the end of the process, ends both.
pub struct Minio {
    port: u16,
    access_key: String,
    secret_key: String,
    audit: Audit,
    server: Mutex<Option<Attached>>,
    program: Artefact,
    data: Scratch,
}

impl Minio {
    /// Starts one with credentials of the tests' own; builds MinIO first when that was never done.
    ///
    /// # Errors
    /// It cannot be built, or does not start; the error quotes its log.
    pub fn start() -> Result<Self> {
        Self::start_with("lvp-tests", "a-secret-of-the-tests")
    }

    /// Starts one with these credentials (3 and 8 characters at least).
    ///
    /// # Errors
    /// As [`Minio::start`].
    pub fn start_with(access_key: &str, secret_key: &str) -> Result<Self> {
        let minio = Self {
            port: boot::free_port()?,
            access_key: access_key.to_owned(),
            secret_key: secret_key.to_owned(),
            audit: Audit::listen()?,
            server: Mutex::new(None),
            program: xtask::minio::ensure()?,
            data: cache::scratch("minio")?,
        };
        minio.restart()?;
        Ok(minio)
    }

    /// Its address for programs of the host.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Its address for programs in the test machine.
    pub fn endpoint_in_vm(&self) -> String {
        format!("http://{HOST_IN_VM}:{}", self.port)
    }

    /// The user it lets in.
    pub fn access_key(&self) -> &str {
        &self.access_key
    }

    /// That user's secret.
    pub fn secret_key(&self) -> &str {
        &self.secret_key
    }

    /// Starts it, again if it runs: same address, same objects.
    ///
    /// # Errors
    /// It does not come up; the error quotes its log.
    pub fn restart(&self) -> Result<()> {
        self.stop();
        let log = self.data.path().join("minio.log");
        let file = fs::File::options().create(true).append(true).open(&log)?;
        let mut command = Attached::command(&self.program.join("minio").display().to_string());
        command.args(["server", "--address", &format!("127.0.0.1:{}", self.port)]).arg(self.data.path().join("data"));
        command.env("MINIO_ROOT_USER", &self.access_key).env("MINIO_ROOT_PASSWORD", &self.secret_key);
        command.env("MINIO_BROWSER", "off").env("MINIO_UPDATE", "off");
        command.env("MINIO_AUDIT_WEBHOOK_ENABLE_tests", "on");
        command.env("MINIO_AUDIT_WEBHOOK_ENDPOINT_tests", format!("http://127.0.0.1:{}/", self.audit.port));
        command.stdout(file.try_clone()?).stderr(file);
        let server = Attached::start(command)?;
        // That it is alive it says before it can answer requests.
        let live = format!("{}/minio/health/cluster", self.endpoint());
        let up = process::until(START, || {
            let mut curl = Command::new("curl");
            let answer = process::output(curl.args(["-sf", &live]), Input::Empty, START);
            (!server.is_running() || answer.is_ok_and(|output| output.code == 0)).then_some(())
        });
        ensure!(up.is_some() && server.is_running(), "MinIO did not start: {}", process::tail(&log, 20));
        *self.server() = Some(server);
        Ok(())
    }

    /// Ends it; its objects stay for [`Minio::restart`].
    pub fn stop(&self) {
        *self.server() = None;
    }

    /// Whether it runs.
    pub fn is_running(&self) -> bool {
        self.server().as_ref().is_some_and(Attached::is_running)
    }

    /// Makes a bucket.
    ///
    /// # Errors
    /// It is there, or MinIO refuses.
    pub fn make_bucket(&self, bucket: &str) -> Result<()> {
        self.request(&["-X", "PUT"], bucket, Input::Empty)
    }

    /// Puts a file as an object, over one that may be there.
    ///
    /// # Errors
    /// The file cannot be read, or MinIO refuses.
    pub fn put(&self, bucket: &str, key: &str, file: &Path) -> Result<()> {
        let file = file.to_str().context("a path that is not text")?;
        self.request(&["-T", file], &format!("{bucket}/{key}"), Input::Empty)
    }

    /// Puts these bytes as an object.
    ///
    /// # Errors
    /// MinIO refuses.
    pub fn put_bytes(&self, bucket: &str, key: &str, content: &[u8]) -> Result<()> {
        self.request(&["-X", "PUT", "--data-binary", "@-"], &format!("{bucket}/{key}"), Input::Bytes(content))
    }

    /// Removes an object.
    ///
    /// # Errors
    /// MinIO refuses.
    pub fn remove(&self, bucket: &str, key: &str) -> Result<()> {
        self.request(&["-X", "DELETE"], &format!("{bucket}/{key}"), Input::Empty)
    }

    fn request(&self, arguments: &[&str], path: &str, input: Input<'_>) -> Result<()> {
        let output = self.curl(arguments, path, input)?;
        ensure!(output.code == 0, "MinIO: {} {path}: {}{}", arguments.join(" "), output.stdout, output.stderr);
        Ok(())
    }

    fn curl(&self, arguments: &[&str], path: &str, input: Input<'_>) -> Result<process::Output> {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "--fail-with-body", "--aws-sigv4", "aws:amz:us-east-1:s3"]);
        curl.args(["--user", &format!("{}:{}", self.access_key, self.secret_key)]);
        curl.args(["-H", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]);
        curl.args(arguments).arg(format!("{}/{path}", self.endpoint()));
        process::output(&mut curl, input, REQUEST)
    }

    /// What was fetched of an object since MinIO first started, by MinIO's own audit log. Requests that are still
    /// being answered do not count yet.
    ///
    /// # Errors
    /// MinIO does not report.
    pub fn fetched(&self, bucket: &str, key: &str) -> Result<Fetched> {
        // The log is behind; once it has a request made now, it has those that ended before.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let mark = format!("mark-of-the-tests-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        self.curl(&[], &format!("{bucket}/{mark}"), Input::Empty)?;
        let seen = process::until(START, || (!self.audit.gets(bucket, &mark).is_empty()).then_some(()));
        ensure!(seen.is_some(), "MinIO's audit log does not report");
        // (status, bytes): what was not there was not fetched.
        let answered = self.audit.gets(bucket, key).into_iter().filter(|(status, _)| (200..300).contains(status));
        Ok(answered.fold(Fetched::default(), |sum, (_, bytes)| Fetched {
            requests: sum.requests + 1,
            bytes: sum.bytes + bytes,
        }))
    }

    fn server(&self) -> MutexGuard<'_, Option<Attached>> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// MinIO's audit log: it posts an entry for each request when that has ended.
struct Audit {
    port: u16,
    entries: Arc<Mutex<Vec<Value>>>,
}

impl Audit {
    /// Listens until the process ends.
    fn listen() -> Result<Self> {
        let entries = Arc::new(Mutex::new(Vec::new()));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let router = Router::new().route("/", post(record)).with_state(Arc::clone(&entries));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        thread::spawn(move || {
            runtime.block_on(async move { axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await })
        });
        Ok(Self { port, entries })
    }

    /// Status and bytes of content of each GET of an object.
    fn gets(&self, bucket: &str, key: &str) -> Vec<(u64, u64)> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        entries
            .iter()
            .map(|entry| &entry["api"])
            .filter(|api| api["name"] == "GetObject" && api["bucket"] == bucket && api["object"] == key)
            .map(|api| (number(&api["statusCode"]), number(&api["tx"])))
            .collect()
    }
}

async fn record(State(entries): State<Arc<Mutex<Vec<Value>>>>, body: Bytes) {
    let received = serde_json::Deserializer::from_slice(&body).into_iter().map_while(Result::ok);
    entries.lock().unwrap_or_else(PoisonError::into_inner).extend(received);
}
