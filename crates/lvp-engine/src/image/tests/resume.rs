//! Downloads by several ranges, and what a restart continues.

use std::{fs, os::unix::fs::FileExt, sync::Arc};

use e2e::gate::Gate;
use tokio::sync::oneshot;

use super::*;
use crate::{image::Along, progress::Stop, watermark::Watermark};

/// More than a few pieces.
const LARGE: usize = 21_000_000;

fn ranges(server: &Server) -> Vec<String> {
    server.received().iter().filter_map(|request| request.header("range").map(str::to_owned)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_image_comes_in_pieces_however_they_are_cut() {
    let server = Server::start();
    let bytes = content(LARGE, 1);
    let bed = Bed::new().await;
    let mut random = fastrand::Rng::with_seed(7);
    let cuts: Vec<u64> = (0..12).map(|_| random.u64(0..LARGE as u64)).collect();
    server.serve("/x.qcow2", Page::new(bytes.clone()).cut(&cuts).stall(&[9_000_000]));
    let entry = bed.bring_promised(&server.url("/x.qcow2"), sha256(&bytes)).await.unwrap();
    assert_eq!(fs::read(entry.path()).unwrap(), bytes);
    let ranges = ranges(&server);
    assert!(ranges.len() > 8, "{ranges:?}");
    assert!(ranges.contains(&"bytes=4194304-8388607".to_owned()), "{ranges:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_answers_a_range_with_everything_is_read_as_one_stream() {
    let server = Server::start();
    let bytes = content(LARGE, 2);
    server.serve("/x.qcow2", Page::new(bytes.clone()).ignores_ranges());
    let bed = Bed::new().await;
    let entry = bed.bring_promised(&server.url("/x.qcow2"), sha256(&bytes)).await.unwrap();
    assert_eq!(fs::read(entry.path()).unwrap(), bytes);
    assert_eq!(ranges(&server).len() + 1, server.count("GET", "/x.qcow2"), "one of them without a range");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn content_that_changes_between_two_pieces_is_refused() {
    let server = Server::start();
    let bed = Bed::new().await;
    let changed = Page::new(content(LARGE, 4));
    server.serve("/x.qcow2", Page::new(content(LARGE, 3)).then(3, changed.clone()));
    assert_code(bed.bring(&server.url("/x.qcow2")).await, ErrorCode::SourceChanged);
    server.serve("/y.qcow2", Page::new(content(LARGE, 3)).ignores_if_match().then(3, changed.ignores_if_match()));
    assert_code(bed.bring(&server.url("/y.qcow2")).await, ErrorCode::SourceChanged);
    bed.assert_empty();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_drips_is_given_up() {
    let server = Server::start();
    let bed = Bed::with(SourceSettings { retry_attempts: 1, ..quick() }, None).await;
    server.serve("/x.qcow2", Page::new(content(100_000, 1)).pace(1, Duration::from_millis(20)));
    let error = assert_code(bed.bring(&server.url("/x.qcow2")).await, ErrorCode::SourceFailed);
    assert!(error.chain().contains("less than 1 KiB a second"), "{error:?}");
    assert_eq!(server.count("GET", "/x.qcow2"), 2);
    bed.assert_empty();
}

/// Begins a download, stops it as a daemon that stops once the mark has moved to `until`, and gives the closed cache.
async fn interrupted(bed: Bed, url: &str, digest: Option<Digest>, until: u64) -> Bed {
    let (progress, mark) = (Progress::default(), Arc::<Watermark>::default());
    let (begun, _begins) = oneshot::channel();
    let along = Along { mark: mark.clone(), begun };
    let wanted = Wanted { checksum: digest, ..bed.wanted(url) };
    let resolved = bed.images.resolve(&wanted, &progress).await.unwrap();
    let stop = {
        let progress = progress.clone();
        tokio::task::spawn_blocking(move || {
            mark.wait(until, &progress).unwrap();
            progress.stop(Stop::Shutdown);
        })
    };
    assert_code(bed.images.fetch(&resolved, Some(along), &progress).await, ErrorCode::ShuttingDown);
    stop.await.unwrap();
    drop(resolved);
    let bed = bed.restart().await;
    let left: Vec<_> = bed.files().into_iter().filter(|name| name.contains("partial")).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    bed
}

fn partial(bed: &Bed) -> std::path::PathBuf {
    let name = bed.files().into_iter().find(|name| name.ends_with(".partial")).unwrap();
    bed.root.path().join(name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_continues_a_download_where_it_was() {
    for promised in [true, false] {
        let server = Server::start();
        let bytes = content(LARGE, 5);
        let url = server.url("/x.qcow2");
        let digest = promised.then(|| sha256(&bytes));
        server.serve("/x.qcow2", Page::new(bytes.clone()).stall(&[17_000_000; 9]));
        let bed = interrupted(Bed::new().await, &url, digest.clone(), 8_500_000).await;
        let kept = fs::metadata(partial(&bed)).unwrap().len();
        assert!(kept >= 8_500_000, "{kept}");
        server.serve("/x.qcow2", Page::new(bytes.clone()));
        let before = server.received().len();
        let wanted = Wanted { checksum: digest, ..bed.wanted(&url) };
        let entry = bring(&bed.images, &wanted, &Progress::default()).await.unwrap();
        assert_eq!(fs::read(entry.path()).unwrap(), bytes);
        assert_eq!(entry.digest(), sha256(&bytes));
        let asked: Vec<_> =
            server.received()[before..].iter().filter_map(|r| r.header("range").map(str::to_owned)).collect();
        let begins: Vec<u64> =
            asked.iter().map(|range| range[6..].split('-').next().unwrap().parse().unwrap()).collect();
        assert_eq!(begins.iter().min(), Some(&kept), "{asked:?}");
        assert!(!bed.files().iter().any(|name| name.contains("partial")), "{:?}", bed.files());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_content_is_not_continued() {
    let server = Server::start();
    let url = server.url("/x.qcow2");
    server.serve("/x.qcow2", Page::new(content(LARGE, 6)).stall(&[17_000_000; 9]));
    let bed = interrupted(Bed::new().await, &url, None, 5_000_000).await;
    let other = content(LARGE, 7);
    server.serve("/x.qcow2", Page::new(other.clone()));
    let entry = bed.bring(&url).await.unwrap();
    assert_eq!(fs::read(entry.path()).unwrap(), other);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_a_power_cut_spoiled_are_found_by_the_digest_and_fetched_anew() {
    let server = Server::start();
    let bytes = content(LARGE, 8);
    let url = server.url("/x.qcow2");
    server.serve("/x.qcow2", Page::new(bytes.clone()).stall(&[17_000_000; 9]));
    let bed = interrupted(Bed::new().await, &url, Some(sha256(&bytes)), 5_000_000).await;
    let file = fs::OpenOptions::new().write(true).open(partial(&bed)).unwrap();
    file.write_all_at(&[0; 4096], 4_000_000).unwrap();
    server.serve("/x.qcow2", Page::new(bytes.clone()));
    let resolved = bed.images.resolve(&bed.promised(&url, sha256(&bytes)), &Progress::default()).await.unwrap();
    let Fetch::New(new) = bed.images.fetch(&resolved, None, &Progress::default()).await.unwrap() else {
        panic!("it was cached")
    };
    assert!(!new.along_is_good(), "who read along read the spoiled bytes");
    let entry = new.publish(Some(1)).await.unwrap();
    assert_eq!(fs::read(entry.path()).unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_goes_first_when_space_is_needed() {
    let server = Server::start();
    let url = server.url("/x.qcow2");
    server.serve("/x.qcow2", Page::new(content(LARGE, 9)).stall(&[17_000_000; 9]));
    let bed = interrupted(Bed::new().await, &url, None, 5_000_000).await;
    let index = bed.images.shared.index.clone();
    let free = bed.usage().free_bytes;
    assert_code(index.reserve(free * 2, 0).map(drop), ErrorCode::CacheFull);
    bed.assert_empty();
}

/// Its job was cancelled before it went on, or has no source any more; and the daemon runs for months.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_that_nobody_goes_on_with_counts_and_goes_after_a_day_without_a_restart() {
    let server = Server::start();
    let url = server.url("/x.qcow2");
    server.serve("/x.qcow2", Page::new(content(LARGE, 9)).stall(&[17_000_000; 9]));
    let bed = interrupted(Bed::new().await, &url, None, 5_000_000).await;
    let left = fs::OpenOptions::new().write(true).open(partial(&bed)).unwrap();
    let size = left.metadata().unwrap().len();
    assert_eq!((bed.usage().images, bed.usage().used_bytes), (0, size));
    let now = std::time::SystemTime::now();
    for hours in [0, 23] {
        left.set_modified(now - Duration::from_secs(hours * 3600)).unwrap();
        bed.images.sweep().await.unwrap();
        assert_eq!(bed.usage().used_bytes, size, "a job may come back for it after {hours} h");
    }
    left.set_modified(now - Duration::from_secs(25 * 3600)).unwrap();
    bed.images.sweep().await.unwrap();
    bed.assert_empty();
    assert_eq!(bed.usage().used_bytes, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_that_a_job_goes_on_with_is_no_leftover_however_old_it_is() {
    let server = Server::start();
    let (url, bytes, gate) = (server.url("/x.qcow2"), content(LARGE, 5), Gate::default());
    server.serve("/x.qcow2", Page::new(bytes.clone()).stall(&[17_000_000; 9]));
    let bed = interrupted(Bed::new().await, &url, None, 5_000_000).await;
    let left = partial(&bed);
    server.serve("/x.qcow2", Page::new(bytes.clone()).hold(18_000_000, &gate));
    let (images, wanted) = (bed.images.clone(), bed.wanted(&url));
    let job = tokio::spawn(async move { bring(&images, &wanted, &Progress::default()).await });
    gate.reached().await;
    let old = std::time::SystemTime::now() - Duration::from_secs(25 * 3600);
    fs::OpenOptions::new().write(true).open(&left).unwrap().set_modified(old).unwrap();
    bed.images.sweep().await.unwrap();
    assert!(left.exists());
    gate.open();
    assert_eq!(fs::read(job.await.unwrap().unwrap().path()).unwrap(), bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_download_leaves_nothing() {
    let server = Server::start();
    server.serve("/x.qcow2", Page::new(content(LARGE, 9)).stall(&[17_000_000; 9]));
    let bed = Bed::new().await;
    let progress = Progress::default();
    let resolved = bed.resolve(&server.url("/x.qcow2")).await.unwrap();
    let (begun, begins) = oneshot::channel();
    let mark = Arc::<Watermark>::default();
    let cancel = async {
        begins.await.unwrap();
        progress.stop(Stop::Cancel);
    };
    let along = Along { mark: mark.clone(), begun };
    let (fetched, ()) = tokio::join!(bed.images.fetch(&resolved, Some(along), &progress), cancel);
    assert_code(fetched, ErrorCode::Cancelled);
    assert!(mark.has_failed(), "who reads along is told");
    bed.assert_empty();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn zeros_of_an_image_take_no_space_in_the_cache() {
    let server = Server::start();
    let mut bytes = content(1 << 20, 1);
    bytes.resize(12 << 20, 0);
    bytes.extend(content(4096, 2));
    bytes.resize(16 << 20, 0);
    server.serve("/x.qcow2", Page::new(bytes.clone()));
    let bed = Bed::new().await;
    let entry = bed.bring_promised(&server.url("/x.qcow2"), sha256(&bytes)).await.unwrap();
    assert_eq!(fs::read(entry.path()).unwrap(), bytes);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(entry.path()).unwrap());
    assert!(blocks * 512 < 4 << 20, "{blocks} blocks");
}
