//! Jobs in a real database: what is kept, found, counted and forgotten.

use serde_json::json;

use super::{super::row::unreadable, *};

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

#[tokio::test]
async fn a_job_that_took_long_is_remembered_when_it_ends() {
    let (_directory, store) = store().await;
    let (long, _) = store.insert(new("a", None)).await.unwrap();
    let (short, _) = store.insert(new("b", None)).await.unwrap();
    for id in [short, long] {
        store.finish(id, JobStatus::Completed, Progress::queued(), None, json!({})).await.unwrap();
        store.prune(1).await.unwrap();
    }
    assert_eq!(store.get(long).await.unwrap().status, JobStatus::Completed);
    assert_eq!(store.get(short).await.unwrap_err().code(), ErrorCode::JobNotFound);
}

#[tokio::test]
async fn a_command_sees_its_own_jobs_waiting_and_leaves_the_daemons() {
    let (_directory, daemon) = store().await;
    let command = daemon.clone().bounded(1).run_by(RunBy::Command);
    let (theirs, _) = daemon.insert(new("a", None)).await.unwrap();
    let (own, _) = command.insert(new("b", None)).await.unwrap();
    assert_eq!(command.pending().await.unwrap(), [(own, "b".to_owned())]);
    assert_eq!(daemon.pending().await.unwrap().len(), 2);
    assert_eq!(command.insert(new("c", None)).await.unwrap_err().code(), ErrorCode::QueueFull);
    assert_eq!(command.left_to_daemon("a".to_owned()).await.unwrap(), Some(theirs));
    assert_eq!(command.left_to_daemon("b".to_owned()).await.unwrap(), None);
    assert_eq!(daemon.left_to_daemon("a".to_owned()).await.unwrap(), None, "it is the daemon");
    // Who cancels a job takes it back.
    daemon.start(theirs).await.unwrap();
    assert_eq!(command.request_cancel(theirs).await.unwrap().unwrap().run_by, RunBy::Command);
    assert_eq!(command.left_to_daemon("a".to_owned()).await.unwrap(), None);
    // What commands left is the daemon's once there is one.
    daemon.take_over().await.unwrap();
    assert_eq!(daemon.get(own).await.unwrap().run_by, RunBy::Daemon);
}

/// Breaks a column of a job as a newer version, or a bit that flips, would.
async fn break_column(store: &Store, id: JobId, column: &'static str, value: &'static str) {
    let sql = format!("UPDATE jobs SET {column} = CAST(?2 AS TEXT) WHERE id = ?1");
    let value = value.as_bytes().iter().map(|byte| if *byte == b'~' { 0xff } else { *byte }).collect::<Vec<u8>>();
    let changed = store.transact(move |t| t.execute(&sql, params![id.to_string(), value])).await.unwrap();
    assert_eq!(changed, 1);
}

#[tokio::test]
async fn one_job_that_cannot_be_read_does_not_take_the_others_out_of_the_list() {
    let (directory, store) = store().await;
    let path = directory.path().join("jobs.db");
    let columns =
        [("kind", "teleport"), ("status", "rumning"), ("request", "{~"), ("created_at", "then"), ("record", "~")];
    for (column, value) in columns {
        let (before, _) = store.insert(new("a", None)).await.unwrap();
        let (broken, _) = store.insert(new(column, None)).await.unwrap();
        let (after, _) = store.insert(new("c", None)).await.unwrap();
        break_column(&store, broken, column, value).await;
        assert_eq!(unreadable(&path).unwrap(), [broken.to_string()], "{column}");
        // A page is as long as it was asked for, and the next one begins behind it.
        let page = |before| store.list(Filter { limit: 1, before, ..Filter::default() });
        assert_eq!(page(None).await.unwrap()[0].id, after, "{column}");
        assert_eq!(page(Some(after)).await.unwrap()[0].id, before, "{column}");
        let error = store.get(broken).await.unwrap_err();
        assert!(error.code() == ErrorCode::DatabaseUnavailable && !error.retryable(), "{column}: {error:?}");
        assert!(error.to_body().hint.is_some_and(|hint| hint.contains("newer lvp") && hint.contains("doctor")));

        // It is known from the start, neither run nor worked against, and left as it is.
        let next = Store::open(&path).unwrap();
        let ids: Vec<JobId> = next.unfinished().await.unwrap().iter().map(|job| job.id).collect();
        assert_eq!(ids, [before, after], "{column}");
        let waiting: Vec<JobId> = next.pending().await.unwrap().iter().map(|(id, _)| *id).collect();
        assert_eq!(waiting, [before, after], "{column}");
        assert_eq!(next.unreadable_about(column), Some(broken.to_string()));
        assert_eq!(next.unreadable_about("a"), None);
        for id in [before, after] {
            next.request_cancel(id).await.unwrap();
        }
        next.prune(0).await.unwrap();
        assert_eq!(unreadable(&path).unwrap(), [broken.to_string()], "{column}: it was forgotten");
        let gone = move |t: &Transaction<'_>| t.execute("DELETE FROM jobs WHERE id = ?1", [broken.to_string()]);
        assert_eq!(next.transact(gone).await.unwrap(), 1);
    }
}

#[tokio::test]
async fn an_error_of_a_newer_version_keeps_its_words() {
    let (_directory, store) = store().await;
    let (id, _) = store.insert(new("a", None)).await.unwrap();
    store.start(id).await.unwrap();
    store.finish(id, JobStatus::Failed, Progress::queued(), None, json!({})).await.unwrap();
    let error =
        r#"{"error": "moon_is_full", "message": "the moon is full", "code": 503, "retryable": true, "hint": "wait"}"#;
    break_column(&store, id, "error", error).await;
    break_column(
        &store,
        id,
        "progress",
        r#"{"stage": "baking", "percent": 40, "bytes_processed": 4, "bytes_total": 9}"#,
    )
    .await;
    let job = store.get(id).await.unwrap();
    let read = job.error.unwrap();
    assert_eq!(
        (read.error, read.message.as_str(), read.hint.as_deref()),
        (ErrorCode::Internal, "the moon is full", Some("wait"))
    );
    assert_eq!((read.retryable, &read.details["unknown_code"]), (true, &json!("moon_is_full")));
    assert_eq!((job.progress.percent, job.progress.bytes_processed, job.progress.bytes_total), (40, 4, 9));
    break_column(&store, id, "error", "{\"error\": \"inter~al\"").await;
    assert!(store.get(id).await.unwrap().error.unwrap().message.contains("inter"));
}
