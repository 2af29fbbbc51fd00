//! Base volumes, on a file system that shares blocks: made once, shared by all, gone with their image. Thin pools have the
//! same in the end-to-end scenarios.

use std::fs;

use e2e::{
    images::MountedFileSystem,
    server::{Page, Server},
};
use lvp_api::TargetSpec;
use serde_json::{Value, json};

use crate::bed::{Bed, DISK};

/// A server whose default target is on a file system with reflinks.
async fn sharing() -> (Bed, MountedFileSystem) {
    let mounted = MountedFileSystem::make(512 << 20, &["mkfs.xfs", "-q", "-m", "reflink=1"]).unwrap();
    let path = mounted.path.join("volumes");
    fs::create_dir(&path).unwrap();
    let spec = TargetSpec::Directory { path };
    let bed = Bed::with(|settings| drop(settings.targets.insert("default".to_owned(), spec.into()))).await;
    (bed, mounted)
}

fn volume(mounted: &MountedFileSystem, name: &str) -> std::path::PathBuf {
    mounted.path.join(format!("volumes/{name}.raw"))
}

async fn bases(bed: &Bed) -> Vec<Value> {
    bed.tcp().get("/api/v1/bases").await.expect(200).as_array().unwrap().clone()
}

fn hidden(mounted: &MountedFileSystem) -> Vec<String> {
    let entries = fs::read_dir(mounted.path.join("volumes")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.')).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_provision_makes_a_base_and_the_next_ones_copy_it() {
    let (bed, mounted) = sharing().await;
    let image = bed.publish("good.qcow2", 1);
    let plan = bed.tcp().post("/api/v1/jobs?dry_run=true", &bed.order("good.qcow2", "web-1")).await.expect(200);
    assert_eq!(plan["creates"][1], json!({ "kind": "base", "size_bytes": DISK }), "{plan:#}");
    let first = bed.provision(&bed.order("good.qcow2", "web-1")).await;
    assert_eq!(first["receipt"]["bytes_shared"], 0, "{first:#}");
    let made = bases(&bed).await;
    assert_eq!((made.len(), &made[0]["image_digest"]), (1, &first["image_digest"]), "{made:#?}");

    let mut larger = bed.order("good.qcow2", "web-2");
    larger["size"] = json!(4 * DISK);
    let plan = bed.tcp().post("/api/v1/jobs?dry_run=true", &larger).await.expect(200);
    assert_eq!((&plan["volume_action"], &plan["bytes_to_fetch"]), (&json!("clone"), &json!(0)), "{plan:#}");
    assert_eq!((&plan["bytes_to_write"], plan["creates"].as_array().unwrap().len()), (&json!(0), 1), "{plan:#}");
    let second = bed.provision(&larger).await;
    let receipt = &second["receipt"];
    assert_eq!((&receipt["bytes_shared"], &receipt["bytes_written"]), (&json!(DISK), &json!(0)), "{second:#}");
    assert_eq!((&receipt["bytes_skipped"], &receipt["volume_bytes"]), (&json!(3 * DISK), &json!(4 * DISK)));
    assert_eq!(receipt["content_digest"], first["receipt"]["content_digest"]);
    assert_eq!(bases(&bed).await, made);
    for (name, size) in [("web-1", DISK), ("web-2", 4 * DISK)] {
        bed.assert_holds(&volume(&mounted, name), &image, "qcow2", size);
        let verified = bed.tcp().post(&format!("/api/v1/volumes/{name}/verify"), &Value::Null).await.expect(200);
        assert_eq!(verified["intact"], true, "{verified:#}");
    }
    let listed = bed.tcp().get("/api/v1/volumes").await.expect(200);
    assert_eq!(listed.as_array().unwrap().len(), 2, "a base is no volume: {listed:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_serves_where_the_image_is_gone_from_the_cache_and_goes_when_told() {
    let (bed, mounted) = sharing().await;
    let image = bed.publish("good.qcow2", 1);
    let first = bed.provision(&bed.order("good.qcow2", "web-1")).await;
    // As an eviction does.
    fs::remove_file(first["image_path"].as_str().unwrap()).unwrap();
    let before = bed.store.requests().len();
    let second = bed.provision(&bed.order("good.qcow2", "web-2")).await;
    assert_eq!(second["receipt"]["bytes_fetched"], 0, "{second:#}");
    bed.assert_holds(&volume(&mounted, "web-2"), &image, "qcow2", DISK);
    let asked = bed.store.requests()[before..].to_vec();
    assert!(!asked.contains(&("GET".to_owned(), "/images/good.qcow2".to_owned())), "{asked:?}");

    let digest = first["image_digest"].as_str().unwrap();
    bed.tcp().delete(&format!("/api/v1/images/{digest}")).await.expect(204);
    assert_eq!((bases(&bed).await.len(), hidden(&mounted).len()), (0, 0));
    bed.assert_holds(&volume(&mounted, "web-1"), &image, "qcow2", DISK);
    bed.tcp().delete(&format!("/api/v1/images/{digest}")).await.refusal("image_not_found");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_first_jobs_at_once_make_one_base() {
    let (bed, mounted) = sharing().await;
    for (image, checksum) in [("promised.qcow2", true), ("unpromised.qcow2", false)] {
        let file = bed.image(image, 1 + u64::from(checksum));
        let digest = bed.upload(&file);
        if !checksum {
            bed.store.remove("images", &format!("{image}.sha256")).unwrap();
        }
        let order = |number: usize| bed.order(image, &format!("{}-{number}", &image[..4]));
        let mut ids = Vec::new();
        for number in 0..4 {
            ids.push(bed.submit(&order(number)).await);
        }
        for id in ids {
            let job = bed.ended(&id).await;
            assert_eq!(job["status"], "completed", "{job:#}");
            let name = job["volume"].as_str().unwrap();
            bed.assert_holds(&volume(&mounted, name), &file, "qcow2", DISK);
        }
        let made = bases(&bed).await;
        let of_this = made.iter().filter(|base| base["image_digest"] == format!("sha256:{digest}")).count();
        assert_eq!((of_this, hidden(&mounted).len()), (1, made.len()), "{made:#?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_fails_or_is_cancelled_leaves_no_base() {
    let (bed, mounted) = sharing().await;
    let web = Server::start();
    let mut bytes = fs::read(bed.image("good.qcow2", 1)).unwrap();
    let digest = bed.upload(&bed.path("images/good.qcow2"));
    let middle = bytes.len() as u64 / 2;
    *bytes.last_mut().unwrap() ^= 1;
    let mut order = bed.order("good.qcow2", "web-1");
    order["image_url"] = json!(web.url("/x.qcow2"));
    order["checksum"] = json!(format!("sha256:{digest}"));
    web.serve("/x.qcow2", Page::new(bytes.clone()));
    let job = bed.ended(&bed.submit(&order).await).await;
    assert_eq!(job["status"], "failed", "{job:#}");
    assert_nothing(&mounted);

    web.serve("/x.qcow2", Page::new(bytes).stall(&[middle; 99]));
    let id = bed.submit(&order).await;
    bed.job_when(&id, |job| {
        job["progress"]["stage"] == "downloading" && job["progress"]["bytes_processed"].as_u64().unwrap() > 0
    })
    .await;
    assert_eq!(hidden(&mounted).len(), 1, "the base is being written");
    bed.tcp().delete(&format!("/api/v1/jobs/{id}")).await.expect(200);
    assert_eq!(bed.ended(&id).await["status"], "cancelled");
    assert_nothing(&mounted);
}

#[track_caller]
fn assert_nothing(mounted: &MountedFileSystem) {
    let left: Vec<_> = fs::read_dir(mounted.path.join("volumes")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
}
