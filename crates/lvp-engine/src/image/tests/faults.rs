//! Servers that fail, lie or change in the middle: what is tried again, what is an error, and which.

use std::time::Instant;

use super::*;

#[tokio::test]
async fn what_can_pass_is_tried_again() {
    let server = Server::start();
    let bed = Bed::new().await;
    for (number, status) in [500, 502, 503, 504, 429, 408].into_iter().enumerate() {
        let path = format!("/{status}.qcow2");
        server.serve(&path, Page::new(content(4000, number as u64)).fail(3, status));
        assert!(bed.bring(&server.url(&path)).await.is_ok(), "{status}");
        server.serve(&path, Page::new("").fail(9, status));
        let error = assert_code(bed.bring(&server.url(&path)).await, ErrorCode::SourceFailed);
        assert!(error.retryable());
        assert_eq!(error.to_body().details["attempts"], 4);
        assert!(error.to_string().contains(&status.to_string()), "{error:?}");
    }
}

#[tokio::test]
async fn a_definite_refusal_is_not_tried_again() {
    let server = Server::start();
    let bed = Bed::new().await;
    for (status, code) in [
        (401, ErrorCode::SourceDenied),
        (403, ErrorCode::SourceDenied),
        (404, ErrorCode::SourceNotFound),
        (400, ErrorCode::SourceFailed),
        (501, ErrorCode::SourceFailed),
    ] {
        let path = format!("/{status}.qcow2");
        server.serve(&path, Page::new("").fail(99, status));
        let error = assert_code(bed.bring(&server.url(&path)).await, code);
        assert!(!error.retryable(), "{error:?}");
        assert!(server.count("HEAD", &path) == 1 && server.count("GET", &path) <= 1, "{status}");
        bed.assert_empty();
    }
}

#[tokio::test]
async fn the_server_s_wish_to_wait_is_granted() {
    let server = Server::start();
    server.serve("/x.qcow2", Page::new(content(4000, 1)).fail_with(1, 503, &[("retry-after", "1")]));
    let bed = Bed::new().await;
    let begun = Instant::now();
    bed.bring(&server.url("/x.qcow2")).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn a_cut_transfer_goes_on_where_it_was_cut() {
    let server = Server::start();
    let bytes = content(1_000_000, 1);
    // More cuts than attempts: each brings some bytes, so each begins the count anew.
    let cuts: Vec<_> = (1..=9).map(|cut| cut * 100_000).collect();
    server.serve("/x.qcow2", Page::new(bytes.clone()).cut(&cuts));
    let bed = Bed::new().await;
    let progress = Progress::default();
    let wanted = bed.promised(&server.url("/x.qcow2"), sha256(&bytes));
    bring(&bed.images, &wanted, &progress).await.unwrap();
    let resumed: Vec<_> = server.received().iter().filter_map(|r| r.header("range").map(str::to_owned)).collect();
    assert_eq!(resumed.len(), 9, "{resumed:?}");
    assert!(server.received().iter().filter(|r| r.header("range").is_some()).all(|r| r.header("if-match").is_some()));
    assert_eq!(progress.snapshot().bytes_processed, 1_000_000);
}

#[tokio::test]
async fn a_cut_transfer_starts_over_where_it_cannot_go_on() {
    let server = Server::start();
    let bytes = content(300_000, 1);
    let page = || Page::new(bytes.clone()).cut(&[200_000]);
    for (name, page) in
        [("no-etag", page().etag(None)), ("weak-etag", page().etag(Some("W/\"1\""))), ("no-ranges", page().no_ranges())]
    {
        let path = format!("/{name}.qcow2");
        let bed = Bed::new().await;
        server.serve(&path, page);
        let progress = Progress::default();
        let wanted = bed.promised(&server.url(&path), sha256(&bytes));
        bring(&bed.images, &wanted, &progress).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        assert_eq!(server.count("GET", &path), 2, "{name}");
        assert_eq!(progress.snapshot().bytes_processed, 300_000, "{name}");
    }
    // Says that it has ranges, but answers a range with everything.
    let bed = Bed::new().await;
    let later = Page::new(bytes.clone()).no_ranges();
    server.serve("/liar.qcow2", page().then(2, later));
    bed.bring_promised(&server.url("/liar.qcow2"), sha256(&bytes)).await.unwrap();
}

#[tokio::test]
async fn a_transfer_that_is_always_cut_ends() {
    let server = Server::start();
    let bed = Bed::new().await;
    server.serve("/x.qcow2", Page::new(content(300_000, 1)).etag(None).cut(&[1000; 99]));
    let error = assert_code(bed.bring(&server.url("/x.qcow2")).await, ErrorCode::SourceFailed);
    assert!(error.retryable() && error.chain().contains("at byte 1000"), "{error:?}");
    assert_eq!(server.count("GET", "/x.qcow2"), 4);
    bed.assert_empty();
}

#[tokio::test]
async fn a_stalled_transfer_is_cut_and_goes_on() {
    let server = Server::start();
    let bytes = content(300_000, 1);
    server.serve("/x.qcow2", Page::new(bytes.clone()).stall(&[100_000]));
    let bed = Bed::new().await;
    bed.bring_promised(&server.url("/x.qcow2"), sha256(&bytes)).await.unwrap();
    assert_eq!(server.count("GET", "/x.qcow2"), 2);
    let bed = Bed::new().await;
    server.serve("/y.qcow2", Page::new(content(300_000, 2)).stall(&[0; 99]));
    let error = assert_code(bed.bring(&server.url("/y.qcow2")).await, ErrorCode::SourceFailed);
    assert!(error.to_string().contains("sent nothing more"), "{error:?}");
    bed.assert_empty();
}

#[tokio::test]
async fn a_length_that_is_not_true_is_an_error() {
    let server = Server::start();
    let bed = Bed::new().await;
    let bytes = content(4000, 1);
    for (name, page, expected) in [
        ("too-few", Page::new(bytes.clone()).announce(5000), "cut the transfer"),
        ("too-few-chunked", Page::new(bytes.clone()).announce(5000).chunked(), "ended the transfer"),
        ("too-many-chunked", Page::new(bytes.clone()).announce(3000).chunked(), "more of"),
    ] {
        let path = format!("/{name}.qcow2");
        server.serve(&path, page.etag(None));
        let error = assert_code(bed.bring(&server.url(&path)).await, ErrorCode::SourceFailed);
        assert!(error.to_string().contains(expected), "{name}: {error:?}");
        bed.assert_empty();
    }
}

#[tokio::test]
async fn more_than_was_announced_is_an_error_also_where_a_chunk_ends_with_the_announced_last_byte() {
    let server = Server::start();
    let bed = Bed::new().await;
    let page = Page::new(content(4000, 1)).announce(3000).chunked().etag(None);
    server.serve("/x.qcow2", page.pace(1000, Duration::from_millis(1)));
    let error = assert_code(bed.bring(&server.url("/x.qcow2")).await, ErrorCode::SourceFailed);
    assert!(error.to_string().contains("more of") && !error.retryable(), "{error:?}");
    bed.assert_empty();
}

#[tokio::test]
async fn a_source_that_changes_between_two_requests_is_found_out() {
    let server = Server::start();
    let (old, new) = (|| Page::new(content(300_000, 1)), || Page::new(content(300_000, 2)));
    for (name, page) in [
        // One look (HEAD), then the GET: another ETag, with and without If-Match.
        ("before", old().then(1, new())),
        ("before-silently", old().then(1, new().ignores_if_match())),
        // The look, the GET that is cut, then the rest.
        ("between", old().cut(&[100_000]).then(2, new())),
        ("between-silently", old().cut(&[100_000]).then(2, new().ignores_if_match())),
        ("size", old().etag(None).then(1, Page::new(content(1000, 1)).etag(None))),
    ] {
        let path = format!("/{name}.qcow2");
        let bed = Bed::new().await;
        server.serve(&path, page);
        let wanted = bed.promised(&server.url(&path), sha256(&content(300_000, 1)));
        let result = bring(&bed.images, &wanted, &Progress::default()).await;
        let error = assert_code(result, ErrorCode::SourceChanged);
        assert!(error.retryable(), "{name}");
        bed.assert_empty();
    }
}

#[tokio::test]
async fn answers_that_were_not_asked_for_are_refused() {
    let server = Server::start();
    let bed = Bed::new().await;
    let page = || Page::new(content(300_000, 1));
    for (name, page, expected) in [
        ("encoded", page().header("content-encoding", "gzip"), "content encoding"),
        ("other-range", page().cut(&[100_000]).then(2, page().wrong_range()), "another part"),
    ] {
        let path = format!("/{name}.qcow2");
        server.serve(&path, page);
        let wanted = bed.promised(&server.url(&path), sha256(b"y"));
        let result = bring(&bed.images, &wanted, &Progress::default()).await;
        let error = assert_code(result, ErrorCode::SourceFailed);
        assert!(error.to_string().contains(expected) && !error.retryable(), "{name}: {error:?}");
        bed.assert_empty();
    }
}

#[tokio::test]
async fn each_way_of_not_reaching_a_source_has_its_sentence() {
    let server = Server::start();
    let port = server.url("").rsplit(':').next().unwrap().to_owned();
    let bed = Bed::with(SourceSettings { retry_attempts: 1, ..quick() }, None).await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    // Accepts, and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    for (url, expected) in [
        ("http://no-such-host.invalid/x.qcow2".to_owned(), "the name no-such-host.invalid cannot be resolved"),
        (format!("http://127.0.0.1:{closed}/x.qcow2"), "refused the connection"),
        (format!("https://127.0.0.1:{port}/x.qcow2"), "no TLS connection"),
        (format!("http://{}/x.qcow2", silent.local_addr().unwrap()), "did not answer in time"),
    ] {
        let error = assert_code(bed.bring(&url).await, ErrorCode::SourceUnreachable);
        assert!(error.to_string().contains(expected), "{url}: {error:?}");
        assert!(error.retryable());
    }
}

#[tokio::test]
async fn redirects_are_followed_within_limits() {
    let (server, other) = (Server::start(), Server::start());
    let bytes = content(300_000, 1);
    let bed = Bed::new().await;
    other.serve("/target.qcow2", Page::new(bytes.clone()).cut(&[100_000]));
    server.serve("/x.qcow2", Page::new("").redirect(&other.url("/target.qcow2")));
    let entry = bed.bring_promised(&server.url("/x.qcow2"), sha256(&bytes)).await.unwrap();
    assert!(entry.name().starts_with("x-"));
    server.serve("/loop.qcow2", Page::new("").redirect("/loop.qcow2"));
    server.serve("/ftp.qcow2", Page::new("").redirect("ftp://127.0.0.1/x"));
    for (path, expected) in [("/loop.qcow2", "more than five"), ("/ftp.qcow2", "")] {
        let wanted = bed.promised(&server.url(path), sha256(b"y"));
        let result = bring(&bed.images, &wanted, &Progress::default()).await;
        let error = assert_code(result, ErrorCode::SourceFailed);
        assert!(error.chain().contains(expected) && !error.retryable(), "{error:?}");
    }
    assert!(server.count("HEAD", "/loop.qcow2") <= 6);
}
