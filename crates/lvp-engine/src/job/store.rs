//! Jobs in SQLite: every change of a job and of its steps, each in one transaction. It leaves out deciding anything.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;
use lvp_api::{ErrorBody, ErrorCode, JobId, JobKind, JobStatus, Progress};
use rusqlite::{Connection, OptionalExtension, Transaction, params};
use serde_json::Value;

use super::row::{COLUMNS, Unreadable, id_of, if_readable, read, text};
use crate::{
    db,
    error::{Error, Result},
};

/// Whose a job is to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunBy {
    /// The daemon's, this one or the next.
    Daemon,
    /// A command's that works without a daemon; it ends with that.
    Command,
}

impl RunBy {
    fn name(self) -> &'static str {
        match self {
            Self::Daemon => "daemon",
            Self::Command => "command",
        }
    }
}

/// A job as it is kept.
#[derive(Debug, Clone)]
pub struct Stored {
    /// Its id.
    pub id: JobId,
    /// What it does.
    pub kind: JobKind,
    /// Where it stands.
    pub status: JobStatus,
    /// What was asked; its shape is the use case's own.
    pub request: Value,
    /// What the steps found and did; its shape is the use case's own.
    pub record: Value,
    /// Whether its user wants it to stop.
    pub cancel_requested: bool,
    /// How often it began to run.
    pub attempts: u32,
    /// How far it was when it was last recorded.
    pub progress: Progress,
    /// Why it failed.
    pub error: Option<ErrorBody>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it first ran.
    pub started_at: Option<Timestamp>,
    /// When this record last changed.
    pub updated_at: Timestamp,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// Whose it is to run.
    pub run_by: RunBy,
}

/// A job to keep.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// What it does.
    pub kind: JobKind,
    /// What was asked.
    pub request: Value,
    /// What no two running jobs may share.
    pub exclusive: String,
    /// The caller's key against doing it twice.
    pub idempotency_key: Option<String>,
}

/// Which jobs to list.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Only those with this status.
    pub status: Option<JobStatus>,
    /// Only those made before this one.
    pub before: Option<JobId>,
    /// This many at most.
    pub limit: u32,
}

/// The database of jobs. Clones share it. Every call blocks a worker thread, not the caller's.
#[derive(Clone)]
pub struct Store {
    connection: Arc<Mutex<Connection>>,
    /// No more jobs than this wait for their turn.
    most_pending: u32,
    /// Who has it open.
    own: RunBy,
    unreadable: Known,
}

/// The rows that were found to be not readable, by what stands in the place of their ids, with the exclusive keys of those
/// that have not ended. Each is told once. Nobody runs one of them, and what it is about is left alone.
#[derive(Clone, Default)]
struct Known(Arc<Mutex<HashMap<String, Option<String>>>>);

impl Known {
    fn tell(&self, bad: Unreadable, exclusive: Option<String>) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.contains_key(&bad.id) {
            let unfinished = exclusive.is_some();
            tracing::error!(
                job_id = bad.id,
                error = bad.why,
                unfinished,
                "a job cannot be read in the database and is left as it is"
            );
        }
        let kept = known.entry(bad.id).or_default();
        *kept = kept.take().or(exclusive);
    }

    fn has(&self, id: JobId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&id.to_string())
    }
}

/// What came of keeping a job.
enum Inserted {
    New(Box<Stored>),
    /// The job of the same idempotency key.
    Known(Box<Stored>),
    /// So many wait already.
    Full(u32),
}

/// Receipts that are kept, the newest; a host has far fewer volumes.
const RECEIPTS_KEPT: u32 = 10_000;

/// The jobs that are to be run by `?1`: a daemon runs those of commands too.
const OWN: &str = "(?1 = 'daemon' OR run_by = ?1)";

impl Store {
    /// Opens the database at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let connection = Arc::new(Mutex::new(db::open(path)?));
        Ok(Self { connection, most_pending: u32::MAX, own: RunBy::Daemon, unreadable: Known::default() })
    }

    /// The same, where no more than so many jobs wait for their turn.
    #[must_use]
    pub fn bounded(self, most_pending: u32) -> Self {
        Self { most_pending, ..self }
    }

    /// The same, opened by this one; else by a daemon.
    #[must_use]
    pub fn run_by(self, own: RunBy) -> Self {
        Self { own, ..self }
    }

    /// Runs `work` in one transaction, on a thread that may block.
    async fn transact<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let connection = Arc::clone(&self.connection);
        let done = tokio::task::spawn_blocking(move || {
            let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
            let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
            let value = work(&transaction)?;
            transaction.commit()?;
            Ok::<_, rusqlite::Error>(value)
        });
        match done.await {
            Ok(result) => result.map_err(db::unusable),
            Err(error) => Err(Error::internal("a database call broke off").source(error)),
        }
    }

    /// Whether the database can be written.
    pub async fn check(&self) -> Result<()> {
        self.transact(|t| t.pragma_query_value(None, "user_version", |row| row.get::<_, u32>(0)).map(drop)).await
    }

    /// Keeps a new job and gives its id; or the id of the job that has the same idempotency key already.
    ///
    /// # Errors
    /// `idempotency_conflict` when that job was asked for something else; `queue_full`.
    pub async fn insert(&self, new: NewJob) -> Result<(JobId, bool)> {
        let id = JobId(uuid::Uuid::now_v7());
        let request = new.request.clone();
        let key = new.idempotency_key.clone();
        let (most, own) = (self.most_pending, self.own);
        let inserted = self
            .transact(move |t| {
                if let Some(key) = &new.idempotency_key {
                    let sql = format!("SELECT {COLUMNS} FROM jobs WHERE idempotency_key = ?1");
                    if let Some(stored) = t.query_row(&sql, [key], read).optional()? {
                        return Ok(Inserted::Known(Box::new(stored)));
                    }
                }
                let waiting = count_pending(t, own)?;
                if waiting >= most {
                    return Ok(Inserted::Full(waiting));
                }
                t.execute(
                    "INSERT INTO jobs (id, kind, status, request, exclusive, idempotency_key, created_at, updated_at, run_by)
                     VALUES (?1, ?2, 'pending', ?3, ?4, ?5, ?6, ?6, ?7)",
                    params![
                        id.to_string(),
                        new.kind.to_string(),
                        new.request.to_string(),
                        new.exclusive,
                        new.idempotency_key,
                        now(),
                        own.name()
                    ],
                )?;
                Ok(Inserted::New(Box::new(get(t, id)?.ok_or(rusqlite::Error::QueryReturnedNoRows)?)))
            })
            .await?;
        let (found, made) = match inserted {
            Inserted::New(found) => (found, true),
            Inserted::Known(found) => (found, false),
            Inserted::Full(waiting) => {
                let said = format!("{waiting} jobs wait for their turn, and no more are taken");
                return Err(Error::new(ErrorCode::QueueFull, said).detail("pending_jobs", waiting));
            }
        };
        if !made && found.request != request {
            return Err(Error::new(
                ErrorCode::IdempotencyConflict,
                format!("idempotency key '{}' was used for another request", key.unwrap_or_default().escape_debug()),
            )
            .hint("use a new key for a new request")
            .detail("job_id", found.id.to_string()));
        }
        Ok((found.id, made))
    }

    /// The job of this id.
    ///
    /// # Errors
    /// `job_not_found`; `database_unavailable` also for one that is there and cannot be read.
    pub async fn get(&self, id: JobId) -> Result<Stored> {
        self.transact(move |t| get(t, id)).await?.ok_or_else(|| {
            Error::new(ErrorCode::JobNotFound, format!("there is no job {id}"))
                .hint("ended jobs are kept for a while, then forgotten; `lvp job list` shows those that are known")
        })
    }

    /// Jobs, newest first, without those that cannot be read.
    pub async fn list(&self, filter: Filter) -> Result<Vec<Stored>> {
        let unreadable = self.unreadable.clone();
        self.transact(move |t| {
            let sql = format!(
                "SELECT {COLUMNS} FROM jobs WHERE (?1 IS NULL OR status = ?1) AND (?2 IS NULL OR id < ?2) ORDER BY id DESC"
            );
            let status = filter.status.map(JobStatus::name);
            let before = filter.before.map(|id| id.to_string());
            let (mut statement, mut found) = (t.prepare_cached(&sql)?, Vec::new());
            let mut rows = statement.query(params![status, before])?;
            while found.len() < filter.limit as usize
                && let Some(row) = rows.next()?
            {
                match if_readable(row, read)? {
                    Ok(stored) => found.push(stored),
                    Err(bad) => unreadable.tell(bad, None),
                }
            }
            Ok(found)
        })
        .await
    }

    /// Jobs that have not ended, oldest first, without those that cannot be read: from here on these are known, and neither
    /// run nor worked against.
    pub async fn unfinished(&self) -> Result<Vec<Stored>> {
        let unreadable = self.unreadable.clone();
        self.transact(move |t| {
            // By its end and not by its status, which may be what cannot be read.
            let sql = format!("SELECT {COLUMNS}, exclusive FROM jobs WHERE finished_at IS NULL ORDER BY id");
            let (mut statement, mut found) = (t.prepare_cached(&sql)?, Vec::new());
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                match if_readable(row, read)? {
                    Ok(stored) if stored.status.is_terminal() => {}
                    Ok(stored) => found.push(stored),
                    Err(bad) => unreadable.tell(bad, Some(text(row, 14)?.unwrap_or_default().into_owned())),
                }
            }
            Ok(found)
        })
        .await
    }

    /// From here on this unfinished job counts as one that cannot be read: nobody knows what it is to do.
    pub async fn leave(&self, id: JobId, why: &Error) -> Result<()> {
        let (unreadable, why) = (self.unreadable.clone(), why.chain());
        self.transact(move |t| {
            let sql = "SELECT exclusive FROM jobs WHERE id = ?1";
            let about = t.query_row(sql, [id.to_string()], |row| Ok(text(row, 0)?.unwrap_or_default().into_owned()))?;
            unreadable.tell(Unreadable { id: id.to_string(), why }, Some(about));
            Ok(())
        })
        .await
    }

    /// The ids and exclusive keys of the own jobs that wait for their turn, oldest first.
    pub async fn pending(&self) -> Result<Vec<(JobId, String)>> {
        let (own, unreadable) = (self.own, self.unreadable.clone());
        self.transact(move |t| {
            let sql = format!("SELECT id, exclusive FROM jobs WHERE status = 'pending' AND {OWN} ORDER BY id");
            let (mut statement, mut found) = (t.prepare_cached(&sql)?, Vec::new());
            let mut rows = statement.query([own.name()])?;
            while let Some(row) = rows.next()? {
                match if_readable(row, |row| Ok((id_of(row)?, row.get(1)?)))? {
                    Ok(entry) if unreadable.has(entry.0) => {}
                    Ok(entry) => found.push(entry),
                    Err(bad) => unreadable.tell(bad, None),
                }
            }
            Ok(found)
        })
        .await
    }

    /// An unfinished job with this exclusive key that cannot be read: what stands in the place of its id.
    pub fn unreadable_about(&self, exclusive: &str) -> Option<String> {
        let known = self.unreadable.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().find(|(_, about)| about.as_deref() == Some(exclusive)).map(|(id, _)| id.clone())
    }

    /// The oldest job with this exclusive key that a command has to leave to the daemon.
    pub async fn left_to_daemon(&self, exclusive: String) -> Result<Option<JobId>> {
        if self.own == RunBy::Daemon {
            return Ok(None);
        }
        self.transact(move |t| {
            let sql =
                "SELECT id FROM jobs WHERE exclusive = ?1 AND status IN ('pending', 'running') AND run_by = 'daemon'
                       ORDER BY id LIMIT 1";
            t.query_row(sql, [exclusive], id_of).optional()
        })
        .await
    }

    /// Every job that has not ended is to be run by who has this open.
    pub async fn take_over(&self) -> Result<()> {
        let own = self.own;
        self.transact(move |t| {
            let sql = "UPDATE jobs SET run_by = ?1 WHERE status IN ('pending', 'running') AND run_by <> ?1";
            t.execute(sql, [own.name()]).map(drop)
        })
        .await
    }

    /// How many of the own jobs wait for their turn.
    pub async fn count_pending(&self) -> Result<u32> {
        let own = self.own;
        self.transact(move |t| count_pending(t, own)).await
    }

    /// A job begins to run, or to run again.
    pub async fn start(&self, id: JobId) -> Result<Stored> {
        self.transact(move |t| {
            t.execute(
                "UPDATE jobs SET status = 'running', attempts = attempts + 1, started_at = coalesce(started_at, ?2), updated_at = ?2
                 WHERE id = ?1 AND status = 'pending'",
                params![id.to_string(), now()],
            )?;
            get(t, id)?.ok_or(rusqlite::Error::QueryReturnedNoRows)
        })
        .await
    }

    /// A job that was interrupted waits for its turn again.
    pub async fn requeue(&self, id: JobId) -> Result<()> {
        self.transact(move |t| {
            t.execute(
                "UPDATE jobs SET status = 'pending', updated_at = ?2 WHERE id = ?1 AND status = 'running'",
                params![id.to_string(), now()],
            )
            .map(drop)
        })
        .await
    }

    /// As [`Store::requeue`], for a job that was told to stop: that is no fault of its own and does not count.
    pub async fn requeue_stopped(&self, id: JobId) -> Result<()> {
        self.transact(move |t| {
            t.execute(
                "UPDATE jobs SET status = 'pending', attempts = max(attempts - 1, 0), updated_at = ?2
                 WHERE id = ?1 AND status = 'running'",
                params![id.to_string(), now()],
            )
            .map(drop)
        })
        .await
    }

    /// Whether the job has steps, and all of them were undone.
    pub async fn is_undone(&self, id: JobId) -> Result<bool> {
        self.transact(move |t| {
            t.query_row(
                "SELECT count(*) > 0 AND count(*) = sum(state = 'undone') FROM steps WHERE job_id = ?1",
                [id.to_string()],
                |row| row.get::<_, Option<bool>>(0),
            )
        })
        .await
        .map(Option::unwrap_or_default)
    }

    /// Keeps the state of a step together with the job's record: before it acts, which also says that those before it are
    /// done, after, and when it is undone.
    pub async fn step(
        &self,
        id: JobId,
        position: usize,
        name: &'static str,
        state: &'static str,
        record: Value,
    ) -> Result<()> {
        self.transact(move |t| {
            if state == "started" {
                t.execute(
                    "UPDATE steps SET state = 'done', at = ?3 WHERE job_id = ?1 AND position < ?2 AND state = 'started'",
                    params![id.to_string(), position as i64, now()],
                )?;
            }
            t.execute(
                "INSERT INTO steps (job_id, position, name, state, at) VALUES (?1, ?2, ?3, ?4, ?5)
                 ON CONFLICT (job_id, position) DO UPDATE SET name = ?3, state = ?4, at = ?5",
                params![id.to_string(), position as i64, name, state, now()],
            )?;
            t.execute(
                "UPDATE jobs SET record = ?2, updated_at = ?3 WHERE id = ?1",
                params![id.to_string(), record.to_string(), now()],
            )
            .map(drop)
        })
        .await
    }

    /// How many steps, from the first on, were started and not undone.
    pub async fn steps_started(&self, id: JobId) -> Result<usize> {
        self.transact(move |t| {
            t.query_row(
                "SELECT coalesce(max(position) + 1, 0) FROM steps WHERE job_id = ?1 AND state IN ('started', 'done')",
                [id.to_string()],
                |row| row.get::<_, i64>(0),
            )
        })
        .await
        .map(|count| count as usize)
    }

    /// A user wants the job to stop. A pending job ends here; another one is to be taken back by who was told. Gives the
    /// job as it is then.
    pub async fn request_cancel(&self, id: JobId) -> Result<Option<Stored>> {
        let own = self.own;
        self.transact(move |t| {
            t.execute(
                "UPDATE jobs SET cancel_requested = 1, updated_at = ?2, run_by = ?3,
                        status = CASE WHEN status = 'pending' AND started_at IS NULL THEN 'cancelled' ELSE status END,
                        finished_at = CASE WHEN status = 'pending' AND started_at IS NULL THEN ?2 ELSE finished_at END
                 WHERE id = ?1 AND status IN ('pending', 'running')",
                params![id.to_string(), now(), own.name()],
            )?;
            get(t, id)
        })
        .await
    }

    /// What the last completed job with this exclusive key left as its receipt; its shape is the use case's own.
    pub async fn receipt(&self, exclusive: String) -> Result<Option<Value>> {
        let found = self.transact(move |t| {
            let sql = "SELECT receipt FROM receipts WHERE exclusive = ?1";
            t.query_row(sql, [exclusive], |row| row.get::<_, String>(0)).optional()
        });
        Ok(found.await?.and_then(|text| serde_json::from_str(&text).ok()))
    }

    /// The receipts of those exclusive keys that begin so, the newest first, this many at most.
    pub async fn newest_receipts(&self, beginning: String, limit: u32) -> Result<Vec<Value>> {
        let found = self.transact(move |t| {
            let sql = "SELECT receipt FROM receipts WHERE substr(exclusive, 1, length(?1)) = ?1 ORDER BY job_id DESC LIMIT ?2";
            t.prepare_cached(sql)?.query_map(params![beginning, limit], |row| row.get::<_, String>(0))?.collect()
        });
        let texts: Vec<String> = found.await?;
        Ok(texts.iter().filter_map(|text| serde_json::from_str(text).ok()).collect())
    }

    /// A job ends. When it completed and its record has a `receipt`, that is kept for longer than the job.
    pub async fn finish(
        &self,
        id: JobId,
        status: JobStatus,
        progress: Progress,
        error: Option<ErrorBody>,
        record: Value,
    ) -> Result<()> {
        self.transact(move |t| {
            let error = error.map(|body| serde_json::to_string(&body).expect("an error body is JSON"));
            let progress = serde_json::to_string(&progress).expect("progress is JSON");
            t.execute(
                "UPDATE jobs SET status = ?2, progress = ?3, error = ?4, record = ?5, updated_at = ?6, finished_at = ?6 WHERE id = ?1",
                params![id.to_string(), status.name(), progress, error, record.to_string(), now()],
            )?;
            if status == JobStatus::Completed {
                t.execute(
                    "UPDATE steps SET state = 'done', at = ?2 WHERE job_id = ?1 AND state = 'started'",
                    params![id.to_string(), now()],
                )?;
            }
            match record.get("receipt").filter(|receipt| receipt.is_object() && status == JobStatus::Completed) {
                Some(receipt) => keep_receipt(t, id, receipt),
                None => Ok(()),
            }
        })
        .await
    }

    /// Forgets ended jobs until `keep` are left, those first that ended first: not the oldest, or one that took long would be
    /// forgotten before anybody saw its end.
    pub async fn prune(&self, keep: u32) -> Result<usize> {
        self.transact(move |t| {
            t.execute(
                "DELETE FROM jobs WHERE finished_at IS NOT NULL AND id NOT IN
                 (SELECT id FROM jobs WHERE finished_at IS NOT NULL ORDER BY finished_at DESC, id DESC LIMIT ?1)",
                [keep],
            )
        })
        .await
    }
}

fn keep_receipt(transaction: &Transaction<'_>, id: JobId, receipt: &Value) -> rusqlite::Result<()> {
    transaction.execute(
        "INSERT INTO receipts (exclusive, job_id, receipt) SELECT exclusive, id, ?2 FROM jobs WHERE id = ?1
         ON CONFLICT (exclusive) DO UPDATE SET job_id = excluded.job_id, receipt = excluded.receipt",
        params![id.to_string(), receipt.to_string()],
    )?;
    transaction
        .execute(
            "DELETE FROM receipts WHERE job_id NOT IN (SELECT job_id FROM receipts ORDER BY job_id DESC LIMIT ?1)",
            [RECEIPTS_KEPT],
        )
        .map(drop)
}

fn count_pending(transaction: &Transaction<'_>, own: RunBy) -> rusqlite::Result<u32> {
    let sql = format!("SELECT count(*) FROM jobs WHERE status = 'pending' AND {OWN}");
    transaction.prepare_cached(&sql)?.query_row([own.name()], |row| row.get(0))
}

fn get(transaction: &Transaction<'_>, id: JobId) -> rusqlite::Result<Option<Stored>> {
    transaction
        .prepare_cached(&format!("SELECT {COLUMNS} FROM jobs WHERE id = ?1"))?
        .query_row([id.to_string()], read)
        .optional()
}

fn now() -> String {
    Timestamp::now().to_string()
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
