//! What the reference daemon promises and does not do, each shown absent here by a test of that name.
//!
//! It leaves out what needs LVM (`the volume group is configurable` is shown here for a directory) and the exact counts
//! of `jobs_are_counted_by_their_end`, for which the process must be its own: the tests of the binary have it.

use std::{fs, time::Duration};

use e2e::{
    images,
    server::{Page, Server},
};
use serde_json::{Value, json};

use crate::bed::{Bed, DISK, MIB};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_second_request_is_a_hit() {
    let bed = Bed::new().await;
    let image = bed.publish("ubuntu-20.04.qcow2", 1);
    let first = bed.provision(&bed.order("ubuntu-20.04.qcow2", "web-1")).await;
    assert_eq!(first["cache_hit"], false);
    let gets = bed.store.count("GET", "/images/ubuntu-20.04.qcow2");
    let second = bed.provision(&bed.order("ubuntu-20.04.qcow2", "web-2")).await;
    assert_eq!((&second["cache_hit"], &second["image_path"]), (&json!(true), &first["image_path"]));
    assert_eq!(bed.store.count("GET", "/images/ubuntu-20.04.qcow2"), gets, "it was downloaded again");
    for volume in ["web-1", "web-2"] {
        bed.assert_holds(&bed.volume(volume), &image, "qcow2", DISK);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_second_request_is_a_hit_after_a_restart_and_without_the_object() {
    let mut bed = Bed::new().await;
    let image = bed.publish("good.qcow2", 1);
    bed.provision(&bed.order("good.qcow2", "web-1")).await;
    bed.restart().await;
    bed.store.remove("images", "good.qcow2").unwrap();
    let job = bed.provision(&bed.order("good.qcow2", "web-2")).await;
    assert_eq!(job["cache_hit"], true);
    bed.assert_holds(&bed.volume("web-2"), &image, "qcow2", DISK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_images_of_one_name_do_not_overwrite_each_other() {
    let bed = Bed::new().await;
    let old = bed.publish("base.qcow2", 1);
    let kept = bed.path("images/kept.qcow2");
    fs::copy(&old, &kept).unwrap();
    let first = bed.provision(&bed.order("base.qcow2", "old-1")).await;
    let new = bed.publish("base.qcow2", 2);
    let second = bed.provision(&bed.order("base.qcow2", "new-1")).await;
    assert_eq!(second["cache_hit"], false);
    assert_ne!(first["image_path"], second["image_path"]);
    assert_eq!(bed.tcp().get("/api/v1/images").await.expect(200).as_array().unwrap().len(), 2);
    bed.assert_holds(&bed.volume("old-1"), &kept, "qcow2", DISK);
    bed.assert_holds(&bed.volume("new-1"), &new, "qcow2", DISK);
    // Both are still hits, each under its own digest.
    let mut order = bed.order("base.qcow2", "old-2");
    order["checksum"] = first["image_digest"].clone();
    assert_eq!(bed.provision(&order).await["cache_hit"], true);
    bed.assert_holds(&bed.volume("old-2"), &kept, "qcow2", DISK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_are_hashed_against_the_published_checksum() {
    let bed = Bed::new().await;
    let promised = bed.image("promised.qcow2", 1);
    bed.upload(&promised);
    // As long as the promised one, so that a count of bytes would not tell.
    let mut bytes = fs::read(&promised).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    bed.store.put("images", "promised.qcow2", &bytes).unwrap();
    let before = bed.listing();
    bed.fail(&bed.order("promised.qcow2", "web-1"), "checksum_mismatch").await;
    assert_eq!(bed.listing(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rollback_never_removes_a_volume_that_was_there() {
    let bed = Bed::new().await;
    let before = vec![7; DISK as usize];
    fs::write(bed.volume("web-1"), &before).unwrap();
    // Fails before it writes: nothing is touched.
    let broken = bed.image("broken.qcow2", 3);
    bed.upload(&broken);
    bed.store.put("images", "broken.qcow2", b"QFI\xfbnot what was promised").unwrap();
    let job = bed.ended(&bed.submit(&bed.order("broken.qcow2", "web-1")).await).await;
    assert_eq!(job["status"], "failed", "{job:#}");
    assert!(fs::read(bed.volume("web-1")).unwrap() == before, "its content changed");

    // One that lvp made itself, for an earlier job, was there before too.
    bed.publish("good.qcow2", 1);
    bed.provision(&bed.order("good.qcow2", "web-2")).await;
    let content = fs::read(bed.volume("web-2")).unwrap();
    let job = bed.ended(&bed.submit(&bed.order("broken.qcow2", "web-2")).await).await;
    assert_eq!(job["status"], "failed", "{job:#}");
    assert!(fs::read(bed.volume("web-2")).unwrap() == content, "its content changed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_survive_a_restart() {
    let mut bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let completed = bed.provision(&bed.order("good.qcow2", "web-1")).await;
    let failed = bed.fail(&bed.order("missing.qcow2", "web-2"), "source_not_found").await;
    bed.restart().await;
    for job in [completed, failed] {
        let id = job["job_id"].as_str().unwrap();
        assert_eq!(bed.job(id).await, job);
        assert_eq!(bed.tcp().get(&format!("/api/v1/status/{id}")).await.expect(200), job);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_a_restart_interrupts_is_finished_after_it() {
    let mut bed = Bed::with(|settings| settings.max_concurrent_jobs = 1).await;
    let web = Server::start();
    let image = bed.image("slow.qcow2", 1);
    let bytes = fs::read(&image).unwrap();
    let middle = bytes.len() as u64 / 2;
    web.serve("/slow.qcow2", Page::new(bytes.clone()).stall(&[middle; 9]));
    let mut order = bed.order("slow.qcow2", "web-1");
    order["image_url"] = json!(web.url("/slow.qcow2"));
    let running = bed.submit(&order).await;
    bed.job_when(&running, |job| job["progress"]["bytes_processed"].as_u64().unwrap() > 0).await;
    order["volume_name"] = json!("web-2");
    let waiting = bed.submit(&order).await;
    web.serve("/slow.qcow2", Page::new(bytes));
    bed.restart().await;
    for (id, volume) in [(running, "web-1"), (waiting, "web-2")] {
        let job = bed.ended(&id).await;
        assert_eq!(job["status"], "completed", "{job:#}");
        bed.assert_holds(&bed.volume(volume), &image, "qcow2", DISK);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_configured_target_is_used() {
    let bed = Bed::new().await;
    let image = bed.publish("good.qcow2", 1);
    let job = bed.provision(&bed.order("good.qcow2", "web-1")).await;
    assert_eq!(job["device_path"], json!(bed.volume("web-1")));
    let mut order = bed.order("good.qcow2", "web-1");
    order["target"] = json!("other");
    let job = bed.provision(&order).await;
    assert_eq!(job["device_path"], json!(bed.path("other/web-1.raw")));
    bed.assert_holds(&bed.volume("web-1"), &image, "qcow2", DISK);
    bed.assert_holds(&bed.path("other/web-1.raw"), &image, "qcow2", DISK);
}

/// Provisions an image on a volume that was full of old bytes, larger than the image; all the rest must be zero.
async fn assert_no_old_bytes(bed: &Bed, image: &str, format: &str, wanted: Value) {
    let size = 12 * MIB;
    fs::write(bed.volume("old"), vec![0xAA; size as usize]).unwrap();
    let mut order = wanted;
    order["size"] = json!(size);
    order["image_type"] = json!(format);
    bed.provision(&order).await;
    bed.assert_holds(&bed.volume("old"), &bed.path(&format!("images/{image}")), format, size);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reprovisioning_leaves_no_old_bytes() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    assert_no_old_bytes(&bed, "good.qcow2", "qcow2", bed.order("good.qcow2", "old")).await;
    let raw = bed.path("images/disk.raw");
    images::raw_with_data(&raw, DISK + 512, 40, 2).unwrap();
    bed.upload(&raw);
    assert_no_old_bytes(&bed, "disk.raw", "raw", bed.order("disk.raw", "old")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_volume_is_written_by_one_job_at_a_time() {
    let bed = Bed::with(|settings| settings.max_concurrent_jobs = 4).await;
    let web = Server::start();
    let image = bed.image("slow.qcow2", 1);
    let bytes = fs::read(&image).unwrap();
    let piece = bytes.len() / 4;
    web.serve("/slow.qcow2", Page::new(bytes).pace(piece, Duration::from_millis(100)));
    let mut order = bed.order("slow.qcow2", "web-1");
    order["image_url"] = json!(web.url("/slow.qcow2"));
    let first = bed.submit(&order).await;
    bed.job_when(&first, |job| job["status"] == "running").await;
    let second = bed.submit(&order).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(
        (&bed.job(&first).await["status"], &bed.job(&second).await["status"]),
        (&json!("running"), &json!("pending"))
    );
    let (first, second) = (bed.ended(&first).await, bed.ended(&second).await);
    let time = |job: &Value, field: &str| job[field].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    assert!(time(&second, "started_at") >= time(&first, "finished_at"), "{first:#} {second:#}");
    bed.assert_holds(&bed.volume("web-1"), &image, "qcow2", DISK);
}

/// A crash between the last step and the job's end: the volume is its user's already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_finished_volume_is_never_made_again() {
    let mut bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let mut existing = bed.order("good.qcow2", "web-2");
    fs::create_dir_all(bed.volume("web-2").parent().unwrap()).unwrap();
    let size = existing["size"].as_u64().unwrap();
    fs::File::create(bed.volume("web-2")).unwrap().set_len(size).unwrap();
    let mut ids = Vec::new();
    for (order, volume) in [(bed.order("good.qcow2", "web-1"), "web-1"), (existing.take(), "web-2")] {
        let job = bed.provision(&order).await;
        ids.push(job["job_id"].as_str().unwrap().to_owned());
        std::os::unix::fs::FileExt::write_all_at(
            &fs::OpenOptions::new().write(true).open(bed.volume(volume)).unwrap(),
            b"the guest's",
            4096,
        )
        .unwrap();
    }
    let before: Vec<_> = ["web-1", "web-2"].map(|name| fs::read(bed.volume(name)).unwrap()).into();
    bed.restart_after(|state| {
        let database = rusqlite::Connection::open(state.join("jobs.db")).unwrap();
        database.execute("UPDATE jobs SET status = 'running', finished_at = NULL", []).unwrap();
    })
    .await;
    for id in ids {
        assert_eq!(bed.ended(&id).await["status"], "completed");
    }
    for (name, before) in ["web-1", "web-2"].iter().zip(before) {
        assert!(fs::read(bed.volume(name)).unwrap() == before, "{name} was written again");
    }
}

/// The same, and its user removed it before the daemon came back: the job does what it was asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_finished_volume_that_is_gone_is_made_again() {
    let mut bed = Bed::new().await;
    let image = bed.publish("good.qcow2", 1);
    let first = bed.provision(&bed.order("good.qcow2", "web-1")).await;
    fs::remove_file(bed.volume("web-1")).unwrap();
    bed.restart_after(|state| {
        let database = rusqlite::Connection::open(state.join("jobs.db")).unwrap();
        database.execute("UPDATE jobs SET status = 'running', finished_at = NULL", []).unwrap();
    })
    .await;
    let job = bed.ended(first["job_id"].as_str().unwrap()).await;
    assert_eq!(job["status"], "completed", "{job:#}");
    bed.assert_holds(&bed.volume("web-1"), &image, "qcow2", DISK);
    let shown = bed.tcp().get("/api/v1/volumes/web-1").await.expect(200);
    assert!(shown["made_by_lvp"] == true && shown["incomplete"] != true, "{shown:#}");
    assert!(shown["receipt"] == job["receipt"] && job["receipt"] != first["receipt"], "{shown:#}");
}

/// One file under two targets' names, one of them not there when its job was submitted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_written_by_one_job_at_a_time_whatever_it_is_called() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let (plain, dotted) = (bed.path("new"), bed.path("new/."));
    let mut ids = Vec::new();
    for directory in [&plain, &dotted, &plain] {
        let mut order = bed.order("good.qcow2", "web-1");
        order["target"] = json!(format!("dir:{}", directory.display()));
        let accepted = bed.unix().post("/api/v1/jobs", &order).await.expect(202);
        ids.push(accepted["job_id"].as_str().unwrap().to_owned());
    }
    for id in ids {
        let job = bed.ended(&id).await;
        assert!(job["status"] == "completed" || job["error_code"] == "volume_in_use", "{job:#}");
    }
}
