//! What a provision says that it did, and volumes held against it.

use std::{fs, os::unix::fs::FileExt};

use e2e::server::{Page, Server};
use futures::future::join_all;
use lvp_api::{DiskFormat, TargetSpec, ZeroPolicy};
use lvp_engine::TargetSettings;
use serde_json::{Value, json};

use crate::bed::{Bed, DISK, MIB};

fn number(value: &Value, field: &str) -> u64 {
    value[field].as_u64().unwrap_or_else(|| panic!("no {field} in {value:#}"))
}

/// That every byte of the volume is accounted for, once.
fn assert_accounts(receipt: &Value) {
    let parts = ["bytes_written", "bytes_zeroed", "bytes_skipped", "bytes_left", "bytes_shared"];
    let sum: u64 = parts.iter().map(|part| number(receipt, part)).sum();
    assert_eq!(sum, number(receipt, "volume_bytes"), "{receipt:#}");
    assert!(!receipt["stages"].as_array().unwrap().is_empty(), "{receipt:#}");
}

async fn verify(bed: &Bed, volume: &str) -> Value {
    bed.tcp().post(&format!("/api/v1/volumes/{volume}/verify"), &Value::Null).await.expect(200)
}

/// Changes one byte of a volume.
fn spoil(bed: &Bed, volume: &str, at: u64) {
    let file = fs::OpenOptions::new().read(true).write(true).open(bed.volume(volume)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completed_job_and_its_volume_have_the_receipt() {
    let mut bed = Bed::new().await;
    let image = bed.publish("good.qcow2", 1);
    let size = fs::metadata(&image).unwrap().len();
    let job = bed.provision(&bed.order("good.qcow2", "web-1")).await;
    let receipt = &job["receipt"];
    assert_accounts(receipt);
    assert_eq!((number(receipt, "bytes_fetched"), number(receipt, "volume_bytes")), (size, DISK), "{receipt:#}");
    assert_eq!((&receipt["job_id"], &receipt["zero"]), (&job["job_id"], &json!("full")));
    assert_eq!(receipt["image_digest"], job["image_digest"]);
    assert_eq!(bed.tcp().get("/api/v1/volumes/web-1").await.expect(200)["receipt"], *receipt);

    let mut larger = bed.order("good.qcow2", "web-2");
    larger["size"] = json!(3 * DISK);
    let hit = &bed.provision(&larger).await["receipt"];
    assert_accounts(hit);
    assert_eq!((number(hit, "bytes_fetched"), number(hit, "volume_bytes")), (0, 3 * DISK), "{hit:#}");
    assert_eq!(hit["content_digest"], receipt["content_digest"], "one image, one digest, whatever the volume's size");

    bed.restart().await;
    assert_eq!(bed.tcp().get("/api/v1/volumes/web-2").await.expect(200)["receipt"], *hit);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_is_verified_and_the_first_byte_that_differs_is_named() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let mut order = bed.order("good.qcow2", "web-1");
    order["size"] = json!(2 * DISK);
    let job = bed.provision(&order).await;
    let found = verify(&bed, "web-1").await;
    assert_eq!((&found["intact"], &found["actual"]), (&json!(true), &job["receipt"]["content_digest"]), "{found:#}");

    for at in [2 * DISK - 1, DISK + 5, 3 * MIB + 1234] {
        spoil(&bed, "web-1", at);
        let found = verify(&bed, "web-1").await;
        assert_eq!((&found["intact"], &found["first_difference"]), (&json!(false), &json!(at)), "{found:#}");
    }
    let name = bed.tcp().get("/api/v1/images").await.expect(200)[0]["name"].as_str().unwrap().to_owned();
    bed.tcp().delete(&format!("/api/v1/images/{name}")).await.expect(204);
    let found = verify(&bed, "web-1").await;
    assert_eq!((&found["intact"], &found["first_difference"]), (&json!(false), &Value::Null), "{found:#}");
}

/// A volume is verified while nobody changes it: a job that is to write it waits, and who asks during a job is told so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_is_verified_beside_its_jobs_is_never_called_damaged() {
    let (bed, web) = (Bed::new().await, Server::start());
    // Large, so that to read it takes a while.
    let size = 64 * MIB;
    let order = |number: u8| {
        let path = format!("/{number}.raw");
        let order = json!({ "image_url": web.url(&path), "volume_name": "web-1", "size": size, "image_type": "raw" });
        web.serve(&path, Page::new(vec![number; size as usize]));
        order
    };
    let orders = [order(1), order(2)];
    bed.provision(&orders[0]).await;
    // They go one after the other, so that most are still to begin when the job does.
    let ask = || bed.tcp().post("/api/v1/volumes/web-1/verify", &Value::Null);
    let (answers, _) = tokio::join!(join_all((0..24).map(|_| ask())), bed.provision(&orders[1]));
    for answer in answers {
        if answer.status == 200 {
            assert_eq!(answer.expect(200)["intact"], true);
        } else {
            answer.refusal("volume_in_use");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receipt_is_of_what_the_volume_holds_and_of_nothing_else() {
    let bed = Bed::new().await;
    bed.publish("first.qcow2", 1);
    bed.publish("second.qcow2", 2);
    bed.provision(&bed.order("first.qcow2", "web-1")).await;
    let second = bed.provision(&bed.order("second.qcow2", "web-1")).await;
    assert_accounts(&second["receipt"]);
    assert_eq!(bed.tcp().get("/api/v1/volumes/web-1").await.expect(200)["receipt"], second["receipt"]);
    assert_eq!(verify(&bed, "web-1").await["intact"], true);

    // Somebody else's file under the same name.
    fs::remove_file(bed.volume("web-1")).unwrap();
    fs::File::create(bed.volume("web-1")).unwrap().set_len(DISK).unwrap();
    assert_eq!(bed.tcp().get("/api/v1/volumes/web-1").await.expect(200)["receipt"], Value::Null);
    let answer = bed.tcp().post("/api/v1/volumes/web-1/verify", &Value::Null).await;
    answer.refusal("receipt_not_found");
    bed.tcp().post("/api/v1/volumes/absent/verify", &Value::Null).await.refusal("volume_not_found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_target_that_says_so_leaves_what_is_behind_the_image() {
    let bed = Bed::with(|settings| {
        let TargetSettings { spec: TargetSpec::Directory { path }, .. } = &settings.targets["other"] else { panic!() };
        let spec = TargetSpec::Directory { path: path.clone() };
        settings.targets.insert(
            "other".to_owned(),
            TargetSettings { spec, zero: ZeroPolicy::Image, format: DiskFormat::Raw, linked: false },
        );
    })
    .await;
    bed.publish("good.qcow2", 1);
    for (target, folder, behind) in [("default", "volumes", 0), ("other", "other", 0xaa)] {
        let file = bed.path(&format!("{folder}/web-1.raw"));
        fs::write(&file, vec![0xaa; 2 * DISK as usize]).unwrap();
        let mut order = bed.order("good.qcow2", "web-1");
        order["size"] = json!(2 * DISK);
        order["target"] = json!(target);
        let receipt = &bed.provision(&order).await["receipt"];
        assert_accounts(receipt);
        assert_eq!(number(receipt, "bytes_left"), if behind == 0 { 0 } else { DISK }, "{receipt:#}");
        let content = fs::read(&file).unwrap();
        assert!(content[DISK as usize..].iter().all(|byte| *byte == behind), "{target}");
        let path = format!("/api/v1/volumes/web-1/verify?target={target}");
        assert_eq!(bed.tcp().post(&path, &Value::Null).await.expect(200)["intact"], true, "{target}");
    }
}
