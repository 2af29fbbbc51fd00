//! What is a hit, what is fetched again, what is kept, and whose files are touched.

use super::*;

#[tokio::test]
async fn the_second_request_hits_the_cache() {
    let (store, bytes) = (store(), content(300_000, 1));
    store.put("images", "debian.qcow2", &bytes).unwrap();
    store.put("images", "debian.qcow2.sha256", format!("{}  debian.qcow2\n", sha256(&bytes).hex()).as_bytes()).unwrap();
    let bed = Bed::on(&store).await;
    let first = bed.bring("s3://images/debian.qcow2").await.unwrap();
    let url = format!("{}/images/debian.qcow2", store.endpoint());
    let resolved = bed.resolve(&url).await.unwrap();
    assert_eq!(resolved.cached().unwrap().name(), first.name());
    let second = bed.bring(&url).await.unwrap();
    assert_eq!(std::fs::read(second.path()).unwrap(), bytes);
    assert_eq!(store.count("GET", "/images/debian.qcow2"), 1);
    let view = second.view();
    assert_eq!(view.name, format!("debian-{}.qcow2", &sha256(&bytes).hex()[..16]));
    assert_eq!((view.size_bytes, view.virtual_size_bytes), (300_000, Some(1 << 30)));
    assert_eq!((view.verified, view.pinned, view.in_use), (true, false, true));
    assert_eq!(view.source, "s3://images/debian.qcow2");
}

#[tokio::test]
async fn two_different_images_with_the_same_file_name_both_stay() {
    let server = Server::start();
    let bed = Bed::new().await;
    let mut names = Vec::new();
    for (path, seed) in [("/a/disk.qcow2", 1), ("/b/disk.qcow2", 2)] {
        server.serve(path, Page::new(content(1000, seed)));
        let entry = bed.bring(&server.url(path)).await.unwrap();
        assert_eq!(std::fs::read(entry.path()).unwrap(), content(1000, seed));
        names.push(entry.name().to_owned());
    }
    assert_ne!(names[0], names[1]);
    assert_eq!(bed.images.list().await.unwrap().len(), 2);
}

#[tokio::test]
async fn downloaded_bytes_are_hashed_against_the_published_checksum() {
    let server = Server::start();
    let (bytes, other) = (content(5000, 1), sha256(b"something else"));
    server.serve("/x.qcow2", Page::new(bytes.clone()));
    server.serve("/x.qcow2.sha256", Page::new(other.hex().to_owned()));
    let bed = Bed::new().await;
    let error = assert_code(bed.bring(&server.url("/x.qcow2")).await, ErrorCode::ChecksumMismatch);
    assert!(!error.retryable());
    let body = error.to_body();
    assert_eq!(body.details["expected"], other.to_string());
    assert_eq!(body.details["actual"], sha256(&bytes).to_string());
    assert!(body.message.contains(other.hex()) && body.message.contains(sha256(&bytes).hex()));
    assert_eq!(server.count("GET", "/x.qcow2"), 1, "a wrong digest is not tried again");
    bed.assert_empty();
}

#[tokio::test]
async fn a_wrong_checksum_in_the_request_leaves_nothing_behind() {
    let server = Server::start();
    let bytes = content(5000, 1);
    server.serve("/x.qcow2", Page::new(bytes.clone()));
    server.serve("/x.qcow2.sha256", Page::new(sha256(&bytes).hex().to_owned()));
    let bed = Bed::new().await;
    for wrong in [sha256(b"y"), sha512(b"y")] {
        assert_code(bed.bring_promised(&server.url("/x.qcow2"), wrong).await, ErrorCode::ChecksumMismatch);
        bed.assert_empty();
    }
    assert_eq!(server.count("GET", "/x.qcow2.sha256"), 0, "the request outranks the published checksum");
}

#[tokio::test]
async fn a_known_digest_is_a_hit_without_the_source() {
    let server = Server::start();
    let bytes = content(5000, 1);
    server.serve("/x.qcow2", Page::new(bytes.clone()));
    let url = server.url("/x.qcow2");
    let bed = Bed::new().await;
    bed.bring_promised(&url, sha512(&bytes)).await.unwrap();
    drop(server);
    for digest in [sha256(&bytes), sha512(&bytes)] {
        let resolved = bed.images.resolve(&bed.promised(&url, digest.clone()), &Progress::default()).await.unwrap();
        assert!(resolved.cached().is_some() && resolved.info.is_none());
        assert!(bed.bring_promised("https://elsewhere.invalid/x", digest).await.is_ok());
    }
}

#[tokio::test]
async fn without_the_source_the_error_names_the_cached_digest() {
    let server = Server::start();
    let bytes = content(5000, 1);
    server.serve("/x.qcow2", Page::new(bytes.clone()));
    let url = server.url("/x.qcow2");
    let bed = Bed::new().await;
    bed.bring(&url).await.unwrap();
    drop(server);
    let error = assert_code(bed.bring(&url).await, ErrorCode::SourceUnreachable);
    assert!(error.to_body().hint.unwrap().contains(&sha256(&bytes).to_string()));
    let error = assert_code(bed.bring_promised(&url, sha256(b"y")).await, ErrorCode::SourceUnreachable);
    assert!(!error.to_body().hint.unwrap_or_default().contains(sha256(&bytes).hex()));
}

#[tokio::test]
async fn a_changed_etag_is_fetched_again_and_the_old_image_kept() {
    let server = Server::start();
    let url = server.url("/x.qcow2");
    let bed = Bed::new().await;
    server.serve("/x.qcow2", Page::new(content(4000, 1)));
    let old = bed.bring(&url).await.unwrap();
    assert_eq!(bed.bring(&url).await.unwrap().name(), old.name());
    assert_eq!(server.count("GET", "/x.qcow2"), 1);
    server.serve("/x.qcow2", Page::new(content(4000, 2)));
    let new = bed.bring(&url).await.unwrap();
    assert_eq!(std::fs::read(new.path()).unwrap(), content(4000, 2));
    assert_eq!(std::fs::read(old.path()).unwrap(), content(4000, 1));
    // And back: the source says again what it said first, but its latest sighting decides nothing.
    server.serve("/x.qcow2", Page::new(content(4000, 1)));
    assert_eq!(bed.bring(&url).await.unwrap().name(), old.name());
}

#[tokio::test]
async fn a_changed_published_checksum_is_fetched_again() {
    let server = Server::start();
    let url = server.url("/x.qcow2");
    let bed = Bed::new().await;
    for seed in [1, 2] {
        // The server gives every content the same ETag.
        server.serve("/x.qcow2", Page::new(content(4000, seed)).etag(Some("\"same\"")));
        server.serve("/x.qcow2.sha256", Page::new(sha256(&content(4000, seed)).hex().to_owned()));
        let entry = bed.bring(&url).await.unwrap();
        assert_eq!(entry.digest(), sha256(&content(4000, seed)));
    }
}

#[tokio::test]
async fn without_an_etag_time_and_size_decide() {
    let server = Server::start();
    let url = server.url("/x.qcow2");
    let bed = Bed::new().await;
    let page = |seed| Page::new(content(4000, seed)).etag(None);
    let (monday, tuesday) = ("Mon, 16 Nov 2026 10:00:00 GMT", "Tue, 17 Nov 2026 10:00:00 GMT");
    server.serve("/x.qcow2", page(1).last_modified(monday));
    let first = bed.bring(&url).await.unwrap();
    assert_eq!(bed.bring(&url).await.unwrap().name(), first.name());
    assert_eq!(server.count("GET", "/x.qcow2"), 1);
    server.serve("/x.qcow2", page(2).last_modified(tuesday));
    assert_ne!(bed.bring(&url).await.unwrap().name(), first.name());
    // A source that says nothing of itself is never trusted to be unchanged.
    server.serve("/y.qcow2", page(3));
    for _ in 0..2 {
        bed.bring(&server.url("/y.qcow2")).await.unwrap();
    }
    assert_eq!(server.count("GET", "/y.qcow2"), 2);
}

#[tokio::test]
async fn the_same_bytes_from_another_place_become_one_image() {
    let server = Server::start();
    let bed = Bed::new().await;
    for path in ["/a.qcow2", "/b.qcow2"] {
        server.serve(path, Page::new(content(4000, 1)));
    }
    let first = bed.bring(&server.url("/a.qcow2")).await.unwrap();
    let second = bed.bring(&server.url("/b.qcow2")).await.unwrap();
    assert_eq!(first.name(), second.name());
    assert_eq!(second.view().source, server.url("/b.qcow2"));
    for path in ["/a.qcow2", "/b.qcow2"] {
        assert!(bed.resolve(&server.url(path)).await.unwrap().cached().is_some());
    }
    assert_eq!(bed.files().len(), 2);
}

/// A request may name a digest that is cached beside a place that has something else.
#[tokio::test]
async fn a_digest_in_a_request_makes_no_place_one_that_has_the_image() {
    let server = Server::start();
    let (bed, first) = (Bed::new().await, content(4000, 1));
    server.serve("/a.qcow2", Page::new(first.clone()));
    server.serve("/q.qcow2", Page::new(content(4000, 2)));
    let (a, q) = (server.url("/a.qcow2"), server.url("/q.qcow2"));
    bed.bring(&a).await.unwrap();
    let hit = bed.bring_promised(&q, sha256(&first)).await.unwrap();
    assert_eq!(hit.view().source, a, "nothing came from the other place");
    assert_eq!(std::fs::read(bed.bring(&q).await.unwrap().path()).unwrap(), content(4000, 2));
    server.serve("/q.qcow2", Page::new("").fail(9, 503));
    let error = assert_code(bed.bring(&q).await, ErrorCode::SourceFailed);
    assert_eq!(error.to_body().details["cached_digest"], sha256(&content(4000, 2)).to_string());
}

/// The place itself names the image: the last one that it had is known when it cannot be reached, but nothing that the place
/// says of itself is taken for the image when the checksum file is gone.
#[tokio::test]
async fn a_checksum_file_that_names_a_cached_image_says_nothing_of_the_place_without_it() {
    let server = Server::start();
    let (bed, first) = (Bed::new().await, content(4000, 1));
    server.serve("/a.qcow2", Page::new(first.clone()));
    bed.bring(&server.url("/a.qcow2")).await.unwrap();
    // The checksum came before its image.
    let q = server.url("/q.qcow2");
    server.serve("/q.qcow2", Page::new(content(4000, 2)));
    server.serve("/q.qcow2.sha256", Page::new(sha256(&first).hex().to_owned()));
    assert_eq!(bed.bring(&q).await.unwrap().view().source, q);
    server.serve("/q.qcow2.sha256", Page::new("").fail(4, 503).then(4, Page::new("").fail(9, 404)));
    let error = assert_code(bed.bring(&q).await, ErrorCode::SourceFailed);
    assert_eq!(error.to_body().details["cached_digest"], sha256(&first).to_string());
    assert_eq!(std::fs::read(bed.bring(&q).await.unwrap().path()).unwrap(), content(4000, 2));
}

#[tokio::test]
async fn a_digest_learnt_from_a_second_download_is_remembered() {
    let server = Server::start();
    let (bed, bytes) = (Bed::new().await, content(4000, 1));
    server.serve("/a.qcow2", Page::new(bytes.clone()));
    bed.bring(&server.url("/a.qcow2")).await.unwrap();
    for _ in 0..2 {
        bed.bring_promised(&server.url("/a.qcow2"), sha512(&bytes)).await.unwrap();
    }
    assert_eq!(server.count("GET", "/a.qcow2"), 2);
    assert!(bed.images.list().await.unwrap()[0].verified);
}

#[tokio::test]
async fn two_downloads_of_the_same_bytes_at_once_become_one_image() {
    let server = Server::start();
    let bed = Bed::new().await;
    for path in ["/a.qcow2", "/b.qcow2"] {
        server.serve(path, Page::new(content(4000, 1)));
    }
    let first = bed.download(&server.url("/a.qcow2")).await.unwrap();
    let second = bed.download(&server.url("/b.qcow2")).await.unwrap();
    assert_eq!(first.publish(Some(1)).await.unwrap().name(), second.publish(Some(1)).await.unwrap().name());
    assert_eq!(bed.files().len(), 2);
}

#[tokio::test]
async fn files_of_others_are_never_touched() {
    let server = Server::start();
    let bytes = content(4000, 1);
    server.serve("/disk.qcow2", Page::new(bytes.clone()));
    let bed = Bed::new().await;
    let hex = sha256(&bytes).hex().to_owned();
    let short = bed.root.path().join(format!("disk-{}.qcow2", &hex[..16]));
    let full = bed.root.path().join(format!("disk-{hex}.qcow2"));
    std::fs::write(bed.root.path().join("windows.qcow2"), "theirs").unwrap();
    std::fs::write(&short, "theirs").unwrap();
    let entry = bed.bring(&server.url("/disk.qcow2")).await.unwrap();
    assert_eq!(entry.path(), full);
    drop(entry);
    bed.images.delete(&hex[..12]).await.unwrap();
    std::fs::write(&full, "theirs too").unwrap();
    assert_code(bed.bring(&server.url("/disk.qcow2")).await, ErrorCode::FileInTheWay);
    let bed = bed.restart().await;
    assert_eq!(std::fs::read(&short).unwrap(), b"theirs");
    assert_eq!(std::fs::read(&full).unwrap(), b"theirs too");
    assert_eq!(bed.files().len(), 3, "{:?}", bed.files());
    assert!(bed.images.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_restart_rebuilds_the_index_from_the_directory() {
    let server = Server::start();
    let bed = Bed::new().await;
    let mut entries = Vec::new();
    for (path, seed) in [("/kept.qcow2", 1), ("/removed.qcow2", 2), ("/changed.qcow2", 3)] {
        server.serve(path, Page::new(content(4000, seed)));
        entries.push(bed.bring(&server.url(path)).await.unwrap());
    }
    let before = bed.images.pin(entries[0].name(), true).await.unwrap();
    std::fs::remove_file(entries[1].path()).unwrap();
    std::fs::write(entries[2].path(), "changed by someone else").unwrap();
    let changed = entries[2].path().to_owned();
    std::fs::write(bed.root.path().join(".lvp/url-1.partial"), "half").unwrap();
    std::fs::write(bed.root.path().join(".lvp/old.corrupt"), "bad").unwrap();
    drop(entries);
    let bed = bed.restart().await;
    let list = bed.images.list().await.unwrap();
    assert_eq!(list.len(), 1, "{list:?}");
    assert_eq!(list[0], lvp_api::Image { in_use: false, ..before });
    assert!(bed.resolve(&server.url("/kept.qcow2")).await.unwrap().cached().is_some());
    assert_eq!(std::fs::read(changed).unwrap(), b"changed by someone else");
    let private: Vec<_> = bed.files().into_iter().filter(|name| name.starts_with(".lvp/")).collect();
    assert_eq!(private.len(), 1, "{private:?}");
}

#[tokio::test]
async fn a_sidecar_of_another_version_is_left_alone() {
    let server = Server::start();
    server.serve("/x.qcow2", Page::new(content(4000, 1)));
    let bed = Bed::new().await;
    let name = bed.bring(&server.url("/x.qcow2")).await.unwrap().name().to_owned();
    let sidecar = bed.root.path().join(format!(".lvp/{name}.json"));
    let newer = std::fs::read_to_string(&sidecar).unwrap().replace("\"version\": 1", "\"version\": 2");
    std::fs::write(&sidecar, newer).unwrap();
    let bed = bed.restart().await;
    assert!(bed.images.list().await.unwrap().is_empty());
    assert_eq!(bed.files().len(), 2);
}

#[tokio::test]
async fn an_image_that_someone_removed_is_fetched_again() {
    let server = Server::start();
    server.serve("/x.qcow2", Page::new(content(4000, 1)));
    let bed = Bed::new().await;
    let entry = bed.bring(&server.url("/x.qcow2")).await.unwrap();
    std::fs::remove_file(entry.path()).unwrap();
    drop(entry);
    let again = bed.bring(&server.url("/x.qcow2")).await.unwrap();
    assert_eq!(std::fs::read(again.path()).unwrap(), content(4000, 1));
}

#[tokio::test]
async fn a_dropped_download_leaves_nothing() {
    let server = Server::start();
    server.serve("/x.qcow2", Page::new(content(4000, 1)));
    let bed = Bed::new().await;
    let new = bed.download(&server.url("/x.qcow2")).await.unwrap();
    assert_eq!(std::fs::read(new.path()).unwrap(), content(4000, 1));
    assert_eq!((new.size, &new.digests.sha256), (4000, &sha256(&content(4000, 1))));
    assert!(bed.images.list().await.unwrap().is_empty(), "nothing is published before it is read");
    drop(new);
    bed.assert_empty();
    assert_eq!(bed.usage().reserved_bytes, 0);
}

#[tokio::test]
async fn a_corrupt_image_is_found_and_taken_out_of_use() {
    let server = Server::start();
    server.serve("/x.qcow2", Page::new(content(4000, 1)));
    let bed = Bed::new().await;
    let entry = bed.bring(&server.url("/x.qcow2")).await.unwrap();
    let progress = Progress::default();
    assert!(bed.images.verify(&entry, &progress).await.unwrap().intact);
    assert_eq!(progress.snapshot().bytes_processed, 4000);
    let mut bytes = content(4000, 1);
    bytes[2000] ^= 1;
    std::fs::write(entry.path(), &bytes).unwrap();
    let verification = bed.images.verify(&entry, &progress).await.unwrap();
    assert_eq!((verification.intact, verification.actual), (false, sha256(&bytes)));
    bed.images.quarantine(&entry).await.unwrap();
    bed.images.quarantine(&entry).await.unwrap();
    assert!(bed.images.list().await.unwrap().is_empty());
    let again = bed.bring(&server.url("/x.qcow2")).await.unwrap();
    assert_eq!(std::fs::read(again.path()).unwrap(), content(4000, 1));
}

#[tokio::test]
async fn images_are_found_pinned_and_deleted() {
    let server = Server::start();
    server.serve("/x.qcow2", Page::new(content(4000, 1)));
    let bed = Bed::new().await;
    let entry = bed.bring(&server.url("/x.qcow2")).await.unwrap();
    let (name, digest) = (entry.name().to_owned(), entry.digest());
    for text in [name.as_str(), digest.hex(), &digest.to_string(), &digest.hex()[..12]] {
        assert_eq!(bed.images.find(text).await.unwrap().name(), name);
    }
    for text in ["", "x.qcow2", &digest.hex()[..11], "000000000000", "sha256:", "../x"] {
        assert_code(bed.images.find(text).await, ErrorCode::ImageNotFound);
        assert_code(bed.images.delete(text).await, ErrorCode::ImageNotFound);
    }
    assert!(assert_code(bed.images.delete(&name).await, ErrorCode::ImageInUse).retryable());
    drop(entry);
    assert!(bed.images.pin(&name, true).await.unwrap().pinned);
    assert_code(bed.images.delete(&name).await, ErrorCode::ImagePinned);
    assert!(!bed.images.pin(&name, false).await.unwrap().pinned);
    assert!(!bed.images.show(&name).await.unwrap().in_use);
    bed.images.delete(&name).await.unwrap();
    bed.assert_empty();
}

#[tokio::test]
async fn the_cache_says_whether_it_can_be_used() {
    let bed = Bed::new().await;
    let check = bed.images.check().await;
    assert_eq!((check.name.as_str(), check.status), ("cache", lvp_api::HealthStatus::Healthy), "{check:?}");
    std::fs::remove_dir_all(bed.root.path()).unwrap();
    assert_eq!(bed.images.check().await.status, lvp_api::HealthStatus::Unhealthy);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_ask_at_once_are_told_that_the_cache_can_be_used() {
    let bed = Bed::new().await;
    let index = bed.images.shared.index.clone();
    let start = std::sync::Arc::new(std::sync::Barrier::new(16));
    let askers: Vec<_> = (0..16)
        .map(|_| {
            let (index, start) = (index.clone(), start.clone());
            std::thread::spawn(move || {
                start.wait();
                (0..200).for_each(|_| index.directory().probe().unwrap());
            })
        })
        .collect();
    askers.into_iter().for_each(|asker| asker.join().unwrap());
    bed.assert_empty();
}
