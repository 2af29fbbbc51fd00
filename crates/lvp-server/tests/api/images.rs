//! The image cache over HTTP: list, show, prefetch, verify, pin, delete.

use std::{fs, path::PathBuf, time::Duration};

use e2e::server::{Page, Server};
use serde_json::{Value, json};

use crate::bed::{Bed, DISK};

async fn prefetch(bed: &Bed, name: &str) -> Value {
    let submitted = bed.tcp().post("/api/v1/images", &json!({ "image_url": bed.url(name) })).await.expect(202);
    let job = bed.ended(submitted["job_id"].as_str().unwrap()).await;
    assert_eq!(job["status"], "completed", "{job:#}");
    job
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefetched_image_is_a_hit() {
    let bed = Bed::new().await;
    let image = bed.publish("good.qcow2", 1);
    let job = prefetch(&bed, "good.qcow2").await;
    assert_eq!((&job["kind"], &job["cache_hit"], &job["volume"]), (&json!("prefetch"), &json!(false), &Value::Null));
    assert_eq!(job["progress"]["percent"], 100);
    let gets = bed.store.count("GET", "/images/good.qcow2");
    let job = bed.provision(&bed.order("good.qcow2", "web-1")).await;
    assert_eq!(job["cache_hit"], true);
    assert_eq!(bed.store.count("GET", "/images/good.qcow2"), gets, "it was fetched again");
    bed.assert_holds(&bed.volume("web-1"), &image, "qcow2", DISK);
    assert_eq!(prefetch(&bed, "good.qcow2").await["cache_hit"], true);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_is_listed_and_shown_by_name_and_by_digest() {
    let bed = Bed::new().await;
    assert_eq!(bed.tcp().get("/api/v1/images").await.expect(200), json!([]));
    let file = bed.image("good.qcow2", 1);
    let digest = bed.upload(&file);
    prefetch(&bed, "good.qcow2").await;
    let list = bed.tcp().get("/api/v1/images").await.expect(200);
    let mut image = list[0].clone();
    for field in ["fetched_at", "last_used_at"] {
        assert!(image.as_object_mut().unwrap().remove(field).unwrap().as_str().unwrap().ends_with('Z'));
    }
    let name = format!("good-{}.qcow2", &digest[..16]);
    let expected = json!({
        "name": name, "digest": format!("sha256:{digest}"), "path": bed.path(&format!("cache/{name}")), "format": "qcow2",
        "size_bytes": fs::metadata(file).unwrap().len(), "virtual_size_bytes": DISK, "source": "s3://images/good.qcow2",
        "verified": true, "pinned": false, "in_use": false
    });
    assert_eq!(image, expected);
    for known in [&name, &digest, &digest[..12]] {
        assert_eq!(bed.tcp().get(&format!("/api/v1/images/{known}")).await.expect(200), list[0], "{known}");
    }
    for unknown in ["good.qcow2", &digest[..11], "0123456789abcdef", "..", "a%2Fb"] {
        let answer = bed.tcp().get(&format!("/api/v1/images/{unknown}")).await;
        assert_eq!(answer.status, 404, "{unknown}: {}", answer.text);
    }
    bed.tcp().get("/api/v1/images/0123456789abcdef").await.refusal("image_not_found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verification_tells_a_damaged_image_and_the_next_provision_fetches_it_anew() {
    let bed = Bed::new().await;
    let file = bed.image("good.qcow2", 1);
    let digest = bed.upload(&file);
    let job = prefetch(&bed, "good.qcow2").await;
    let verify = format!("/api/v1/images/{digest}/verify");
    let intact = bed.tcp().post(&verify, &json!({})).await.expect(200);
    assert_eq!(
        (&intact["intact"], &intact["expected"], &intact["actual"]),
        (&json!(true), &json!(format!("sha256:{digest}")), &intact["expected"])
    );

    let cached = PathBuf::from(job["image_path"].as_str().unwrap());
    let mut bytes = fs::read(&cached).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&cached, bytes).unwrap();
    let damaged = bed.tcp().post(&verify, &json!({})).await.expect(200);
    assert_eq!(damaged["intact"], false);
    assert_ne!(damaged["actual"], damaged["expected"]);

    let job = bed.provision(&bed.order("good.qcow2", "web-1")).await;
    assert_eq!(job["cache_hit"], false, "{job:#}");
    bed.assert_holds(&bed.volume("web-1"), &file, "qcow2", DISK);
    assert_eq!(bed.tcp().post(&verify, &json!({})).await.expect(200)["intact"], true);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pinned_image_is_not_deleted_and_an_unpinned_one_is() {
    let bed = Bed::new().await;
    let digest = bed.upload(&bed.image("good.qcow2", 1));
    prefetch(&bed, "good.qcow2").await;
    let at = format!("/api/v1/images/{digest}");
    let pin = format!("{at}/pin");
    assert_eq!(bed.tcp().put(&pin, &json!({ "pinned": true })).await.expect(200)["pinned"], true);
    assert_eq!(bed.tcp().get(&at).await.expect(200)["pinned"], true);
    let refused = bed.tcp().delete(&at).await;
    assert_eq!(refused.status, 409);
    refused.refusal("image_pinned");
    bed.tcp().put(&pin, &json!({ "pinned": "yes" })).await.refusal("invalid_field");
    bed.tcp().put(&pin, &json!({ "pin": true })).await.refusal("unknown_field");

    assert_eq!(bed.tcp().put(&pin, &json!({ "pinned": false })).await.expect(200)["pinned"], false);
    assert_eq!(bed.tcp().delete(&at).await.status, 204);
    bed.tcp().delete(&at).await.refusal("image_not_found");
    let left: Vec<String> = bed.listing().into_iter().filter(|name| name.contains("good")).collect();
    assert_eq!(left, [""; 0], "the file or its sidecar is still there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_requests_for_one_image_download_it_once() {
    let bed = Bed::with(|settings| settings.max_concurrent_jobs = 10).await;
    let web = Server::start();
    let file = bed.image("shared.qcow2", 1);
    let bytes = fs::read(&file).unwrap();
    let piece = bytes.len() / 4;
    web.serve("/shared.qcow2", Page::new(bytes).pace(piece, Duration::from_millis(100)));
    let mut ids = Vec::new();
    for number in 0..10 {
        let mut order = bed.order("shared.qcow2", &format!("web-{number}"));
        order["image_url"] = json!(web.url("/shared.qcow2"));
        ids.push(bed.submit(&order).await);
    }
    for (number, id) in ids.iter().enumerate() {
        assert_eq!(bed.ended(id).await["status"], "completed");
        bed.assert_holds(&bed.volume(&format!("web-{number}")), &file, "qcow2", DISK);
    }
    // The header is read by ranges before; all of the image is asked for once.
    let whole = web
        .received()
        .iter()
        .filter(|request| {
            request.method == "GET"
                && request.target == "/shared.qcow2"
                && request.header("range").is_none_or(|range| range == "bytes=0-")
        })
        .count();
    assert_eq!(whole, 1);
    assert_eq!(bed.tcp().get("/api/v1/images").await.expect(200).as_array().unwrap().len(), 1);
}
