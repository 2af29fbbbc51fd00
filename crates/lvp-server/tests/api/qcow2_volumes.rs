//! Volumes that are qcow2 files: images that need no other file, which qemu finds in order.

use std::{fs, path::PathBuf, process::Command};

use e2e::{
    images::{self, Qcow2Options},
    server::{Page, Server},
};
use lvp_api::{DiskFormat, TargetSpec, ZeroPolicy};
use lvp_engine::TargetSettings;
use serde_json::{Value, json};

use crate::bed::{Bed, DISK, MIB};

async fn bed() -> Bed {
    Bed::with(|settings| {
        let TargetSettings { spec: TargetSpec::Directory { path }, .. } = &settings.targets["default"] else {
            panic!()
        };
        let spec = TargetSpec::Directory { path: path.clone() };
        let target = TargetSettings { spec, zero: ZeroPolicy::Full, format: DiskFormat::Qcow2, linked: false };
        settings.targets.insert("default".to_owned(), target);
        settings.sources.stall_timeout = std::time::Duration::from_secs(1);
    })
    .await
}

fn volume(bed: &Bed, name: &str) -> PathBuf {
    bed.path(&format!("volumes/{name}.qcow2"))
}

/// That qemu finds the volume in order, of this size, and with the image in it.
fn assert_is(bed: &Bed, name: &str, image: &std::path::Path, format: &str, size: u64) {
    let path = volume(bed, name);
    let text = path.to_str().unwrap();
    let checked = images::run("qemu-img", &["check", "-f", "qcow2", text]).unwrap();
    assert!(checked.contains("No errors were found"), "{checked}");
    let info: Value =
        serde_json::from_str(&images::run("qemu-img", &["info", "--output=json", text]).unwrap()).unwrap();
    assert_eq!((&info["virtual-size"], &info["backing-filename"]), (&json!(size), &Value::Null), "{info:#}");
    let arguments = ["compare", "-f", "qcow2", "-F", format, text, image.to_str().unwrap()];
    images::run("qemu-img", &arguments).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_of_every_kind_become_standalone_qcow2_files() {
    let bed = bed().await;
    let raw = bed.path("images/disk.raw");
    images::raw_with_data(&raw, DISK, 40, 1).unwrap();
    let qcow2 = bed.path("images/disk.qcow2");
    images::qcow2_from(&raw, &qcow2, &Qcow2Options { compression: Some("zstd"), ..Default::default() }).unwrap();
    for (file, format) in [(&raw, "raw"), (&qcow2, "qcow2")] {
        bed.upload(file);
        for (number, size, rounded) in [(1, DISK, DISK), (2, 5 * DISK + 4096, 5 * DISK + (64 << 10))] {
            let mut order = bed.order(&format!("disk.{format}"), &format!("{format}-{number}"));
            (order["size"], order["image_type"]) = (json!(size), json!(format));
            let job = bed.provision(&order).await;
            let name = job["volume"].as_str().unwrap();
            assert_is(&bed, name, file, format, rounded);
            assert_eq!(job["receipt"]["volume_bytes"], rounded, "{job:#}");
            let verified = bed.tcp().post(&format!("/api/v1/volumes/{name}/verify"), &Value::Null).await.expect(200);
            assert_eq!(verified["intact"], true, "{verified:#}");
            let shown = bed.tcp().get(&format!("/api/v1/volumes/{name}")).await.expect(200);
            assert_eq!(shown["size_bytes"], rounded, "{shown:#}");
        }
    }
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(volume(&bed, "raw-2")).unwrap());
    assert!(blocks * 512 < DISK, "only what is used takes space: {blocks} blocks");
    // What a machine does with it.
    images::qemu_io(&volume(&bed, "raw-1"), &["write -P 9 1M 2M", "read -P 9 1M 2M"]).unwrap();
    let found = bed.tcp().post("/api/v1/volumes/raw-1/verify", &Value::Null).await.expect(200);
    assert_eq!(found["intact"], false, "{found:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_qcow2_file_is_not_written_twice_and_an_unfinished_one_is_removed() {
    let bed = bed().await;
    let image = bed.publish("good.qcow2", 1);
    bed.provision(&bed.order("good.qcow2", "web-1")).await;
    let job = bed.fail(&bed.order("good.qcow2", "web-1"), "volume_incompatible").await;
    assert!(job["error"].as_str().unwrap().contains("delete it first"), "{job:#}");
    assert_is(&bed, "web-1", &image, "qcow2", DISK);
    let before = bed.listing();

    let web = Server::start();
    let bytes = fs::read(&image).unwrap();
    let middle = bytes.len() as u64 / 2;
    web.serve("/x.qcow2", Page::new(bytes.clone()).stall(&[middle; 99]));
    let mut order = bed.order("good.qcow2", "web-2");
    order["image_url"] = json!(web.url("/x.qcow2"));
    let id = bed.submit(&order).await;
    bed.job_when(&id, |_| volume(&bed, "web-2").exists()).await;
    let unfinished = volume(&bed, "web-2");
    let output = Command::new("qemu-img").args(["info", "-f", "qcow2"]).arg(unfinished).output().unwrap();
    assert!(!output.status.success(), "an unfinished file is no image");
    bed.tcp().delete(&format!("/api/v1/jobs/{id}")).await.expect(200);
    assert_eq!(bed.ended(&id).await["status"], "cancelled");
    assert_eq!(bed.listing(), before);
    bed.tcp().delete("/api/v1/volumes/web-1?force=true").await.expect(204);
    let mut larger = bed.order("good.qcow2", "web-1");
    larger["size"] = json!(64 * MIB);
    bed.provision(&larger).await;
    assert_is(&bed, "web-1", &image, "qcow2", 64 * MIB);
}
