//! The cache and its sources against real servers: an S3 store with signatures and a web server that misbehaves.

mod cache;
mod faults;
mod flights;
mod resume;
mod secrecy;
mod sources;
mod space;
mod users;

use std::{path::Path, time::Duration};

use e2e::{
    s3::ObjectStore,
    server::{Page, Server},
};
use lvp_api::{Digest, DigestAlgorithm, ErrorCode, ImageFormat};
use tempfile::TempDir;

use super::{
    Credentials, Entry, Fetch, ImageSettings, ImageUrl, Images, Resolved, Secret, SourceSettings, Unpublished, Users,
    Wanted, hasher::sha256_hex, index::Usage, parse_endpoint,
};
use crate::{
    error::{Error, Result},
    progress::Progress,
    provision::file_users,
    space::Ledger,
};

/// A cache in a directory of its own.
struct Bed {
    root: TempDir,
    settings: SourceSettings,
    images: Images,
}

impl Bed {
    async fn new() -> Self {
        Self::with(quick(), None).await
    }

    async fn limited(max_bytes: u64) -> Self {
        Self::with(quick(), Some(max_bytes)).await
    }

    async fn with(settings: SourceSettings, max_bytes: Option<u64>) -> Self {
        let root = tempfile::tempdir().unwrap();
        let images = open(root.path(), &settings, max_bytes).await.unwrap();
        Self { root, settings, images }
    }

    /// With the account of [`store`].
    async fn on(store: &ObjectStore) -> Self {
        Self::with(signed(&store.endpoint()), None).await
    }

    fn wanted(&self, url: &str) -> Wanted {
        Wanted { url: ImageUrl::parse(url, &self.settings, true).unwrap(), format: ImageFormat::Qcow2, checksum: None }
    }

    fn promised(&self, url: &str, digest: Digest) -> Wanted {
        Wanted { checksum: Some(digest), ..self.wanted(url) }
    }

    async fn resolve(&self, url: &str) -> Result<Resolved> {
        self.images.resolve(&self.wanted(url), &Progress::default()).await
    }

    async fn bring(&self, url: &str) -> Result<Entry> {
        bring(&self.images, &self.wanted(url), &Progress::default()).await
    }

    async fn bring_promised(&self, url: &str, digest: Digest) -> Result<Entry> {
        bring(&self.images, &self.promised(url, digest), &Progress::default()).await
    }

    /// Resolves and fetches, and expects a download.
    async fn download(&self, url: &str) -> Result<Box<Unpublished>> {
        match self.images.fetch(&self.resolve(url).await?, None, &Progress::default()).await? {
            Fetch::New(new) => Ok(new),
            Fetch::Cached(entry) | Fetch::Known { entry, .. } => panic!("{entry:?} was cached"),
        }
    }

    /// Closes the cache and opens it again, without a limit.
    async fn restart(self) -> Self {
        self.restart_limited(None).await
    }

    async fn restart_limited(mut self, max_bytes: Option<u64>) -> Self {
        // The lock goes with the last handle.
        let placeholder = tempfile::tempdir().unwrap();
        self.images = open(placeholder.path(), &self.settings, None).await.unwrap();
        self.images = self.open_when_unlocked(max_bytes).await;
        self
    }

    /// A program that another test starts in this moment holds copies of our descriptors, the lock among them, until it
    /// has begun.
    async fn open_when_unlocked(&self, max_bytes: Option<u64>) -> Images {
        for _ in 0..500 {
            match open(self.root.path(), &self.settings, max_bytes).await {
                Err(error) if error.code() == ErrorCode::StateLocked => {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                opened => return opened.unwrap(),
            }
        }
        panic!("the lock is still held after 5 s");
    }

    /// The names of all files in the directory, sorted; those below `.lvp` but the lock with it before them.
    fn files(&self) -> Vec<String> {
        let list = |path: &Path, prefix: &str| -> Vec<String> {
            let items = std::fs::read_dir(path).unwrap();
            items.map(|item| format!("{prefix}{}", item.unwrap().file_name().to_str().unwrap())).collect()
        };
        let mut names = list(self.root.path(), "");
        names.extend(list(&self.root.path().join(".lvp"), ".lvp/"));
        names.retain(|name| name != ".lvp" && name != ".lvp/lock");
        names.sort();
        names
    }

    fn usage(&self) -> Usage {
        self.images.shared.index.usage().unwrap()
    }

    fn assert_empty(&self) {
        assert_eq!(self.files(), [""; 0]);
    }
}

async fn open(path: &Path, settings: &SourceSettings, max_bytes: Option<u64>) -> Result<Images> {
    open_counting(path, settings, max_bytes, Ledger::default()).await
}

async fn open_counting(
    path: &Path,
    settings: &SourceSettings,
    max_bytes: Option<u64>,
    ledger: Ledger,
) -> Result<Images> {
    open_asking(path, settings, max_bytes, (ledger, file_users(None))).await
}

async fn open_asking(
    path: &Path,
    settings: &SourceSettings,
    max_bytes: Option<u64>,
    (ledger, users): (Ledger, Users),
) -> Result<Images> {
    let directory = path.to_owned();
    Images::open(ImageSettings { directory, max_bytes, pool: None, source: settings.clone(), ledger, users }).await
}

/// Resolves, fetches and publishes.
async fn bring(images: &Images, wanted: &Wanted, progress: &Progress) -> Result<Entry> {
    match images.fetch(&images.resolve(wanted, progress).await?, None, progress).await? {
        Fetch::Cached(entry) | Fetch::Known { entry, .. } => Ok(entry),
        Fetch::New(new) => new.publish(Some(1 << 30)).await,
    }
}

/// Settings whose waits are short enough for tests.
fn quick() -> SourceSettings {
    SourceSettings {
        retry_backoff: vec![Duration::from_millis(2)],
        connect_timeout: Duration::from_secs(5),
        stall_timeout: Duration::from_millis(500),
        ..SourceSettings::default()
    }
}

const ACCESS_KEY: &str = "an-access-key";
const SECRET_KEY: &str = "a-very-secret-key";

fn signed(endpoint: &str) -> SourceSettings {
    SourceSettings {
        endpoint: Some(parse_endpoint(endpoint).unwrap()),
        credentials: Some(Credentials { access_key: Secret::new(ACCESS_KEY), secret_key: Secret::new(SECRET_KEY) }),
        ..quick()
    }
}

fn store() -> ObjectStore {
    ObjectStore::start(ACCESS_KEY, SECRET_KEY).unwrap()
}

/// Bytes that do not repeat, different for each seed.
fn content(size: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; size];
    random.fill(&mut bytes);
    bytes
}

fn sha256(bytes: &[u8]) -> Digest {
    Digest::new(DigestAlgorithm::Sha256, &sha256_hex(bytes)).unwrap()
}

fn sha512(bytes: &[u8]) -> Digest {
    let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA512, bytes);
    Digest::from_bytes(DigestAlgorithm::Sha512, hash.as_ref())
}

#[track_caller]
fn assert_code<T>(result: Result<T>, code: ErrorCode) -> Error {
    match result {
        Ok(_) => panic!("expected {code}, got a value"),
        Err(error) => {
            assert_eq!(error.code(), code, "{error:?}");
            error
        }
    }
}
