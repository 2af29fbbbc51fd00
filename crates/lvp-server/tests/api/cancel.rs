//! Cancelling: a queued job, a job in its download, a job while it writes.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use e2e::{
    images,
    server::{Page, Server},
};
use serde_json::{Value, json};

use crate::bed::{Bed, MIB};

/// A cancelled job has stopped its writer and ended within this (the promise is a second for the writer).
const SOON: Duration = Duration::from_secs(3);

/// A source that never comes to its end.
fn endless(bed: &Bed, web: &Server) -> Value {
    let image = fs::read(bed.image("endless.qcow2", 9)).unwrap();
    let middle = image.len() as u64 / 2;
    web.serve("/endless.qcow2", Page::new(image).stall(&[middle; 9]));
    let mut order = bed.order("endless.qcow2", "web-1");
    order["image_url"] = json!(web.url("/endless.qcow2"));
    order
}

fn is_downloading(job: &Value) -> bool {
    job["progress"]["stage"] == "downloading" && job["progress"]["bytes_processed"].as_u64().unwrap() > 0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queued_job_is_cancelled_at_once_and_never_runs() {
    let bed = Bed::with(|settings| settings.max_concurrent_jobs = 1).await;
    let web = Server::start();
    let first = bed.submit(&endless(&bed, &web)).await;
    bed.job_when(&first, is_downloading).await;
    let second = bed.submit(&bed.order("good.qcow2", "web-2")).await;
    let job = bed.job(&second).await;
    assert_eq!(
        (&job["status"], &job["progress"]["stage"], &job["started_at"]),
        (&json!("pending"), &json!("queued"), &Value::Null)
    );
    assert_eq!(bed.tcp().get("/health").await.json()["pending_jobs"], 1);

    let cancelled = bed.tcp().delete(&format!("/api/v1/cancel/{second}")).await.expect(200);
    assert_eq!((&cancelled["status"], &cancelled["job_id"]), (&json!("cancelled"), &json!(second)));
    assert!(cancelled["finished_at"].is_string());
    // Twice is no mistake.
    assert_eq!(bed.tcp().delete(&format!("/api/v1/jobs/{second}")).await.expect(200)["status"], "cancelled");
    bed.tcp().delete(&format!("/api/v1/jobs/{first}")).await.expect(200);
    bed.ended(&first).await;
    assert_eq!(bed.job(&second).await["started_at"], Value::Null);
    assert_eq!(bed.store.requests(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_is_cancelled_and_leaves_nothing() {
    let bed = Bed::new().await;
    let web = Server::start();
    let order = endless(&bed, &web);
    let before = bed.listing();
    let id = bed.submit(&order).await;
    bed.job_when(&id, is_downloading).await;
    let begun = Instant::now();
    bed.tcp().delete(&format!("/api/v1/jobs/{id}")).await.expect(200);
    let job = bed.ended(&id).await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!((&job["status"], &job["error_code"]), (&json!("cancelled"), &Value::Null), "{job:#}");
    assert_eq!(bed.listing(), before);
}

fn is_populating(job: &Value) -> bool {
    job["progress"]["stage"] == "populating" && job["progress"]["bytes_processed"].as_u64().unwrap() > 0
}

/// How much of a file is on the disk, in blocks of 512 bytes.
fn blocks(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_job_never_becomes_completed_and_its_writer_stops() {
    const SIZE: u64 = 2048 * MIB;
    let bed = Bed::new().await;
    let heavy = images::qcow2_of_sevens(Path::new(env!("CARGO_TARGET_TMPDIR")), SIZE / MIB).unwrap();
    bed.store.put_file("images", "heavy.qcow2", &heavy).unwrap();
    let mut order = bed.order("heavy.qcow2", "web-1");
    order["size"] = json!(SIZE);
    // A new volume: it goes.
    let id = bed.submit(&order).await;
    bed.job_when(&id, is_populating).await;
    assert!(bed.volume("web-1").exists());
    let begun = Instant::now();
    bed.tcp().delete(&format!("/api/v1/jobs/{id}")).await.expect(200);
    let job = bed.ended(&id).await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    assert_eq!((&job["status"], &job["details"]), (&json!("cancelled"), &Value::Null), "{job:#}");
    assert!(!bed.volume("web-1").exists());

    // A volume that was there before: it stays, the job says that it is half-written, and nobody writes to it any more.
    let existing = fs::File::create(bed.volume("web-1")).unwrap();
    existing.set_len(SIZE).unwrap();
    drop(existing);
    let second = bed.submit(&order).await;
    bed.job_when(&second, is_populating).await;
    bed.tcp().delete(&format!("/api/v1/jobs/{second}")).await.expect(200);
    let job = bed.ended(&second).await;
    assert_eq!(job["status"], "cancelled", "{job:#}");
    assert!(job["details"]["not_undone"].to_string().contains("partly overwritten"), "{job:#}");
    let written = blocks(&bed.volume("web-1"));
    assert!(written < SIZE / 512, "all of it was written");
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(blocks(&bed.volume("web-1")), written, "somebody still writes");
    for id in [id, second] {
        assert_eq!(bed.job(&id).await["status"], "cancelled");
        bed.tcp().delete(&format!("/api/v1/cancel/{id}")).await.expect(200);
    }
}
