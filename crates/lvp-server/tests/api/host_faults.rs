//! What of the host is away or full, each with a whole job: rows of the table "Host" of docs/reference/faults.md.
//!
//! It leaves out what needs a machine of its own, such as memory that runs out: the scenarios of `crates/e2e` have that.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use e2e::{
    gate::Gate,
    server::{Page, Server},
};
use lvp_engine::LibvirtSetting;
use serde_json::{Value, json};

use crate::{
    auditor::Audit,
    bed::{Bed, MIB},
    people_faults::serve_held,
    source_faults::{order, raw_image, somebodys_volume},
};

/// What has not come by then does not.
const PATIENCE: Duration = Duration::from_secs(30);
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

/// Writes something else into a column of a job; gives what was there.
fn replace(state: &Path, id: &str, column: &str, value: &str) -> String {
    let database = rusqlite::Connection::open(state.join("jobs.db")).unwrap();
    let before = database.query_row(&format!("SELECT {column} FROM jobs WHERE id = ?1"), [id], |row| row.get(0));
    let changed = database.execute(&format!("UPDATE jobs SET {column} = ?2 WHERE id = ?1"), [id, value]).unwrap();
    assert_eq!(changed, 1);
    before.unwrap()
}

/// What a newer lvp wrote, or a bit that flipped: one job that cannot be read, in the middle of what it does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_cannot_be_read_stops_no_daemon_and_its_volume_is_left_alone() {
    let mut bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let before = bed.provision(&bed.order("good.qcow2", "before")).await["job_id"].clone();
    let (web, gate) = (Server::start(), Gate::default());
    let image = fs::read(bed.image("held.qcow2", 2)).unwrap();
    let most = image.len() as u64 - 1;
    web.serve("/held.qcow2", Page::new(image).hold(most, &gate));
    let mut held = bed.order("good.qcow2", "held");
    held["image_url"] = json!(web.url("/held.qcow2"));
    let id = bed.submit(&held).await;
    let begun = Instant::now();
    while !bed.volume("held").exists() {
        assert!(begun.elapsed() < PATIENCE, "its volume is not made");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut kind = String::new();
    bed.restart_after(|state| kind = replace(state, &id, "kind", "teleport")).await;
    gate.open();
    // The daemon is there, and does what else it is asked for.
    let after = bed.provision(&bed.order("good.qcow2", "after")).await["job_id"].clone();
    let listed: Vec<Value> = bed.all_jobs().await.iter().map(|job| job["job_id"].clone()).collect();
    assert_eq!(listed, [after, before]);
    let answer = bed.tcp().get(&format!("/api/v1/jobs/{id}")).await;
    let refusal = answer.refusal("database_unavailable");
    assert_eq!(refusal["retryable"], false, "{refusal:#}");
    assert!(refusal["hint"].as_str().unwrap().contains("newer lvp"), "{refusal:#}");

    // Nobody touches what it had begun: not by a request, and not as a leftover.
    let answer = bed.tcp().post("/api/v1/jobs", &bed.order("good.qcow2", "held")).await;
    let refusal = answer.refusal("volume_in_use");
    assert!(refusal["retryable"] == false && refusal["message"].as_str().unwrap().contains(&id), "{refusal:#}");
    bed.unix().delete("/api/v1/volumes/held?force=true").await.refusal("volume_in_use");
    let begun = Instant::now();
    while !bed.tcp().get("/health").await.json()["checks"].as_array().unwrap().iter().any(|check| {
        check["name"] == "leftovers" && check["message"].as_str().unwrap().contains("cannot be read in the database")
    }) {
        assert!(begun.elapsed() < PATIENCE, "leftovers were not looked for");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(bed.volume("held").exists());

    // The same, where a newer lvp was asked for what is not known here.
    let mut request = String::new();
    bed.restart_after(|state| {
        replace(state, &id, "kind", &kind);
        request = replace(state, &id, "request", "{\"newer\": true}");
    })
    .await;
    bed.provision(&bed.order("good.qcow2", "last")).await;
    assert_eq!(bed.all_jobs().await.len(), 3, "the one that cannot be read is listed, or another one is not");
    bed.tcp().get(&format!("/api/v1/jobs/{id}")).await.refusal("database_unavailable");
    bed.tcp().post("/api/v1/jobs", &bed.order("good.qcow2", "held")).await.refusal("volume_in_use");
    assert!(bed.volume("held").exists());

    // The newer lvp is back.
    bed.restart_after(|state| drop(replace(state, &id, "request", &request))).await;
    assert_eq!(bed.ended(&id).await["status"], "completed");
}
