//! Space is promised once: jobs that run at once never count on the same bytes of a small file system, and what cannot be
//! promised is refused before a byte is written. Thin pools have the same in the end-to-end scenarios.

use std::{fs, os::unix::fs::MetadataExt, path::Path, time::Duration};

use e2e::{
    images::MountedFileSystem,
    server::{Page, Server},
};
use lvp_api::TargetSpec;
use lvp_engine::EngineSettings;
use serde_json::{Value, json};

use crate::bed::{Bed, MIB, is_ended};

/// The size of each image and volume.
const SIZE: u64 = 24 * MIB;

/// So many bytes without zeros.
fn content(seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(|| random.u8(1..)).take(SIZE as usize).collect()
}

/// Sends the beginning, and then nothing, until another page is served in its place.
fn gated(seed: u64) -> Page {
    Page::new(content(seed)).stall(&[4 * MIB; 999])
}

fn order(web: &Server, image: &str, volume: &str) -> Value {
    json!({ "image_url": web.url(image), "volume_name": volume, "size": SIZE, "image_type": "raw" })
}

/// How many bytes of a page were asked for, where a whole page is asked for in ranges.
fn asked_for(web: &Server, path: &str) -> u64 {
    let requests = web.received().into_iter().filter(|one| one.target == path && one.method == "GET");
    let ranges = requests.map(|one| one.header("range").expect("a range").trim_start_matches("bytes=").to_owned());
    ranges
        .map(|range| {
            range
                .split_once('-')
                .map_or(0, |(from, to)| to.parse::<u64>().expect("an end") + 1 - from.parse::<u64>().expect("a begin"))
        })
        .sum()
}

/// An ext4 file system, and a server that has these on it.
async fn small(size: u64, place: impl FnOnce(&mut EngineSettings, &Path)) -> (Bed, MountedFileSystem) {
    let mounted = MountedFileSystem::make(size, &["mkfs.ext4", "-q", "-m", "0"]).unwrap();
    let path = mounted.path.clone();
    let bed = Bed::with(|settings| {
        settings.sources.stall_timeout = Duration::from_millis(500);
        settings.sources.retry_attempts = 999;
        place(settings, &path);
    })
    .await;
    (bed, mounted)
}

fn volumes_on(settings: &mut EngineSettings, path: &Path) {
    let spec = TargetSpec::Directory { path: path.join("volumes") };
    settings.targets.insert("default".to_owned(), spec.into());
}

fn written(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_jobs_never_count_on_the_same_space_of_a_file_system() {
    let (bed, mounted) = small(48 * MIB, volumes_on).await;
    let web = Server::start();
    web.serve("/x.raw", gated(1));
    web.serve("/y.raw", Page::new(content(2)));
    let volume = |name: &str| mounted.path.join(format!("volumes/{name}.raw"));
    let first = bed.submit(&order(&web, "/x.raw", "web-1")).await;
    bed.job_when(&first, |_| written(&volume("web-1")) > 0).await;

    let refused = bed.fail(&order(&web, "/y.raw", "web-2"), "insufficient_space").await;
    let words = refused["error"].as_str().unwrap();
    assert!(words.contains("needs 24 MiB") && words.contains("running jobs will still take"), "{refused:#}");
    assert_eq!(refused["retryable"], true, "{refused:#}");
    let facts = &refused["details"];
    let number = |name: &str| facts[name].as_u64().unwrap();
    assert!(number("promised_bytes") > 0 && number("free_bytes") >= SIZE, "it was not promised: {refused:#}");
    assert!(!volume("web-2").exists());
    assert!(asked_for(&web, "/y.raw") < MIB, "more than the tables was fetched");
    let planned = bed.tcp().post("/api/v1/jobs?dry_run=true", &order(&web, "/y.raw", "web-2")).await;
    assert_eq!(planned.refusal("insufficient_space")["details"]["needed_bytes"], SIZE);

    web.serve("/x.raw", Page::new(content(1)));
    let job = bed.ended(&first).await;
    assert_eq!(job["status"], "completed", "{job:#}");
    assert!(fs::read(volume("web-1")).unwrap() == content(1));
    // It is there now, so it still does not fit; when the first is gone, it does.
    bed.fail(&order(&web, "/y.raw", "web-2"), "insufficient_space").await;
    bed.tcp().delete("/api/v1/volumes/web-1?force=true").await.expect(204);
    bed.provision(&order(&web, "/y.raw", "web-2")).await;
    assert!(fs::read(volume("web-2")).unwrap() == content(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_and_the_cache_never_count_on_the_same_space() {
    let (bed, mounted) = small(96 * MIB, |settings, path| {
        volumes_on(settings, path);
        settings.cache_directory = Some(path.join("cache"));
    })
    .await;
    let web = Server::start();
    web.serve("/x.raw", gated(1));
    web.serve("/y.raw", Page::new(content(2)));
    let volume = |name: &str| mounted.path.join(format!("volumes/{name}.raw"));
    let first = bed.submit(&order(&web, "/x.raw", "web-1")).await;
    // Its attributes take space before the download has begun.
    let has_begun = |job: &Value| job["progress"]["bytes_processed"].as_u64() > Some(0);
    bed.job_when(&first, |job| has_begun(job) && written(&volume("web-1")) > 0).await;

    // There is room for its volume or for its image, not for both.
    let planned = bed.tcp().post("/api/v1/jobs?dry_run=true", &order(&web, "/y.raw", "web-2")).await;
    assert!(planned.refusal("cache_full")["details"]["promised_bytes"].as_u64().unwrap() > SIZE);
    let refused = bed.fail(&order(&web, "/y.raw", "web-2"), "cache_full").await;
    assert!(refused["error"].as_str().unwrap().contains("running jobs will still take"), "{refused:#}");
    assert_eq!(refused["retryable"], true, "{refused:#}");
    assert!(!volume("web-2").exists());
    assert!(asked_for(&web, "/y.raw") < MIB, "more than the tables was fetched");

    web.serve("/x.raw", Page::new(content(1)));
    let job = bed.ended(&first).await;
    assert_eq!(job["status"], "completed", "{job:#}");
    assert!(fs::read(volume("web-1")).unwrap() == content(1));
}

/// However a job ends, its promise ends with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_fails_is_cancelled_or_runs_again_leaves_no_promise() {
    let (mut bed, mounted) = small(48 * MIB, volumes_on).await;
    let web = Server::start();
    web.serve("/x.raw", gated(1));
    web.serve("/bad.raw", Page::new(content(3)));
    web.serve("/bad.raw.sha256", Page::new("0".repeat(64)));
    bed.fail(&order(&web, "/bad.raw", "web-1"), "checksum_mismatch").await;
    let volume = |name: &str| mounted.path.join(format!("volumes/{name}.raw"));
    let cancelled = bed.submit(&order(&web, "/x.raw", "web-1")).await;
    bed.job_when(&cancelled, |_| written(&volume("web-1")) > 0).await;
    bed.tcp().delete(&format!("/api/v1/jobs/{cancelled}")).await.expect(200);
    assert_eq!(bed.ended(&cancelled).await["status"], "cancelled");

    let resumed = bed.submit(&order(&web, "/x.raw", "web-1")).await;
    bed.job_when(&resumed, |_| written(&volume("web-1")) > 0).await;
    bed.restart().await;
    // It asks for the image's bytes again, so it was promised its space again.
    let before = asked_for(&web, "/x.raw");
    bed.job_when(&resumed, |job| !is_ended(job) && asked_for(&web, "/x.raw") > before + MIB).await;
    web.serve("/y.raw", Page::new(content(2)));
    bed.fail(&order(&web, "/y.raw", "web-2"), "insufficient_space").await;
    web.serve("/x.raw", Page::new(content(1)));
    let job = bed.ended(&resumed).await;
    assert_eq!(job["status"], "completed", "{job:#}");
    assert!(fs::read(volume("web-1")).unwrap() == content(1));
    // Written over, it takes nothing new.
    bed.provision(&order(&web, "/y.raw", "web-1")).await;
    assert!(fs::read(volume("web-1")).unwrap() == content(2));
}

/// Nobody knows how much such an image has before it is decoded: it may have what is left, and fails before it takes more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_of_unknown_size_takes_no_more_than_what_is_left() {
    let (bed, mounted) = small(48 * MIB, volumes_on).await;
    let image = bed.path("images/zeros.raw");
    fs::write(&image, vec![0; 32 * MIB as usize]).unwrap();
    let zeros = e2e::images::compressed(&image, "gz", &[]).unwrap();
    bed.upload(&zeros);
    let full = bed.path("images/full.raw");
    fs::write(&full, content(1)).unwrap();
    bed.upload(&e2e::images::compressed(&full, "gz", &["-1"]).unwrap());
    let order = |image: &str, volume: &str| json!({ "image_url": bed.url(image), "volume_name": volume, "size": 36 * MIB, "image_type": "raw.gz" });
    let web = Server::start();
    web.serve("/y.raw", Page::new(content(2)));
    bed.provision(&self::order(&web, "/y.raw", "web-0")).await;
    // The disk is larger than what is free, and its data is not.
    bed.provision(&order("zeros.raw.gz", "web-1")).await;
    let refused = bed.fail(&order("full.raw.gz", "web-2"), "insufficient_space").await;
    assert!(refused["error"].as_str().unwrap().contains("more data than"), "{refused:#}");
    assert!(!mounted.path.join("volumes/web-2.raw").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_job_is_taken_that_could_not_be_recorded() {
    let (bed, mounted) = small(40 * MIB, |settings, path| settings.state_directory = path.join("state")).await;
    bed.publish("good.qcow2", 1);
    bed.provision(&bed.order("good.qcow2", "web-1")).await;
    let ballast = mounted.path.join("ballast");
    fs::write(&ballast, vec![1; 24 * MIB as usize]).unwrap();
    for path in ["/api/v1/jobs", "/api/v1/jobs?dry_run=true"] {
        let answer = bed.tcp().post(path, &bed.order("good.qcow2", "web-2")).await;
        assert_eq!(answer.status, 507);
        let refusal = answer.refusal("insufficient_space");
        let named = mounted.path.join("state").display().to_string();
        assert!(refusal["message"].as_str().unwrap().contains(&named), "{refusal:#}");
        assert_eq!(refusal["retryable"], true);
    }
    assert_eq!(bed.all_jobs().await.len(), 1);
    fs::remove_file(ballast).unwrap();
    bed.provision(&bed.order("good.qcow2", "web-2")).await;
}
