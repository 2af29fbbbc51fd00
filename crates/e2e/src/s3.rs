//! An object store in this process: S3 over real HTTP with real signatures (Signature Version 4), on a directory.
//!
//! It runs on its own thread, so it serves tests with and without a runtime, and the demo. It leaves out what s3s-fs
//! leaves out: among others it does not look at `If-Match`; [`server`](crate::server) does.

use std::{
    collections::BTreeSet,
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use aws_lc_rs::digest::{SHA256, digest};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use s3s::{
    S3Result,
    access::{S3Access, S3AccessContext},
    auth::SimpleAuth,
    s3_error,
    service::{S3Service, S3ServiceBuilder},
};
use s3s_fs::FileSystem;
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
};

/// A running object store; it stops, and its objects go, when it is dropped.
pub struct ObjectStore {
    address: SocketAddr,
    root: tempfile::TempDir,
    requests: Arc<Mutex<Vec<(String, String)>>>,
    public: Arc<Mutex<BTreeSet<String>>>,
    runtime: Option<Runtime>,
}

/// Lets unsigned requests read public buckets, and nothing else.
struct PublicBuckets(Arc<Mutex<BTreeSet<String>>>);

impl S3Access for PublicBuckets {
    // What `#[async_trait]` makes of an `async fn`: the trait is written with it.
    fn check<'a, 'b, 'c, 'd>(
        &'a self,
        context: &'b mut S3AccessContext<'c>,
    ) -> Pin<Box<dyn Future<Output = S3Result<()>> + Send + 'd>>
    where
        'a: 'd,
        'b: 'd,
        'c: 'd,
        Self: 'd,
    {
        let reads = matches!(context.s3_op().name(), "GetObject" | "HeadObject");
        let bucket = context.s3_path().get_bucket_name().unwrap_or_default();
        let allowed = context.credentials().is_some() || (reads && locked(&self.0).contains(bucket));
        Box::pin(async move { if allowed { Ok(()) } else { Err(s3_error!(AccessDenied, "Signature is required")) } })
    }
}

impl ObjectStore {
    /// Starts a store with one account on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// When no port, thread or directory can be had.
    pub fn start(access_key: &str, secret_key: &str) -> anyhow::Result<Self> {
        let root = tempfile::tempdir()?;
        let requests = Arc::new(Mutex::new(Vec::new()));
        let public = Arc::new(Mutex::new(BTreeSet::new()));
        let filesystem = FileSystem::new(root.path()).map_err(|error| anyhow::anyhow!("s3s-fs: {error:?}"))?;
        let mut builder = S3ServiceBuilder::new(filesystem);
        builder.set_auth(SimpleAuth::from_single(access_key, secret_key));
        builder.set_access(PublicBuckets(public.clone()));
        let service = builder.build();
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        runtime.spawn(accept(listener, service, requests.clone()));
        Ok(Self { address, root, requests, public, runtime: Some(runtime) })
    }

    /// The address, as `MINIO_ENDPOINT` wants it.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Puts an object; makes the bucket when there is none.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn put(&self, bucket: &str, key: &str, content: &[u8]) -> io::Result<()> {
        let (path, new) = self.place(bucket, key)?;
        std::fs::write(&new, content)?;
        std::fs::rename(new, path)?;
        self.note_etag(bucket, key, digest(&SHA256, content).as_ref())
    }

    /// Puts a file as an object, without reading it into memory; makes the bucket when there is none.
    ///
    /// # Errors
    /// When the file cannot be copied.
    pub fn put_file(&self, bucket: &str, key: &str, file: &Path) -> io::Result<()> {
        let (path, new) = self.place(bucket, key)?;
        std::fs::copy(file, &new)?;
        std::fs::rename(new, path)?;
        self.note_etag(bucket, key, &fastrand::u128(..).to_le_bytes())
    }

    /// Removes an object.
    ///
    /// # Errors
    /// When there is none.
    pub fn remove(&self, bucket: &str, key: &str) -> io::Result<()> {
        std::fs::remove_file(self.root.path().join(bucket).join(key))
    }

    /// Lets anybody read a bucket.
    pub fn make_public(&self, bucket: &str) {
        locked(&self.public).insert(bucket.to_owned());
    }

    /// All requests so far: method and path, without the query.
    pub fn requests(&self) -> Vec<(String, String)> {
        locked(&self.requests).clone()
    }

    /// How many requests of this method came for a path (`/bucket/key`).
    pub fn count(&self, method: &str, path: &str) -> usize {
        self.requests().iter().filter(|(known, at)| known == method && at == path).count()
    }

    fn place(&self, bucket: &str, key: &str) -> io::Result<(PathBuf, PathBuf)> {
        let path = self.root.path().join(bucket).join(key);
        std::fs::create_dir_all(path.parent().unwrap_or(self.root.path()))?;
        let new = self.root.path().join(format!(".new-{}", fastrand::u64(..)));
        Ok((path, new))
    }

    /// Writes down the ETag where s3s-fs looks for it; otherwise it reads the whole object for each request.
    fn note_etag(&self, bucket: &str, key: &str, bytes: &[u8]) -> io::Result<()> {
        let etag: String = bytes[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        let name = format!(".bucket-{}.object-{}.internal.json", base64(bucket), base64(key));
        std::fs::write(self.root.path().join(name), serde_json::json!({ "e_tag": etag }).to_string())
    }
}

impl Drop for ObjectStore {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn accept(listener: std::net::TcpListener, service: S3Service, requests: Arc<Mutex<Vec<(String, String)>>>) {
    let listener = TcpListener::from_std(listener).expect("a listener");
    while let Ok((stream, _)) = listener.accept().await {
        let (service, requests) = (service.clone(), requests.clone());
        tokio::spawn(async move {
            let counted = service_fn(move |request: hyper::Request<Incoming>| {
                locked(&requests).push((request.method().to_string(), request.uri().path().to_owned()));
                hyper::service::Service::call(&service, request)
            });
            // A client that goes away in the middle is what some tests do.
            let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), counted).await;
        });
    }
}

/// Base64 for URLs, without padding (RFC 4648, section 5).
fn base64(text: &str) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut encoded = String::new();
    for group in text.as_bytes().chunks(3) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for digit in 0..=group.len() {
            encoded.push(char::from(LETTERS[(bits >> (18 - 6 * digit) & 63) as usize]));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_as_in_the_rfc() {
        for (text, encoded) in
            [("", ""), ("f", "Zg"), ("fo", "Zm8"), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy"), ("?>~", "Pz5-")]
        {
            assert_eq!(base64(text), encoded);
        }
    }
}
