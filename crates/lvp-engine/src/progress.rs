//! How far a job is, how fast it may go, and whether it shall stop: one handle shared by the job's task, its worker threads and its watchers.
//!
//! Workers call [`Progress::advance`] (one atomic addition) and [`Progress::check`]; watchers call
//! [`Progress::snapshot`], which does all the arithmetic. It leaves out storing and sending.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use lvp_api::{ErrorCode, Stage, StageTime};
use tokio::time;
use tokio_util::sync::CancellationToken;

use crate::{
    error::{Error, Result},
    limit::Limits,
    space::Spender,
};

/// The rate is measured over this long.
const RATE_WINDOW: Duration = Duration::from_secs(5);
/// Two samples of the rate are at least this far apart.
const SAMPLE_DISTANCE: Duration = Duration::from_millis(200);
/// A thread that waits looks this often whether to stop.
const LOOK: Duration = Duration::from_millis(100);
/// Who writes more waits for so many bytes at a time: a rate that changes holds for the next part.
const PART: u64 = 1 << 20;

/// Why a job is told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Its user cancelled it: undo.
    Cancel,
    /// The daemon stops: leave everything as recorded, to be resumed.
    Shutdown,
}

/// A shared handle; clones are the same progress.
#[derive(Clone, Default)]
pub struct Progress {
    counts: Arc<Counts>,
    stopping: Arc<Stopping>,
    limits: Limits,
    spender: Spender,
}

#[derive(Default)]
struct Counts {
    processed: AtomicU64,
    total: AtomicU64,
    percent: AtomicU8,
    stage: Mutex<StageClock>,
    /// The counts of a piece of work beside, where those are shown.
    shown: Mutex<Option<Arc<Counts>>>,
}

#[derive(Default)]
struct Stopping {
    reason: Mutex<Option<Stop>>,
    token: CancellationToken,
}

struct StageClock {
    stage: Stage,
    since: Instant,
    /// The stages before, each once, in the order of their first time.
    past: Vec<(Stage, Duration)>,
    samples: VecDeque<(Instant, u64)>,
}

impl Default for StageClock {
    fn default() -> Self {
        Self { stage: Stage::Queued, since: Instant::now(), past: Vec::new(), samples: VecDeque::new() }
    }
}

/// A poisoned lock holds numbers that are still numbers.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The part of the whole that a stage has, in percent: from, to. By experience, not by promise: a download and a
/// populate take most of the time.
fn share(stage: Stage) -> (u8, u8) {
    match stage {
        Stage::Queued | Stage::CreatingVolume => (0, 0),
        Stage::Downloading => (0, 50),
        Stage::Verifying => (50, 62),
        Stage::Populating => (62, 97),
        Stage::Finalizing => (97, 99),
    }
}

impl Progress {
    /// The progress of work that goes on beside, in the same job: it stops with the job, but counts for itself. It is not
    /// shown until [`show`](Self::show).
    #[must_use]
    pub fn beside(&self) -> Self {
        Self { counts: Arc::default(), ..self.clone() }
    }

    /// The same progress, of work that keeps these limits.
    #[must_use]
    pub fn limited(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// The same progress, of work whose writes take promised space.
    #[must_use]
    pub fn spending(self, spender: Spender) -> Self {
        Self { spender, ..self }
    }

    /// Shows another piece of work's counts as the job's own, until the next stage begins.
    pub fn show(&self, beside: &Self) {
        let stage = locked(&beside.counts.stage).stage;
        locked(&self.counts.stage).switch(stage);
        *locked(&self.counts.shown) = Some(beside.counts.clone());
    }

    /// Begins a stage of `total` bytes (0: not known).
    pub fn enter(&self, stage: Stage, total: u64) {
        *locked(&self.counts.shown) = None;
        let mut clock = locked(&self.counts.stage);
        clock.switch(stage);
        clock.samples.clear();
        self.counts.processed.store(0, Ordering::Relaxed);
        self.counts.total.store(total, Ordering::Relaxed);
    }

    /// Says how many bytes the stage has, once known.
    pub fn set_total(&self, total: u64) {
        self.counts.total.store(total, Ordering::Relaxed);
    }

    /// Counts bytes done.
    pub fn advance(&self, bytes: u64) {
        self.counts.processed.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Sets the bytes done, for a stage that starts in the middle or again.
    pub fn set_processed(&self, bytes: u64) {
        self.counts.processed.store(bytes, Ordering::Relaxed);
    }

    /// Tells the job to stop. The first reason stays, but a user's cancel outranks a shutdown.
    pub fn stop(&self, reason: Stop) {
        let mut stop = locked(&self.stopping.reason);
        if stop.is_none() || reason == Stop::Cancel {
            *stop = Some(reason);
        }
        self.stopping.token.cancel();
    }

    /// Why the job shall stop, if it shall.
    pub fn stop_reason(&self) -> Option<Stop> {
        *locked(&self.stopping.reason)
    }

    /// An error when the job shall stop; to be asked at least every few MiB.
    pub fn check(&self) -> Result<()> {
        if !self.stopping.token.is_cancelled() {
            return Ok(());
        }
        Err(match self.stop_reason() {
            Some(Stop::Shutdown) => {
                Error::new(ErrorCode::ShuttingDown, "the daemon is stopping; the job will be resumed")
            }
            _ => Error::new(ErrorCode::Cancelled, "the job was cancelled"),
        })
    }

    /// Waits until the job shall stop.
    pub async fn stopped(&self) {
        self.stopping.token.cancelled().await;
    }

    /// Runs a future, but no longer than until the job shall stop.
    pub async fn until_stopped<T>(&self, future: impl Future<Output = T>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.stopped() => Err(self.check().expect_err("stopped")),
            value = future => Ok(value),
        }
    }

    /// Waits as long as the limits want after so many bytes of an image came: over the network, or from a file.
    pub async fn pace_image(&self, bytes: u64, is_file: bool) {
        let wait = if is_file { self.limits.after_copy(bytes) } else { self.limits.after_download(bytes) };
        if !wait.is_zero() {
            time::sleep(wait).await;
        }
    }

    /// Keeps the thread as long as the limits want before so many bytes are written to a volume.
    ///
    /// # Errors
    /// As [`check`](Self::check), soon after the job is told to stop; `insufficient_space` when the work would take more
    /// than it was promised.
    pub fn pace_write(&self, bytes: u64) -> Result<()> {
        self.spender.may_take(bytes)?;
        let mut rest = bytes;
        while rest > 0 {
            let part = rest.min(PART);
            self.keep_waiting(self.limits.before_write(part))?;
            rest -= part;
        }
        self.check()
    }

    /// Keeps the thread so long, or until the job is told to stop.
    fn keep_waiting(&self, mut left: Duration) -> Result<()> {
        while !left.is_zero() {
            self.check()?;
            let step = left.min(LOOK);
            thread::sleep(step);
            left -= step;
        }
        Ok(())
    }

    /// Notes that so many bytes were written to a volume.
    pub fn wrote(&self, bytes: u64) {
        self.spender.took(bytes);
    }

    /// How long each stage has been shown so far.
    pub fn stage_times(&self) -> Vec<StageTime> {
        let mut clock = locked(&self.counts.stage);
        let stage = clock.stage;
        clock.switch(stage);
        let past = clock.past.iter().filter(|(stage, _)| *stage != Stage::Queued);
        past.map(|(stage, time)| StageTime { stage: *stage, milliseconds: time.as_millis() as u64 }).collect()
    }

    /// The numbers now.
    pub fn snapshot(&self) -> lvp_api::Progress {
        let shown = locked(&self.counts.shown).clone();
        let mut snapshot = shown.as_ref().unwrap_or(&self.counts).snapshot();
        snapshot.percent = self.counts.percent.fetch_max(snapshot.percent, Ordering::Relaxed).max(snapshot.percent);
        snapshot
    }
}

impl Counts {
    /// The numbers now; the percentage may go back here.
    fn snapshot(&self) -> lvp_api::Progress {
        let mut clock = locked(&self.stage);
        let total = self.total.load(Ordering::Relaxed);
        let mut processed = self.processed.load(Ordering::Relaxed);
        if total > 0 {
            processed = processed.min(total);
        }
        let (from, to) = share(clock.stage);
        let done = if total == 0 { 0.0 } else { processed as f64 / total as f64 };
        let bytes_per_second = clock.rate(Instant::now(), processed);
        lvp_api::Progress {
            stage: clock.stage,
            percent: from + (f64::from(to - from) * done) as u8,
            bytes_processed: processed,
            bytes_total: total,
            bytes_per_second,
            seconds_left: bytes_per_second
                .filter(|rate| *rate > 0 && total > 0)
                .map(|rate| (total - processed).div_ceil(rate)),
        }
    }
}

impl StageClock {
    /// Another stage begins.
    fn switch(&mut self, stage: Stage) {
        let now = Instant::now();
        let took = now.duration_since(std::mem::replace(&mut self.since, now));
        match self.past.iter_mut().find(|(known, _)| *known == self.stage) {
            Some((_, time)) => *time += took,
            None => self.past.push((self.stage, took)),
        }
        self.stage = stage;
    }

    /// Takes a sample and gives the mean rate over the window.
    fn rate(&mut self, now: Instant, processed: u64) -> Option<u64> {
        if self.samples.back().is_none_or(|(last, _)| now.duration_since(*last) >= SAMPLE_DISTANCE) {
            self.samples.push_back((now, processed));
        }
        while self.samples.len() > 2
            && self.samples.front().is_some_and(|(first, _)| now.duration_since(*first) > RATE_WINDOW)
        {
            self.samples.pop_front();
        }
        let (first, from) = *self.samples.front()?;
        let seconds = now.duration_since(first).as_secs_f64();
        (seconds >= SAMPLE_DISTANCE.as_secs_f64() && processed > from)
            .then(|| ((processed - from) as f64 / seconds) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_percentage_never_goes_back() {
        let progress = Progress::default();
        let mut last = 0;
        progress.enter(Stage::Downloading, 100);
        for step in [50, 50] {
            progress.advance(step);
            let percent = progress.snapshot().percent;
            assert!(percent >= last);
            last = percent;
        }
        assert_eq!(last, 50);
        // A download that starts again from the beginning.
        progress.enter(Stage::Downloading, 100);
        assert_eq!(progress.snapshot().percent, 50);
        progress.enter(Stage::Finalizing, 0);
        assert_eq!(progress.snapshot().percent, 97);
    }

    #[test]
    fn work_beside_is_shown_when_told_and_stops_with_the_job() {
        let progress = Progress::default();
        let beside = progress.beside();
        progress.enter(Stage::Downloading, 100);
        beside.enter(Stage::Populating, 10);
        beside.advance(5);
        assert_eq!(progress.snapshot().bytes_processed, 0);
        progress.show(&beside);
        let shown = progress.snapshot();
        assert_eq!((shown.stage, shown.bytes_processed, shown.percent), (Stage::Populating, 5, 79));
        progress.enter(Stage::Downloading, 100);
        let again = progress.snapshot();
        assert_eq!((again.stage, again.bytes_processed, again.percent), (Stage::Downloading, 0, 79));
        let times: Vec<Stage> = progress.stage_times().into_iter().map(|time| time.stage).collect();
        assert_eq!(times, [Stage::Downloading, Stage::Populating]);
        progress.stop(Stop::Cancel);
        assert!(beside.check().is_err());
    }

    #[test]
    fn a_stop_is_an_error_with_its_reason() {
        let progress = Progress::default();
        assert!(progress.check().is_ok());
        progress.stop(Stop::Shutdown);
        assert_eq!(progress.check().unwrap_err().code(), ErrorCode::ShuttingDown);
        progress.stop(Stop::Cancel);
        progress.stop(Stop::Shutdown);
        assert_eq!(progress.check().unwrap_err().code(), ErrorCode::Cancelled);
    }

    #[test]
    fn the_rate_is_a_mean_over_the_window() {
        let mut clock = StageClock::default();
        let start = Instant::now();
        assert_eq!(clock.rate(start, 0), None);
        assert_eq!(clock.rate(start + Duration::from_secs(1), 1000), Some(1000));
        assert_eq!(clock.rate(start + Duration::from_secs(2), 4000), Some(2000));
    }
}
