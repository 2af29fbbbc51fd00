//! One object by several ranges at once, given out in order.
//!
//! ```text
//!   piece 0 ──chunks──► given out as they come
//!   piece 1 ──chunks──► kept          each is tried again by itself, from where it broke off
//!   piece 2 ──chunks──► kept          as many under way as make it faster
//! ```
//! Memory is bounded by the window of the pieces under way. It leaves out servers without ranges, and what the bytes are for.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::AtomicU32},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{sync::mpsc, task::JoinSet};

use super::{
    retry::{Failure, Retries, WORTHWHILE},
    source::{Source, SourceInfo},
};
use crate::{error::Error, progress::Progress};

/// Bytes of a piece at most: so many that the wait for an answer counts little.
const PIECE: u64 = 4 << 20;
/// Bytes of all pieces under way at most: they are kept, but for the first one's.
const WINDOW: u64 = 12 << 20;
/// Pieces under way: one is read while the next is asked for, and no more than memory allows.
const FEWEST: usize = 2;
const MOST: usize = 6;
/// Pieces after which their number is thought over.
const ROUND: u32 = 4;
/// So much faster must one more piece make it.
const GAIN: f64 = 1.1;

/// Why no more bytes come.
pub(super) enum Broken {
    /// The server answers a range with the whole: it must be read as one stream.
    NoRanges,
    /// All attempts failed.
    Failed(Error),
}

/// The pieces of one object from some offset to its end.
pub(super) struct Pieces {
    source: Source,
    info: SourceInfo,
    progress: Progress,
    /// Where the next piece begins, and the object's size.
    next: u64,
    size: u64,
    under_way: VecDeque<mpsc::UnboundedReceiver<Result<Bytes, Broken>>>,
    /// Ends them when this is dropped.
    tasks: JoinSet<()>,
    width: Width,
    /// Failures of all pieces.
    failures: Arc<AtomicU32>,
}

impl Pieces {
    /// Whether an object is worth reading so, and its source names its content so that its pieces fit together.
    pub fn suit(info: &SourceInfo) -> bool {
        info.accepts_ranges && info.strong_etag().is_some() && info.size.is_some_and(|size| size > PIECE)
    }

    /// From `from` to the `size` of what `info` describes.
    pub fn new(source: Source, info: SourceInfo, from: u64, size: u64, progress: Progress) -> Self {
        let (under_way, tasks, width) = (VecDeque::new(), JoinSet::new(), Width::new(Instant::now()));
        Self { source, info, progress, next: from, size, under_way, tasks, width, failures: Arc::default() }
    }

    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        loop {
            while self.under_way.len() < self.width.now && self.next < self.size {
                self.begin_piece();
            }
            let Some(first) = self.under_way.front_mut() else { return Ok(None) };
            let asked = Instant::now();
            let chunk = first.recv().await;
            self.width.waited += asked.elapsed();
            match chunk {
                Some(Ok(chunk)) => {
                    self.width.bytes += chunk.len() as u64;
                    return Ok(Some(chunk));
                }
                Some(Err(broken)) => return Err(broken),
                None => {
                    self.under_way.pop_front();
                    self.width.end_piece(Instant::now());
                }
            }
        }
    }

    fn begin_piece(&mut self) {
        let end = (self.next + self.width.piece()).min(self.size);
        let (chunks, given) = mpsc::unbounded_channel();
        let piece = Piece {
            source: self.source.clone(),
            info: self.info.clone(),
            progress: self.progress.clone(),
            at: self.next,
            end,
            chunks,
            failures: Arc::clone(&self.failures),
        };
        self.tasks.spawn(piece.fetch());
        while self.tasks.try_join_next().is_some() {}
        self.under_way.push_back(given);
        self.next = end;
    }
}

/// One range under way.
struct Piece {
    source: Source,
    info: SourceInfo,
    progress: Progress,
    at: u64,
    end: u64,
    chunks: mpsc::UnboundedSender<Result<Bytes, Broken>>,
    failures: Arc<AtomicU32>,
}

impl Piece {
    async fn fetch(mut self) {
        let source = self.source.clone();
        let mut retries = Retries::of_part(source.settings(), Arc::clone(&self.failures));
        loop {
            let before = self.at;
            let broken = match self.attempt().await {
                Ok(true) => return,
                Ok(false) => Broken::NoRanges,
                Err(failure) => {
                    let moved_on = self.at - before >= WORTHWHILE;
                    match retries.pause(failure, moved_on, &self.progress).await {
                        Ok(()) => continue,
                        Err(error) => Broken::Failed(error),
                    }
                }
            };
            // Nobody waits for it any more: that is no error.
            let _ = self.chunks.send(Err(broken));
            return;
        }
    }

    /// One request for the rest of the piece; false when its answer is no range.
    async fn attempt(&mut self) -> Result<bool, Failure> {
        let mut transfer = self.source.open(&self.info, self.at, Some(self.end)).await?;
        if !transfer.is_range {
            return Ok(false);
        }
        while self.at < self.end {
            let Some(chunk) = transfer.next(&self.progress).await? else {
                return Err(Failure::soon(self.source.too_short(self.at)));
            };
            let end = self.at + chunk.len() as u64;
            if end > self.end {
                return Err(Failure::never(self.source.too_long(self.end)));
            }
            self.at = end;
            // A chunk is a part of the client's buffer, which is larger than what came: kept as it is, it would keep more
            // memory than it has bytes, and the client would have to take a new buffer for the next.
            if self.chunks.send(Ok(Bytes::copy_from_slice(&chunk))).is_err() {
                return Ok(true);
            }
        }
        Ok(true)
    }
}

/// How many pieces are under way: more as long as more are faster, and only while the source is what is waited for.
struct Width {
    now: usize,
    settled: bool,
    pieces: u32,
    since: Instant,
    bytes: u64,
    waited: Duration,
    /// Bytes a second of the round before.
    before: f64,
}

impl Width {
    fn new(now: Instant) -> Self {
        Self { now: FEWEST, settled: false, pieces: 0, since: now, bytes: 0, waited: Duration::ZERO, before: 0.0 }
    }

    /// Bytes of the next piece.
    fn piece(&self) -> u64 {
        PIECE.min(WINDOW / self.now as u64)
    }

    fn end_piece(&mut self, now: Instant) {
        self.pieces += 1;
        if self.pieces < ROUND {
            return;
        }
        let took = now.duration_since(self.since);
        let rate = self.bytes as f64 / took.as_secs_f64().max(1e-6);
        let source_is_slowest = self.waited * 2 > took;
        if source_is_slowest && !self.settled {
            if rate > self.before * GAIN {
                self.settled = self.now == MOST;
                self.now = (self.now + 1).min(MOST);
            } else {
                self.settled = true;
                self.now = (self.now - 1).max(FEWEST);
            }
        }
        *self = Self { since: now, pieces: 0, bytes: 0, waited: Duration::ZERO, before: rate, ..*self };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The width after so many rounds from a source whose rate is this function of the width.
    fn settled(rounds: u32, waits: bool, rate: impl Fn(usize) -> f64) -> usize {
        let mut now = Instant::now();
        let mut width = Width::new(now);
        for _ in 0..rounds * ROUND {
            let took = Duration::from_secs_f64(width.piece() as f64 / rate(width.now));
            now += took;
            width.bytes += width.piece();
            width.waited += if waits { took } else { Duration::ZERO };
            width.end_piece(now);
        }
        width.now
    }

    #[test]
    fn more_pieces_are_under_way_only_where_that_is_faster() {
        assert_eq!(settled(20, true, |width| 1e6 * width as f64), MOST);
        assert_eq!(settled(20, true, |_| 1e8), FEWEST);
        assert_eq!(settled(20, true, |width| 1e6 * width.min(4) as f64), 4);
        assert_eq!(settled(20, false, |width| 1e6 * width as f64), FEWEST, "the source is not what is waited for");
    }
}
