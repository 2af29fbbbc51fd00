//! Requests at the same time: one download, its outcome for all, and a stop for one only.

use std::time::Instant;

use e2e::gate::Gate;
use tokio::task::JoinSet;

use super::*;
use crate::progress::Stop;

/// A page that takes about half a second.
fn slow(bytes: Vec<u8>) -> Page {
    let piece = bytes.len() / 25;
    Page::new(bytes).pace(piece, Duration::from_millis(20))
}

async fn ten(bed: &Bed, url: &str, checksum: Option<Digest>) -> Vec<Result<Entry>> {
    let mut requests = JoinSet::new();
    for _ in 0..10 {
        let (images, wanted) = (bed.images.clone(), Wanted { checksum: checksum.clone(), ..bed.wanted(url) });
        requests.spawn(async move { bring(&images, &wanted, &Progress::default()).await });
    }
    requests.join_all().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_requests_are_one_download() {
    let server = Server::start();
    let bytes = content(500_000, 1);
    let bed = Bed::new().await;
    let pages = [("/etag.qcow2", slow(bytes.clone())), ("/nothing.qcow2", slow(content(500_000, 2)).etag(None))];
    for (path, page) in pages {
        server.serve(path, page);
        let entries = ten(&bed, &server.url(path), None).await;
        let names: Vec<_> = entries.iter().map(|entry| entry.as_ref().unwrap().name()).collect();
        assert!(names.iter().all(|name| *name == names[0]));
        assert_eq!(server.count("GET", path), 1);
    }
    server.serve("/digest.qcow2", slow(content(500_000, 3)));
    let promised = Some(sha256(&content(500_000, 3)));
    assert!(ten(&bed, &server.url("/digest.qcow2"), promised).await.iter().all(Result::is_ok));
    assert_eq!(server.count("GET", "/digest.qcow2"), 1);
    assert_eq!(bed.files().len(), 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_definite_failure_is_everybody_s() {
    let server = Server::start();
    server.serve("/x.qcow2", slow(content(500_000, 1)));
    let bed = Bed::new().await;
    for result in ten(&bed, &server.url("/x.qcow2"), Some(sha256(b"y"))).await {
        let body = assert_code(result, ErrorCode::ChecksumMismatch).to_body();
        assert_eq!(body.details["actual"], sha256(&content(500_000, 1)).to_string());
    }
    assert_eq!(server.count("GET", "/x.qcow2"), 1);
    bed.assert_empty();
}

/// Begins a download that its source holds back, has others wait for the same digest from the places, and lets the first go on.
async fn behind(server: &Server, first: Page, digest: &Digest, places: &[&str]) -> (Result<Entry>, Vec<Result<Entry>>) {
    let bed = Bed::new().await;
    let gate = Gate::default();
    server.serve("/first.qcow2", first.hold(1000, &gate));
    let bring_from = |url: String| {
        let (images, wanted) = (bed.images.clone(), bed.promised(&url, digest.clone()));
        tokio::spawn(async move { bring(&images, &wanted, &Progress::default()).await })
    };
    let leader = bring_from(server.url("/first.qcow2"));
    gate.reached().await;
    let waiters: Vec<_> = places.iter().map(|place| bring_from(server.url(place))).collect();
    // They have looked at their source, and wait.
    tokio::time::sleep(Duration::from_millis(300)).await;
    gate.open();
    let led = leader.await.unwrap();
    let mut waited = Vec::new();
    for waiter in waiters {
        waited.push(waiter.await.unwrap());
    }
    (led, waited)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_source_did_wrong_is_not_the_answer_for_who_named_another_one() {
    let server = Server::start();
    let bytes = content(500_000, 1);
    let digest = sha256(&bytes);
    // It breaks off and is denied then; or it sends something else.
    let denied = Page::new(bytes[..2000].to_vec()).announce(500_000).then(2, Page::new("").fail(99, 403));
    let wrong = Page::new(content(500_000, 2));
    for (page, code) in [(denied, ErrorCode::SourceDenied), (wrong, ErrorCode::ChecksumMismatch)] {
        server.serve("/good.qcow2", Page::new(bytes.clone()));
        server.serve("/gone.qcow2", Page::new(bytes.clone()).then(1, Page::new("").fail(99, 404)));
        let (led, mut waited) = behind(&server, page, &digest, &["/gone.qcow2", "/good.qcow2"]).await;
        assert_code(led, code);
        assert_eq!(waited.pop().unwrap().unwrap().digest(), digest);
        // The other one came before or after it.
        if let Some(Err(error)) = waited.pop() {
            assert_eq!(error.code(), ErrorCode::SourceNotFound);
            assert!(error.to_string().contains("/gone.qcow2"), "{error:?}");
        }
    }
}

/// Waits until a request has looked at its source, and for its turn behind the one that fetches.
async fn waits(server: &Server, path: &str, looks: usize) {
    while server.count("HEAD", path) < looks {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
}

/// The digest is fetched from one place while a request, or the checksum file of another place, names it for that other
/// place, which has something else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_request_brought_is_not_what_ones_own_place_has() {
    for by_request in [true, false] {
        let (server, bed, gate) = (Server::start(), Bed::new().await, Gate::default());
        let bytes = content(50_000, 1);
        server.serve("/a.qcow2", Page::new(bytes.clone()).hold(1000, &gate));
        server.serve("/q.qcow2", Page::new(content(50_000, 2)));
        server.serve("/q.qcow2.sha256", Page::new(sha256(&bytes).hex().to_owned()));
        let bring_from = |wanted: Wanted| {
            let images = bed.images.clone();
            tokio::spawn(async move { bring(&images, &wanted, &Progress::default()).await })
        };
        let leader = bring_from(bed.promised(&server.url("/a.qcow2"), sha256(&bytes)));
        gate.reached().await;
        let checksum = by_request.then(|| sha256(&bytes));
        let waiter = bring_from(Wanted { checksum, ..bed.wanted(&server.url("/q.qcow2")) });
        waits(&server, "/q.qcow2", 1).await;
        gate.open();
        assert!(leader.await.unwrap().is_ok() && waiter.await.unwrap().is_ok());
        assert_eq!(server.count("GET", "/q.qcow2"), 0);
        server.remove("/q.qcow2.sha256");
        let entry = bed.bring(&server.url("/q.qcow2")).await.unwrap();
        assert!(
            std::fs::read(entry.path()).unwrap() == content(50_000, 2),
            "by_request: {by_request}: it never had these"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_saw_a_new_image_is_not_given_the_old_one_that_another_request_still_fetches() {
    let (server, bed, gate) = (Server::start(), Bed::new().await, Gate::default());
    let url = server.url("/x.qcow2");
    let bring_now = || {
        let (images, wanted) = (bed.images.clone(), bed.wanted(&url));
        tokio::spawn(async move { bring(&images, &wanted, &Progress::default()).await })
    };
    server.serve("/x.qcow2", Page::new(content(50_000, 1)).hold(1000, &gate));
    let leader = bring_now();
    gate.reached().await;
    server.serve("/x.qcow2", Page::new(content(50_000, 2)));
    let waiter = bring_now();
    waits(&server, "/x.qcow2", 2).await;
    gate.open();
    assert_eq!(leader.await.unwrap().unwrap().digest(), sha256(&content(50_000, 1)));
    for entry in [waiter.await.unwrap().unwrap(), bed.bring(&url).await.unwrap()] {
        assert_eq!(entry.digest(), sha256(&content(50_000, 2)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_image_is_refused_for_those_who_wait() {
    let server = Server::start();
    server.serve("/x.qcow2", Page::new(content(4000, 1)));
    let bed = Bed::new().await;
    let new = bed.download(&server.url("/x.qcow2")).await.unwrap();
    let (images, wanted) = (bed.images.clone(), bed.wanted(&server.url("/x.qcow2")));
    let as_raw = Wanted { format: ImageFormat::Raw, ..wanted.clone() };
    let waiter = tokio::spawn(async move { bring(&images, &wanted, &Progress::default()).await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    // A request that declares another format is not concerned.
    let raw = bring(&bed.images, &as_raw, &Progress::default()).await.unwrap();
    assert!(raw.name().ends_with(".raw"));
    drop(raw);
    bed.images.delete(sha256(&content(4000, 1)).hex()).await.unwrap();
    new.refuse(&Error::new(ErrorCode::ImageRefused, "it has a backing file"));
    assert_code(waiter.await.unwrap(), ErrorCode::ImageRefused);
    assert_eq!(server.count("GET", "/x.qcow2"), 2);
    bed.assert_empty();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_leader_is_cancelled_a_waiter_takes_over() {
    let server = Server::start();
    server.serve("/x.qcow2", slow(content(500_000, 1)));
    let bed = Bed::new().await;
    let (leader, waiter, quitter) = (Progress::default(), Progress::default(), Progress::default());
    let mut running = Vec::new();
    for progress in [&leader, &waiter, &quitter] {
        let (images, wanted, progress) = (bed.images.clone(), bed.wanted(&server.url("/x.qcow2")), progress.clone());
        running.push(tokio::spawn(async move { bring(&images, &wanted, &progress).await }));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(Duration::from_millis(250)).await;
    let seen = waiter.snapshot();
    assert!(seen.bytes_processed > 0 && seen.bytes_total == 500_000, "a waiter shows the leader's progress: {seen:?}");
    let begun = Instant::now();
    quitter.stop(Stop::Cancel);
    assert_code(running.remove(2).await.unwrap(), ErrorCode::Cancelled);
    leader.stop(Stop::Cancel);
    assert_code(running.remove(0).await.unwrap(), ErrorCode::Cancelled);
    assert!(begun.elapsed() < Duration::from_secs(1));
    assert_eq!(running.remove(0).await.unwrap().unwrap().digest(), sha256(&content(500_000, 1)));
    assert_eq!(server.count("GET", "/x.qcow2"), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_download_stops_within_a_second_and_leaves_nothing() {
    let server = Server::start();
    server.serve("/slow.qcow2", slow(content(500_000, 1)));
    server.serve("/stalled.qcow2", Page::new(content(4000, 1)).stall(&[100]));
    server.serve(
        "/busy.qcow2",
        Page::new(content(4000, 1)).then(1, Page::new("").fail_with(9, 503, &[("retry-after", "60")])),
    );
    let bed = Bed::with(SourceSettings { stall_timeout: Duration::from_secs(60), ..quick() }, None).await;
    for path in ["/slow.qcow2", "/stalled.qcow2", "/busy.qcow2"] {
        let progress = Progress::default();
        let (images, wanted, shared) = (bed.images.clone(), bed.wanted(&server.url(path)), progress.clone());
        let running = tokio::spawn(async move { bring(&images, &wanted, &shared).await });
        tokio::time::sleep(Duration::from_millis(200)).await;
        let begun = Instant::now();
        progress.stop(Stop::Cancel);
        assert_code(running.await.unwrap(), ErrorCode::Cancelled);
        assert!(begun.elapsed() < Duration::from_secs(1), "{path}");
        bed.assert_empty();
        assert_eq!(bed.usage().reserved_bytes, 0);
    }
}
