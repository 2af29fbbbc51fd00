//! Runs jobs: takes the next from the queue, has its steps done, or taken back when one fails or the user cancels, and records
//! how it ended.
//!
//! ```text
//!  submit ─► store ─► queue ─► steps 1 … n ──────────────► completed
//!                       ▲        │ error, panic ─► undo n … 1 ─► failed
//!                       │        │ cancel ───────► undo n … 1 ─► cancelled
//!                       └────────┘ shutdown, crash: recorded as it is, run again at the next start
//! ```
//! It leaves out how steps are done and recorded ([`steps`](super::steps)), and what they do. No job is lost between two lines: the database says what is to be done, memory only
//! what is being done.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::FutureExt;
use lvp_api::{ErrorCode, JobId, JobKind, JobStatus};
use serde_json::Value;
use tokio::sync::{Notify, watch};

use super::{
    Step,
    hold::{Held, Holder},
    queue::{self, Entry},
    steps::{Steps, panicked},
    store::{Filter, NewJob, RunBy, Store, Stored},
};
use crate::{
    error::{Error, Result},
    fault,
    host::cmd::ended_by_signal,
    metrics,
    progress::{Progress, Stop},
};

/// When a program is ended together with the daemon, the daemon learns of it within this.
const STOP_FOLLOWS: Duration = Duration::from_secs(2);
/// A job that was interrupted this often is not begun again.
const MOST_ATTEMPTS: u32 = 5;
/// How long what failed outside of a step is left alone before it is tried again; twice as long each time, up to the longest.
const BREATH: Duration = Duration::from_secs(1);
const LONGEST_BREATH: Duration = Duration::from_secs(8);

/// Makes the context of a job from what is stored of it.
pub type MakeContext<C> = Box<dyn Fn(&Stored, Progress) -> Result<C> + Send + Sync>;

/// What the use cases give: how a job's context is made, what its steps are, and what of it is recorded.
pub struct Execution<C: 'static> {
    /// Makes the context of a job from what is stored.
    pub context: MakeContext<C>,
    /// The steps of this kind of job.
    pub steps: fn(JobKind) -> &'static [Step<C>],
    /// What of the context is kept with each step.
    pub record: fn(&C) -> Value,
}

/// What to do at the start with jobs that a crash or a shutdown left unfinished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// Run them to their end (a daemon).
    Resume,
    /// Take back those of commands and end them as interrupted; leave the daemon's to it (a command that has work of its own).
    Undo,
    /// Leave them for the next daemon (a command that only looks).
    Leave,
}

/// The runner. Clones are the same one.
pub struct Runner<C: 'static> {
    inner: Arc<Inner<C>>,
}

impl<C: 'static> Clone for Runner<C> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

struct Inner<C: 'static> {
    store: Store,
    execution: Execution<C>,
    limit: usize,
    keep: u32,
    live: Mutex<HashMap<JobId, Live>>,
    /// Keys that are held by no job. Locked after `live`.
    held: Arc<Mutex<Vec<String>>>,
    wake: Arc<Notify>,
    changed: watch::Sender<u64>,
    stopping: AtomicBool,
}

struct Live {
    entry: Entry,
    progress: Progress,
}

impl<C: Send + 'static> Runner<C> {
    /// A runner of `limit` jobs at a time that remembers `keep` ended ones. It runs nothing until [`Runner::begin`].
    pub fn new(store: Store, execution: Execution<C>, limit: usize, keep: u32) -> Self {
        let inner = Inner {
            store,
            execution,
            limit,
            keep,
            live: Mutex::default(),
            held: Arc::default(),
            wake: Arc::default(),
            changed: watch::channel(0).0,
            stopping: AtomicBool::new(false),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Settles what an earlier process left, then runs jobs until [`Runner::shutdown`].
    pub async fn begin(&self, recovery: Recovery) -> Result<()> {
        if recovery == Recovery::Resume {
            self.inner.store.take_over().await?;
        }
        for stored in self.inner.store.unfinished().await? {
            if recovery == Recovery::Leave || (recovery == Recovery::Undo && stored.run_by == RunBy::Daemon) {
                continue;
            }
            // A newer version may have asked for what is not known here. To fail it would make its volume a leftover.
            if let Err(error) = (self.inner.execution.context)(&stored, Progress::default()) {
                self.inner.store.leave(stored.id, &error).await?;
                continue;
            }
            if recovery == Recovery::Undo {
                self.inner.settle_interrupted(stored).await?;
                continue;
            }
            if stored.status == JobStatus::Running {
                tracing::warn!(job_id = %stored.id, attempts = stored.attempts, "job was interrupted and will be resumed");
            }
            self.inner.store.requeue(stored.id).await?;
        }
        let runner = self.clone();
        let leave_old = recovery == Recovery::Leave;
        if !leave_old {
            tokio::spawn(async move { runner.dispatch().await });
        }
        Ok(())
    }

    /// Keeps a job and lets it run in its turn; gives its id, and whether it is new. What a command must leave to the daemon
    /// is refused before: see [`Runner::refuse_left`].
    pub async fn submit(&self, new: NewJob) -> Result<(JobId, bool)> {
        if self.inner.stopping.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorCode::ShuttingDown, "the daemon is stopping and takes no new jobs"));
        }
        let submitted = self.inner.store.insert(new).await?;
        self.inner.wake.notify_one();
        self.inner.announce();
        Ok(submitted)
    }

    /// The job as stored, with its progress of this moment.
    pub async fn get(&self, id: JobId) -> Result<Stored> {
        Ok(self.inner.with_live_progress(self.inner.store.get(id).await?))
    }

    /// Jobs, newest first.
    pub async fn list(&self, filter: Filter) -> Result<Vec<Stored>> {
        let jobs = self.inner.store.list(filter).await?;
        Ok(jobs.into_iter().map(|stored| self.inner.with_live_progress(stored)).collect())
    }

    /// Tells a job to stop. It has ended when its status says so.
    ///
    /// # Errors
    /// `job_finished` when it completed or failed before.
    pub async fn cancel(&self, id: JobId) -> Result<Stored> {
        let before = self.inner.store.get(id).await?;
        match before.status {
            JobStatus::Cancelled => return Ok(before),
            JobStatus::Completed | JobStatus::Failed => {
                return Err(Error::new(ErrorCode::JobFinished, format!("job {id} has {} already", before.status)));
            }
            JobStatus::Pending | JobStatus::Running => {}
        }
        let after = self.inner.store.request_cancel(id).await?;
        if after.is_some_and(|after| after.status == JobStatus::Cancelled) {
            metrics::job_ended(JobStatus::Cancelled);
        }
        let live = self.inner.live().get(&id).map(|live| live.progress.clone());
        match live {
            Some(progress) => progress.stop(Stop::Cancel),
            // A process that is gone ran it: it is run again, to be taken back.
            None if before.status == JobStatus::Running => self.inner.store.requeue_stopped(id).await?,
            None => {}
        }
        self.inner.wake.notify_one();
        self.inner.announce();
        let job = self.get(id).await?;
        self.inner.forget().await;
        Ok(job)
    }

    /// The job that has this exclusive key now. Once its end can be read, it has nothing.
    pub async fn holder(&self, exclusive: &str) -> Result<Option<Holder>> {
        let holds = |live: &&Live| live.entry.exclusive == exclusive;
        let Some(id) = self.inner.live().values().find(holds).map(|live| live.entry.id) else {
            if let Some(job) = self.inner.store.unreadable_about(exclusive) {
                return Ok(Some(Holder::Unreadable(job)));
            }
            let left = self.inner.store.left_to_daemon(exclusive.to_owned()).await?;
            return Ok(left.map(Holder::LeftToDaemon));
        };
        match self.inner.store.get(id).await {
            Ok(job) => Ok((!job.status.is_terminal()).then_some(Holder::Running(id))),
            // It has ended, and was forgotten.
            Err(error) if error.code() == ErrorCode::JobNotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Refuses what must not begin, because an earlier job is about the same: one of the daemon's that will go on with it, in
    /// a command, or one that cannot be read.
    ///
    /// # Errors
    /// `volume_in_use`, with the job.
    pub async fn refuse_left(&self, exclusive: &str, what: &str) -> Result<()> {
        if let Some(job) = self.inner.store.unreadable_about(exclusive) {
            return Err(Holder::Unreadable(job).refusal(what));
        }
        let left = self.inner.store.left_to_daemon(exclusive.to_owned()).await?;
        left.map_or(Ok(()), |job| Err(Holder::LeftToDaemon(job).refusal(what)))
    }

    /// Refuses what would hold up a job that waits for its turn with this exclusive key.
    ///
    /// # Errors
    /// `volume_in_use`, with the job.
    pub async fn refuse_awaited(&self, exclusive: &str, what: &str) -> Result<()> {
        let waiting = self.inner.store.pending().await?;
        let job = waiting.into_iter().find(|(_, key)| key == exclusive);
        job.map_or(Ok(()), |(job, _)| Err(Holder::Awaited(job).refusal(what)))
    }

    /// Holds this exclusive key outside of a job.
    ///
    /// # Errors
    /// `volume_in_use` while a job, or somebody else outside of one, has it.
    pub async fn hold(&self, exclusive: &str, what: &str) -> Result<Held> {
        let held = self.inner.take(exclusive).ok_or_else(|| {
            Error::new(ErrorCode::VolumeInUse, format!("{what} is in the hands of another request"))
                .hint("wait for its end, then try again")
                .retry(true)
        })?;
        // No job begins with it from here on; one that is running has it.
        match self.holder(exclusive).await? {
            Some(holder) => Err(holder.refusal(what)),
            None => Ok(held),
        }
    }

    /// How many jobs run.
    pub fn running(&self) -> usize {
        self.inner.live().len()
    }

    /// Ticks whenever a job changes its status or its stage.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// Begins no job any more, and takes none.
    pub fn retire(&self) {
        self.inner.stopping.store(true, Ordering::Relaxed);
        self.inner.wake.notify_one();
    }

    /// Waits until no job runs, `patience` at most.
    pub async fn idle(&self, patience: Duration) {
        let running = self.running();
        if running > 0 && !patience.is_zero() {
            tracing::info!(running, seconds = patience.as_secs(), "waiting for running jobs to end");
        }
        let _ = tokio::time::timeout(patience, self.none_running()).await;
    }

    async fn none_running(&self) {
        let mut changes = self.changes();
        while self.running() > 0 && changes.changed().await.is_ok() {}
    }

    /// Stops: no new jobs; running ones are left as recorded, to be resumed. Waits for them, `patience` at most.
    pub async fn shutdown(&self, patience: Duration) {
        self.retire();
        for live in self.inner.live().values() {
            live.progress.stop(Stop::Shutdown);
        }
        if tokio::time::timeout(patience, self.none_running()).await.is_err() {
            tracing::warn!(
                running = self.running(),
                "jobs did not stop in time; they will be resumed from their record"
            );
        }
    }

    async fn dispatch(&self) {
        while !self.inner.stopping.load(Ordering::Relaxed) {
            match self.inner.next().await {
                Ok(Some((id, progress))) => self.spawn(id, progress),
                Ok(None) => self.inner.wake.notified().await,
                Err(error) => {
                    tracing::error!(error = %error.chain(), "the queue cannot be read");
                    tokio::time::sleep(BREATH).await;
                }
            }
        }
    }

    /// Runs one job, which is live already, in a task of its own.
    fn spawn(&self, id: JobId, progress: Progress) {
        let inner = Arc::clone(&self.inner);
        tokio::spawn(async move {
            metrics::job_started();
            let ended = inner.run_until_settled(id, progress).await;
            metrics::job_stopped(ended);
            inner.live().remove(&id);
            inner.announce();
            inner.wake.notify_one();
        });
    }
}

impl<C: Send + 'static> Inner<C> {
    fn live(&self) -> MutexGuard<'_, HashMap<JobId, Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn announce(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    fn with_live_progress(&self, mut stored: Stored) -> Stored {
        if let Some(live) = self.live().get(&stored.id)
            && !stored.status.is_terminal()
        {
            stored.progress = live.progress.snapshot();
        }
        stored
    }

    /// Holds a key, if nobody else does outside of a job.
    fn take(&self, exclusive: &str) -> Option<Held> {
        let _live = self.live();
        let mut held = self.held();
        if held.iter().any(|key| key == exclusive) {
            return None;
        }
        held.push(exclusive.to_owned());
        Some(Held { key: exclusive.to_owned(), held: Arc::clone(&self.held), wake: Arc::clone(&self.wake) })
    }

    fn held(&self) -> MutexGuard<'_, Vec<String>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next job to run. It counts as live from here on, so nobody else begins with its key.
    async fn next(&self) -> Result<Option<(JobId, Progress)>> {
        if self.live().len() >= self.limit {
            return Ok(None);
        }
        let waiting = self.store.pending().await?;
        let mut live = self.live();
        let pending: Vec<Entry> = waiting
            .into_iter()
            .filter(|(id, _)| !live.contains_key(id))
            .map(|(id, exclusive)| Entry { id, exclusive })
            .collect();
        let running: Vec<Entry> = live.values().map(|live| live.entry.clone()).collect();
        let Some(entry) = queue::next(&pending, &running, &self.held(), self.limit).cloned() else { return Ok(None) };
        let (id, progress) = (entry.id, Progress::default());
        live.insert(id, Live { entry, progress: progress.clone() });
        Ok(Some((id, progress)))
    }

    /// Runs a job until it has ended, or until the daemon stops (`None`). What breaks off outside of a step, as when the
    /// database cannot be used, is run again from its record, less and less often. All the while the job is live: nobody
    /// else has its volume before the record says that this job has let go of it.
    async fn run_until_settled(&self, id: JobId, progress: Progress) -> Option<JobStatus> {
        let (mut wait, mut has_panicked) = (Duration::ZERO, false);
        loop {
            let attempt = async {
                match (wait.is_zero(), has_panicked) {
                    (true, _) => {}
                    (false, true) => self.store.requeue(id).await?,
                    // No fault of the job's.
                    (false, false) => self.store.requeue_stopped(id).await?,
                }
                self.run(id, progress.clone()).await
            };
            let error = match AssertUnwindSafe(attempt).catch_unwind().await {
                Ok(Ok(ended)) => return ended,
                Ok(Err(error)) => error,
                Err(panic) => {
                    has_panicked = true;
                    panicked("the run of a job", &*panic)
                }
            };
            tracing::error!(job_id = %id, error = %error.chain(), "the job broke off, and is run again from its record");
            wait = (wait * 2).clamp(BREATH, LONGEST_BREATH);
            match progress.stop_reason() {
                // A stop or a cancel ends the wait.
                None => drop(tokio::time::timeout(wait, progress.stopped()).await),
                Some(Stop::Cancel) => tokio::time::sleep(wait).await,
                Some(Stop::Shutdown) => {}
            }
            // The next start finds it as it is recorded.
            if self.stopping.load(Ordering::Relaxed) {
                return None;
            }
        }
    }

    /// Runs a job to its end, or until it is interrupted (`None`).
    async fn run(&self, id: JobId, progress: Progress) -> Result<Option<JobStatus>> {
        let stored = self.store.start(id).await?;
        if stored.status != JobStatus::Running {
            return Ok(None);
        }
        if stored.cancel_requested {
            progress.stop(Stop::Cancel);
        }
        self.announce();
        tracing::info!(job_id = %id, kind = %stored.kind, attempt = stored.attempts, "job begins");
        let mut context = match (self.execution.context)(&stored, progress.clone()) {
            Ok(context) => context,
            Err(error) => return self.end(id, &progress, Err(error), stored.record).await.map(Some),
        };
        let steps = self.steps(&stored);
        let (result, reached) = if self.store.is_undone(id).await? {
            let error =
                Error::new(ErrorCode::Interrupted, "the job had failed and was undone, but its end was not recorded");
            (Err(error.hint("see the log of that time for why; then submit the job again")), 0)
        } else if stored.attempts > MOST_ATTEMPTS {
            let error = Error::new(ErrorCode::Interrupted, format!("the job was interrupted {MOST_ATTEMPTS} times"))
                .hint("see the daemon's log for what ended it; then submit the job again");
            (Err(error), self.store.steps_started(id).await?)
        } else {
            steps.forward(&mut context, &progress, || self.announce()).await
        };
        let result = match result {
            Err(error) if is_of_a_shutdown(&error, &progress).await => {
                tracing::info!(job_id = %id, "job is interrupted and will be resumed");
                self.store.requeue_stopped(id).await?;
                return Ok(None);
            }
            Err(error) => {
                let reached = reached.max(self.store.steps_started(id).await?);
                Err(steps.backward(&mut context, reached, error).await)
            }
            Ok(()) => Ok(()),
        };
        let record = (self.execution.record)(&context);
        drop(context);
        self.end(id, &progress, result, record).await.map(Some)
    }

    fn steps(&self, stored: &Stored) -> Steps<'_, C> {
        let steps = (self.execution.steps)(stored.kind);
        Steps { id: stored.id, steps, record: self.execution.record, store: &self.store }
    }

    async fn end(&self, id: JobId, progress: &Progress, result: Result<()>, record: Value) -> Result<JobStatus> {
        let mut snapshot = progress.snapshot();
        let (status, error) = match result {
            Ok(()) => (JobStatus::Completed, None),
            Err(error) if error.code() == ErrorCode::Cancelled => (JobStatus::Cancelled, Some(error)),
            Err(error) => (JobStatus::Failed, Some(error)),
        };
        match &error {
            Some(error) if status == JobStatus::Failed => {
                tracing::warn!(job_id = %id, code = %error.code(), retryable = error.retryable(), error = %error.chain(), "job failed");
            }
            _ => tracing::info!(job_id = %id, %status, "job ended"),
        }
        if status == JobStatus::Completed {
            snapshot.percent = 100;
            snapshot.bytes_processed = snapshot.bytes_total;
        }
        (snapshot.bytes_per_second, snapshot.seconds_left) = (None, None);
        let error = error.map(|error| error.to_body());
        self.finish(id, status, snapshot, error, record).await?;
        self.forget().await;
        Ok(status)
    }

    /// Forgets ended jobs beyond those that are to be remembered.
    async fn forget(&self) {
        if let Err(error) = self.store.prune(self.keep).await {
            tracing::warn!(error = %error.chain(), "ended jobs were not forgotten this time");
        }
    }

    /// Records the end, however long the database takes to be usable again; meanwhile the job keeps its volume. Only a
    /// stop of the daemon ends the trying: then the next start finds the job by its steps.
    async fn finish(
        &self,
        id: JobId,
        status: JobStatus,
        snapshot: lvp_api::Progress,
        error: Option<lvp_api::ErrorBody>,
        record: Value,
    ) -> Result<()> {
        let mut wait = Duration::from_millis(250);
        loop {
            let recorded = match fault::point("job.end") {
                Ok(()) => self.store.finish(id, status, snapshot.clone(), error.clone(), record.clone()).await,
                Err(failure) => Err(failure),
            };
            match recorded {
                Err(failure) if !self.stopping.load(Ordering::Relaxed) => {
                    tracing::error!(job_id = %id, error = %failure.chain(), "the job's end cannot be recorded yet");
                    tokio::time::sleep(wait).await;
                    wait = (wait * 2).min(Duration::from_secs(10));
                }
                recorded => return recorded,
            }
        }
    }

    /// Ends a job that an earlier process left: what never began is cancelled, what began is taken back.
    async fn settle_interrupted(&self, stored: Stored) -> Result<()> {
        let progress = Progress::default();
        let error = Error::new(ErrorCode::Interrupted, "the process that ran the job ended before it")
            .hint("submit the job again");
        let mut context = (self.execution.context)(&stored, progress.clone())?;
        let reached = self.store.steps_started(stored.id).await?;
        let error = self.steps(&stored).backward(&mut context, reached, error).await;
        let record = (self.execution.record)(&context);
        self.end(stored.id, &progress, Err(error), record).await.map(drop)
    }
}

/// Whether a job ended only because the daemon stops: it saw that itself, or a program that it ran was stopped with the
/// daemon, maybe a moment before.
async fn is_of_a_shutdown(error: &Error, progress: &Progress) -> bool {
    if ended_by_signal(error) {
        let _ = tokio::time::timeout(STOP_FOLLOWS, progress.stopped()).await;
        return progress.stop_reason() == Some(Stop::Shutdown);
    }
    error.code() == ErrorCode::ShuttingDown
}

#[cfg(test)]
#[path = "runner_tests.rs"]
mod tests;
