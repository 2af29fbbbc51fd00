//! Linked volumes: overlays on a base in their own directory, on any file system, and a base that stays as long as they do.

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use e2e::{
    images,
    server::{Page, Server},
};
use lvp_api::{DiskFormat, TargetSpec, ZeroPolicy};
use lvp_engine::TargetSettings;
use serde_json::{Value, json};

use crate::bed::{Bed, DISK, MIB};

/// A server whose default target is linked; `/tmp` need not share blocks.
pub async fn linked() -> Bed {
    Bed::with(|settings| {
        let TargetSettings { spec: TargetSpec::Directory { path }, .. } = &settings.targets["default"] else {
            panic!()
        };
        let spec = TargetSpec::Directory { path: path.clone() };
        let target = TargetSettings { spec, zero: ZeroPolicy::Full, format: DiskFormat::Qcow2, linked: true };
        settings.targets.insert("default".to_owned(), target);
        settings.sources.stall_timeout = std::time::Duration::from_secs(1);
    })
    .await
}

fn volume(bed: &Bed, name: &str) -> PathBuf {
    bed.path(&format!("volumes/{name}.qcow2"))
}

fn sized(mut order: Value, size: u64) -> Value {
    order["size"] = json!(size);
    order
}

async fn bases(bed: &Bed) -> Vec<Value> {
    bed.tcp().get("/api/v1/bases").await.expect(200).as_array().unwrap().clone()
}

/// The one base of a target, as a file.
async fn base(bed: &Bed) -> PathBuf {
    let made = bases(bed).await;
    assert_eq!(made.len(), 1, "{made:#?}");
    bed.path(&format!("volumes/{}", made[0]["name"].as_str().unwrap()))
}

async fn verify(bed: &Bed, name: &str) -> Value {
    bed.tcp().post(&format!("/api/v1/volumes/{name}/verify"), &Value::Null).await.expect(200)
}

fn files(bed: &Bed) -> Vec<String> {
    let entries = fs::read_dir(bed.path("volumes")).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// That qemu finds the volume in order, reads the image and then zeros, and that it is a small file.
#[track_caller]
fn assert_holds(bed: &Bed, name: &str, image: &Path, format: &str, size: u64) {
    let path = volume(bed, name);
    let checked = images::run("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]).unwrap();
    assert!(checked.contains("No errors were found"), "{checked}");
    let raw = bed.path("images/volume");
    images::raw_from(&path, "qcow2", &raw).unwrap();
    bed.assert_holds(&raw, image, format, size);
    let used = fs::metadata(&path).unwrap().blocks() * 512;
    assert!(used < MIB / 2, "{name} takes {used} bytes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_volume_makes_a_base_and_all_stand_on_it() {
    let bed = linked().await;
    let image = bed.publish("good.qcow2", 1);
    let plan = bed.tcp().post("/api/v1/jobs?dry_run=true", &bed.order("good.qcow2", "web-1")).await.expect(200);
    assert_eq!(plan["volume_action"], "create", "{plan:#}");
    let first = bed.provision(&bed.order("good.qcow2", "web-1")).await;
    let (made, written) = (bases(&bed).await, fs::metadata(base(&bed).await).unwrap());
    assert_eq!((&made[0]["image_digest"], &made[0]["linked_volumes"]), (&first["image_digest"], &json!(1)));
    assert_eq!(first["device_path"], json!(volume(&bed, "web-1")), "{first:#}");
    assert_eq!((&first["receipt"]["bytes_shared"], &first["receipt"]["linked_to"]), (&json!(0), &made[0]["name"]));

    let larger = sized(bed.order("good.qcow2", "web-2"), 4 * DISK + 4096);
    let size = 4 * DISK + (64 << 10);
    let plan = bed.tcp().post("/api/v1/jobs?dry_run=true", &larger).await.expect(200);
    assert_eq!((&plan["volume_action"], &plan["bytes_to_fetch"]), (&json!("link"), &json!(0)), "{plan:#}");
    let second = bed.provision(&larger).await;
    let receipt = &second["receipt"];
    assert_eq!((&receipt["bytes_shared"], &receipt["bytes_written"]), (&json!(DISK), &json!(0)), "{second:#}");
    assert_eq!((&receipt["bytes_skipped"], &receipt["volume_bytes"]), (&json!(size - DISK), &json!(size)));
    assert_eq!(receipt["content_digest"], first["receipt"]["content_digest"]);
    let now = fs::metadata(base(&bed).await).unwrap();
    assert_eq!((now.ino(), now.mtime_nsec()), (written.ino(), written.mtime_nsec()), "the base is the first one's");
    assert_eq!(bases(&bed).await[0]["linked_volumes"], 2);
    for (name, size) in [("web-1", DISK), ("web-2", size)] {
        assert_holds(&bed, name, &image, "qcow2", size);
        assert_eq!(verify(&bed, name).await["intact"], true);
        let shown = bed.tcp().get(&format!("/api/v1/volumes/{name}")).await.expect(200);
        assert_eq!((&shown["linked_to"], &shown["size_bytes"]), (&made[0]["name"], &json!(size)), "{shown:#}");
        assert_eq!(shown["receipt"]["linked_to"], made[0]["name"], "{shown:#}");
    }
    let listed = bed.tcp().get("/api/v1/volumes").await.expect(200);
    assert_eq!(listed.as_array().unwrap().len(), 2, "a base is no volume: {listed:#}");
    // It is written once, like every qcow2 file.
    let job = bed.fail(&bed.order("good.qcow2", "web-1"), "volume_incompatible").await;
    assert!(job["error"].as_str().unwrap().contains("delete it first"), "{job:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_of_every_kind_and_size_are_linked_where_their_size_is_known() {
    let bed = linked().await;
    for (number, size) in [(0, DISK), (1, DISK - 512), (2, DISK + 4096 + 512), (3, 512)] {
        let raw = bed.path(&format!("images/disk{number}.raw"));
        images::raw_with_data(&raw, size, 100, number).unwrap();
        let qcow2 = raw.with_extension("qcow2");
        images::qcow2_from(&raw, &qcow2, &images::Qcow2Options::default()).unwrap();
        let packed = images::compressed(&raw, "xz", &["-1"]).unwrap();
        for file in [&raw, &qcow2, &packed] {
            bed.upload(file);
            let name = file.file_name().unwrap().to_str().unwrap();
            let mut order = sized(bed.order(name, &name.replace('.', "-")), size);
            order.as_object_mut().unwrap().remove("image_type");
            let job = bed.provision(&order).await;
            assert!(job["receipt"]["linked_to"].is_string(), "{job:#}");
            let (name, rounded) = (job["volume"].as_str().unwrap(), size.next_multiple_of(64 << 10));
            assert_holds(&bed, name, &raw, "raw", rounded);
            assert_eq!(verify(&bed, name).await["intact"], true, "{name}");
        }
    }
    // A size that only decoding tells: a volume that stands alone.
    let raw = bed.path("images/disk0.raw");
    let packed = images::compressed(&raw, "gz", &["-1"]).unwrap();
    bed.upload(&packed);
    let mut order = bed.order("disk0.raw.gz", "alone");
    order["image_type"] = json!("raw.gz");
    let job = bed.provision(&order).await;
    assert_eq!(job["receipt"]["linked_to"], Value::Null, "{job:#}");
    images::run("qemu-img", &["compare", volume(&bed, "alone").to_str().unwrap(), raw.to_str().unwrap()]).unwrap();
    assert_eq!(verify(&bed, "alone").await["intact"], true);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_byte_is_found_in_the_overlay_and_in_the_base() {
    let bed = linked().await;
    bed.publish("good.qcow2", 1);
    for name in ["web-1", "web-2"] {
        bed.provision(&sized(bed.order("good.qcow2", name), 2 * DISK)).await;
    }
    images::qemu_io(&volume(&bed, "web-1"), &["write -P 0xa5 9M 4k"]).unwrap();
    let found = verify(&bed, "web-1").await;
    assert_eq!((&found["intact"], &found["first_difference"]), (&json!(false), &json!(9 * MIB)), "{found:#}");
    images::qemu_io(&volume(&bed, "web-1"), &["write -P 0xa5 2M 4k"]).unwrap();
    let at = verify(&bed, "web-1").await["first_difference"].as_u64().unwrap();
    assert!((2 * MIB..2 * MIB + 4096).contains(&at), "{at}");
    assert_eq!(verify(&bed, "web-2").await["intact"], true, "the other one has its own overlay");

    let (path, at, mut byte) = (base(&bed).await, 3 * MIB + 1234, [0]);
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    let found = verify(&bed, "web-2").await;
    assert_eq!((&found["intact"], &found["first_difference"]), (&json!(false), &json!(at)), "{found:#}");
    file.write_all_at(&byte, at).unwrap();
    assert_eq!(verify(&bed, "web-2").await["intact"], true);

    // Without the base nothing is guessed.
    let aside = bed.path("images/aside");
    fs::rename(&path, &aside).unwrap();
    let body = bed.tcp().post("/api/v1/volumes/web-2/verify", &Value::Null).await.refusal("input_output");
    assert!(body["message"].as_str().unwrap().contains(".base, which is not there"), "{body:#}");
    fs::rename(&aside, &path).unwrap();
    // Nor is another file read, whatever the header says.
    let overlay = volume(&bed, "web-2");
    let words = ["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd", overlay.to_str().unwrap()];
    images::run("qemu-img", &words).unwrap();
    bed.tcp().post("/api/v1/volumes/web-2/verify", &Value::Null).await.refusal("image_refused");
    assert_eq!(bed.tcp().get("/api/v1/volumes/web-2").await.expect(200)["linked_to"], Value::Null);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_base_goes_with_its_image_when_no_volume_needs_it() {
    let bed = linked().await;
    let image = bed.publish("good.qcow2", 1);
    let job = bed.provision(&bed.order("good.qcow2", "web-1")).await;
    bed.provision(&bed.order("good.qcow2", "web-2")).await;
    let by_digest = format!("/api/v1/images/{}", job["image_digest"].as_str().unwrap());
    for (number, gone) in [("2 volumes", "web-1"), ("1 volume", "web-2")] {
        let before = bed.listing();
        let body = bed.tcp().delete(&by_digest).await.refusal("image_in_use");
        let said = body["message"].as_str().unwrap();
        assert!(said.contains(&format!("needed by {number} linked")) && said.contains("such as web-"), "{body:#}");
        assert_eq!((&body["retryable"], bed.listing()), (&json!(false), before), "nothing is removed, not the image");
        bed.tcp().delete(&format!("/api/v1/volumes/{gone}?force=true")).await.expect(204);
    }
    // The last volume leaves the base, which serves where the image is gone.
    assert_eq!(bases(&bed).await[0]["linked_volumes"], 0);
    fs::remove_file(job["image_path"].as_str().unwrap()).unwrap();
    let again = bed.provision(&bed.order("good.qcow2", "web-3")).await;
    assert_eq!(again["receipt"]["bytes_fetched"], 0, "{again:#}");
    assert_holds(&bed, "web-3", &image, "qcow2", DISK);
    bed.tcp().delete(&by_digest).await.refusal("image_in_use");
    bed.tcp().delete("/api/v1/volumes/web-3?force=true").await.expect(204);
    bed.tcp().delete(&by_digest).await.expect(204);
    assert_eq!((bases(&bed).await.len(), files(&bed)), (0, Vec::new()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_first_jobs_at_once_make_one_base() {
    let bed = linked().await;
    for (image, checksum) in [("promised.qcow2", true), ("unpromised.qcow2", false)] {
        let file = bed.image(image, 1 + u64::from(checksum));
        let digest = bed.upload(&file);
        if !checksum {
            bed.store.remove("images", &format!("{image}.sha256")).unwrap();
        }
        let mut ids = Vec::new();
        for number in 0..4 {
            ids.push(bed.submit(&bed.order(image, &format!("{}-{number}", &image[..4]))).await);
        }
        for id in ids {
            let job = bed.ended(&id).await;
            assert_eq!(job["status"], "completed", "{job:#}");
            assert_holds(&bed, job["volume"].as_str().unwrap(), &file, "qcow2", DISK);
        }
        let made = bases(&bed).await;
        let of_this: Vec<_> = made.iter().filter(|base| base["image_digest"] == format!("sha256:{digest}")).collect();
        assert_eq!((of_this.len(), &of_this[0]["linked_volumes"]), (1, &json!(4)), "{made:#?}");
        let hidden = files(&bed).iter().filter(|name| name.starts_with('.')).count();
        assert_eq!(hidden, made.len());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_interrupted_is_finished_and_what_is_cancelled_leaves_nothing() {
    let mut bed = linked().await;
    let web = Server::start();
    let image = bed.image("slow.qcow2", 1);
    let bytes = fs::read(&image).unwrap();
    let middle = bytes.len() as u64 / 2;
    let slow = || Page::new(bytes.clone()).stall(&[middle; 99]);
    let mut order = bed.order("slow.qcow2", "web-1");
    order["image_url"] = json!(web.url("/slow.qcow2"));
    let under_way = |job: &Value| job["progress"]["bytes_processed"].as_u64().unwrap() > 0;

    web.serve("/slow.qcow2", slow());
    let id = bed.submit(&order).await;
    bed.job_when(&id, under_way).await;
    assert_eq!(files(&bed), [format!(".lvp-{id}.base-new")], "the base is being written");
    bed.tcp().delete(&format!("/api/v1/jobs/{id}")).await.expect(200);
    assert_eq!(bed.ended(&id).await["status"], "cancelled");
    assert_eq!(files(&bed), [""; 0]);

    let id = bed.submit(&order).await;
    bed.job_when(&id, under_way).await;
    web.serve("/slow.qcow2", Page::new(bytes.clone()));
    bed.restart().await;
    let job = bed.ended(&id).await;
    assert_eq!(job["status"], "completed", "{job:#}");
    assert_holds(&bed, "web-1", &image, "qcow2", DISK);
    assert_eq!((files(&bed).len(), verify(&bed, "web-1").await["intact"].clone()), (2, json!(true)));
}

/// The gate for images is as it was: what is linked is lvp's own, never what comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overlay_is_no_image_also_where_volumes_are_overlays() {
    let bed = linked().await;
    bed.publish("good.qcow2", 1);
    bed.provision(&bed.order("good.qcow2", "web-1")).await;
    let before = bed.listing();
    let image = bed.path("images/overlay.qcow2");
    fs::copy(volume(&bed, "web-1"), &image).unwrap();
    bed.upload(&image);
    let job = bed.fail(&bed.order("overlay.qcow2", "web-2"), "image_refused").await;
    assert!(job["error"].as_str().unwrap().contains("backing file"), "{job:#}");
    assert_eq!(bed.listing(), before);
}
