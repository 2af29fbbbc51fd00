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

use lvp_api::{ErrorCode, Stage};
use plan::{Piece, Plan};
use worker::Worker;

use super::Image;
use crate::{
    error::{Error, Result},
    host::block::{BlockTarget, OpenTarget},
    progress::Progress,
};

/// A chunk is this long, or a cluster where that is longer: what one write takes at most.
const CHUNK: u64 = 1 << 20;

/// How to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PopulateOptions {
    /// Threads, 1 to [`WORKERS_LIMIT`](Self::WORKERS_LIMIT); each holds about 3 MiB, or two clusters where those are
    /// larger.
    pub workers: usize,
}

impl PopulateOptions {
    /// The most threads.
    pub const WORKERS_LIMIT: usize = 64;
}

impl Default for PopulateOptions {
    /// Two threads for each processor: one decodes while the other waits for the target. At most 16.
    fn default() -> Self {
        Self { workers: thread::available_parallelism().map_or(2, usize::from).saturating_mul(2).min(16) }
    }
}

/// What a copy did. Written, zeroed and skipped bytes are together the target's size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Populated {
    /// Bytes of the disk that were read from the image and, where compressed, decoded.
    pub bytes_decoded: u64,
    /// Bytes written; where the target does not read zero, short runs of zeros between data are among them.
    pub bytes_written: u64,
    /// Bytes made zero by the target, or by writing zeros where it cannot.
    pub bytes_zeroed: u64,
    /// Bytes left alone, because they read as zero before.
    pub bytes_skipped: u64,
}

impl std::ops::AddAssign for Populated {
    fn add_assign(&mut self, other: Self) {
        self.bytes_decoded += other.bytes_decoded;
        self.bytes_written += other.bytes_written;
        self.bytes_zeroed += other.bytes_zeroed;
        self.bytes_skipped += other.bytes_skipped;
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
    let total = if target.reads_zero { image.data_bytes() } else { target.size };
    progress.enter(Stage::Populating, total);
    let chunk = CHUNK.max(image.cluster_size());
    let copy = Copy {
        image,
        target: &open,
        reads_zero: target.reads_zero,
        chunk,
        progress,
        plan: Mutex::new(Plan::new(image.extents(), target.size, chunk)),
        stopped: AtomicBool::new(false),
    };
    let workers = options.workers.clamp(1, PopulateOptions::WORKERS_LIMIT);
    thread::scope(|scope| {
        let mut threads = Vec::with_capacity(workers);
        for index in 0..workers {
            let copy = &copy;
            let work = move || copy.guarded(|| Worker::new(copy)?.run());
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
    stopped: AtomicBool,
}

impl Copy<'_> {
    /// Runs a worker; however it ends but well, the others stop.
    fn guarded(&self, work: impl FnOnce() -> Result<Populated>) -> Result<Populated> {
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
fn collect(threads: Vec<thread::ScopedJoinHandle<'_, Result<Populated>>>) -> Result<Populated> {
    let mut sum = Populated::default();
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
