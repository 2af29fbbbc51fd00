//! Volumes over HTTP: list, show, delete; lvp removes only what it made, and only when told twice.

use std::{fs, process::Command};

use serde_json::{Value, json};

use crate::bed::{Bed, DISK};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_are_listed_and_shown_with_what_lvp_knows_of_them() {
    let bed = Bed::new().await;
    let digest = bed.upload(&bed.image("good.qcow2", 1));
    let job = bed.provision(&bed.order("good.qcow2", "web-1")).await;
    fs::write(bed.volume("foreign"), vec![7; 4096]).unwrap();
    fs::write(bed.path("volumes/notes.txt"), "no volume").unwrap();
    let volume = |name: &str, size: u64| {
        json!({ "name": name, "target": format!("dir:{}", bed.path("volumes").display()), "device_path": bed.volume(name),
                "size_bytes": size, "made_by_lvp": false })
    };
    let mut ours = volume("web-1", DISK);
    ours["made_by_lvp"] = json!(true);
    ours["job_id"] = job["job_id"].clone();
    ours["image_digest"] = json!(format!("sha256:{digest}"));
    let foreign = volume("foreign", 4096);
    assert_eq!(bed.tcp().get("/api/v1/volumes").await.expect(200), json!([foreign, ours]));
    assert_eq!(bed.tcp().get("/api/v1/volumes?target=other").await.expect(200), json!([]));
    ours["receipt"] = job["receipt"].clone();
    assert_eq!(bed.tcp().get("/api/v1/volumes/web-1").await.expect(200), ours);
    assert_eq!(bed.tcp().get("/api/v1/volumes/foreign").await.expect(200), foreign);

    bed.tcp().get("/api/v1/volumes/web-2").await.refusal("volume_not_found");
    bed.tcp().get("/api/v1/volumes/web-1?target=other").await.refusal("volume_not_found");
    bed.tcp().get("/api/v1/volumes/-x").await.refusal("invalid_volume_name");
    bed.tcp().get("/api/v1/volumes?target=nowhere").await.refusal("target_not_found");
    bed.tcp().get("/api/v1/volumes?target=broken").await.refusal("target_unavailable");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleting_a_volume_needs_force_and_only_lvps_own_are_deleted() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    bed.provision(&bed.order("good.qcow2", "web-1")).await;
    fs::write(bed.volume("foreign"), vec![7; DISK as usize]).unwrap();
    // Overwritten by lvp is not made by lvp.
    bed.provision(&bed.order("good.qcow2", "foreign")).await;
    let before = bed.listing();
    for (path, code, status) in [
        ("web-1", "force_required", 409),
        ("web-1?force=false", "force_required", 409),
        ("foreign", "volume_not_ours", 409),
        ("foreign?force=true", "volume_not_ours", 409),
        ("web-2?force=true", "volume_not_found", 404),
        ("web-1?force=true&target=other", "volume_not_found", 404),
        ("a%2Fb?force=true", "invalid_volume_name", 400),
    ] {
        let answer = bed.tcp().delete(&format!("/api/v1/volumes/{path}")).await;
        assert_eq!(answer.status, status, "{path}: {}", answer.text);
        answer.refusal(code);
    }
    assert_eq!(bed.listing(), before);

    let mut user = Command::new("sleep").arg("60").stdin(fs::File::open(bed.volume("web-1")).unwrap()).spawn().unwrap();
    let shown = bed.tcp().get("/api/v1/volumes/web-1").await.expect(200);
    let busy = bed.tcp().delete("/api/v1/volumes/web-1?force=true").await;
    user.kill().unwrap();
    user.wait().unwrap();
    assert!(shown["in_use"].as_str().unwrap().contains("sleep"), "{shown:#}");
    assert_eq!(busy.status, 409);
    busy.refusal("volume_in_use");

    assert_eq!(bed.tcp().delete("/api/v1/volumes/web-1?force=true").await.status, 204);
    assert!(!bed.volume("web-1").exists() && bed.volume("foreign").exists());
    bed.tcp().delete("/api/v1/volumes/web-1?force=true").await.refusal("volume_not_found");
    let left = bed.tcp().get("/api/v1/volumes").await.expect(200);
    assert_eq!(
        left.as_array().unwrap().iter().map(|volume| &volume["name"]).collect::<Vec<_>>(),
        [&Value::from("foreign")]
    );
}
