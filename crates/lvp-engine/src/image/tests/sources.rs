//! Where images come from: S3 with and without keys, plain HTTP, files; what is published beside them; ranges.

use std::{fs::OpenOptions, os::unix::fs::FileExt, sync::Arc, time::SystemTime};

use jiff::Timestamp;
use tokio::sync::oneshot;

use super::*;
use crate::{
    image::{Along, sign, source::Sources},
    limit::{Limits, RateLimit},
    watermark::Watermark,
};

#[tokio::test]
async fn an_object_is_read_with_real_signatures() {
    let store = store();
    let bed = Bed::on(&store).await;
    for key in ["debian.qcow2", "a b/ü+%25?&=#~.qcow2", "deep/er/x.qcow2"] {
        let bytes = content(70_000, key.len() as u64);
        store.put("images", key, &bytes).unwrap();
        let url = format!("s3://images/{}", crate::image::escape::percent_encode(key, true));
        let entry = bed.bring(&url).await.unwrap_or_else(|error| panic!("{key}: {error:?}"));
        assert_eq!(std::fs::read(entry.path()).unwrap(), bytes);
        assert_eq!(entry.view().source, url);
    }
}

#[tokio::test]
async fn wrong_and_missing_keys_are_named() {
    let store = store();
    store.put("private", "x.qcow2", b"x").unwrap();
    store.put("public", "x.qcow2", b"x").unwrap();
    store.make_public("public");
    let with = |access_key: &str, secret_key: &str| SourceSettings {
        credentials: Some(Credentials { access_key: Secret::new(access_key), secret_key: Secret::new(secret_key) }),
        ..signed(&store.endpoint())
    };
    let unsigned = SourceSettings { credentials: None, ..signed(&store.endpoint()) };
    for (settings, hint) in [
        (with(ACCESS_KEY, "wrong"), "MINIO_SECRET_KEY"),
        (with("unknown", SECRET_KEY), "MINIO_ACCESS_KEY"),
        (unsigned.clone(), "are not set"),
    ] {
        let bed = Bed::with(settings, None).await;
        let wanted = bed.promised("s3://private/x.qcow2", sha256(b"x"));
        let result = bring(&bed.images, &wanted, &Progress::default()).await;
        let error = assert_code(result, ErrorCode::SourceDenied);
        assert!(!error.retryable());
        let shown = error.to_body().hint.unwrap();
        assert!(shown.contains(hint), "{hint}: {shown} ({error:?})");
    }
    let bed = Bed::with(unsigned, None).await;
    assert_eq!(bed.bring("s3://public/x.qcow2").await.unwrap().size(), 1);
}

#[tokio::test]
async fn what_is_not_there_is_said_to_be_not_there() {
    let store = store();
    store.put("images", "x.qcow2", b"x").unwrap();
    let bed = Bed::on(&store).await;
    for url in ["s3://images/y.qcow2", "s3://nowhere/x.qcow2", "/no/such/file.qcow2"] {
        let error = assert_code(bed.bring(url).await, ErrorCode::SourceNotFound);
        assert!(error.to_string().contains(url), "{error:?}");
    }
    assert_eq!(store.count("GET", "/images/y.qcow2"), 0);
}

#[tokio::test]
async fn a_presigned_url_is_read_although_it_signs_get_only() {
    let store = store();
    let bytes = content(50_000, 1);
    store.put("images", "x.qcow2", &bytes).unwrap();
    let settings = signed(&store.endpoint());
    let object = sign::object_url(settings.endpoint.as_ref().unwrap(), "images", "x.qcow2");
    let presign = |seconds: i64| {
        let now = Timestamp::now() - jiff::SignedDuration::from_secs(seconds);
        sign::presign("GET", &object, "us-east-1", settings.credentials.as_ref().unwrap(), now)
    };
    // No endpoint, no keys: as on any other host.
    let bed = Bed::new().await;
    let entry = bed.bring(presign(0).as_str()).await.unwrap();
    assert_eq!(std::fs::read(entry.path()).unwrap(), bytes);
    assert!(bed.resolve(presign(5).as_str()).await.unwrap().cached().is_some(), "another signature, the same object");
    assert!(!store.requests().iter().any(|(_, path)| path.ends_with(".sha256")));
    let error = assert_code(bed.bring(presign(4000).as_str()).await, ErrorCode::SourceDenied);
    assert!(error.to_body().hint.unwrap().contains("expired"));
}

#[tokio::test]
async fn a_private_authority_is_trusted_when_its_file_is_named() {
    let server = Server::start_tls();
    let bytes = content(50_000, 1);
    server.serve("/images/x.qcow2", Page::new(bytes.clone()));
    let bed = Bed::with(signed(&server.url("")), None).await;
    let error = assert_code(bed.bring("s3://images/x.qcow2").await, ErrorCode::SourceUnreachable);
    assert!(error.chain().contains("certificate") && error.to_string().contains("no TLS connection"), "{error:?}");
    assert!(error.to_body().hint.unwrap().contains("LVP_CA_CERT_FILE"));
    let directory = tempfile::tempdir().unwrap();
    let ca_file = directory.path().join("ca.pem");
    std::fs::write(&ca_file, server.authority().unwrap()).unwrap();
    let settings = SourceSettings { ca_file: Some(ca_file), ..signed(&server.url("")) };
    let bed = Bed::with(settings, None).await;
    assert_eq!(bed.bring("s3://images/x.qcow2").await.unwrap().digest(), sha256(&bytes));
}

#[tokio::test]
async fn a_redirect_from_https_to_http_is_not_followed() {
    let (secure, plain) = (Server::start_tls(), Server::start());
    plain.serve("/x.qcow2", Page::new(content(4000, 1)));
    secure.serve("/x.qcow2", Page::new("").redirect(&plain.url("/x.qcow2")));
    let directory = tempfile::tempdir().unwrap();
    let ca_file = directory.path().join("ca.pem");
    std::fs::write(&ca_file, secure.authority().unwrap()).unwrap();
    let bed = Bed::with(SourceSettings { ca_file: Some(ca_file), ..quick() }, None).await;
    let wanted = bed.promised(&secure.url("/x.qcow2"), sha256(b"y"));
    let error = assert_code(bring(&bed.images, &wanted, &Progress::default()).await, ErrorCode::SourceFailed);
    assert!(error.chain().contains("from https to http"), "{error:?}");
    assert!(plain.received().is_empty());
}

#[tokio::test]
async fn a_file_of_this_machine_is_a_source_too() {
    let bed = Bed::new().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("local.qcow2");
    let url = path.to_str().unwrap();
    std::fs::write(&path, content(600_000, 1)).unwrap();
    let first = bed.bring(url).await.unwrap();
    assert_eq!(std::fs::read(first.path()).unwrap(), content(600_000, 1));
    assert!(bed.resolve(&format!("file://{url}")).await.unwrap().cached().is_some());
    std::fs::write(&path, content(600_000, 2)).unwrap();
    assert_ne!(bed.bring(url).await.unwrap().name(), first.name());
    std::fs::write(directory.path().join("local.qcow2.sha256"), sha256(b"y").hex()).unwrap();
    assert_code(bed.bring(url).await, ErrorCode::ChecksumMismatch);
    assert_code(bed.bring(directory.path().to_str().unwrap()).await, ErrorCode::SourceFailed);
    assert_code(bed.bring("/dev/null").await, ErrorCode::SourceFailed);
}

/// A file of 600,000 bytes that was written a while ago, so that whatever is done to it gives it another time.
fn old_file(path: &Path) {
    std::fs::write(path, content(600_000, 1)).unwrap();
    let before = SystemTime::now() - Duration::from_secs(1000);
    OpenOptions::new().write(true).open(path).unwrap().set_modified(before).unwrap();
}

/// Changes a file behind what is read of it at once; or its length.
fn change(path: &Path, how: usize) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    match how {
        0 => file.write_all_at(b"another", 590_000).unwrap(),
        1 => file.write_all_at(b"more", 600_000).unwrap(),
        _ => file.set_len(300_000).unwrap(),
    }
}

#[tokio::test]
async fn a_file_that_changes_while_it_is_read_is_a_changed_source() {
    let (settings, progress, directory) = (quick(), Progress::default(), tempfile::tempdir().unwrap());
    let path = directory.path().join("local.qcow2");
    let url = ImageUrl::parse(path.to_str().unwrap(), &settings, true).unwrap();
    let source = Sources::new(settings).unwrap().source(&url);
    for how in 0..3 {
        old_file(&path);
        let info = source.look(&progress).await.unwrap();
        let mut transfer = source.open(&info, 0, None).await.unwrap();
        transfer.next(&progress).await.unwrap().unwrap();
        change(&path, how);
        let failure = loop {
            match transfer.next(&progress).await {
                Ok(chunk) => assert!(chunk.is_some(), "{how}: it was read to its end"),
                Err(failure) => break failure,
            }
        };
        assert_eq!(failure.error.code(), ErrorCode::SourceChanged, "{how}: {failure:?}");
        assert!(failure.error.retryable());
    }
    // Another file in its place does not make what was read wrong.
    old_file(&path);
    let info = source.look(&progress).await.unwrap();
    let mut transfer = source.open(&info, 0, None).await.unwrap();
    let other = directory.path().join("other");
    std::fs::write(&other, "another").unwrap();
    std::fs::rename(other, &path).unwrap();
    let mut read = Vec::new();
    while let Some(chunk) = transfer.next(&progress).await.unwrap() {
        read.extend_from_slice(&chunk);
    }
    assert_eq!(read, content(600_000, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_changes_while_it_is_read_does_not_become_an_image() {
    for how in 0..3 {
        let (bed, directory) = (Bed::new().await, tempfile::tempdir().unwrap());
        let path = directory.path().join("local.qcow2");
        old_file(&path);
        let (slow, fast) = (Arc::new(RateLimit::new(300_000)), Arc::new(RateLimit::unlimited()));
        let progress = Progress::default().limited(Limits::of(slow, fast));
        let resolved = bed.images.resolve(&bed.wanted(path.to_str().unwrap()), &progress).await.unwrap();
        let (mark, (begun, _begins)) = (Arc::<Watermark>::default(), oneshot::channel());
        let along = Along { mark: mark.clone(), begun };
        let change = {
            let (progress, path) = (progress.clone(), path.clone());
            tokio::task::spawn_blocking(move || {
                mark.wait(1, &progress).unwrap();
                change(&path, how);
            })
        };
        let fetched = bed.images.fetch(&resolved, Some(along), &progress).await;
        change.await.unwrap();
        assert_code(fetched, ErrorCode::SourceChanged);
        bed.assert_empty();
    }
}

#[tokio::test]
async fn only_a_definite_absence_means_that_no_checksum_is_published() {
    let server = Server::start();
    let url = server.url("/x.qcow2");
    server.serve("/x.qcow2", Page::new(content(4000, 1)));
    let bed = Bed::new().await;
    let html = "<!DOCTYPE html><html><body>404</body></html>";
    for (page, code, hint) in [
        (Page::new(html), ErrorCode::ChecksumUnreadable, "sha256sum"),
        (Page::new(vec![b'a'; 70_000]), ErrorCode::ChecksumUnreadable, "sha256sum"),
        (Page::new("").fail(9, 403), ErrorCode::SourceDenied, "publish the checksum"),
        (Page::new("").fail(9, 500), ErrorCode::SourceFailed, ""),
        (Page::new("").fail(9, 400), ErrorCode::SourceFailed, ""),
    ] {
        server.serve("/x.qcow2.sha256", page);
        let error = assert_code(bed.bring(&url).await, code);
        assert!(error.chain().contains("/x.qcow2.sha256"), "{error:?}");
        assert!(error.to_body().hint.unwrap_or_default().contains(hint), "{error:?}");
        bed.assert_empty();
    }
    for status in [404, 410] {
        server.serve("/x.qcow2.sha256", Page::new("").fail(9, status));
        let resolved = bed.resolve(&url).await.unwrap();
        assert!(resolved.expected().is_none());
    }
    assert!(!bed.bring(&url).await.unwrap().view().verified);
}

#[tokio::test]
async fn servers_are_looked_at_in_the_way_that_they_allow() {
    let server = Server::start();
    let bed = Bed::new().await;
    let page = || Page::new(content(4000, 1));
    for (name, page, size, ranges) in [
        ("plain", page(), Some(4000), true),
        ("no-head", page().head_status(403), Some(4000), true),
        ("no-head-method", page().head_status(405), Some(4000), true),
        ("head-not-implemented", page().head_status(501), Some(4000), true),
        ("no-ranges", page().no_ranges(), Some(4000), false),
        ("no-head-no-ranges", page().no_ranges().head_status(403), Some(4000), false),
        ("head-without-length", page().announce(0), Some(4000), true),
        ("chunked", page().chunked().no_ranges(), None, false),
    ] {
        let path = format!("/{name}.qcow2");
        server.serve(&path, page);
        let resolved = bed.resolve(&server.url(&path)).await.unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let info = resolved.info.as_ref().unwrap();
        assert_eq!((info.size, info.accepts_ranges), (size, ranges), "{name}");
        assert!(server.received().iter().all(|request| request.header("accept-encoding") == Some("identity")));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_can_be_read_anywhere_before_it_is_fetched() {
    let server = Server::start();
    let bytes = content(1_000_000, 1);
    server.serve("/x.qcow2", Page::new(bytes.clone()));
    let bed = Bed::new().await;
    let url = server.url("/x.qcow2");
    let check = |reader: crate::image::Reader, bytes: Vec<u8>| {
        tokio::task::spawn_blocking(move || {
            assert_eq!(reader.len(), 1_000_000);
            for (offset, length) in [(0, 104), (262_000, 1000), (999_999, 1), (0, 8), (500_000, 300_000), (5, 0)] {
                let mut buffer = vec![0; length];
                reader.read_exact_at(offset as u64, &mut buffer).unwrap();
                assert_eq!(buffer, bytes[offset..offset + length]);
            }
            let past = reader.read_exact_at(999_999, &mut [0; 2]).unwrap_err();
            assert_eq!(past.kind(), std::io::ErrorKind::UnexpectedEof);
            assert!(reader.read_exact_at(u64::MAX, &mut [0; 2]).is_err());
        })
    };
    let resolved = bed.resolve(&url).await.unwrap();
    let before = server.count("GET", "/x.qcow2");
    check(resolved.reader(&Progress::default()).unwrap().unwrap(), bytes.clone()).await.unwrap();
    assert_eq!(server.count("GET", "/x.qcow2") - before, 5, "each block is asked for once");
    bed.bring(&url).await.unwrap();
    let resolved = bed.resolve(&url).await.unwrap();
    let before = server.received().len();
    check(resolved.reader(&Progress::default()).unwrap().unwrap(), bytes).await.unwrap();
    assert_eq!(server.received().len(), before, "a cached image is read from its file");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_source_that_changes_under_a_reader_is_found_out() {
    let server = Server::start();
    let bed = Bed::new().await;
    for later in [Page::new(content(4000, 2)), Page::new(content(4000, 2)).ignores_if_match()] {
        server.serve("/x.qcow2", Page::new(content(4000, 1)));
        let resolved = bed.resolve(&server.url("/x.qcow2")).await.unwrap();
        let reader = resolved.reader(&Progress::default()).unwrap().unwrap();
        server.serve("/x.qcow2", later);
        let error =
            tokio::task::spawn_blocking(move || reader.read_exact_at(0, &mut [0; 8])).await.unwrap().unwrap_err();
        let error = error.into_inner().unwrap().downcast::<Error>().unwrap();
        assert_eq!(error.code(), ErrorCode::SourceChanged);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_whole_answer_to_a_range_is_read_no_further_than_needed() {
    let server = Server::start();
    let bed = Bed::new().await;
    server.serve("/x.qcow2", Page::new(content(20 << 20, 1)));
    let resolved = bed.resolve(&server.url("/x.qcow2")).await.unwrap();
    let reader = resolved.reader(&Progress::default()).unwrap().unwrap();
    server.serve("/x.qcow2", Page::new(content(20 << 20, 1)).no_ranges());
    let outcome = tokio::task::spawn_blocking(move || {
        let mut buffer = [0; 100];
        reader.read_exact_at(300_000, &mut buffer).unwrap();
        assert_eq!(buffer, content(20 << 20, 1)[300_000..300_100]);
        reader.read_exact_at(19 << 20, &mut buffer).map_err(|error| error.to_string())
    });
    assert!(outcome.await.unwrap().unwrap_err().contains("does not serve parts"));
}
