//! The copy of an image to a target, in parallel: after it every byte of the target is image or zero.
//!
//! The target is cut into chunks on a fixed grid, so that every block of it has one writer and every write is aligned.
//! Workers take chunks one after the other from a [`Plan`], which walks the image's extents; each assembles a chunk in
//! its own buffer, and writes what is not zero. What reads as zero already is left alone; other zeros are made by the
//! target where they are long. It leaves out the final flush ([`sync`]), which is the caller's next step.

mod plan;
mod worker;

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use lvp_api::{ContentDigest, ErrorCode, Stage, ZeroPolicy};
pub(super) use plan::{Piece, Plan};
use serde::{Deserialize, Serialize};
use worker::Worker;

use super::{Image, content::ContentHasher};
use crate::{
    error::{Error, Result},
    host::{
        block::{BLOCK, BlockTarget, OpenTarget},
        confine::confine_decoder,
    },
    progress::Progress,
};

/// A chunk is this long, or a cluster where that is longer: what one write takes at most.
pub(super) const CHUNK: u64 = 1 << 20;

/// How to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PopulateOptions {
    /// Threads, 1 to [`WORKERS_LIMIT`](Self::WORKERS_LIMIT); each holds about 3 MiB, or two clusters where those are
    /// larger.
    pub workers: usize,
    /// Which bytes are made zero.
    pub zero: ZeroPolicy,
}

impl PopulateOptions {
    /// The most threads.
    pub const WORKERS_LIMIT: usize = 64;
}

impl Default for PopulateOptions {
    /// Two threads for each processor: one decodes while the other waits for the target. At most 16.
    fn default() -> Self {
        let workers = thread::available_parallelism().map_or(2, usize::from).saturating_mul(2).min(16);
        Self { workers, zero: ZeroPolicy::Full }
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
/// Enters the stage `populating`, whose total is the work: the image's stored bytes where the target reads zero, else
/// the target's size. Does not flush: see [`sync`].
///
/// # Errors
/// `image_too_large` when the target is smaller than the disk; what the image, the target or `progress` give. The first
/// error of any worker stops all of them; the target is then partly written.
pub fn populate(
    image: &Image,
    target: &BlockTarget,
    options: &PopulateOptions,
    progress: &Progress,
) -> Result<Populated> {
    if image.virtual_size() > target.size {
        return Err(too_large(image.virtual_size(), target));
    }
    progress.check()?;
    let open = OpenTarget::open(target)?;
    let end = match options.zero {
        ZeroPolicy::Full => target.size,
        ZeroPolicy::Image => image.virtual_size().next_multiple_of(BLOCK as u64).min(target.size),
    };
    let total = if target.reads_zero { image.data_bytes() } else { end };
    progress.enter(Stage::Populating, total);
    let chunk = CHUNK.max(image.cluster_size());
    let copy = Copy {
        image,
        target: &open,
        reads_zero: target.reads_zero,
        chunk,
        progress,
        plan: Mutex::new(Plan::new(image.extents(), end, chunk)),
        content: ContentHasher::default(),
        stopped: AtomicBool::new(false),
    };
    let mut counts = run_workers(&copy, options.workers.clamp(1, PopulateOptions::WORKERS_LIMIT))?;
    counts.bytes_left = target.size - end;
    Ok(Populated { counts, content: copy.content.finish() })
}

fn run_workers(copy: &Copy<'_>, workers: usize) -> Result<Counts> {
    thread::scope(|scope| {
        let mut threads = Vec::with_capacity(workers);
        for index in 0..workers {
            let work = move || {
                confine_decoder(&copy.target.descriptors());
                copy.guarded(|| Worker::new(copy)?.run())
            };
            match thread::Builder::new().name(format!("populate-{index}")).spawn_scoped(scope, work) {
                Ok(thread) => threads.push(thread),
                // Fewer threads are slower, none is an error.
                Err(error) if threads.is_empty() => {
                    return Err(Error::internal("no thread could be started").source(error));
                }
                Err(_) => break,
            }
        }
        collect(threads)
    })
}

/// Flushes a target to stable storage.
///
/// # Errors
/// As [`OpenTarget::open`] and [`OpenTarget::sync`].
pub fn sync(target: &BlockTarget) -> Result<()> {
    OpenTarget::open(target)?.sync()
}

/// What the workers of one copy share.
struct Copy<'a> {
    image: &'a Image,
    target: &'a OpenTarget,
    reads_zero: bool,
    chunk: u64,
    progress: &'a Progress,
    plan: Mutex<Plan<'a>>,
    content: ContentHasher,
    stopped: AtomicBool,
}

impl Copy<'_> {
    /// Runs a worker; however it ends but well, the others stop.
    fn guarded(&self, work: impl FnOnce() -> Result<Counts>) -> Result<Counts> {
        struct StopOthers<'a>(Option<&'a AtomicBool>);
        impl Drop for StopOthers<'_> {
            fn drop(&mut self) {
                if let Some(stopped) = self.0 {
                    stopped.store(true, Ordering::Relaxed);
                }
            }
        }
        let mut guard = StopOthers(Some(&self.stopped));
        let done = work()?;
        guard.0 = None;
        Ok(done)
    }

    /// Whether no other worker has failed; an error when the job shall stop.
    fn goes_on(&self) -> Result<bool> {
        self.progress.check()?;
        Ok(!self.stopped.load(Ordering::Relaxed))
    }

    fn next_piece(&self) -> Result<Option<Piece>> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner).next()
    }
}

/// Waits for all workers; the first error in their order counts, a panic last.
fn collect(threads: Vec<thread::ScopedJoinHandle<'_, Result<Counts>>>) -> Result<Counts> {
    let mut sum = Counts::default();
    let mut failed: Option<Error> = None;
    for thread in threads {
        match thread.join() {
            Ok(Ok(done)) => sum += done,
            Ok(Err(error)) => failed = failed.or(Some(error)),
            Err(_) => failed = failed.or_else(|| Some(Error::internal("a thread that copied the image panicked"))),
        }
    }
    failed.map_or(Ok(sum), Err)
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
