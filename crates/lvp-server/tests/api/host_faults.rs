//! What of the host is away or full, each with a whole job: rows of the table "Host" of docs/reference/faults.md.
//!
//! It leaves out what needs a machine of its own, such as memory that runs out: the scenarios of `crates/e2e` have that.

use std::{fs, time::Duration};

use e2e::server::{Page, Server};
use lvp_engine::LibvirtSetting;
use serde_json::{Value, json};

use crate::{
    auditor::Audit,
    bed::{Bed, MIB},
    people_faults::serve_held,
    source_faults::{order, raw_image, somebodys_volume},
};

/// The size of the volumes of [`order`].
const SIZE: u64 = 11 * MIB;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_libvirt_a_new_volume_is_resumed_and_taken_back_and_an_old_one_is_not_touched() {
    let away = LibvirtSetting::Uri("test:///nonexistent/node.xml".to_owned());
    let mut bed = Bed::with(|settings| settings.libvirt = away).await;
    let (web, image) = (Server::start(), raw_image(&bed, 1));
    let gate = serve_held(&web, &image);
    let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
    gate.reached().await;
    assert!(bed.volume("web-1").exists(), "the attempt before left nothing to be removed");
    bed.restart_after(|_| web.serve("/x.raw", Page::new(fs::read(&image).unwrap()))).await;
    let job = bed.ended(&id).await;
    assert_eq!(job["status"], "completed", "{job:#}");
    bed.assert_holds(&bed.volume("web-1"), &image, "raw", SIZE);

    let other = raw_image(&bed, 2);
    let audit = Audit::begin(&bed);
    let gate = serve_held(&web, &other);
    let id = bed.submit(&order(&web.url("/x.raw"), "web-2")).await;
    gate.reached().await;
    bed.tcp().delete(&format!("/api/v1/jobs/{id}")).await.expect(200);
    let job = bed.ended(&id).await;
    assert_eq!(job["status"], "cancelled", "{job:#}");
    audit.unchanged(&job);
    gate.open();

    somebodys_volume(&bed, "old");
    let audit = Audit::begin(&bed).may_cache(&image);
    web.serve("/x.raw", Page::new(fs::read(&image).unwrap()));
    let job = bed.fail(&order(&web.url("/x.raw"), "old"), "libvirt_unavailable").await;
    audit.unchanged(&job);
}

/// Does something to the job database beside the daemon.
fn to_database(bed: &Bed, sql: &str) {
    let connection = rusqlite::Connection::open(bed.path("state/jobs.db")).unwrap();
    connection.busy_timeout(Duration::from_secs(10)).unwrap();
    connection.execute_batch(sql).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_database_that_takes_nothing_loses_no_job_and_no_volume() {
    let bed = Bed::with(|settings| settings.max_concurrent_jobs = 1).await;
    let (web, image) = (Server::start(), raw_image(&bed, 1));
    bed.publish("good.qcow2", 1);
    bed.provision(&bed.order("good.qcow2", "old")).await;
    let gate = serve_held(&web, &image);
    let running = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
    gate.reached().await;
    let waiting = bed.submit(&bed.order("good.qcow2", "web-2")).await;
    // Everything can be read, and nothing can be written, as on a disk that is full or read-only.
    let refuse = |event: &str| {
        format!("CREATE TRIGGER no_{event} BEFORE {event} ON jobs BEGIN SELECT RAISE(FAIL, 'disk is full'); END;")
    };
    to_database(&bed, &(refuse("INSERT") + &refuse("UPDATE")));
    let answer = bed.tcp().post("/api/v1/jobs", &bed.order("good.qcow2", "web-3")).await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.refusal("database_unavailable")["retryable"], json!(true));
    let status = async |id: &str| bed.job(id).await["status"].clone();
    assert_eq!((status(&running).await, status(&waiting).await), (json!("running"), json!("pending")));
    // Volumes need no database.
    bed.tcp().delete("/api/v1/volumes/old?force=true").await.expect(204);

    // What cannot say that it goes on is taken back, and keeps its volume until its end is recorded.
    gate.open();
    let begun = std::time::Instant::now();
    while bed.volume("web-1").exists() {
        assert!(begun.elapsed() < Duration::from_secs(30), "the volume stays");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!((status(&running).await, status(&waiting).await), (json!("running"), json!("pending")));
    to_database(&bed, "DROP TRIGGER no_INSERT; DROP TRIGGER no_UPDATE;");
    let job: Value = bed.ended(&running).await;
    assert_eq!((&job["status"], &job["error_code"]), (&json!("failed"), &json!("database_unavailable")), "{job:#}");
    assert_eq!(job["retryable"], json!(true));
    let job = bed.ended(&waiting).await;
    assert_eq!(job["status"], "completed", "{job:#}");
}
