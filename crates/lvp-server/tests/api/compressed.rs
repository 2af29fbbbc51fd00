//! Compressed raw images from the request to the volume: their type by the name, in the cache as they are, and a volume
//! that was there before is not touched for a disk that does not come out whole.

use std::{
    fs,
    path::{Path, PathBuf},
};

use e2e::images;
use serde_json::{Value, json};

use crate::bed::{Bed, DISK, MIB};

/// Uploads a disk of `size` bytes as `NAME.img` or `NAME.raw` with this ending; gives the disk and the object's name.
fn publish(bed: &Bed, name: &str, ending: &str, size: u64) -> (PathBuf, String) {
    let raw = bed.path(&format!("images/{name}"));
    images::raw_with_data(&raw, size, 40, 3).unwrap();
    let image = images::compressed(&raw, ending, &["-1"]).unwrap();
    bed.upload(&image);
    (raw, image.file_name().unwrap().to_str().unwrap().to_owned())
}

/// An order without a type.
fn order(bed: &Bed, image: &str, volume: &str) -> Value {
    let mut order = bed.order(image, volume);
    order.as_object_mut().unwrap().remove("image_type");
    order
}

fn with_size(mut order: Value, size: u64) -> Value {
    order["size"] = json!(size);
    order
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compressed_disk_goes_to_a_volume_and_stays_compressed_in_the_cache() {
    let bed = Bed::new().await;
    for (name, ending, told) in [("a.img", "gz", None), ("b.raw", "zst", None), ("c.img", "xz", Some(DISK - 5))] {
        let (raw, image) = publish(&bed, name, ending, DISK - 5);
        let (format, volume) = (format!("raw.{ending}"), format!("web-{ending}"));
        let mut dry = order(&bed, &image, &volume);
        dry["dry_run"] = json!(true);
        let plan = bed.tcp().post("/api/v1/jobs", &dry).await.expect(200);
        assert_eq!((&plan["image_type"], plan["virtual_size_bytes"].as_u64()), (&json!(format), told), "{plan:#}");

        let job = bed.provision(&order(&bed, &image, &volume)).await;
        let cached = Path::new(job["image_path"].as_str().unwrap());
        assert!(cached.to_str().unwrap().ends_with(&format!(".{format}")), "{job:#}");
        assert!(fs::read(cached).unwrap() == fs::read(bed.path(&format!("images/{image}"))).unwrap());
        bed.assert_holds(&bed.volume(&volume), &raw, "raw", DISK);
        let shown = &bed
            .tcp()
            .get(&format!("/api/v1/images/{}", &job["image_digest"].as_str().unwrap()[7..]))
            .await
            .expect(200);
        assert_eq!((&shown["format"], shown["virtual_size_bytes"].as_u64()), (&json!(format), told), "{shown:#}");

        // Again, from the cache, to a volume that is full of another's data.
        fs::write(bed.volume(&volume), vec![0xaa; DISK as usize]).unwrap();
        let again = bed.provision(&order(&bed, &image, &volume)).await;
        assert_eq!(again["cache_hit"], true);
        bed.assert_holds(&bed.volume(&volume), &raw, "raw", DISK);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_was_there_is_not_touched_for_a_disk_that_does_not_come_out_whole() {
    let bed = Bed::new().await;
    bed.publish("good.qcow2", 1);
    bed.provision(&bed.order("good.qcow2", "web-1")).await;
    let before = fs::read(bed.volume("web-1")).unwrap();
    for (ending, code) in [("gz", "image_too_large"), ("zst", "volume_incompatible"), ("xz", "volume_incompatible")] {
        let (_, image) = publish(&bed, "large.img", ending, DISK + MIB);
        bed.fail(&order(&bed, &image, "web-1"), code).await;
        assert!(fs::read(bed.volume("web-1")).unwrap() == before, "{ending}: the volume was overwritten");
    }
    for ending in ["gz", "zst"] {
        let (_, image) = publish(&bed, "good.img", ending, DISK);
        let mut bytes = fs::read(bed.path(&format!("images/{image}"))).unwrap();
        // In the check at the end.
        *bytes.last_mut().unwrap() ^= 1;
        let name = format!("damaged.img.{ending}");
        let damaged = bed.path(&format!("images/{name}"));
        fs::write(&damaged, bytes).unwrap();
        bed.upload(&damaged);
        let job = bed.fail(&order(&bed, &name, "web-1"), "image_invalid").await;
        assert!(job["details"]["offset"].is_u64(), "{job:#}");
        assert!(fs::read(bed.volume("web-1")).unwrap() == before, "{ending}: the volume was overwritten");
        // A volume that the job made goes again.
        bed.fail(&order(&bed, &name, "web-2"), "image_invalid").await;
        assert!(!bed.volume("web-2").exists());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_is_refused_before_there_is_a_volume() {
    let bed = Bed::new().await;
    let qcow2 = bed.image("inside.raw", 1);
    let inside = images::compressed(&qcow2, "zst", &[]).unwrap();
    bed.upload(&inside);
    let (_, large) = publish(&bed, "large.img", "xz", DISK + 1);
    let (_, bomb) = publish(&bed, "bomb.img", "gz", DISK + 1);
    let before = bed.listing();
    let job = bed.fail(&order(&bed, "inside.raw.zst", "web-1"), "image_type_mismatch").await;
    assert!(job["error"].as_str().unwrap().contains("the disk in it is a qcow2 image"), "{job:#}");
    let job = bed.fail(&order(&bed, &large, "web-1"), "image_too_large").await;
    assert_eq!(job["details"], json!({ "image_bytes": DISK + 1, "volume_bytes": DISK }));
    assert_eq!(bed.listing(), before, "something was fetched or made");
    // Only decoding shows it: the image stays in the cache, the volume goes.
    bed.fail(&order(&bed, &bomb, "web-1"), "image_too_large").await;
    assert!(!bed.volume("web-1").exists());
    bed.provision(&with_size(order(&bed, &bomb, "web-1"), DISK + 4096)).await;
    for name in ["a.img", "a.gz", "a.qcow2.gz", "a.img.bz2"] {
        let refusal = bed.tcp().post("/api/v1/jobs", &order(&bed, name, "web-1")).await.refusal("invalid_field");
        assert!(refusal["hint"].as_str().unwrap().contains("raw.gz"), "{refusal:#}");
    }
}
