//! Admission and eviction: who goes, who never goes, and that no byte is promised twice.

use super::*;
use crate::space::Place;

const KIB: usize = 1024;

/// Serves and brings images of 100 KiB, one per seed, oldest use first.
async fn fill(bed: &Bed, server: &Server, seeds: impl IntoIterator<Item = u64>) -> Vec<String> {
    let mut names = Vec::new();
    for seed in seeds {
        let path = format!("/{seed}.qcow2");
        server.serve(&path, Page::new(content(100 * KIB, seed)));
        names.push(bed.bring(&server.url(&path)).await.unwrap().name().to_owned());
    }
    names
}

async fn names(bed: &Bed) -> Vec<String> {
    bed.images.list().await.unwrap().into_iter().map(|image| image.name).collect()
}

#[tokio::test]
async fn the_least_recently_used_image_goes_first() {
    let server = Server::start();
    let bed = Bed::limited(350 * KIB as u64).await;
    let filled = fill(&bed, &server, 1..=3).await;
    bed.bring(&server.url("/1.qcow2")).await.unwrap();
    fill(&bed, &server, [4]).await;
    let left = names(&bed).await;
    assert_eq!(left.len(), 3);
    assert!(left.contains(&filled[0]) && !left.contains(&filled[1]));
    assert_eq!(bed.files().len(), 6);
}

#[tokio::test]
async fn eviction_never_takes_what_is_pinned_or_in_use() {
    let server = Server::start();
    let bed = Bed::limited(350 * KIB as u64).await;
    let filled = fill(&bed, &server, 1..=3).await;
    bed.images.pin(&filled[0], true).await.unwrap();
    let held = bed.images.find(&filled[1]).await.unwrap();
    fill(&bed, &server, [4]).await;
    let left = names(&bed).await;
    assert!(left.contains(&filled[0]) && left.contains(&filled[1]) && !left.contains(&filled[2]), "{left:?}");
    server.serve("/big.qcow2", Page::new(content(200 * KIB, 9)));
    let error = assert_code(bed.bring(&server.url("/big.qcow2")).await, ErrorCode::CacheFull);
    assert!(error.to_string().contains("limit 350 KiB"), "{error:?}");
    assert_eq!(error.to_body().details["wanted_bytes"], 200 * KIB);
    assert!(error.retryable());
    assert_eq!(names(&bed).await.len(), 3, "what would not help is not evicted");
    drop(held);
    bed.bring(&server.url("/big.qcow2")).await.unwrap();
}

#[tokio::test]
async fn what_never_fits_is_refused_before_a_byte_is_fetched() {
    let server = Server::start();
    let bed = Bed::limited(50 * KIB as u64).await;
    server.serve("/big.qcow2", Page::new(content(100 * KIB, 1)));
    let error = assert_code(bed.bring(&server.url("/big.qcow2")).await, ErrorCode::CacheFull);
    assert!(!error.retryable());
    assert_eq!(server.count("GET", "/big.qcow2"), 0);
    // More than any file system has.
    let bed = Bed::new().await;
    for announced in [1 << 60, u64::MAX] {
        server.serve("/huge.qcow2", Page::new("x").announce(announced));
        assert_code(bed.bring(&server.url("/huge.qcow2")).await, ErrorCode::CacheFull);
    }
    bed.assert_empty();
}

#[tokio::test]
async fn two_downloads_never_count_on_the_same_space() {
    let server = Server::start();
    let bed = Bed::limited(150 * KIB as u64).await;
    for seed in [1, 2] {
        server.serve(&format!("/{seed}.qcow2"), Page::new(content(100 * KIB, seed)));
    }
    let first = bed.download(&server.url("/1.qcow2")).await.unwrap();
    assert_eq!(bed.usage().reserved_bytes, 100 * KIB as u64);
    assert_code(bed.bring(&server.url("/2.qcow2")).await, ErrorCode::CacheFull);
    let entry = first.publish(Some(1)).await.unwrap();
    let usage = bed.usage();
    assert_eq!((usage.images, usage.used_bytes, usage.reserved_bytes), (1, 100 * KIB as u64, 0));
    assert_code(bed.bring(&server.url("/2.qcow2")).await, ErrorCode::CacheFull);
    drop(entry);
    bed.bring(&server.url("/2.qcow2")).await.unwrap();
}

#[tokio::test]
async fn an_image_of_unknown_size_is_bounded_while_it_streams() {
    let server = Server::start();
    server.serve("/x.qcow2", Page::new(content(100 * KIB, 1)).chunked());
    let bed = Bed::limited(50 * KIB as u64).await;
    assert_code(bed.bring(&server.url("/x.qcow2")).await, ErrorCode::CacheFull);
    bed.assert_empty();
    let bed = Bed::new().await;
    let resolved = bed.resolve(&server.url("/x.qcow2")).await.unwrap();
    assert!(resolved.size().is_some() || resolved.reader(&Progress::default()).unwrap().is_none());
    assert_eq!(bed.bring(&server.url("/x.qcow2")).await.unwrap().size(), 100 * KIB as u64);
    server.serve("/y.qcow2", Page::new(content(100 * KIB, 2)).chunked().no_ranges());
    assert_eq!(bed.resolve(&server.url("/y.qcow2")).await.unwrap().size(), None);
    assert_eq!(bed.bring(&server.url("/y.qcow2")).await.unwrap().size(), 100 * KIB as u64);
}

#[tokio::test]
async fn a_download_never_counts_on_what_a_volume_was_promised() {
    let server = Server::start();
    let (root, settings, ledger) = (tempfile::tempdir().unwrap(), quick(), Ledger::default());
    let images = open_counting(root.path(), &settings, None, ledger.clone()).await.unwrap();
    let bed = Bed { root, settings, images };
    server.serve("/1.qcow2", Page::new(content(100 * KIB, 1)));
    let place = Place::of(bed.root.path()).unwrap();
    // All that there is.
    let promise = ledger.at(&place, |room| room.promise(u64::MAX / 2));
    let refused = bed.images.refuse_full(1).await;
    assert_eq!(refused.unwrap_err().code(), ErrorCode::CacheFull);
    let error = assert_code(bed.bring(&server.url("/1.qcow2")).await, ErrorCode::CacheFull);
    assert!(error.to_string().contains("running jobs will still take"), "{error:?}");
    assert_eq!(server.count("GET", "/1.qcow2"), 0);
    drop(promise);
    let first = bed.download(&server.url("/1.qcow2")).await.unwrap();
    assert!(bed.usage().reserved_bytes > 0);
    // What is written of it is promised no more.
    assert!(ledger.at(&place, |room| room.promised()) <= 100 * KIB as u64);
    drop(first);
    assert_eq!(ledger.at(&place, |room| room.promised()), 0);
}
