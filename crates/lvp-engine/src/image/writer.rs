//! The thread of a download that writes, moves the mark and hashes, in this order and in the order of the file.
//!
//! Blocks of zeros are left out of the file, so that a sparse disk stays sparse in the cache. What is written is on its
//! way to the disk soon, so that the flush at the end finds little to do. It leaves out where the bytes come from: see
//! `download`.

use std::{fs::File, io, num::NonZeroU64, os::unix::fs::FileExt, path::Path, sync::Arc};

use bytes::Bytes;
use lvp_api::Digest;
use rustix::fs::{Advice, fadvise};
use tokio::{sync::mpsc, task::JoinHandle};

use super::{
    full::could_not,
    hasher::{Digests, Hasher},
    retry::Failure,
};
use crate::{
    error::{Error, Result},
    watermark::Watermark,
    zero::is_zero,
};

/// Chunks between network and disk. A chunk is some hundreds of KiB where the network is fast.
const QUEUE: usize = 4;
/// So many bytes are sent to the disk at once.
const WRITE_BACK: u64 = 4 << 20;
/// What is read at once of the bytes that are there already.
const READ: usize = 1 << 20;
/// Zeros of this length are worth a hole.
const HOLE: usize = 4096;

/// What the thread is told.
pub(super) enum Order {
    /// The next bytes of the file.
    Write(Bytes),
    /// All from the begin again.
    Restart,
}

/// What became of the file.
pub(super) struct Written {
    pub size: u64,
    pub digests: Digests,
    /// Whether it was begun again after something of it may have been read.
    pub restarted: bool,
}

/// The thread.
pub(super) struct Writer {
    orders: Option<mpsc::Sender<Order>>,
    thread: JoinHandle<Result<Written>>,
}

impl Writer {
    /// Starts with a file that has its first `kept` bytes: they are hashed first.
    pub fn start(file: File, path: &Path, expected: Option<&Digest>, mark: Arc<Watermark>, kept: u64) -> Self {
        let (orders, mut received) = mpsc::channel(QUEUE);
        let (path, expected) = (path.to_owned(), expected.cloned());
        let thread = tokio::task::spawn_blocking(move || {
            let mut work = Work {
                file,
                hasher: Hasher::new(expected.as_ref()),
                expected,
                mark,
                at: 0,
                sent: kept,
                restarted: false,
            };
            work.run(&mut received, kept).map_err(|error| could_not("writing", &path, error))?;
            Ok(Written { size: work.at, digests: work.hasher.finish(), restarted: work.restarted })
        });
        Self { orders: Some(orders), thread }
    }

    /// Gives the thread something to do.
    pub async fn send(&mut self, order: Order) -> Result<(), Failure> {
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
    pub async fn finish(&mut self) -> Result<Written> {
        self.orders = None;
        match (&mut self.thread).await {
            Ok(result) => result,
            Err(error) => Err(Error::internal("the writer of a download broke off").source(error)),
        }
    }
}

struct Work {
    file: File,
    hasher: Hasher,
    expected: Option<Digest>,
    mark: Arc<Watermark>,
    at: u64,
    /// What is behind this is on its way to the disk.
    sent: u64,
    restarted: bool,
}

impl Work {
    fn run(&mut self, orders: &mut mpsc::Receiver<Order>, kept: u64) -> io::Result<()> {
        self.read_kept(kept)?;
        while let Some(order) = orders.blocking_recv() {
            match order {
                Order::Write(bytes) => {
                    self.write(&bytes)?;
                    self.moved(&bytes);
                    self.send_to_disk();
                }
                Order::Restart => self.restart()?,
            }
        }
        // A hole at the end is not part of the file yet.
        self.file.set_len(self.at)
    }

    fn read_kept(&mut self, kept: u64) -> io::Result<()> {
        let mut buffer = vec![0; READ.min(kept as usize)];
        while self.at < kept {
            let count = buffer.len().min((kept - self.at) as usize);
            self.file.read_exact_at(&mut buffer[..count], self.at)?;
            self.moved(&buffer[..count]);
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() >= HOLE && is_zero(bytes) {
            return self.file.set_len(self.at + bytes.len() as u64);
        }
        self.file.write_all_at(bytes, self.at)
    }

    fn moved(&mut self, bytes: &[u8]) {
        self.at += bytes.len() as u64;
        self.mark.advance(self.at);
        self.hasher.update(bytes);
    }

    /// Begins to write back what was written. The advice does so first, and can then drop nothing, since nothing of it is
    /// clean yet (posix_fadvise(2), mm/fadvise.c; PostgreSQL's pg_flush_data does the same): who reads along reads memory.
    fn send_to_disk(&mut self) {
        if let Some(length) = NonZeroU64::new(self.at - self.sent).filter(|length| length.get() >= WRITE_BACK) {
            let _ = fadvise(&self.file, self.sent, Some(length), Advice::DontNeed);
            self.sent = self.at;
        }
    }

    fn restart(&mut self) -> io::Result<()> {
        if self.mark.has_moved() {
            // What comes now may be other bytes than those that were read.
            self.mark.fail();
            self.restarted = true;
        }
        self.file.set_len(0)?;
        (self.at, self.sent) = (0, 0);
        self.hasher = Hasher::new(self.expected.as_ref());
        Ok(())
    }
}
