//! What was left: incomplete volumes of jobs that will not come back are removed, and nothing else is; and whose a volume is.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use e2e::{images::run, server::Server};
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

use crate::{
    bed::{Bed, DISK},
    linked::linked,
    people_faults::serve_held,
    source_faults::{order, raw_image},
};

const PATIENCE: Duration = Duration::from_secs(30);

/// A job submitted so many hours ago, which nobody here knows.
fn strange_job(hours: u64) -> uuid::Uuid {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() - hours * 3600;
    uuid::Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, seconds, 0))
}

/// A file with what lvp writes on its volumes, of such a job.
fn strange_volume(path: &Path, hours: u64, incomplete: bool) {
    write_strange(path, strange_job(hours), incomplete);
}

fn write_strange(path: &Path, job: uuid::Uuid, incomplete: bool) {
    let mut record = json!({ "job": job, "image": null });
    if incomplete {
        record["incomplete"] = json!(true);
    }
    fs::write(path, vec![7; DISK as usize]).unwrap();
    run("setfattr", &["--name=user.lvp", &format!("--value={record}"), path.to_str().unwrap()]).unwrap();
}

async fn until_gone(path: &Path) {
    let begun = Instant::now();
    while path.exists() {
        assert!(begun.elapsed() < PATIENCE, "{} stays", path.display());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What health tells of leftovers, once they were looked for. One of the bed's targets is never usable.
async fn until_told(bed: &Bed) -> Value {
    let begun = Instant::now();
    loop {
        let health = bed.tcp().get("/health").await.expect(503);
        if let Some(check) = health["checks"].as_array().unwrap().iter().find(|check| check["name"] == "leftovers") {
            return check.clone();
        }
        assert!(begun.elapsed() < PATIENCE, "{health:#}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_unknown_job_left_incomplete_is_removed_after_the_grace_period_and_nothing_else_is() {
    let mut bed = Bed::new().await;
    strange_volume(&bed.volume("new"), 23, true);
    strange_volume(&bed.volume("old"), 25, true);
    strange_volume(&bed.volume("complete"), 1000, false);
    strange_volume(&bed.volume("used"), 25, true);
    // Looks like lvp's by its name only.
    fs::write(bed.path("volumes/.lvp-used.new"), "another's").unwrap();
    fs::write(bed.volume("lvp-incomplete"), "another's").unwrap();
    let loop_device = e2e::images::LoopDevice::attach(&bed.volume("used"), 512).unwrap();
    let shown = bed.tcp().get("/api/v1/volumes/old").await.expect(200);
    assert_eq!(shown["incomplete"], true, "{shown:#}");
    let mut before = bed.listing();
    bed.restart().await;
    until_gone(&bed.volume("old")).await;
    // The next one finds no more than the one before left.
    bed.restart().await;
    before.retain(|line| !line.starts_with("volumes/old.raw"));
    assert_eq!(bed.listing(), before);
    let told = until_told(&bed).await;
    assert!(told["status"] == "degraded", "{told:#}");
    let message = told["message"].as_str().unwrap();
    assert!(message.contains("incomplete volume new in") && message.contains("kept for now"), "{message}");
    assert!(message.contains("incomplete volume used in") && message.contains("cannot be removed now"), "{message}");
    drop(loop_device);
    bed.restart().await;
    until_gone(&bed.volume("used")).await;
    // What has no tags is nobody's to remove, whatever became of the volume of that name.
    assert_eq!(fs::read(bed.path("volumes/.lvp-used.new")).unwrap(), b"another's");
}

/// Bases that other daemons write, or that only look so, in a linked directory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unfinished_base_is_removed_if_it_says_that_it_is_one_and_nobody_holds_it() {
    let mut bed = linked().await;
    let [left, held, foreign, marked] = [25, 25, 25, 25].map(strange_job);
    let file = |job: uuid::Uuid| bed.path(&format!("volumes/.lvp-{job}.base-new"));
    let [left, held] = [left, held].map(|job| {
        write_strange(&file(job), job, true);
        file(job)
    });
    // Not of the job in its name, and of none at all.
    write_strange(&file(foreign), strange_job(25), true);
    fs::write(file(marked), "another's").unwrap();
    let writer = fs::File::open(&held).unwrap();
    flock(&writer, FlockOperation::LockExclusive).unwrap();
    let mut before = bed.listing();
    bed.restart().await;
    until_gone(&left).await;
    let told = until_told(&bed).await;
    assert!(told["message"].as_str().unwrap().contains("cannot be removed now"), "{told:#}");
    let name = left.strip_prefix(bed.path("")).unwrap().display().to_string();
    before.retain(|line| *line != name);
    assert_eq!(bed.listing(), before);
    drop(writer);
    bed.restart().await;
    until_gone(&held).await;
    let name = held.strip_prefix(bed.path("")).unwrap().display().to_string();
    before.retain(|line| *line != name);
    assert_eq!(bed.listing(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whose_a_volume_is_changes_by_the_administrator_only() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let made = bed.provision(&bed.order("good.qcow2", "web")).await;
    fs::write(bed.volume("foreign"), vec![7; DISK as usize]).unwrap();
    let post = async |name: &str, verb: &str| {
        let path = format!("/api/v1/volumes/{name}/{verb}");
        bed.tcp().post(&path, &Value::Null).await.refusal("not_permitted");
        bed.unix().post(&path, &Value::Null).await
    };
    assert_eq!(post("foreign", "adopt").await.expect(200)["made_by_lvp"], true);
    assert_eq!(post("foreign", "adopt").await.expect(200)["made_by_lvp"], true);
    let released = post("web", "release").await.expect(200);
    assert!(released["made_by_lvp"] == false && released.get("job_id").is_none(), "{released:#}");
    post("absent", "adopt").await.refusal("volume_not_found");
    bed.tcp().delete("/api/v1/volumes/web?force=true").await.refusal("volume_not_ours");
    bed.tcp().delete("/api/v1/volumes/foreign?force=true").await.expect(204);
    assert!(bed.volume("web").exists() && !bed.volume("foreign").exists());
    let adopted = post("web", "adopt").await.expect(200);
    assert!(adopted["made_by_lvp"] == true && adopted.get("job_id").is_none(), "not the job's: {made:#}");
}

/// Who takes over what a job left says that it is to stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_incomplete_volume_that_is_adopted_is_no_leftover() {
    let mut bed = Bed::new().await;
    strange_volume(&bed.volume("kept"), 25, true);
    strange_volume(&bed.volume("left"), 25, true);
    let adopted = bed.unix().post("/api/v1/volumes/kept/adopt", &Value::Null).await.expect(200);
    assert!(adopted["made_by_lvp"] == true && adopted["incomplete"] != true, "{adopted:#}");
    assert!(adopted.get("job_id").is_none(), "{adopted:#}");
    bed.restart().await;
    until_gone(&bed.volume("left")).await;
    assert_eq!(fs::read(bed.volume("kept")).unwrap(), vec![7; DISK as usize]);
    bed.tcp().delete("/api/v1/volumes/kept?force=true").await.expect(204);
    // One that a job is about is the job's.
    let web = Server::start();
    let gate = serve_held(&web, &raw_image(&bed, 1));
    let id = bed.submit(&order(&web.url("/x.raw"), "web")).await;
    gate.reached().await;
    bed.job_when(&id, |_| bed.volume("web").exists()).await;
    let refused = bed.unix().post("/api/v1/volumes/web/adopt", &Value::Null).await.refusal("volume_in_use");
    assert!(refused["message"].as_str().unwrap().contains(&id), "{refused:#}");
    gate.open();
    assert_eq!(bed.ended(&id).await["status"], "completed");
}
