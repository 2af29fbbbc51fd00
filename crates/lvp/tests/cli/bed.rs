//! A place for one test: state, cache and volumes of its own, an object store, and the binary to run on them.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use e2e::{images, s3::ObjectStore};
use serde_json::Value;
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;
/// The size of the disk in [`Bed::image`]'s images.
pub const DISK: u64 = 8 * MIB;
const ACCESS_KEY: &str = "an-access-key";
const SECRET_KEY: &str = "a-very-secret-key";
const PATIENCE: Duration = Duration::from_secs(30);

pub struct Bed {
    root: TempDir,
    pub store: ObjectStore,
}

/// How a command ended, and what it said.
#[derive(Debug)]
pub struct Run {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    /// Asserts the exit code, and that there was no panic.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl Bed {
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("images")).unwrap();
        Self { root, store: ObjectStore::start(ACCESS_KEY, SECRET_KEY).unwrap() }
    }

    pub fn path(&self, inside: &str) -> PathBuf {
        self.root.path().join(inside)
    }

    /// The file of a volume of the default target.
    pub fn volume(&self, name: &str) -> PathBuf {
        self.path(&format!("state/volumes/{name}.raw"))
    }

    /// The daemon's socket.
    pub fn socket(&self) -> PathBuf {
        self.path("state/lvp.sock")
    }

    /// `lvp` with these words, in an environment that has nothing but what a user would set.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lvp"));
        command.args(words).env_clear().current_dir(self.root.path()).stdin(Stdio::null());
        for name in ["PATH", "HOME", "TMPDIR", "LLVM_PROFILE_FILE"] {
            command.envs(std::env::var_os(name).map(|value| (name, value)));
        }
        command
            .env("LVP_CONFIG", self.configuration())
            .env("LVP_STATE_DIR", self.path("state"))
            .env("LVP_CACHE_DIR", self.path("cache"))
            .env("LVP_LIBVIRT_URI", "none")
            .env("PORT", "0")
            .env("MINIO_ENDPOINT", self.store.endpoint())
            .env("MINIO_ACCESS_KEY", ACCESS_KEY)
            .env("MINIO_SECRET_KEY", SECRET_KEY)
            .env("MINIO_RETRY_BACKOFF_MS", "2");
        command
    }

    /// An empty file, so that the machine's own configuration is not read.
    fn configuration(&self) -> PathBuf {
        let path = self.path("config.toml");
        if !path.exists() {
            fs::write(&path, "").unwrap();
        }
        path
    }

    pub fn lvp(&self, words: &[&str]) -> Run {
        run(&mut self.command(words))
    }

    /// A daemon, once its socket answers.
    pub fn serve(&self) -> Process {
        self.serve_with(&[])
    }

    /// As [`Bed::serve`], with these variables too.
    pub fn serve_with(&self, environment: &[(&str, &str)]) -> Process {
        let mut command = self.command(&["serve"]);
        command.envs(environment.iter().copied());
        self.begin(command)
    }

    /// As [`Bed::serve`], begun by a shell that did this before.
    pub fn serve_after(&self, script: &str) -> Process {
        let daemon = self.command(&[]);
        let mut shell = Command::new("bash");
        shell.args(["-c", &format!("{script}; exec {} serve", env!("CARGO_BIN_EXE_lvp"))]);
        shell.env_clear().current_dir(self.root.path()).stdin(Stdio::null());
        shell.envs(daemon.get_envs().filter_map(|(name, value)| Some((name, value?))));
        self.begin(shell)
    }

    fn begin(&self, mut command: Command) -> Process {
        let log = fs::File::create(self.path("log")).unwrap();
        let child = command.env("LOG_LEVEL", "trace").stderr(log).spawn().unwrap();
        let mut daemon = Process(child);
        let begun = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            assert!(daemon.0.try_wait().unwrap().is_none() && begun.elapsed() < PATIENCE, "{}", self.log());
            thread::sleep(Duration::from_millis(10));
        }
        daemon
    }

    /// What the daemon logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    /// What the daemon answers at its socket: head and body.
    pub fn ask(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    pub fn get(&self, path: &str) -> String {
        self.ask(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
    }

    /// A qcow2 image with data in a disk of [`DISK`] bytes.
    pub fn image(&self, name: &str) -> PathBuf {
        let (raw, image) = (self.path(&format!("images/{name}.disk")), self.path(&format!("images/{name}")));
        images::raw_with_data(&raw, DISK, 40, 1).unwrap();
        images::qcow2_from(&raw, &image, &images::Qcow2Options::default()).unwrap();
        image
    }

    /// [`Bed::image`] in the bucket `images`.
    pub fn publish(&self, name: &str) -> PathBuf {
        let image = self.image(name);
        self.store.put_file("images", name, &image).unwrap();
        image
    }

    /// `mib` MiB of the byte 7 as `heavy.qcow2` in the bucket `images`: it takes a while to write.
    pub fn publish_heavy(&self, mib: u64) {
        let file = images::qcow2_of_sevens(Path::new(env!("CARGO_TARGET_TMPDIR")), mib).unwrap();
        self.store.put_file("images", "heavy.qcow2", &file).unwrap();
    }

    /// Asserts by `qemu-img` that a volume holds an image.
    #[track_caller]
    pub fn assert_holds(&self, volume: &str, image: &Path) {
        let reference = self.path("images/reference");
        images::raw_from(image, "qcow2", &reference).unwrap();
        assert!(
            fs::read(self.volume(volume)).unwrap() == fs::read(reference).unwrap(),
            "{volume} differs from its image"
        );
    }
}

pub fn run(command: &mut Command) -> Run {
    let output = command.output().unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A process that does not outlive its test.
pub struct Process(pub Child);

impl Process {
    pub fn signal(&self, name: &str) {
        images::run("kill", &["-s", name, &self.0.id().to_string()]).unwrap();
    }

    /// Waits for its end, `limit` at most.
    #[track_caller]
    pub fn ends_within(&mut self, limit: Duration) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < limit, "it still runs after {limit:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until this is so.
#[track_caller]
pub fn until(mut so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < PATIENCE, "it did not come so far");
        thread::sleep(Duration::from_millis(5));
    }
}
