//! Sources that fail, lie or go away, each with a whole job on a new volume and on one that was there: the row "Source" of
//! docs/reference/faults.md.
//!
//! It leaves out what certificates can be wrong in (`source_tls`), and each request by itself: the tests of the engine's
//! `image` have that.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use e2e::{
    gate::Gate,
    images,
    server::{Page, Server},
};
use lvp_engine::parse_endpoint;
use rustix::fs::{XattrFlags, lsetxattr};
use serde_json::{Value, json};

use crate::{
    auditor::{Audit, Complete, Failed, sha256},
    bed::{Bed, MIB},
};

/// The disk of the images here: more than two pieces of a download.
const SIZE: u64 = 10 * MIB;

/// With few attempts and short waits.
pub async fn quick() -> Bed {
    Bed::with(|settings| {
        settings.sources.stall_timeout = Duration::from_millis(400);
        settings.sources.retry_attempts = 2;
    })
    .await
}

/// A raw disk without zeros in it, but for a hole.
pub fn raw_image(bed: &Bed, seed: u64) -> PathBuf {
    let mut bytes = vec![0; SIZE as usize];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes[5 * MIB as usize..6 * MIB as usize].fill(0);
    let path = bed.path(&format!("images/disk-{seed}.raw"));
    fs::write(&path, bytes).unwrap();
    path
}

pub fn order(url: &str, volume: &str) -> Value {
    json!({ "image_url": url, "volume_name": volume, "size": SIZE + MIB, "image_type": "raw" })
}

/// A volume that somebody else made, with an attribute of theirs.
pub fn somebodys_volume(bed: &Bed, name: &str) {
    fs::write(bed.volume(name), vec![7; (SIZE + MIB) as usize]).unwrap();
    lsetxattr(bed.volume(name), "user.owner", b"somebody", XattrFlags::empty()).unwrap();
}

/// Makes the next request miss the cache.
pub async fn forget_image(bed: &Bed, job: &Value) {
    let digest = job["image_digest"].as_str().unwrap();
    bed.tcp().delete(&format!("/api/v1/images/{digest}")).await.expect(204);
}

/// Runs a job that must fail, on a new volume and on one that was there.
async fn fails_on_both(bed: &Bed, name: &str, order: &Value, expected: &Failed<'_>, prepare: impl Fn()) {
    println!("{name}");
    for volume in ["web-1", "old"] {
        let audit = Audit::begin(bed);
        let mut order = order.clone();
        order["volume_name"] = json!(volume);
        prepare();
        audit.failed(&bed.submit(&order).await, expected).await;
    }
}

/// Faults that stay, one a line: the code, whether trying again helps, what the sentence says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_stays_broken_leaves_everything_as_it_was() {
    let (bed, web) = (quick().await, Server::start());
    somebodys_volume(&bed, "old");
    let bytes = fs::read(raw_image(&bed, 1)).unwrap();
    let other = fs::read(raw_image(&bed, 2)).unwrap();
    let page = || Page::new(bytes.clone());
    let whole = || page().no_ranges();
    let at = 5 * MIB;
    let small = || Page::new(bytes[..4096].to_vec()).etag(None);
    for (name, page, code, retryable, says) in [
        ("cut, in pieces", page().cut(&[at; 99]), "source_failed", true, "cut the transfer"),
        ("cut, in one stream", whole().cut(&[at; 99]), "source_failed", true, "at byte 5242880"),
        ("cut before the first byte", page().cut(&[0; 99]), "source_failed", true, "cut the transfer"),
        ("stall", page().stall(&[at; 99]), "source_failed", true, "sent nothing more for too long"),
        ("stall, in one stream", whole().stall(&[at; 99]), "source_failed", true, "sent nothing more for too long"),
        ("reset", page().reset(&[at; 99]), "source_failed", true, "cut the transfer"),
        ("reset, in one stream", whole().reset(&[at; 99]), "source_failed", true, "cut the transfer"),
        ("short body", whole().announce(SIZE + 4096), "source_failed", true, "at byte 10485760"),
        ("long body", whole().etag(None).announce(SIZE - 4096).chunked(), "source_failed", false, "sends more of"),
        ("wrong length", page().etag(None).then(1, small()), "source_changed", true, "changed while it was read"),
        ("500", page().fail(999, 500), "source_failed", true, "answered 500"),
        ("503", page().fail_with(999, 503, &[("retry-after", "0")]), "source_failed", true, "answered 503"),
        ("429", page().fail_with(999, 429, &[("retry-after", "0")]), "source_failed", true, "answered 429"),
        ("refused in the middle", page().then(4, page().fail(999, 403)), "source_denied", false, "it answered 403"),
        ("redirect loop", page().redirect("/x.raw"), "source_failed", false, "more than five times"),
        ("redirect to ftp", page().redirect("ftp://127.0.0.1/x"), "source_failed", false, "not http or https"),
        ("replaced", page().then(4, Page::new(other.clone())), "source_changed", true, "changed while it was read"),
        ("no image", page().fail(999, 404), "source_not_found", false, "is not there"),
    ] {
        let expected = Failed { code, retryable, says: &["/x.raw", says] };
        fails_on_both(&bed, name, &order(&web.url("/x.raw"), ""), &expected, || web.serve("/x.raw", page.clone()))
            .await;
    }
}

/// Faults that pass, once each: the job waits and goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_recovers_ends_in_the_whole_image() {
    let (bed, web) = (quick().await, Server::start());
    let image = raw_image(&bed, 1);
    let bytes = fs::read(&image).unwrap();
    let page = || Page::new(bytes.clone());
    let whole = || page().no_ranges();
    let at = 5 * MIB;
    for (number, (name, page)) in [
        ("cut", page().cut(&[at])),
        ("cut, in one stream", whole().cut(&[at])),
        ("stall", page().stall(&[at])),
        ("stall, in one stream", whole().stall(&[at])),
        ("reset", page().reset(&[at])),
        ("reset, in one stream", whole().reset(&[at])),
        ("500", page().fail(1, 500)),
        ("500 in the middle", page().then(4, page().fail(1, 500))),
        ("429 in the middle", page().then(4, page().fail_with(1, 429, &[("retry-after", "0")]))),
        ("everything at once", page().cut(&[at]).reset(&[9 * MIB]).stall(&[2 * MIB]).fail(1, 503)),
    ]
    .into_iter()
    .enumerate()
    {
        println!("{name}");
        let url = format!("/{number}.raw");
        somebodys_volume(&bed, "old");
        for volume in [format!("web-{number}").as_str(), "old"] {
            web.serve(&url, page.clone());
            let audit = Audit::begin(&bed);
            let id = bed.submit(&order(&web.url(&url), volume)).await;
            let job = audit.complete(&id, &Complete { volume, image: &image, format: "raw", size: SIZE + MIB }).await;
            forget_image(&bed, &job).await;
        }
        fs::remove_file(bed.volume("old")).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_store_is_given_the_time_that_it_asks_for() {
    let (bed, web) = (quick().await, Server::start());
    let image = raw_image(&bed, 1);
    let page = Page::new(fs::read(&image).unwrap());
    for (number, status) in [503, 429].into_iter().enumerate() {
        web.serve("/x.raw", page.clone().then(4, page.clone().fail_with(1, status, &[("retry-after", "1")])));
        let (audit, begun, volume) = (Audit::begin(&bed), Instant::now(), format!("web-{number}"));
        let id = bed.submit(&order(&web.url("/x.raw"), &volume)).await;
        let expected = Complete { volume: &volume, image: &image, format: "raw", size: SIZE + MIB };
        let job = audit.complete(&id, &expected).await;
        assert!(begun.elapsed() >= Duration::from_secs(1));
        forget_image(&bed, &job).await;
    }
}

/// Where the tables of a qcow2 image lie that qemu-img made: its L1 table and the first L2 table.
fn tables(image: &[u8]) -> [u64; 2] {
    let number = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let l1 = number(40);
    [l1, number(l1 as usize) & 0x00ff_ffff_ffff_fe00]
}

/// The property: whatever byte a connection is cut before, the volume is the image.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_cut_before_any_byte_changes_nothing() {
    let (bed, web) = (quick().await, Server::start());
    let (raw, image) = (raw_image(&bed, 1), bed.path("images/x.qcow2"));
    images::qcow2_from(&raw, &image, &images::Qcow2Options::default()).unwrap();
    let bytes = fs::read(&image).unwrap();
    let (size, piece, [l1, l2]) = (bytes.len() as u64, 4 * MIB, tables(&bytes));
    assert!(size > 2 * piece && l1 > 0 && l2 > 0 && l2 < size, "{size} {l1} {l2}");
    let mut offsets = vec![0, 1, 71, 72, l1, l1 + 3, l2, l2 + 8, l2 + 4097, size - 2, size - 1];
    offsets.extend([1, 2].into_iter().flat_map(|border| [border * piece - 1, border * piece, border * piece + 1]));
    let mut random = fastrand::Rng::with_seed(5);
    offsets.extend(std::iter::repeat_with(|| random.u64(0..size)).take(8));
    for offset in offsets {
        // In the second form the tables are not read before, so it is the download that is cut.
        for (form, page) in [("pieces", Page::new(bytes.clone())), ("stream", Page::new(bytes.clone()).no_ranges())] {
            println!("{form} cut before byte {offset}");
            web.serve("/x.qcow2", page.cut(&[offset]));
            let mut order = order(&web.url("/x.qcow2"), "web-1");
            order["image_type"] = json!("qcow2");
            let audit = Audit::begin(&bed);
            let id = bed.submit(&order).await;
            let expected = Complete { volume: "web-1", image: &image, format: "qcow2", size: SIZE + MIB };
            let job = audit.complete(&id, &expected).await;
            forget_image(&bed, &job).await;
            bed.tcp().delete("/api/v1/volumes/web-1?force=true").await.expect(204);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_presigned_url_that_expires_in_the_middle_is_told_without_its_signature() {
    let (bed, web) = (quick().await, Server::start());
    let page = Page::new(fs::read(raw_image(&bed, 1)).unwrap());
    somebodys_volume(&bed, "old");
    for volume in ["web-1", "old"] {
        // A presigned URL is signed for GET alone. Two looks, the first and the last bytes, and two pieces come before.
        web.serve("/x.raw", page.clone().head_status(403).then(6, page.clone().fail(999, 403)));
        let audit = Audit::begin(&bed);
        let id = bed.submit(&order(&web.url("/x.raw?X-Amz-Expires=60&X-Amz-Signature=hush"), volume)).await;
        let expected = Failed { code: "source_denied", retryable: false, says: &["/x.raw", "403"] };
        let job = audit.failed(&id, &expected).await;
        assert!(job["hint"].as_str().unwrap().contains("presigned URL may have expired"), "{job:#}");
        assert!(!job.to_string().contains("hush"), "{job:#}");
        assert!(job["progress"]["bytes_processed"].as_u64().unwrap() > 0, "it was not in the middle: {job:#}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redirect_to_another_host_takes_no_credentials_along() {
    let (store, other) = (Server::start(), Server::start());
    let endpoint = parse_endpoint(&store.url("")).unwrap();
    let bed = Bed::with(|settings| settings.sources.endpoint = Some(endpoint)).await;
    let image = raw_image(&bed, 1);
    other.serve("/elsewhere", Page::new(fs::read(&image).unwrap()));
    store.serve("/images/x.raw", Page::new("").redirect(&other.url("/elsewhere")));
    let audit = Audit::begin(&bed);
    let id = bed.submit(&order("s3://images/x.raw", "web-1")).await;
    audit.complete(&id, &Complete { volume: "web-1", image: &image, format: "raw", size: SIZE + MIB }).await;
    assert!(store.received().iter().any(|request| request.target.contains("X-Amz-Signature")));
    let received = other.received();
    assert!(received.iter().any(|request| request.method == "GET"));
    for request in received {
        assert_eq!(request.target, "/elsewhere");
        for name in ["authorization", "cookie", "referer", "x-amz-security-token"] {
            assert_eq!(request.header(name), None, "{request:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_cannot_be_reached_is_named() {
    let bed = quick().await;
    somebodys_volume(&bed, "old");
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (url, says) in [
        ("http://no-such-host.invalid/x.raw".to_owned(), "the name no-such-host.invalid cannot be resolved".to_owned()),
        (format!("http://{closed}/x.raw"), format!("{closed} refused the connection")),
    ] {
        let expected = Failed { code: "source_unreachable", retryable: true, says: &["/x.raw", &says] };
        fails_on_both(&bed, &says, &order(&url, ""), &expected, || ()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_digest_is_shown_with_the_right_one() {
    let (bed, web) = (quick().await, Server::start());
    somebodys_volume(&bed, "old");
    let image = raw_image(&bed, 1);
    let (wrong, right) = ("5".repeat(64), sha256(&image));
    web.serve("/x.raw", Page::new(fs::read(&image).unwrap()));
    let mut by_request = order(&web.url("/x.raw"), "");
    by_request["checksum"] = json!(format!("sha256:{wrong}"));
    let expected = Failed { code: "checksum_mismatch", retryable: false, says: &["/x.raw", &wrong, &right] };
    fails_on_both(&bed, "in the request", &by_request, &expected, || ()).await;
    web.serve("/x.raw.sha256", Page::new(format!("{wrong}  x.raw\n")));
    fails_on_both(&bed, "published", &order(&web.url("/x.raw"), ""), &expected, || ()).await;
}

/// An upload in the middle: the image that came is not the one of the digest that was read first, and that digest is
/// not the published one any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_digest_file_that_changes_between_two_reads_is_a_change_of_the_source() {
    let (bed, web) = (quick().await, Server::start());
    somebodys_volume(&bed, "old");
    let (old, new) = (raw_image(&bed, 1), raw_image(&bed, 2));
    let sums = [&old, &new].map(|image| Page::new(format!("{}  x.raw\n", sha256(image))));
    web.serve("/x.raw", Page::new(fs::read(&new).unwrap()));
    let expected = Failed { code: "source_changed", retryable: true, says: &["/x.raw", "checksum"] };
    let changes = || web.serve("/x.raw.sha256", sums[0].clone().then(1, sums[1].clone()));
    fails_on_both(&bed, "changes", &order(&web.url("/x.raw"), ""), &expected, changes).await;
    // The same request again finds the new one.
    let audit = Audit::begin(&bed);
    let id = bed.submit(&order(&web.url("/x.raw"), "web-1")).await;
    audit.complete(&id, &Complete { volume: "web-1", image: &new, format: "raw", size: SIZE + MIB }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_killed_and_started_again_in_the_middle_is_no_failure() {
    let bed = Bed::with(|settings| settings.sources.retry_attempts = 1000).await;
    let image = raw_image(&bed, 1);
    let page = || Page::new(fs::read(&image).unwrap());
    somebodys_volume(&bed, "old");
    for volume in ["web-1", "old"] {
        let (store, gate) = (Server::start(), Gate::default());
        store.serve("/x.raw", page().hold(9 * MIB, &gate));
        let audit = Audit::begin(&bed);
        let id = bed.submit(&order(&store.url("/x.raw"), volume)).await;
        gate.reached().await;
        bed.job_when(&id, |job| job["progress"]["bytes_processed"].as_u64() == Some(9 * MIB)).await;
        let store = Server::start_at(store.kill(), "/x.raw", page());
        let expected = Complete { volume, image: &image, format: "raw", size: SIZE + MIB };
        let job = audit.complete(&id, &expected).await;
        assert_eq!(job["receipt"]["bytes_fetched"], SIZE, "{job:#}");
        let asked: Vec<_> = store.received().iter().filter_map(|r| r.header("range").map(str::to_owned)).collect();
        assert_eq!(asked, [format!("bytes={}-{}", 9 * MIB, SIZE - 1)]);
        forget_image(&bed, &job).await;
    }
}
