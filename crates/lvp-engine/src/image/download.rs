//! Bytes from a source into a partial file, hashed on the way, with their space reserved.
//!
//! ```text
//!  source ──pieces or one stream──► this task ──channel──► writer thread: file, mark, hash
//!    └─ cut ─► retry: at the offset when the source has a strong ETag and ranges, else from the start
//! ```
//! Network, hash and whoever reads along behind the mark overlap; the channel bounds memory. What an interrupted run left
//! is hashed first and then continued. It leaves out what becomes of the file: see `images`.

use std::{fs::File, path::PathBuf, sync::Arc};

use bytes::Bytes;
use lvp_api::{Digest, ErrorCode};
use tokio::sync::oneshot;

use super::{
    flight::Lead,
    hasher::Digests,
    index::Reservation,
    partial::Partial,
    pieces::{Broken, Pieces},
    retry::{Again, Failure, Retries, WORTHWHILE},
    source::{Source, SourceInfo, blocking},
    writer::{Order, Writer, Written},
};
use crate::{
    error::{Error, Result},
    fault,
    progress::Progress,
    watermark::Watermark,
};

/// When the size is not known, space is reserved in steps of this many bytes.
const STEP: u64 = 64 << 20;
/// How often the reservation learns what is written, in bytes.
const ACCOUNTED: u64 = 4 << 20;

/// Who wants to read an image while it comes.
pub struct Along {
    /// How far the file is written. When it fails, what was read may not be the image.
    pub mark: Arc<Watermark>,
    /// Gets the file once it is there; dropped when no download begins, or one of unknown size.
    pub begun: oneshot::Sender<Growing>,
}

/// The file of a download that has begun.
pub struct Growing {
    /// Opened for reading.
    pub file: File,
    /// What to call it.
    pub path: PathBuf,
    /// The size that it will have, in bytes.
    pub size: u64,
}

/// A complete download.
pub(super) struct Downloaded {
    pub partial: Partial,
    pub size: u64,
    pub digests: Digests,
    /// Whether some of its bytes are from an earlier run.
    pub resumed: bool,
    /// Whether who read along read the image.
    pub along_is_good: bool,
    /// Bytes that came from the source.
    pub fetched: u64,
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

/// How far a download is.
struct Position {
    offset: u64,
    total: Option<u64>,
    reserved: u64,
    accounted: u64,
    fetched: u64,
}

/// Nothing becomes good any more when the download is given up, however that happens.
struct FailOnDrop(Arc<Watermark>);

impl Drop for FailOnDrop {
    fn drop(&mut self) {
        self.0.fail();
    }
}

impl Download<'_> {
    /// Fetches what is missing of the source into a file that has its first `kept` bytes.
    pub async fn run(&self, partial: Partial, file: File, kept: u64, along: Option<Along>) -> Result<Downloaded> {
        let mark = along.as_ref().map_or_else(Arc::default, |along| along.mark.clone());
        let _fails = FailOnDrop(mark.clone());
        if let (Some(along), Some(size)) = (along, self.info.size) {
            let path = partial.path().to_owned();
            let file = file.try_clone().map_err(|error| Error::io("opening", &path, error))?;
            // Who wanted to read along may have gone.
            let _ = along.begun.send(Growing { file, path, size });
        }
        let mut writer = Writer::start(file, partial.path(), self.expected, mark, kept);
        if kept > 0 {
            tracing::info!(file = %partial.path().display(), bytes = kept, "continuing the download of an earlier run");
        }
        match self.complete(&mut writer, kept).await {
            Ok((Written { size, digests, restarted }, fetched)) => {
                let (resumed, along_is_good) = (kept > 0, !restarted);
                Ok(Downloaded { partial, size, digests, resumed, along_is_good, fetched })
            }
            Err(error) => {
                if error.code() == ErrorCode::ShuttingDown {
                    // All that came is worth keeping; nothing writes after this.
                    let _ = writer.finish().await;
                    partial.leave();
                }
                Err(error)
            }
        }
    }

    /// Receives and writes everything from `kept` on; gives also how many bytes came.
    async fn complete(&self, writer: &mut Writer, kept: u64) -> Result<(Written, u64)> {
        let (size, fetched) = self.receive(writer, kept).await?;
        let written = self.progress.until_stopped(writer.finish()).await??;
        if written.size == size {
            return Ok((written, fetched));
        }
        Err(Error::internal("a download has another length than was received"))
    }

    /// Receives everything from `from` on; gives the size, and how much of it came now.
    async fn receive(&self, writer: &mut Writer, from: u64) -> Result<(u64, u64)> {
        let mut at = Position { offset: from, total: self.info.size, reserved: 0, accounted: from, fetched: 0 };
        self.progress.set_processed(from);
        if let Some(total) = at.total {
            self.announce(&mut at, total).await?;
        }
        let size = self.info.size.filter(|_| Pieces::suit(self.info) && self.source.is_remote());
        let in_pieces = match size {
            Some(size) => self.receive_pieces(writer, &mut at, size).await?,
            None => false,
        };
        if !in_pieces {
            self.receive_stream(writer, &mut at).await?;
        }
        Ok((at.offset, at.fetched))
    }

    /// Several ranges at once; false when the server has none after all.
    async fn receive_pieces(&self, writer: &mut Writer, at: &mut Position, size: u64) -> Result<bool> {
        let mut pieces = Pieces::new(self.source.clone(), self.info.clone(), at.offset, size, self.progress.clone());
        loop {
            match self.progress.until_stopped(pieces.next()).await? {
                Ok(Some(chunk)) => self.take(writer, at, chunk).await.map_err(|failure| failure.error)?,
                Ok(None) => return Ok(true),
                Err(Broken::NoRanges) => return Ok(false),
                Err(Broken::Failed(error)) => return Err(error),
            }
        }
    }

    /// One stream, begun again where it broke off, or at the start where the source cannot do better.
    async fn receive_stream(&self, writer: &mut Writer, at: &mut Position) -> Result<()> {
        let resumes = self.info.accepts_ranges && self.info.strong_etag().is_some();
        let mut retries = Retries::new(self.source.settings());
        let is_all = |at: &Position| self.info.size.is_some_and(|size| size > 0 && size == at.offset);
        if is_all(at) {
            // An earlier run left all of it.
            return Ok(());
        }
        loop {
            let before = at.offset;
            let from = if resumes { before } else { 0 };
            match self.progress.until_stopped(self.attempt(writer, at, from)).await? {
                Ok(()) => return Ok(()),
                // The connection broke after the last byte; a definite failure says that what came is not the image.
                Err(failure) if failure.again != Again::Never && is_all(at) => return Ok(()),
                Err(failure) => {
                    retries.pause(failure, resumes && at.offset >= before + WORTHWHILE, self.progress).await?;
                }
            }
        }
    }

    async fn attempt(&self, writer: &mut Writer, at: &mut Position, from: u64) -> Result<(), Failure> {
        let mut transfer = self.source.open(self.info, from, None).await?;
        if transfer.from != at.offset {
            writer.send(Order::Restart).await?;
            at.offset = transfer.from;
            at.accounted = transfer.from;
            self.progress.set_processed(transfer.from);
        }
        if let Some(total) = transfer.total.or(at.total) {
            self.announce(at, total).await?;
        }
        while let Some(chunk) = transfer.next(self.progress).await? {
            self.take(writer, at, chunk).await?;
        }
        match at.total {
            Some(total) if at.offset < total => Err(Failure::soon(self.source.too_short(at.offset))),
            _ => Ok(()),
        }
    }

    /// The size is known.
    async fn announce(&self, at: &mut Position, total: u64) -> Result<()> {
        at.total = Some(total);
        self.progress.set_total(total);
        self.reserve(total).await?;
        at.reserved = at.reserved.max(total);
        Ok(())
    }

    /// The next bytes are here.
    async fn take(&self, writer: &mut Writer, at: &mut Position, chunk: Bytes) -> Result<(), Failure> {
        let length = chunk.len() as u64;
        let end = at.offset + length;
        if let Some(total) = at.total.filter(|total| end > *total) {
            return Err(Failure::never(self.source.too_long(total)));
        }
        if end > at.reserved {
            at.reserved = end + STEP;
            self.reserve(at.reserved).await?;
        }
        writer.send(Order::Write(chunk)).await?;
        fault::point("download.received").map_err(Failure::never)?;
        at.offset = end;
        at.fetched += length;
        self.progress.advance(length);
        self.lead.show(end, at.total.unwrap_or(0));
        if end - at.accounted >= ACCOUNTED {
            // The last of it may be on its way to the writer.
            self.reservation.set_written(at.accounted);
            at.accounted = end;
        }
        Ok(())
    }

    async fn reserve(&self, size: u64) -> Result<()> {
        let reservation = self.reservation.clone();
        blocking(move || reservation.ensure(size)).await.map(|_| ())
    }
}
