//! Jobs in SQLite: every change of a job and of its steps, each in one transaction. It leaves out deciding anything.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;
use lvp_api::{ErrorBody, ErrorCode, JobId, JobKind, JobStatus, Progress};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use serde_json::Value;

use crate::{
    db,
    error::{Error, Result},
};

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

const COLUMNS: &str = "id, kind, status, request, record, cancel_requested, attempts, progress, error, \
                       created_at, started_at, updated_at, finished_at";

impl Store {
    /// Opens the database at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { connection: Arc::new(Mutex::new(db::open(path)?)), most_pending: u32::MAX })
    }

    /// The same, where no more than so many jobs wait for their turn.
    #[must_use]
    pub fn bounded(self, most_pending: u32) -> Self {
        Self { most_pending, ..self }
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
        let most = self.most_pending;
        let inserted = self
            .transact(move |t| {
                if let Some(key) = &new.idempotency_key {
                    let sql = format!("SELECT {COLUMNS} FROM jobs WHERE idempotency_key = ?1");
                    if let Some(stored) = t.query_row(&sql, [key], read).optional()? {
                        return Ok(Inserted::Known(Box::new(stored)));
                    }
                }
                let waiting = count_pending(t)?;
                if waiting >= most {
                    return Ok(Inserted::Full(waiting));
                }
                t.execute(
                    "INSERT INTO jobs (id, kind, status, request, exclusive, idempotency_key, created_at, updated_at)
                     VALUES (?1, ?2, 'pending', ?3, ?4, ?5, ?6, ?6)",
                    params![
                        id.to_string(),
                        new.kind.to_string(),
                        new.request.to_string(),
                        new.exclusive,
                        new.idempotency_key,
                        now()
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
    /// `job_not_found`.
    pub async fn get(&self, id: JobId) -> Result<Stored> {
        self.transact(move |t| get(t, id)).await?.ok_or_else(|| {
            Error::new(ErrorCode::JobNotFound, format!("there is no job {id}"))
                .hint("ended jobs are kept for a while, then forgotten; `lvp job list` shows those that are known")
        })
    }

    /// Jobs, newest first.
    pub async fn list(&self, filter: Filter) -> Result<Vec<Stored>> {
        self.transact(move |t| {
            let sql = format!(
                "SELECT {COLUMNS} FROM jobs WHERE (?1 IS NULL OR status = ?1) AND (?2 IS NULL OR id < ?2) ORDER BY id DESC LIMIT ?3"
            );
            let status = filter.status.map(JobStatus::name);
            let before = filter.before.map(|id| id.to_string());
            t.prepare_cached(&sql)?.query_map(params![status, before, filter.limit], read)?.collect()
        })
        .await
    }

    /// Jobs that have not ended, oldest first.
    pub async fn unfinished(&self) -> Result<Vec<Stored>> {
        self.transact(|t| {
            let sql = format!("SELECT {COLUMNS} FROM jobs WHERE status IN ('pending', 'running') ORDER BY id");
            t.prepare_cached(&sql)?.query_map([], read)?.collect()
        })
        .await
    }

    /// The ids and exclusive keys of the jobs that wait for their turn, oldest first.
    pub async fn pending(&self) -> Result<Vec<(JobId, String)>> {
        self.transact(|t| {
            let sql = "SELECT id, exclusive FROM jobs WHERE status = 'pending' ORDER BY id";
            let entry = |row: &Row<'_>| Ok((id_of(row)?, row.get(1)?));
            t.prepare_cached(sql)?.query_map([], entry)?.collect()
        })
        .await
    }

    /// How many jobs wait for their turn.
    pub async fn count_pending(&self) -> Result<u32> {
        self.transact(count_pending).await
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

    /// A user wants the job to stop. A pending job ends here; gives the job as it is then.
    pub async fn request_cancel(&self, id: JobId) -> Result<Option<Stored>> {
        self.transact(move |t| {
            t.execute(
                "UPDATE jobs SET cancel_requested = 1, updated_at = ?2,
                        status = CASE WHEN status = 'pending' AND started_at IS NULL THEN 'cancelled' ELSE status END,
                        finished_at = CASE WHEN status = 'pending' AND started_at IS NULL THEN ?2 ELSE finished_at END
                 WHERE id = ?1 AND status IN ('pending', 'running')",
                params![id.to_string(), now()],
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

    /// Forgets ended jobs, the oldest first, until `keep` are left.
    pub async fn prune(&self, keep: u32) -> Result<usize> {
        self.transact(move |t| {
            t.execute(
                "DELETE FROM jobs WHERE finished_at IS NOT NULL AND id NOT IN
                 (SELECT id FROM jobs WHERE finished_at IS NOT NULL ORDER BY id DESC LIMIT ?1)",
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

fn count_pending(transaction: &Transaction<'_>) -> rusqlite::Result<u32> {
    transaction.prepare_cached("SELECT count(*) FROM jobs WHERE status = 'pending'")?.query_row([], |row| row.get(0))
}

/// The id in the first column.
fn id_of(row: &Row<'_>) -> rusqlite::Result<JobId> {
    row.get::<_, String>(0)?.parse().map_err(|error: lvp_api::Invalid| {
        rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, error.0.into())
    })
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

/// A row of [`COLUMNS`].
fn read(row: &Row<'_>) -> rusqlite::Result<Stored> {
    let bad = |index: usize, error: String| {
        rusqlite::Error::FromSqlConversionFailure(index, rusqlite::types::Type::Text, error.into())
    };
    let json = |index: usize| -> rusqlite::Result<Value> {
        serde_json::from_str(&row.get::<_, String>(index)?).map_err(|error| bad(index, error.to_string()))
    };
    let time = |index: usize| -> rusqlite::Result<Option<Timestamp>> {
        row.get::<_, Option<String>>(index)?
            .map(|text| text.parse().map_err(|error: jiff::Error| bad(index, error.to_string())))
            .transpose()
    };
    let required = |index: usize| time(index)?.ok_or_else(|| bad(index, "a time is missing".to_owned()));
    let parsed = |index: usize| row.get::<_, Option<String>>(index);
    Ok(Stored {
        id: id_of(row)?,
        kind: serde_json::from_value(Value::String(row.get(1)?)).map_err(|error| bad(1, error.to_string()))?,
        status: row.get::<_, String>(2)?.parse().map_err(|error: lvp_api::Invalid| bad(2, error.0))?,
        request: json(3)?,
        record: json(4)?,
        cancel_requested: row.get(5)?,
        attempts: row.get(6)?,
        progress: match parsed(7)? {
            Some(text) => serde_json::from_str(&text).map_err(|error| bad(7, error.to_string()))?,
            None => Progress::queued(),
        },
        error: parsed(8)?
            .map(|text| serde_json::from_str(&text).map_err(|error| bad(8, error.to_string())))
            .transpose()?,
        created_at: required(9)?,
        started_at: time(10)?,
        updated_at: required(11)?,
        finished_at: time(12)?,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    async fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("jobs.db")).unwrap();
        (directory, store)
    }

    fn new(volume: &str, key: Option<&str>) -> NewJob {
        NewJob {
            kind: JobKind::Provision,
            request: json!({ "volume": volume }),
            exclusive: volume.to_owned(),
            idempotency_key: key.map(str::to_owned),
        }
    }

    #[tokio::test]
    async fn an_idempotency_key_names_one_job() {
        let (_directory, store) = store().await;
        let (first, made) = store.insert(new("a", Some("k"))).await.unwrap();
        assert!(made);
        assert_eq!(store.insert(new("a", Some("k"))).await.unwrap(), (first, false));
        assert_eq!(store.insert(new("b", Some("k"))).await.unwrap_err().code(), ErrorCode::IdempotencyConflict);
        assert_eq!(store.list(Filter { limit: 10, ..Filter::default() }).await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn no_more_jobs_wait_than_may_however_many_come_at_once() {
        let (_directory, store) = store().await;
        let store = store.bounded(3);
        let (first, _) = store.insert(new("v-0", Some("k"))).await.unwrap();
        let names: Vec<String> = (1..20).map(|number| format!("v-{number}")).collect();
        let answers = futures::future::join_all(names.iter().map(|name| store.insert(new(name, None)))).await;
        let refused: Vec<Error> = answers.into_iter().filter_map(Result::err).collect();
        assert_eq!(refused.len(), 17);
        assert!(refused.iter().all(|error| error.code() == ErrorCode::QueueFull && error.retryable()));
        assert_eq!((store.count_pending().await.unwrap(), store.pending().await.unwrap().len()), (3, 3));
        // What is known is not new, and what runs does not wait.
        assert_eq!(store.insert(new("v-0", Some("k"))).await.unwrap(), (first, false));
        store.start(first).await.unwrap();
        store.insert(new("v-20", None)).await.unwrap();
    }

    async fn states(store: &Store, id: JobId) -> Vec<String> {
        let read = store.transact(move |t| {
            let sql = "SELECT state FROM steps WHERE job_id = ?1 ORDER BY position";
            t.prepare(sql)?.query_map([id.to_string()], |row| row.get(0))?.collect()
        });
        read.await.unwrap()
    }

    #[tokio::test]
    async fn a_job_survives_its_store() {
        let (directory, store) = store().await;
        let (id, _) = store.insert(new("a", None)).await.unwrap();
        store.start(id).await.unwrap();
        store.step(id, 0, "first", "started", json!({"x": 1})).await.unwrap();
        drop(store);
        let store = Store::open(&directory.path().join("jobs.db")).unwrap();
        let job = store.get(id).await.unwrap();
        assert_eq!((job.status, job.attempts, job.record), (JobStatus::Running, 1, json!({"x": 1})));
        assert_eq!(store.steps_started(id).await.unwrap(), 1);
        store.step(id, 1, "second", "started", json!({"x": 2})).await.unwrap();
        let states = states(&store, id).await;
        assert_eq!(states, ["done", "started"]);
        assert_eq!(store.unfinished().await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn the_newest_receipts_of_a_place_come_first() {
        let (_directory, store) = store().await;
        for (number, volume) in ["lvm:vg0/a", "lvm:vg1/b", "lvm:vg0/c", "lvm:vg0/a"].into_iter().enumerate() {
            let (id, _) = store.insert(new(volume, None)).await.unwrap();
            let record = json!({ "receipt": { "number": number } });
            store.finish(id, JobStatus::Completed, Progress::queued(), None, record).await.unwrap();
        }
        let newest = |limit| store.newest_receipts("lvm:vg0/".to_owned(), limit);
        assert_eq!(newest(9).await.unwrap(), [json!({ "number": 3 }), json!({ "number": 2 })]);
        assert_eq!(newest(1).await.unwrap(), [json!({ "number": 3 })]);
    }

    #[tokio::test]
    async fn pages_follow_each_other_newest_first() {
        let (_directory, store) = store().await;
        let mut ids = Vec::new();
        for volume in ["a", "b", "c"] {
            ids.push(store.insert(new(volume, None)).await.unwrap().0);
        }
        let first = store.list(Filter { limit: 2, ..Filter::default() }).await.unwrap();
        assert_eq!(first.iter().map(|job| job.id).collect::<Vec<_>>(), [ids[2], ids[1]]);
        let second = store.list(Filter { limit: 2, before: Some(ids[1]), ..Filter::default() }).await.unwrap();
        assert_eq!(second.iter().map(|job| job.id).collect::<Vec<_>>(), [ids[0]]);
    }

    #[tokio::test]
    async fn a_pending_job_is_cancelled_at_once_and_old_jobs_are_forgotten() {
        let (_directory, store) = store().await;
        let (id, _) = store.insert(new("a", None)).await.unwrap();
        assert_eq!(store.request_cancel(id).await.unwrap().unwrap().status, JobStatus::Cancelled);
        let (running, _) = store.insert(new("b", None)).await.unwrap();
        store.start(running).await.unwrap();
        let job = store.request_cancel(running).await.unwrap().unwrap();
        assert_eq!((job.status, job.cancel_requested), (JobStatus::Running, true));
        assert_eq!(store.prune(0).await.unwrap(), 1);
        assert_eq!(store.get(id).await.unwrap_err().code(), ErrorCode::JobNotFound);
        assert!(store.get(running).await.is_ok());
    }
}
