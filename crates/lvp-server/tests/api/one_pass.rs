//! A new volume is written while its image comes: what that gives, and what it must not cost.

use std::{fs, os::unix::fs::MetadataExt, path::Path, time::Duration};

use e2e::server::{Page, Server};
use serde_json::{Value, json};

use crate::bed::{Bed, MIB};

/// A raw disk without zeros in it, larger than what is fetched in one piece.
fn disk(bed: &Bed, name: &str, seed: u64) -> (std::path::PathBuf, Vec<u8>) {
    let mut bytes = vec![0; 24 * MIB as usize + 512 * 3];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    let path = bed.path(&format!("images/{name}"));
    fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

fn order(url: &str, volume: &str) -> Value {
    json!({ "image_url": url, "volume_name": volume, "size": 32 * MIB, "image_type": "raw" })
}

async fn quick() -> Bed {
    Bed::with(|settings| {
        settings.sources.stall_timeout = Duration::from_secs(1);
        settings.sources.retry_attempts = 3;
    })
    .await
}

fn written(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_volume_is_written_while_the_image_still_comes() {
    let (bed, web) = (quick().await, Server::start());
    let (image, bytes) = disk(&bed, "x.raw", 1);
    // Silent for good in the middle, so that nothing but the first half is ever there.
    let stalls = [16 * MIB; 99];
    web.serve("/x.raw", Page::new(bytes.clone()).stall(&stalls));
    let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
    bed.job_when(&id, |job| job["progress"]["stage"] == "downloading" && written(&bed.volume("web-1")) >= 8 * MIB)
        .await;
    assert!(!bed.listing().iter().any(|name| name.starts_with("cache/x")), "{:?}", bed.listing());
    web.serve("/x.raw", Page::new(bytes));
    let job = bed.ended(&id).await;
    assert_eq!((&job["status"], &job["cache_hit"]), (&json!("completed"), &json!(false)), "{job:#}");
    bed.assert_holds(&bed.volume("web-1"), &image, "raw", 32 * MIB);
    assert!(bed.listing().iter().any(|name| name.starts_with("cache/x-")), "{:?}", bed.listing());
}

/// However the source behaves, the volume and the cached image are right.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kind_of_server_ends_in_the_same_volume() {
    let (bed, web) = (quick().await, Server::start());
    let (image, bytes) = disk(&bed, "x.raw", 2);
    let page = || Page::new(bytes.clone());
    let cut = [3 * MIB, 9 * MIB + 17, 20 * MIB];
    for (number, (name, page)) in [
        ("whole", page()),
        ("cut and stalled", page().cut(&cut).stall(&[12 * MIB])),
        ("without ranges", page().no_ranges()),
        ("without ranges, cut in the middle", page().no_ranges().cut(&[10 * MIB])),
        ("without an ETag, cut in the middle", page().etag(None).cut(&[10 * MIB])),
        ("with a weak ETag, cut in the middle", page().etag(Some("W/\"1\"")).cut(&[10 * MIB])),
        ("ranges announced, but ignored", page().ignores_ranges()),
        ("without a length", page().chunked().no_ranges()),
    ]
    .into_iter()
    .enumerate()
    {
        let (path, volume) = (format!("/{number}.raw"), format!("web-{number}"));
        web.serve(&path, page);
        let job = bed.provision(&order(&web.url(&path), &volume)).await;
        assert_eq!(job["image_digest"].as_str().map(str::len), Some(71), "{name}: {job:#}");
        println!("{name}");
        bed.assert_holds(&bed.volume(&volume), &image, "raw", 32 * MIB);
        let cached = job["image_path"].as_str().unwrap();
        assert!(fs::read(cached).unwrap() == bytes, "{name}: the cached image");
        bed.tcp().delete(&format!("/api/v1/images/{}", Path::new(cached).file_name().unwrap().to_str().unwrap())).await;
    }
}

/// Only the bytes tell that the image is cached, from another place; what was written before the cut does not count.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_download_of_bytes_that_are_cached_from_another_place_is_completed() {
    let (bed, web) = (quick().await, Server::start());
    let (image, bytes) = disk(&bed, "x.raw", 8);
    let page = || Page::new(bytes.clone());
    web.serve("/first.raw", page());
    let cached = bed.provision(&order(&web.url("/first.raw"), "first")).await["image_path"].clone();
    for (name, page) in [
        ("whole", page()),
        ("without-ranges", page().no_ranges().cut(&[10 * MIB])),
        ("without-an-etag", page().etag(None).cut(&[10 * MIB])),
        ("with-a-weak-etag", page().etag(Some("W/\"1\"")).cut(&[10 * MIB])),
    ] {
        let path = format!("/{name}.raw");
        let cuts = usize::from(name != "whole");
        web.serve(&path, page);
        let job = bed.provision(&order(&web.url(&path), name)).await;
        assert_eq!((&job["image_path"], &job["cache_hit"]), (&cached, &json!(false)), "{name}: {job:#}");
        assert!(job["receipt"]["bytes_fetched"].as_u64().unwrap() >= bytes.len() as u64, "{name}: {job:#}");
        bed.assert_holds(&bed.volume(name), &image, "raw", 32 * MIB);
        let received = web.received();
        let wholes = received.iter().filter(|got| got.method == "GET" && got.target == path);
        let wholes = wholes.filter(|got| got.header("range").is_none()).count();
        assert!(name == "whole" || wholes == 1 + cuts, "{name}: it was fetched {wholes} times");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metadata_that_differs_between_two_reads_undoes_everything() {
    let (bed, web) = (quick().await, Server::start());
    let (first, second) = (fs::read(bed.image("a.qcow2", 1)).unwrap(), fs::read(bed.image("b.qcow2", 2)).unwrap());
    let size = first.len().max(second.len());
    let padded = |mut bytes: Vec<u8>| {
        bytes.resize(size, 0);
        bytes
    };
    // The same header but for its size of the L1 table, under one ETag: as a server behind which two copies differ.
    let mut other = padded(first.clone());
    other[36..40].copy_from_slice(&2_u32.to_be_bytes());
    let page = |bytes: Vec<u8>| Page::new(bytes).etag(Some("\"same\""));
    web.serve("/x.qcow2", page(padded(first.clone())).then(4, page(other)));
    let before = bed.listing();
    let mut order = bed.order("x.qcow2", "web-1");
    order["image_url"] = json!(web.url("/x.qcow2"));
    let job = bed.fail(&order, "source_changed").await;
    assert!(job["hint"].as_str().unwrap().contains("different bytes"), "{job:#}");
    assert_eq!(bed.listing(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_is_wrong_in_its_last_byte_leaves_no_volume() {
    let (bed, web) = (quick().await, Server::start());
    let (_, bytes) = disk(&bed, "x.raw", 3);
    let digest = bed.upload(&bed.path("images/x.raw"));
    let mut wrong = bytes;
    *wrong.last_mut().unwrap() ^= 1;
    web.serve("/x.raw", Page::new(wrong));
    let before = bed.listing();
    let mut order = order(&web.url("/x.raw"), "web-1");
    order["checksum"] = json!(format!("sha256:{digest}"));
    bed.fail(&order, "checksum_mismatch").await;
    assert_eq!(bed.listing(), before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hit_that_is_damaged_is_fetched_anew_and_the_volume_is_right() {
    let bed = quick().await;
    let (image, bytes) = disk(&bed, "x.raw", 4);
    bed.upload(&image);
    let cached = bed.provision(&order(&bed.url("x.raw"), "web-1")).await["image_path"].as_str().unwrap().to_owned();
    let mut damaged = bytes.clone();
    damaged[20 * MIB as usize] ^= 1;
    fs::write(&cached, &damaged).unwrap();
    let job = bed.provision(&order(&bed.url("x.raw"), "web-2")).await;
    assert_eq!(job["cache_hit"], false, "{job:#}");
    bed.assert_holds(&bed.volume("web-2"), &image, "raw", 32 * MIB);
    assert!(fs::read(job["image_path"].as_str().unwrap()).unwrap() == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_in_the_middle_fetches_only_the_rest() {
    let (mut bed, web) = (quick().await, Server::start());
    let (image, bytes) = disk(&bed, "x.raw", 5);
    web.serve("/x.raw", Page::new(bytes.clone()).stall(&[16 * MIB; 99]));
    let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
    bed.job_when(&id, |_| written(&bed.volume("web-1")) >= 8 * MIB).await;
    bed.restart_after(|_| web.serve("/x.raw", Page::new(bytes.clone()))).await;
    let before = web.received().len();
    let job = bed.ended(&id).await;
    assert_eq!(job["status"], "completed", "{job:#}");
    bed.assert_holds(&bed.volume("web-1"), &image, "raw", 32 * MIB);
    let asked: Vec<_> = web.received()[before..].iter().filter_map(|r| r.header("range").map(str::to_owned)).collect();
    // The first bytes are asked for to read the header, the last ones to see what the disk ends with.
    assert!(!asked.contains(&"bytes=0-4194303".to_owned()), "{asked:?}");
    assert!(job["receipt"]["bytes_fetched"].as_u64().is_none_or(|fetched| fetched < 20 * MIB), "{job:#}");
}

/// What a source can do wrong, each with its code; nothing is left of any.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_lie_of_a_source_has_its_code_and_leaves_nothing() {
    let bed = Bed::with(|settings| {
        settings.sources.stall_timeout = Duration::from_millis(500);
        settings.sources.retry_attempts = 1;
    })
    .await;
    let web = Server::start();
    let (_, bytes) = disk(&bed, "x.raw", 6);
    let (_, other) = disk(&bed, "y.raw", 7);
    let size = bytes.len() as u64;
    let page = || Page::new(bytes.clone());
    let without_pieces = || page().no_ranges();
    let before = bed.listing();
    for (number, (name, page, checksum, code)) in [
        ("more is announced than comes", without_pieces().announce(size + 4096), None, "source_failed"),
        ("it is sent with an encoding", page().header("content-encoding", "gzip"), None, "source_failed"),
        ("it drips", page().pace(1, Duration::from_millis(20)), None, "source_failed"),
        ("it changes between two ranges", page().then(5, Page::new(other.clone())), None, "source_changed"),
        (
            "it changes between two ranges, and If-Match is not looked at",
            page().ignores_if_match().then(5, Page::new(other).ignores_if_match()),
            None,
            "source_changed",
        ),
        ("another part comes than was asked for", page().wrong_range(), None, "source_failed"),
        ("the checksum is a web page", page(), Some("<!DOCTYPE html><p>Not found"), "checksum_unreadable"),
        ("it is always cut at the same byte", without_pieces().cut(&[5 * MIB; 99]), None, "source_failed"),
    ]
    .into_iter()
    .enumerate()
    {
        let path = format!("/{number}.raw");
        web.serve(&path, page);
        if let Some(text) = checksum {
            web.serve(&format!("{path}.sha256"), Page::new(text));
        }
        let job = bed.ended(&bed.submit(&order(&web.url(&path), "web-1")).await).await;
        assert_eq!((&job["status"], &job["error_code"]), (&json!("failed"), &json!(code)), "{name}: {job:#}");
        assert!(job["hint"].as_str().is_some_and(|hint| !hint.is_empty()), "{name}: {job:#}");
        assert_eq!(bed.listing(), before, "{name}");
    }
}
