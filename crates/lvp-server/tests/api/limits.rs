//! Jobs that may only go so fast. A rate is held from below only: a slow machine makes no test fail.

use std::{
    fs,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::bed::{Bed, DISK, MIB};

/// A cancelled job that waits for its turn to write or to fetch has ended within this.
const SOON: Duration = Duration::from_secs(3);
const IMAGE: u64 = 6 * MIB;

/// Publishes a raw image without zeros, and gives a request for it.
fn order(bed: &Bed, name: &str, volume: &str) -> Value {
    let mut random = fastrand::Rng::with_seed(5);
    let content: Vec<u8> = std::iter::repeat_with(|| random.u8(1..)).take(IMAGE as usize).collect();
    let file = bed.path(&format!("images/{name}"));
    fs::write(&file, content).unwrap();
    bed.upload(&file);
    json!({ "image_url": bed.url(name), "volume_name": volume, "size": IMAGE, "image_type": "raw" })
}

fn prefetch(bed: &Bed, name: &str) -> Value {
    json!({ "image_url": bed.url(name), "image_type": "raw" })
}

async fn cached(bed: &Bed, body: &Value) {
    let id = bed.tcp().post("/api/v1/images", body).await.expect(202)["job_id"].as_str().unwrap().to_owned();
    assert_eq!(bed.ended(&id).await["status"], "completed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_fetches_no_faster_than_it_may() {
    let bed = Bed::new().await;
    order(&bed, "x.raw", "web-1");
    let mut body = prefetch(&bed, "x.raw");
    body["limit_rate"] = json!("4M");
    let begun = Instant::now();
    cached(&bed, &body).await;
    // 1.5 s, less what may come before the first wait.
    assert!(begun.elapsed() > Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_jobs_together_write_no_faster_than_the_daemon_may() {
    let bed = Bed::with(|settings| settings.write_limit = Some(4 * MIB)).await;
    let first = order(&bed, "x.raw", "web-1");
    cached(&bed, &prefetch(&bed, "x.raw")).await;
    let mut second = first.clone();
    second["volume_name"] = json!("web-2");
    let begun = Instant::now();
    let (one, two) = tokio::join!(bed.provision(&first), bed.provision(&second));
    // 3 s, less what each job may write before its first wait.
    assert!(begun.elapsed() > Duration::from_millis(1500), "{:?}", begun.elapsed());
    assert_eq!((&one["status"], &two["status"]), (&json!("completed"), &json!("completed")));
    assert!(fs::read(bed.volume("web-1")).unwrap() == fs::read(bed.volume("web-2")).unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_waits_for_its_turn_is_cancelled_at_once() {
    let bed = Bed::new().await;
    let mut slow = order(&bed, "x.raw", "web-1");
    slow["limit_rate"] = json!("64K");
    for stage in ["downloading", "populating"] {
        let before = bed.listing();
        let id = bed.submit(&slow).await;
        bed.job_when(&id, |job| {
            job["progress"]["stage"] == stage && job["progress"]["bytes_processed"].as_u64().unwrap() > 0
        })
        .await;
        let begun = Instant::now();
        bed.tcp().delete(&format!("/api/v1/jobs/{id}")).await.expect(200);
        let job = bed.ended(&id).await;
        assert!(begun.elapsed() < SOON, "{stage}: {:?}", begun.elapsed());
        assert_eq!(job["status"], "cancelled", "{job:#}");
        assert_eq!(bed.listing(), before, "{stage}");
        // The next one has only to write.
        cached(&bed, &prefetch(&bed, "x.raw")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copying_at_the_lowest_priority_copies_the_same() {
    let bed = Bed::with(|settings| settings.io_priority = lvp_engine::IoPriority::Idle).await;
    bed.publish("good.qcow2", 1);
    bed.provision(&bed.order("good.qcow2", "web-1")).await;
    let verified = bed.tcp().post("/api/v1/volumes/web-1/verify", &Value::Null).await.expect(200);
    assert_eq!(verified["intact"], true, "{verified:#}");
    assert_eq!(fs::metadata(bed.volume("web-1")).unwrap().len(), DISK);
}
