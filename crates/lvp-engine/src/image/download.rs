//! Bytes from a source into a partial file, hashed on the way, with their space reserved.
//!
//! ```text
//!  source ──chunks──► this task ──channel──► writer thread: file, then hash
//!    └─ cut ─► retry: at the offset when the source has a strong ETag and ranges, else from the start
//! ```
//! Network and hash overlap; the channel bounds memory. A partial file is removed when its [`Partial`] is dropped.
//! It leaves out what becomes of the file: see `images`.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use lvp_api::{Digest, ErrorCode};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    flight::Lead,
    hasher::{Digests, Hasher},
    index::Reservation,
    retry::{Failure, Retries},
    source::{Source, SourceInfo, blocking},
};
use crate::{
    error::{Error, Result},
    progress::Progress,
};

/// Chunks between network and disk. A chunk is some tens of KiB.
const QUEUE: usize = 16;
/// When the size is not known, space is reserved in steps of this many bytes.
const STEP: u64 = 64 << 20;
/// How often the reservation learns what is written, in bytes.
const ACCOUNTED: u64 = 4 << 20;

/// A file that goes when this is dropped. Renaming it away is the way to keep it.
pub(super) struct Partial(PathBuf);

impl Partial {
    /// The file.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        match std::fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(file = %self.0.display(), %error, "a partial download cannot be removed");
            }
            _ => {}
        }
    }
}

/// A complete download.
pub(super) struct Downloaded {
    pub partial: Partial,
    pub size: u64,
    pub digests: Digests,
}

/// What a download needs.
pub(super) struct Download<'a> {
    pub source: &'a Source,
    pub info: &'a SourceInfo,
    pub expected: Option<&'a Digest>,
    pub reservation: &'a Arc<Reservation>,
    pub lead: &'a Lead,
    pub progress: &'a Progress,
}

impl Download<'_> {
    /// Fetches all of the source into `path`.
    pub async fn run(&self, path: PathBuf) -> Result<Downloaded> {
        let (partial, file) = blocking(move || create(path)).await?;
        let mut writer = Writer::start(file, partial.path(), self.expected);
        let resumes = self.info.accepts_ranges && self.info.strong_etag().is_some();
        let mut retries = Retries::new(self.source.settings());
        let mut offset = 0;
        loop {
            let before = offset;
            let from = if resumes { offset } else { 0 };
            match self.progress.until_stopped(self.attempt(&mut writer, &mut offset, from)).await? {
                Ok(()) => break,
                // The connection broke after the last byte.
                Err(_) if self.info.size.is_some_and(|size| size > 0 && size == offset) => break,
                Err(failure) => retries.pause(failure, resumes && offset > before, self.progress).await?,
            }
        }
        let (size, digests) = self.progress.until_stopped(writer.finish()).await??;
        if size != offset {
            return Err(Error::internal("a download has another length than was received"));
        }
        Ok(Downloaded { partial, size, digests })
    }

    async fn attempt(&self, writer: &mut Writer, offset: &mut u64, from: u64) -> Result<(), Failure> {
        let mut transfer = self.source.open(self.info, from).await?;
        if transfer.from != *offset {
            writer.send(Order::Restart).await?;
            *offset = transfer.from;
            self.progress.set_processed(0);
        }
        let total = transfer.total.or(self.info.size);
        if let Some(total) = total {
            self.progress.set_total(total);
            self.reserve(total).await?;
        }
        let (mut reserved, mut accounted) = (total.unwrap_or(0), *offset);
        while let Some(chunk) = transfer.next().await? {
            let end = *offset + chunk.len() as u64;
            if total.is_some_and(|total| end > total) {
                return Err(Failure::never(self.too_long(total.unwrap_or(0))));
            }
            if end > reserved {
                reserved = end + STEP;
                self.reserve(reserved).await?;
            }
            let length = chunk.len() as u64;
            writer.send(Order::Write(chunk)).await?;
            *offset = end;
            self.progress.advance(length);
            self.lead.show(end, total.unwrap_or(0));
            if end - accounted >= ACCOUNTED {
                accounted = end;
                self.reservation.set_written(end);
            }
        }
        match total {
            Some(total) if *offset < total => Err(Failure::soon(self.source.too_short(*offset))),
            _ => Ok(()),
        }
    }

    async fn reserve(&self, size: u64) -> Result<()> {
        let reservation = self.reservation.clone();
        blocking(move || reservation.ensure(size)).await.map(|_| ())
    }

    fn too_long(&self, total: u64) -> Error {
        Error::new(
            ErrorCode::SourceFailed,
            format!("the source sends more of {} than the {total} bytes that it announced", self.source.url()),
        )
        .retry(false)
    }
}

fn create(path: PathBuf) -> Result<(Partial, File)> {
    // Fetched with the operator's keys, so for nobody else to read; libvirt gives it to the domain that it is attached to.
    let created = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
    let file = created.map_err(|error| Error::io("creating", &path, error))?;
    Ok((Partial(path), file))
}

enum Order {
    Write(Bytes),
    Restart,
}

/// The thread that writes and hashes.
struct Writer {
    orders: Option<mpsc::Sender<Order>>,
    thread: JoinHandle<Result<(u64, Digests)>>,
}

impl Writer {
    fn start(file: File, path: &Path, expected: Option<&Digest>) -> Self {
        let (orders, received) = mpsc::channel(QUEUE);
        let (path, expected) = (path.to_owned(), expected.cloned());
        let thread = tokio::task::spawn_blocking(move || {
            write(file, received, expected.as_ref()).map_err(|error| no_space(&path, error))
        });
        Self { orders: Some(orders), thread }
    }

    async fn send(&mut self, order: Order) -> Result<(), Failure> {
        let sent = match &self.orders {
            Some(orders) => orders.send(order).await.is_ok(),
            None => false,
        };
        if sent {
            return Ok(());
        }
        let error = match self.finish().await {
            Err(error) => error,
            Ok(_) => Error::internal("the writer of a download ended early"),
        };
        Err(Failure::never(error))
    }

    /// Waits until all is written and hashed.
    async fn finish(&mut self) -> Result<(u64, Digests)> {
        self.orders = None;
        match (&mut self.thread).await {
            Ok(result) => result,
            Err(error) => Err(Error::internal("the writer of a download broke off").source(error)),
        }
    }
}

fn write(mut file: File, mut orders: mpsc::Receiver<Order>, expected: Option<&Digest>) -> io::Result<(u64, Digests)> {
    let (mut hasher, mut size) = (Hasher::new(expected), 0);
    while let Some(order) = orders.blocking_recv() {
        match order {
            Order::Write(bytes) => {
                file.write_all(&bytes)?;
                hasher.update(&bytes);
                size += bytes.len() as u64;
            }
            Order::Restart => {
                file.set_len(0)?;
                file.rewind()?;
                (hasher, size) = (Hasher::new(expected), 0);
            }
        }
    }
    Ok((size, hasher.finish()))
}

fn no_space(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::new(
            ErrorCode::CacheFull,
            format!("the file system of the image cache became full while {} was written", path.display()),
        )
        .hint("free space on it, or set LVP_CACHE_MAX_BYTES so that other data has room")
        .source(error),
        _ => Error::io("writing", path, error),
    }
}
