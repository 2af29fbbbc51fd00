//! The copy of an image to a target, in parallel: after it every byte of the target is image or zero.
//!
//! The target is cut into chunks on a fixed grid, so that every block of it has one writer and every write is aligned.
//! Workers take chunks one after the other from a [`Plan`], which walks the image's extents; each assembles a chunk in
//! its own buffer, and writes what is not zero. What reads as zero already is left alone; other zeros are made by the
//! target where they are long. A compressed raw image has no extents: see [`stream`]. It leaves out opening the target, which
//! its caller holds, and the final flush ([`OpenTarget::sync`]), which is the caller's next step.

mod crew;
mod plan;
mod stream;
mod worker;
mod writer;

use std::{
    sync::{Mutex, PoisonError},
    thread,
};

use crew::Crew;
use lvp_api::{ContentDigest, ErrorCode, Stage, ZeroPolicy};
pub(super) use plan::{Piece, Plan};
use serde::{Deserialize, Serialize};
use worker::Worker;

use super::{Image, content::ContentHasher};
use crate::{
    error::{Error, Result},
    host::{
        block::{BLOCK, BlockTarget, OpenTarget},
        priority::IoPriority,
    },
    progress::Progress,
};

/// A chunk is this long, or a cluster where that is longer: what one write takes at most. On a new file of ext4, writes of
/// 1 MiB take half as long again, since each allocates blocks; larger ones gain little.
pub(super) const CHUNK: u64 = 2 << 20;

/// How to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PopulateOptions {
    /// Threads, 1 to [`WORKERS_LIMIT`](Self::WORKERS_LIMIT); each holds a chunk and, of a compressed image, a cluster.
    pub workers: usize,
    /// Which bytes are made zero.
    pub zero: ZeroPolicy,
    /// How urgent its reads and writes are.
    pub io_priority: IoPriority,
}

impl PopulateOptions {
    /// The most threads.
    pub const WORKERS_LIMIT: usize = 64;
}

impl Default for PopulateOptions {
    /// Two threads for each processor: one decodes while the other waits for the target. At most 16.
    fn default() -> Self {
        let workers = thread::available_parallelism().map_or(2, usize::from).saturating_mul(2).min(16);
        Self { workers, zero: ZeroPolicy::Full, io_priority: IoPriority::Normal }
    }
}

/// What a copy did. Written, zeroed, skipped and left bytes are together the target's size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Populated {
    /// What was done, in bytes.
    #[serde(flatten)]
    pub counts: Counts,
    /// The digest of what the target holds now.
    pub content: ContentDigest,
}

/// The bytes of a copy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Bytes of the disk that were read from the image and, where compressed, decoded.
    pub bytes_decoded: u64,
    /// Bytes written; where the target does not read zero, short runs of zeros between data are among them.
    pub bytes_written: u64,
    /// Bytes made zero by the target, or by writing zeros where it cannot.
    pub bytes_zeroed: u64,
    /// Those of them that were zeroed by one command to the device or file system for many.
    pub bytes_offloaded: u64,
    /// Bytes left alone, because they read as zero before.
    pub bytes_skipped: u64,
    /// Bytes behind the image that were left as they were, because nobody wanted them zeroed.
    pub bytes_left: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.bytes_decoded += other.bytes_decoded;
        self.bytes_written += other.bytes_written;
        self.bytes_zeroed += other.bytes_zeroed;
        self.bytes_offloaded += other.bytes_offloaded;
        self.bytes_skipped += other.bytes_skipped;
        self.bytes_left += other.bytes_left;
    }
}

/// Copies the image to the target and zeroes the rest of it.
///
/// Enters the stage `populating`, whose total is the work: the image's stored bytes where the target reads zero (of a
/// compressed raw image, its own size), else the target's size. Does not flush: see [`OpenTarget::sync`].
///
/// # Errors
/// `image_too_large` when the target is smaller than the disk, which of a compressed raw image may show only when the
/// target is full: see [`measure`](super::measure); what the image, the target or `progress` give. The first error of any
/// worker stops all of them; the target is then partly written.
pub fn populate(image: &Image, open: &OpenTarget, options: &PopulateOptions, progress: &Progress) -> Result<Populated> {
    let target = open.target();
    if image.least_size() > target.size {
        return Err(too_large(image.least_size(), target));
    }
    progress.check()?;
    let workers = options.workers.clamp(1, PopulateOptions::WORKERS_LIMIT);
    let content = ContentHasher::default();
    let end = match (options.zero, image.virtual_size()) {
        (ZeroPolicy::Image, Some(size)) => size.next_multiple_of(BLOCK as u64).min(target.size),
        _ => target.size,
    };
    progress.enter(Stage::Populating, if target.reads_zero { image.data_bytes() } else { end });
    if let Some(disk) = image.stream(progress, target.reads_zero)? {
        let counts = stream::copy(disk, open, target, &content, PopulateOptions { workers, ..*options }, progress)?;
        return Ok(Populated { counts, content: content.finish() });
    }
    let chunk = CHUNK.max(image.cluster_size());
    let copy = Copy {
        image,
        target: open,
        reads_zero: target.reads_zero,
        chunk,
        progress,
        plan: Mutex::new(Plan::new(image.extents(), end, chunk)),
        content: &content,
        crew: Crew::new(progress, open, options.io_priority),
    };
    let mut counts = run_workers(&copy, workers)?;
    counts.bytes_left = target.size - end;
    drop(copy);
    Ok(Populated { counts, content: content.finish() })
}

fn run_workers(copy: &Copy<'_>, workers: usize) -> Result<Counts> {
    thread::scope(|scope| {
        let mut threads = Vec::with_capacity(workers);
        for index in 0..workers {
            match copy.crew.spawn(scope, format!("populate-{index}"), move || Worker::new(copy)?.run()) {
                Ok(thread) => threads.push(thread),
                // Fewer threads are slower, none is an error.
                Err(error) if threads.is_empty() => return Err(crew::not_started(error)),
                Err(_) => break,
            }
        }
        crew::collect(threads)
    })
}

/// What the workers of one copy share.
struct Copy<'a> {
    image: &'a Image,
    target: &'a OpenTarget,
    reads_zero: bool,
    chunk: u64,
    progress: &'a Progress,
    plan: Mutex<Plan<'a>>,
    content: &'a ContentHasher,
    crew: Crew<'a>,
}

impl Copy<'_> {
    fn next_piece(&self) -> Result<Option<Piece>> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner).next()
    }
}

fn too_large(virtual_size: u64, target: &BlockTarget) -> Error {
    Error::new(
        ErrorCode::ImageTooLarge,
        format!(
            "the image's disk of {virtual_size} bytes does not fit the {} bytes of {}",
            target.size,
            target.path.display()
        ),
    )
    .hint(format!("ask for a volume of at least {virtual_size} bytes"))
    .detail("image_bytes", virtual_size)
    .detail("volume_bytes", target.size)
}
