//! Bad input that only the source, the image or the target shows: the failed job's code and words, and that volumes and
//! cache are as before.

use std::{fs, net::TcpListener, process::Command};

use e2e::images;
use serde_json::{Value, json};

use crate::bed::{Bed, DISK, MIB};

/// Has a job fail: it has this code and these words, `retryable` as the code says, and it alone is left.
async fn assert_fails(bed: &Bed, order: &Value, code: &str, words: &[&str]) -> Value {
    let (before, jobs) = (bed.listing(), bed.all_jobs().await.len());
    let job = bed.fail(order, code).await;
    let text = job.to_string();
    for word in words {
        assert!(text.contains(word), "no '{word}' in {job:#}");
    }
    let known = lvp_api::ErrorCode::ALL.iter().find(|known| known.name() == code).unwrap();
    assert_eq!(job["retryable"], known.retryable(), "{job:#}");
    assert!(job["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "no hint: {job:#}");
    assert!(job["progress"]["percent"].as_u64().unwrap() < 100, "{job:#}");
    assert!(job["finished_at"].is_string(), "{job:#}");
    assert_eq!(bed.listing(), before, "{code} left something behind, or took something away");
    assert_eq!(bed.all_jobs().await.len(), jobs + 1);
    job
}

fn with(mut order: Value, field: &str, value: impl Into<Value>) -> Value {
    order[field] = value.into();
    order
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_does_not_give_the_image_fails_the_job() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let order = |url: &str| with(bed.order("good.qcow2", "web-1"), "image_url", url);

    let missing = bed.url("missing.qcow2");
    assert_fails(&bed, &order(&missing), "source_not_found", &["missing.qcow2", "404"]).await;
    assert_fails(&bed, &order("s3://nowhere/a.qcow2"), "source_not_found", &["nowhere"]).await;
    let web = e2e::server::Server::start();
    web.serve("/denied.qcow2", e2e::server::Page::new("x").fail(99, 403));
    web.serve("/broken.qcow2", e2e::server::Page::new("x").fail(99, 500));
    assert_fails(&bed, &order(&web.url("/denied.qcow2")), "source_denied", &["403"]).await;
    assert_eq!(web.count("HEAD", "/denied.qcow2"), 1, "a refusal is final");
    assert_fails(&bed, &order(&web.url("/broken.qcow2")), "source_failed", &["500"]).await;
    assert_fails(&bed, &order("http://images.invalid/a.qcow2"), "source_unreachable", &["images.invalid"]).await;
    // A port that was free a moment ago: nobody listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let refused = format!("http://{address}/a.qcow2");
    assert_fails(&bed, &order(&refused), "source_unreachable", &[&address.to_string(), "refused"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_keys_are_denied_and_shown_nowhere() {
    let bed = Bed::with(|settings| {
        let keys = settings.sources.credentials.as_mut().unwrap();
        keys.secret_key = lvp_engine::Secret::new("another-secret-key");
    })
    .await;
    bed.publish("good.qcow2", 1);
    let job = assert_fails(&bed, &bed.order("good.qcow2", "web-1"), "source_denied", &["MINIO_SECRET_KEY"]).await;
    assert!(!job.to_string().contains("another-secret-key"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_without_the_promised_digest_are_refused_with_both_digests() {
    let bed = Bed::new().await;
    let digest = bed.upload(&bed.image("good.qcow2", 1));
    let zero = "0".repeat(64);
    let given = with(bed.order("good.qcow2", "web-1"), "checksum", format!("sha256:{zero}"));
    let job = assert_fails(&bed, &given, "checksum_mismatch", &[]).await;
    assert_eq!(job["details"]["expected"], format!("sha256:{zero}"), "{job:#}");
    assert_eq!(job["details"]["actual"], format!("sha256:{digest}"), "{job:#}");

    bed.store.put("images", "good.qcow2.sha256", format!("{zero} *good.qcow2\n").as_bytes()).unwrap();
    let published = bed.order("good.qcow2", "web-1");
    assert_fails(&bed, &published, "checksum_mismatch", &[&zero, &digest]).await;
    bed.store.put("images", "good.qcow2.sha256", b"<html>not a checksum</html>").unwrap();
    assert_fails(&bed, &published, "checksum_unreadable", &["good.qcow2.sha256"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_does_not_fit_is_refused_before_it_is_fetched() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let order = with(bed.order("good.qcow2", "web-1"), "size", DISK - 1);
    let words = [DISK.to_string(), (DISK - 1).to_string()];
    let job = assert_fails(&bed, &order, "image_too_large", &[&words[0], &words[1], "at least 1 GiB"]).await;
    assert_eq!(job["details"], json!({ "image_bytes": DISK, "volume_bytes": DISK - 1 }));
    assert_eq!(job["image_path"], Value::Null);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_type_that_contradicts_the_header_is_refused_both_ways() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let raw = bed.path("images/disk.raw");
    images::raw_with_data(&raw, DISK, 50, 2).unwrap();
    bed.upload(&raw);
    let claims_raw = with(bed.order("good.qcow2", "web-1"), "image_type", "raw");
    assert_fails(&bed, &claims_raw, "image_type_mismatch", &["raw", "qcow2"]).await;
    let claims_qcow2 = bed.order("disk.raw", "web-1");
    assert_fails(&bed, &claims_qcow2, "image_type_mismatch", &["raw", "qcow2"]).await;
    // Another file that is no disk at all.
    bed.store.put("images", "page.qcow2", b"<html>404, said with a 200</html>").unwrap();
    assert_fails(&bed, &bed.order("page.qcow2", "web-1"), "image_type_mismatch", &["qcow2"]).await;
    bed.store.put("images", "empty.qcow2", b"").unwrap();
    let job = bed.ended(&bed.submit(&bed.order("empty.qcow2", "web-1")).await).await;
    assert_eq!(job["status"], "failed", "{job:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_or_dependent_qcow2_is_refused() {
    let bed = Bed::new().await;
    let good = bed.image("good.qcow2", 1);
    let bytes = fs::read(&good).unwrap();
    for (name, length) in [("half.qcow2", bytes.len() / 2), ("head.qcow2", 60), ("table.qcow2", 70_000)] {
        let cut = bed.path(&format!("images/{name}"));
        fs::write(&cut, &bytes[..length]).unwrap();
        bed.upload(&cut);
        assert_fails(&bed, &bed.order(name, "web-1"), "image_invalid", &[name]).await;
    }
    let (overlay, external) = (bed.path("images/overlay.qcow2"), bed.path("images/external.qcow2"));
    let backing = format!("backing_file={},backing_fmt=qcow2", good.display());
    let size = DISK.to_string();
    images::run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &backing, overlay.to_str().unwrap()]).unwrap();
    let data = format!("data_file={}", bed.path("images/data").display());
    images::run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &data, external.to_str().unwrap(), &size]).unwrap();
    for (file, name, word) in [(overlay, "overlay.qcow2", "backing"), (external, "external.qcow2", "another file")] {
        bed.upload(&file);
        let job = assert_fails(&bed, &bed.order(name, "web-1"), "image_refused", &[word]).await;
        assert_eq!(job["image_path"], Value::Null);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_of_another_size_is_refused_with_both_sizes() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    bed.provision(&bed.order("good.qcow2", "web-1")).await;
    let larger = with(bed.order("good.qcow2", "web-1"), "size", 16 * MIB);
    let job = assert_fails(&bed, &larger, "volume_incompatible", &["8 MiB", "16 MiB", "5 %"]).await;
    assert_eq!(job["details"], json!({ "existing_bytes": DISK, "asked_bytes": 16 * MIB }));
    let within = with(bed.order("good.qcow2", "web-1"), "size", DISK + DISK / 25);
    assert_eq!(bed.provision(&within).await["status"], "completed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_in_use_is_refused_with_its_user() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    bed.provision(&bed.order("good.qcow2", "web-1")).await;
    let open = fs::File::open(bed.volume("web-1")).unwrap();
    let mut user = Command::new("sleep").arg("60").stdin(open).spawn().unwrap();
    let job = assert_fails(&bed, &bed.order("good.qcow2", "web-1"), "volume_in_use", &["web-1", "sleep"]).await;
    assert!(job["details"]["users"].to_string().contains(&user.id().to_string()), "{job:#}");
    user.kill().unwrap();
    user.wait().unwrap();
    bed.provision(&bed.order("good.qcow2", "web-1")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_not_there_or_has_no_room_fails_the_job() {
    let bed = Bed::with(|settings| settings.cache_max_bytes = Some(4096)).await;
    let image = bed.publish("good.qcow2", 1);
    let broken = with(bed.order("good.qcow2", "web-1"), "target", "broken");
    let job = bed.ended(&bed.submit(&broken).await).await;
    assert_eq!((&job["status"], &job["error_code"]), (&json!("failed"), &json!("target_unavailable")), "{job:#}");
    assert!(job["error"].as_str().unwrap().contains("not a directory"), "{job:#}");

    let length = fs::metadata(image).unwrap().len();
    let before = bed.listing();
    let job = bed.fail(&bed.order("good.qcow2", "web-1"), "cache_full").await;
    assert!(job["hint"].as_str().unwrap().contains("LVP_CACHE_MAX_BYTES"), "{job:#}");
    assert_eq!(job["details"]["wanted_bytes"], length, "{job:#}");
    // No waiting makes a limit larger.
    assert_eq!((&job["retryable"], bed.listing()), (&json!(false), before), "{job:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_larger_than_the_target_can_hold_is_refused() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    // 7 EiB: a number that a file offset can say, and more than any file system here has.
    let order = with(bed.order("good.qcow2", "web-1"), "size", "7168P");
    let before = bed.listing();
    let job = bed.fail(&order, "insufficient_space").await;
    assert!(job["error"].as_str().unwrap().contains("7168 PiB") && job["hint"].is_string(), "{job:#}");
    assert_eq!(job["retryable"], false, "{job:#}");
    assert_eq!(bed.listing(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_is_not_a_volume_is_never_taken_for_one() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    let secret = bed.path("images/secret");
    fs::write(&secret, vec![7; DISK as usize]).unwrap();
    std::os::unix::fs::symlink(&secret, bed.volume("web-1")).unwrap();
    assert_fails(&bed, &bed.order("good.qcow2", "web-1"), "volume_incompatible", &["regular file"]).await;
    assert!(fs::read(secret).unwrap().iter().all(|byte| *byte == 7));
}
