//! What people do at the wrong moment, each with a whole job: the row "People" of docs/reference/faults.md.
//!
//! ```text
//!  a miss is held in the middle by a gate at its source
//!  a hit, and a volume that was there, by a rate: its second write waits for seconds after the first
//! ```
//! It leaves out what people do to the image cache (`cache_faults`), and volumes that are in use before a job: `volumes` has
//! those.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use e2e::{
    gate::Gate,
    images,
    server::{Page, Server},
};
use reqwest::Method;
use rustix::fs::{FlockOperation, XattrFlags, flock, lsetxattr, removexattr};
use serde_json::{Value, json};

use crate::{
    auditor::{Audit, Complete, Failed, TAGS, attributes},
    bed::{Answer, Bed, MIB},
    source_faults::{order, raw_image, somebodys_volume},
};

/// The size of the volumes of [`order`].
const SIZE: u64 = 11 * MIB;

/// Serves an image that stops in its middle until the gate is open.
pub fn serve_held(web: &Server, image: &Path) -> Gate {
    let gate = Gate::default();
    web.serve("/x.raw", Page::new(fs::read(image).unwrap()).hold(7 * MIB, &gate));
    gate
}

/// An order whose volume is written so slowly that one can act in the middle.
pub fn slow_order(url: &str, volume: &str) -> Value {
    let mut order = order(url, volume);
    order["limit_rate"] = json!("4M");
    order
}

/// Waits until a job writes its volume.
pub async fn writing(bed: &Bed, id: &str) {
    let is_writing = |job: &Value| {
        job["progress"]["stage"] == "populating" && job["progress"]["bytes_processed"].as_u64().unwrap() > 0
    };
    bed.job_when(id, is_writing).await;
}

/// That what was done was done in the middle.
pub async fn assert_runs(bed: &Bed, id: &str) {
    let job = bed.job(id).await;
    assert_eq!(job["status"], "running", "it was over before: {job:#}");
}

pub fn complete<'a>(volume: &'a str, image: &'a Path) -> Complete<'a> {
    Complete { volume, image, format: "raw", size: SIZE }
}

/// A bed, a web server with an image at `/x.raw`, and the image.
pub async fn ready() -> (Bed, Server, PathBuf) {
    let (bed, web) = (Bed::new().await, Server::start());
    let image = raw_image(&bed, 1);
    web.serve("/x.raw", Page::new(fs::read(&image).unwrap()));
    (bed, web, image)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_request_twice_at_once_is_one_job_with_a_key_and_two_in_turn_without() {
    let (bed, web, image) = ready().await;
    let gate = serve_held(&web, &image);
    let keyed = async || {
        let order = order(&web.url("/x.raw"), "web-1");
        let request = bed.tcp().request(Method::POST, "/api/v1/jobs").header("Idempotency-Key", "once").json(&order);
        Answer::of(request).await.expect(202)["job_id"].as_str().unwrap().to_owned()
    };
    let audit = Audit::begin(&bed);
    let (one, two) = tokio::join!(keyed(), keyed());
    assert_eq!((&one, bed.all_jobs().await.len()), (&two, 1));
    gate.reached().await;
    assert_eq!(keyed().await, one, "while it runs");
    gate.open();
    audit.complete(&one, &complete("web-1", &image)).await;
    assert_eq!(keyed().await, one, "after its end");

    let audit = Audit::begin(&bed);
    let order = order(&web.url("/x.raw"), "web-2");
    let (one, two) = tokio::join!(bed.submit(&order), bed.submit(&order));
    assert_ne!(one, two);
    let (first, second) = (bed.ended(&one).await, bed.ended(&two).await);
    // Whichever came first made the volume; the other one wrote it again.
    let in_turn = |before: &Value, after: &Value| {
        before["finished_at"].as_str().unwrap() <= after["started_at"].as_str().unwrap()
    };
    let last = if in_turn(&first, &second) { &second } else { &first };
    assert!(in_turn(&first, &second) || in_turn(&second, &first), "{first:#} {second:#}");
    let owner = if last["job_id"] == first["job_id"] { &second } else { &first };
    assert_eq!((&first["status"], &second["status"]), (&json!("completed"), &json!("completed")));
    let tags = attributes(&bed.volume("web-2"));
    assert!(tags[TAGS].contains(owner["job_id"].as_str().unwrap()), "{tags:?}");
    bed.assert_holds(&bed.volume("web-2"), &image, "raw", SIZE);
    let shown = bed.tcp().get("/api/v1/volumes/web-2").await.expect(200);
    assert_eq!(shown["receipt"], last["receipt"]);
    fs::remove_file(bed.volume("web-2")).unwrap();
    audit.unchanged(&json!({}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_volume_with_two_images_at_once_holds_the_later_one() {
    let (bed, web, image) = ready().await;
    let gate = serve_held(&web, &image);
    let later = raw_image(&bed, 2);
    web.serve("/y.raw", Page::new(fs::read(&later).unwrap()));
    let first = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
    gate.reached().await;
    let second = bed.submit(&order(&web.url("/y.raw"), "web-1")).await;
    assert_eq!(bed.job(&second).await["status"], "pending");
    gate.open();
    let job = bed.ended(&first).await;
    assert_eq!(job["status"], "completed", "{job:#}");
    let job = bed.ended(&second).await;
    assert_eq!(job["status"], "completed", "{job:#}");
    bed.assert_holds(&bed.volume("web-1"), &later, "raw", SIZE);
    let tags: Value = serde_json::from_str(&attributes(&bed.volume("web-1"))[TAGS]).unwrap();
    assert_eq!((&tags["job"], &tags["image"]), (&json!(first), &job["image_digest"]));
    let shown = bed.tcp().get("/api/v1/volumes/web-1").await.expect(200);
    assert_eq!(shown["receipt"], job["receipt"]);
    assert_eq!(bed.tcp().get("/api/v1/images").await.expect(200).as_array().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_after_the_end_changes_nothing() {
    let (bed, web, image) = ready().await;
    let audit = Audit::begin(&bed);
    let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
    let job = bed.ended(&id).await;
    for path in [format!("/api/v1/jobs/{id}"), format!("/api/v1/cancel/{id}")] {
        let answer = bed.tcp().delete(&path).await;
        assert_eq!(answer.status, 409);
        let refusal = answer.refusal("job_finished");
        assert!(refusal["message"].as_str().unwrap().contains(&id), "{refusal:#}");
    }
    assert_eq!(bed.job(&id).await, job);
    audit.complete(&id, &complete("web-1", &image)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_in_the_middle_leaves_everything_as_it_was() {
    let (bed, web, image) = ready().await;
    somebodys_volume(&bed, "old");
    for volume in ["web-1", "old"] {
        let gate = serve_held(&web, &image);
        let audit = Audit::begin(&bed);
        let id = bed.submit(&order(&web.url("/x.raw"), volume)).await;
        gate.reached().await;
        bed.tcp().delete(&format!("/api/v1/jobs/{id}")).await.expect(200);
        audit.cancelled(&id).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_is_provisioned_is_not_deleted() {
    let (bed, web, image) = ready().await;
    let gate = serve_held(&web, &image);
    let audit = Audit::begin(&bed);
    let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
    gate.reached().await;
    bed.job_when(&id, |_| bed.volume("web-1").exists()).await;
    for path in ["/api/v1/volumes/web-1?force=true", "/api/v1/volumes/web-1"] {
        let answer = bed.tcp().delete(path).await;
        assert_eq!(answer.status, 409);
        let refusal = answer.refusal("volume_in_use");
        assert!(refusal["message"].as_str().unwrap().contains(&id), "{refusal:#}");
    }
    gate.open();
    audit.complete(&id, &complete("web-1", &image)).await;
}

/// Makes the next request a miss.
pub async fn forget_images(bed: &Bed) {
    for image in bed.tcp().get("/api/v1/images").await.expect(200).as_array().unwrap() {
        bed.tcp().delete(&format!("/api/v1/images/{}", image["name"].as_str().unwrap())).await.expect(204);
    }
}

fn removed<'a>() -> Failed<'a> {
    Failed {
        code: "volume_not_found",
        retryable: true,
        says: &["volume web-1 was removed or renamed while the job ran"],
    }
}

fn replaced<'a>() -> Failed<'a> {
    Failed { code: "file_in_the_way", retryable: false, says: &["volume web-1 was replaced by another one"] }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_volume_removed_while_it_is_written_fails_its_job_and_leaves_nothing() {
    let (bed, web, image) = ready().await;
    let gate = serve_held(&web, &image);
    let audit = Audit::begin(&bed).may_cache(&image);
    let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
    gate.reached().await;
    bed.job_when(&id, |_| bed.volume("web-1").exists()).await;
    fs::remove_file(bed.volume("web-1")).unwrap();
    gate.open();
    audit.failed(&id, &removed()).await;
    // The same request again has what it wants.
    let audit = Audit::begin(&bed);
    audit.complete(&bed.submit(&order(&web.url("/x.raw"), "web-1")).await, &complete("web-1", &image)).await;
}

/// Once to another volume's name, where it is found and removed; once to none's and once elsewhere, where nobody looks: that is
/// said.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_volume_renamed_while_it_is_written_fails_its_job_and_is_removed() {
    let (bed, web, image) = ready().await;
    for (place, is_found) in [("volumes/aside.raw", true), ("volumes/aside", false), ("elsewhere.raw", false)] {
        println!("{place}");
        let gate = serve_held(&web, &image);
        let audit = Audit::begin(&bed).may_cache(&image);
        let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
        gate.reached().await;
        bed.job_when(&id, |_| bed.volume("web-1").exists()).await;
        fs::rename(bed.volume("web-1"), bed.path(place)).unwrap();
        gate.open();
        if is_found {
            audit.failed(&id, &removed()).await;
            assert!(!bed.path(place).exists());
        } else {
            let mut job = bed.ended(&id).await;
            let left = job["details"].as_object_mut().unwrap().remove("not_undone").unwrap().to_string();
            assert!(
                left.contains("volume web-1 was moved or renamed while the job ran and is no volume of dir:"),
                "{left}"
            );
            let tags: Value = serde_json::from_str(&attributes(&bed.path(place))[TAGS]).unwrap();
            assert_eq!((&tags["job"], &tags["incomplete"]), (&json!(id), &json!(true)));
            fs::remove_file(bed.path(place)).unwrap();
            audit.unchanged(&job);
        }
        forget_images(&bed).await;
    }
}

/// What was there before is nobody's to remove, whatever it is called by now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_was_there_and_is_renamed_while_it_is_written_is_kept_and_named() {
    let (bed, web, _) = ready().await;
    for is_replaced in [false, true] {
        println!("replaced: {is_replaced}");
        somebodys_volume(&bed, "web-1");
        let id = bed.submit(&slow_order(&web.url("/x.raw"), "web-1")).await;
        writing(&bed, &id).await;
        fs::rename(bed.volume("web-1"), bed.volume("old")).unwrap();
        if is_replaced {
            somebodys_volume(&bed, "web-1");
        }
        let audit = Audit::begin(&bed).but_for("volumes/old.raw");
        assert_runs(&bed, &id).await;
        let mut job = bed.ended(&id).await;
        let expected = if is_replaced { replaced() } else { removed() };
        assert_eq!((&job["error_code"], &job["retryable"]), (&json!(expected.code), &json!(expected.retryable)));
        let left = job["details"].as_object_mut().unwrap().remove("not_undone").unwrap().to_string();
        let said = "volume old, which was called web-1 when the job began, was there before and is partly overwritten";
        assert!(left.contains(said), "{left}");
        audit.unchanged(&job);
        let marks = attributes(&bed.volume("old"));
        assert!(!marks.contains_key(TAGS), "it says that it holds an image: {marks:?}");
        fs::remove_file(bed.volume("old")).unwrap();
    }
}

/// Once by a file that was there before the volume was, under another name, once by one of the same size that is new, once
/// by a copy with the tags of the job on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_put_in_place_of_a_new_volume_is_neither_written_nor_removed() {
    let (bed, web, image) = ready().await;
    for way in ["moved there", "made there", "a copy with its tags"] {
        println!("{way}");
        let gate = serve_held(&web, &image);
        let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
        gate.reached().await;
        bed.job_when(&id, |_| bed.volume("web-1").exists()).await;
        let (volume, aside) = (bed.volume("web-1"), bed.path("volumes/aside"));
        match way {
            "made there" => {
                fs::remove_file(&volume).unwrap();
                fs::write(&volume, vec![9; SIZE as usize]).unwrap();
            }
            _ => {
                fs::write(&aside, vec![9; SIZE as usize]).unwrap();
                if way != "moved there" {
                    lsetxattr(&aside, TAGS, attributes(&volume)[TAGS].as_bytes(), XattrFlags::empty()).unwrap();
                }
                fs::rename(&aside, &volume).unwrap();
            }
        }
        let audit = Audit::begin(&bed).but_for_downloads().may_cache(&image);
        gate.open();
        audit.failed(&id, &replaced()).await;
        assert!(fs::read(&volume).unwrap().iter().all(|byte| *byte == 9));
        fs::remove_file(volume).unwrap();
        forget_images(&bed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_was_there_and_is_removed_or_replaced_while_it_is_written_fails_its_job() {
    let (bed, web, _) = ready().await;
    for (way, expected) in [("removed", removed()), ("replaced", replaced())] {
        println!("{way}");
        somebodys_volume(&bed, "web-1");
        let id = bed.submit(&slow_order(&web.url("/x.raw"), "web-1")).await;
        writing(&bed, &id).await;
        fs::remove_file(bed.volume("web-1")).unwrap();
        if way == "replaced" {
            fs::write(bed.volume("web-1"), vec![9; SIZE as usize]).unwrap();
        }
        let audit = Audit::begin(&bed);
        assert_runs(&bed, &id).await;
        audit.failed(&id, &expected).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_is_locked_at_the_last_moment_keeps_its_tags() {
    let (bed, web, _) = ready().await;
    bed.provision(&order(&web.url("/x.raw"), "web-1")).await;
    // By this process, which is none that is looked for before: the lock alone is in the way.
    let held = fs::File::open(bed.volume("web-1")).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    let audit = Audit::begin(&bed);
    let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
    audit.failed(&id, &Failed { code: "volume_in_use", retryable: true, says: &["web-1.raw is in use"] }).await;
}

/// A program that has a file open, and asks nobody.
struct User(Child);

impl User {
    fn of(path: &Path) -> Self {
        let file = fs::File::open(path).unwrap();
        Self(Command::new("sleep").arg("600").stdin(file).spawn().unwrap())
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a program of qemu's opens this raw image for writing, as a guest that starts.
fn is_opened_by_qemu(path: &Path) -> bool {
    let asked = Command::new("qemu-io").args(["-f", "raw", "-c", "quit"]).arg(path).output().unwrap();
    let said = String::from_utf8_lossy(&asked.stderr);
    assert!(asked.status.success() || said.contains("lock"), "{said}");
    asked.status.success()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_starts_while_its_volume_is_written_does_not() {
    let (bed, web, image) = ready().await;
    let gate = serve_held(&web, &image);
    let audit = Audit::begin(&bed);
    let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
    gate.reached().await;
    bed.job_when(&id, |job| job["device_path"].is_string()).await;
    assert!(!is_opened_by_qemu(&bed.volume("web-1")));
    gate.open();
    audit.complete(&id, &complete("web-1", &image)).await;
    assert!(is_opened_by_qemu(&bed.volume("web-1")));
    // And one that was there.
    let id = bed.submit(&slow_order(&web.url("/x.raw"), "web-1")).await;
    writing(&bed, &id).await;
    assert!(!is_opened_by_qemu(&bed.volume("web-1")));
    assert_runs(&bed, &id).await;
    assert_eq!(bed.ended(&id).await["status"], "completed");
    assert!(is_opened_by_qemu(&bed.volume("web-1")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_comes_into_use_while_it_is_written_is_not_said_to_hold_its_image() {
    let (bed, web, image) = ready().await;
    for way in ["new", "was there"] {
        println!("{way}");
        let volume = bed.volume("web-1");
        let (id, user) = if way == "new" {
            let gate = serve_held(&web, &image);
            let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
            gate.reached().await;
            bed.job_when(&id, |job| job["device_path"].is_string()).await;
            let user = User::of(&volume);
            gate.open();
            (id, user)
        } else {
            bed.provision(&order(&web.url("/x.raw"), "web-1")).await;
            let id = bed.submit(&slow_order(&web.url("/x.raw"), "web-1")).await;
            writing(&bed, &id).await;
            let user = User::of(&volume);
            assert_runs(&bed, &id).await;
            (id, user)
        };
        let job = bed.ended(&id).await;
        assert_eq!((&job["status"], &job["error_code"]), (&json!("failed"), &json!("volume_in_use")), "{job:#}");
        let said = job["error"].as_str().unwrap();
        assert!(said.contains("came into use while it was written") && said.contains("(sleep) has it open"), "{job:#}");
        // Nobody's disk is taken away, and nobody is told that it is whole.
        let left = job["details"]["not_undone"].to_string();
        let why = if way == "new" { "volume web-1 is in use" } else { "volume web-1 was there before and is partly" };
        assert!(left.contains(why), "{job:#}");
        let shown = bed.tcp().get("/api/v1/volumes/web-1").await.expect(200);
        assert!(shown["image_digest"].is_null() && shown["receipt"].is_null(), "{shown:#}");
        assert_eq!(shown["incomplete"] == true, way == "new", "{shown:#}");
        drop(user);
        // What was not undone can be done again.
        assert_eq!(bed.tcp().delete("/api/v1/volumes/web-1?force=true").await.status, 204);
        assert!(!volume.exists());
    }
}

/// Removes lvp's tags from a volume, as `setfattr -x` does.
fn remove_tags(bed: &Bed, volume: &str) {
    removexattr(bed.volume(volume), TAGS).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_lost_its_tags_is_not_removed_by_the_undo_which_says_so() {
    let (bed, web, image) = ready().await;
    for way in ["fails", "is cancelled"] {
        println!("{way}");
        let gate = serve_held(&web, &image);
        let mut order = order(&web.url("/x.raw"), "web-1");
        order["checksum"] = json!(format!("sha256:{}", "5".repeat(64)));
        let before = Audit::begin(&bed).but_for("volumes/web-1.raw");
        let id = bed.submit(&order).await;
        gate.reached().await;
        bed.job_when(&id, |_| bed.volume("web-1").exists()).await;
        remove_tags(&bed, "web-1");
        if way == "is cancelled" {
            bed.tcp().delete(&format!("/api/v1/jobs/{id}")).await.expect(200);
        } else {
            gate.open();
        }
        let mut job = bed.ended(&id).await;
        let left = job["details"].as_object_mut().unwrap().remove("not_undone").unwrap();
        assert!(left.to_string().contains("volume web-1 has not the tags of this job any more"), "{left}");
        let ended = if way == "fails" { ("failed", "checksum_mismatch") } else { ("cancelled", "cancelled") };
        assert_eq!((&job["status"], &job["error_code"]), (&json!(ended.0), &json!(ended.1)), "{job:#}");
        before.unchanged(&job);
        assert_eq!(
            (fs::metadata(bed.volume("web-1")).unwrap().len(), attributes(&bed.volume("web-1")).len()),
            (SIZE, 0)
        );
        bed.tcp().delete("/api/v1/volumes/web-1?force=true").await.refusal("volume_not_ours");
        fs::remove_file(bed.volume("web-1")).unwrap();
    }
}

/// Whatever was put there, the job says what it knows: not that somebody's good disk is not complete.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_put_in_place_of_a_new_volume_while_the_daemon_is_down_is_left_and_not_called_incomplete() {
    let (mut bed, web, image) = ready().await;
    // One that the job could overwrite, and one that it could not.
    for (name, size) in [("web-1", SIZE), ("web-2", 3 * SIZE)] {
        let gate = serve_held(&web, &image);
        let id = bed.submit(&order(&web.url("/x.raw"), name)).await;
        gate.reached().await;
        bed.job_when(&id, |job| job["device_path"].is_string()).await;
        let (volume, other) = (bed.volume(name), vec![9; size as usize]);
        bed.restart_after(|_| {
            fs::remove_file(&volume).unwrap();
            fs::write(&volume, &other).unwrap();
            web.serve("/x.raw", Page::new(fs::read(&image).unwrap()));
        })
        .await;
        let job = bed.ended(&id).await;
        assert_eq!((&job["status"], &job["error_code"]), (&json!("failed"), &json!("file_in_the_way")), "{job:#}");
        let left = job["details"]["not_undone"].to_string();
        assert!(left.contains(&format!("a volume {name} is there that does not say that it is this job's")), "{left}");
        assert!(!left.contains("complete"), "{left}");
        assert!(fs::read(&volume).unwrap() == other && attributes(&volume).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_lost_its_tags_in_the_middle_is_written_to_its_end_and_is_not_lvps() {
    let (bed, web, image) = ready().await;
    let gate = serve_held(&web, &image);
    let audit = Audit::begin(&bed);
    let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
    gate.reached().await;
    bed.job_when(&id, |_| bed.volume("web-1").exists()).await;
    remove_tags(&bed, "web-1");
    gate.open();
    audit.released("web-1").complete(&id, &complete("web-1", &image)).await;
    assert_eq!(bed.tcp().get("/api/v1/volumes/web-1").await.expect(200)["made_by_lvp"], false);
    bed.tcp().delete("/api/v1/volumes/web-1?force=true").await.refusal("volume_not_ours");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_lost_its_tags_afterwards_is_somebody_elses() {
    let (bed, web, image) = ready().await;
    bed.provision(&order(&web.url("/x.raw"), "web-1")).await;
    remove_tags(&bed, "web-1");
    let audit = Audit::begin(&bed);
    let shown = bed.tcp().get("/api/v1/volumes/web-1").await.expect(200);
    assert_eq!((&shown["made_by_lvp"], &shown["receipt"]), (&json!(false), &Value::Null), "{shown:#}");
    bed.tcp().delete("/api/v1/volumes/web-1?force=true").await.refusal("volume_not_ours");
    bed.tcp().post("/api/v1/volumes/web-1/verify", &Value::Null).await.refusal("receipt_not_found");
    audit.unchanged(&json!({}));
    // It is overwritten as any volume that was there, and stays somebody else's.
    audit.complete(&bed.submit(&order(&web.url("/x.raw"), "web-1")).await, &complete("web-1", &image)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_volume_removed_while_it_is_written_from_a_qcow2_image_fails_its_job_too() {
    let (bed, web, image) = ready().await;
    let qcow2 = bed.path("images/x.qcow2");
    images::qcow2_from(&image, &qcow2, &images::Qcow2Options::default()).unwrap();
    let gate = serve_held(&web, &qcow2);
    let mut order = order(&web.url("/x.raw"), "web-1");
    order["image_type"] = json!("qcow2");
    let audit = Audit::begin(&bed).may_cache(&qcow2);
    let id = bed.submit(&order).await;
    gate.reached().await;
    bed.job_when(&id, |_| bed.volume("web-1").exists()).await;
    fs::remove_file(bed.volume("web-1")).unwrap();
    gate.open();
    audit.failed(&id, &removed()).await;
}
