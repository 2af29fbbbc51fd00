//! Files of the cache that others use or write to: they stay, byte for byte.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use e2e::holder::Holder;

use super::*;

const KIB: usize = 1024;

/// A program that has the file at this path open.
fn held_open(path: &Path) -> Holder {
    Holder::of(File::open(path).unwrap())
}

/// Brings images of 100 KiB, one per seed, oldest use first.
async fn fill(bed: &Bed, server: &Server, seeds: impl IntoIterator<Item = u64>) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for seed in seeds {
        let path = format!("/{seed}.qcow2");
        server.serve(&path, Page::new(content(100 * KIB, seed)));
        paths.push(bed.bring(&server.url(&path)).await.unwrap().path().to_owned());
    }
    paths
}

/// Changes a byte.
fn flip(path: &Path) -> Vec<u8> {
    let mut bytes = fs::read(path).unwrap();
    bytes[2000] ^= 1;
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(&bytes[2000..2001], 2000).unwrap();
    bytes
}

/// The same as a disk does it that loses what is on it: nobody wrote.
fn rot(path: &Path) -> Vec<u8> {
    let modified = path.metadata().unwrap().modified().unwrap();
    let bytes = flip(path);
    OpenOptions::new().write(true).open(path).unwrap().set_modified(modified).unwrap();
    bytes
}

async fn with_users(users: Users, max_bytes: u64) -> Bed {
    let (root, settings) = (tempfile::tempdir().unwrap(), quick());
    let images = open_asking(root.path(), &settings, Some(max_bytes), (Ledger::default(), users)).await.unwrap();
    Bed { root, settings, images }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_a_program_has_open_is_neither_evicted_nor_deleted() {
    let server = Server::start();
    let bed = Bed::limited(350 * KIB as u64).await;
    let paths = fill(&bed, &server, 1..=3).await;
    let holder = held_open(&paths[0]);
    let user = format!("process {} (sleep) has it open", holder.id());
    // The oldest stays, the next one goes.
    fill(&bed, &server, [4]).await;
    assert_eq!(fs::read(&paths[0]).unwrap(), content(100 * KIB, 1));
    assert!(!paths[1].exists());
    let name = paths[0].file_name().unwrap().to_str().unwrap();
    let error = assert_code(bed.images.delete(name).await, ErrorCode::ImageInUse);
    assert_eq!(error.to_string(), format!("the cached image {name} is in use: {user}"));
    // Where nothing else can go, it is said who keeps what.
    server.serve("/big.qcow2", Page::new(content(300 * KIB, 9)));
    let error = assert_code(bed.bring(&server.url("/big.qcow2")).await, ErrorCode::CacheFull);
    assert!(error.to_string().contains(&format!("{name} stays: {user}")), "{error:?}");
    assert_eq!(bed.images.list().await.unwrap().len(), 3, "what would not help is not evicted");
    drop(holder);
    bed.images.delete(name).await.unwrap();
    assert!(!paths[0].exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_nobody_knows_who_uses_an_image_none_is_evicted_or_deleted() {
    let unknown = || Err(Error::new(ErrorCode::LibvirtUnavailable, "libvirt is away"));
    let (server, bed) = (Server::start(), with_users(Users::new(unknown), 250 * KIB as u64).await);
    let paths = fill(&bed, &server, 1..=2).await;
    server.serve("/3.qcow2", Page::new(content(100 * KIB, 3)));
    let error = assert_code(bed.bring(&server.url("/3.qcow2")).await, ErrorCode::LibvirtUnavailable);
    assert!(error.retryable() && error.chain().contains("libvirt is away"), "{error:?}");
    let name = paths[0].file_name().unwrap().to_str().unwrap();
    assert_code(bed.images.delete(name).await, ErrorCode::LibvirtUnavailable);
    assert!(paths.iter().all(|path| path.exists()));
    assert_eq!(bed.usage().reserved_bytes, 0);
}

/// libvirt takes up to half a minute to answer; jobs that have their image go on meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn domains_are_listed_once_for_a_download_and_without_the_lock_of_the_cache() {
    let (asked, other) = (Arc::<AtomicUsize>::default(), Arc::<std::sync::OnceLock<Images>>::default());
    let (counted, cache) = (asked.clone(), other.clone());
    let users = Users::new(move || {
        counted.fetch_add(1, Ordering::SeqCst);
        // Takes the lock, so that it would hang here.
        assert_eq!(cache.get().unwrap().shared.index.list().len(), 3);
        Ok(Box::new(|_: &Path| Ok(Vec::new())))
    });
    let (server, bed) = (Server::start(), with_users(users, 350 * KIB as u64).await);
    let _ = other.set(bed.images.clone());
    fill(&bed, &server, 1..=3).await;
    server.serve("/big.qcow2", Page::new(content(300 * KIB, 9)));
    bed.bring(&server.url("/big.qcow2")).await.unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    assert_eq!(bed.images.list().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_image_that_others_use_stays_until_they_do_not_and_one_that_they_wrote_to_for_ever() {
    let server = Server::start();
    let image = content(100 * KIB, 1);
    server.serve("/x.qcow2", Page::new(image.clone()));
    for written in [true, false] {
        let bed = Bed::new().await;
        let entry = bed.bring(&server.url("/x.qcow2")).await.unwrap();
        let path = entry.path().to_owned();
        // A guest writes to it and is shut off; or its disk rots while a guest runs.
        let (bytes, holder) = if written { (flip(&path), None) } else { (rot(&path), Some(held_open(&path))) };
        bed.images.quarantine(&entry).await.unwrap();
        drop(entry);
        assert!(bed.images.list().await.unwrap().is_empty());
        let again = bed.bring(&server.url("/x.qcow2")).await.unwrap();
        assert_ne!(again.path(), path);
        assert_eq!(fs::read(again.path()).unwrap(), image);
        drop(again);
        let bed = bed.restart().await;
        assert_eq!(fs::read(&path).unwrap(), bytes, "{written}");
        assert_eq!(bed.images.list().await.unwrap().len(), 1);
        drop(holder);
        bed.images.sweep().await.unwrap();
        assert_eq!(path.exists(), written);
        let left = fs::read_dir(bed.root.path().join(".lvp")).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(left.into_iter().all(|name| !name.to_str().unwrap().ends_with(".damaged")), "{written}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_put_in_the_place_of_an_image_is_not_set_aside() {
    let server = Server::start();
    let bed = Bed::new().await;
    // It is older than the image.
    let other = bed.root.path().join("other");
    fs::write(&other, content(4000, 2)).unwrap();
    server.serve("/x.qcow2", Page::new(content(4000, 1)));
    let entry = bed.bring(&server.url("/x.qcow2")).await.unwrap();
    fs::rename(&other, entry.path()).unwrap();
    bed.images.quarantine(&entry).await.unwrap();
    assert_eq!(fs::read(entry.path()).unwrap(), content(4000, 2));
    assert!(bed.images.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_was_set_aside_is_removed_at_a_start_when_nobody_uses_it() {
    let server = Server::start();
    let bed = Bed::new().await;
    server.serve("/x.qcow2", Page::new(content(4000, 1)));
    let entry = bed.bring(&server.url("/x.qcow2")).await.unwrap();
    let bytes = rot(entry.path());
    bed.images.quarantine(&entry).await.unwrap();
    let aside = bed.root.path().join(format!(".lvp/{}.corrupt", entry.name()));
    drop(entry);
    // Somebody looks at it, or an earlier version took it from under its guest.
    let holder = held_open(&aside);
    let bed = bed.restart().await;
    assert_eq!(fs::read(&aside).unwrap(), bytes);
    // The next one of the same name does not take its place, and goes the same way.
    let entry = bed.bring(&server.url("/x.qcow2")).await.unwrap();
    rot(entry.path());
    bed.images.quarantine(&entry).await.unwrap();
    assert_eq!(fs::read(&aside).unwrap(), bytes);
    assert!(!entry.path().exists());
    drop((entry, holder));
    // Who uses the good one that has the name now does not keep the bad ones.
    let entry = bed.bring(&server.url("/x.qcow2")).await.unwrap();
    let _holder = held_open(entry.path());
    drop(entry);
    let bed = bed.restart().await;
    let left = fs::read_dir(bed.root.path().join(".lvp")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_str().unwrap().contains("corrupt")));
    assert_eq!(bed.images.list().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_image_of_which_nobody_knows_who_uses_it_stays_until_somebody_does() {
    let away = Arc::new(AtomicBool::new(true));
    let asked = away.clone();
    let users = Users::new(move || {
        if asked.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorCode::LibvirtUnavailable, "libvirt is away"));
        }
        Ok(Box::new(|_: &Path| Ok(Vec::new())))
    });
    let (server, bed) = (Server::start(), with_users(users, 350 * KIB as u64).await);
    let path = fill(&bed, &server, [1]).await.remove(0);
    let entry = bed.images.find(path.file_name().unwrap().to_str().unwrap()).await.unwrap();
    let bytes = rot(&path);
    bed.images.quarantine(&entry).await.unwrap();
    assert_code(bed.images.sweep().await, ErrorCode::LibvirtUnavailable);
    assert_eq!(fs::read(&path).unwrap(), bytes);
    away.store(false, Ordering::SeqCst);
    bed.images.sweep().await.unwrap();
    assert!(!path.exists() && bed.images.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_does_not_count_on_the_space_of_images_that_others_use() {
    let server = Server::start();
    let bed = Bed::limited(350 * KIB as u64).await;
    let paths = fill(&bed, &server, 1..=3).await;
    let holders: Vec<_> = paths.iter().map(|path| held_open(path)).collect();
    let error = assert_code(bed.images.refuse_full(100 * KIB as u64).await, ErrorCode::CacheFull);
    assert!(error.to_string().contains(" stays: process "), "{error:?}");
    drop(holders);
    bed.images.refuse_full(100 * KIB as u64).await.unwrap();
    assert!(paths.iter().all(|path| path.exists()), "nothing goes for a question");
}

/// The file is made longer, written to, or replaced by one that is older than the image.
fn change(path: &Path, how: usize) -> Vec<u8> {
    match how {
        0 => OpenOptions::new().write(true).open(path).unwrap().set_len(200 * KIB as u64).unwrap(),
        1 => drop(flip(path)),
        _ => {
            let other = path.with_extension("other");
            fs::write(&other, content(100 * KIB, 77)).unwrap();
            let old = std::time::SystemTime::now() - Duration::from_secs(100_000);
            OpenOptions::new().write(true).open(&other).unwrap().set_modified(old).unwrap();
            fs::rename(other, path).unwrap();
        }
    }
    fs::read(path).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_somebody_wrote_to_is_not_evicted_and_others_go_instead() {
    let server = Server::start();
    for how in 0..3 {
        let bed = Bed::limited(350 * KIB as u64).await;
        let paths = fill(&bed, &server, 1..=3).await;
        let theirs = change(&paths[0], how);
        // The oldest is forgotten, so that there is room below the limit.
        fill(&bed, &server, [4]).await;
        assert_eq!(fs::read(&paths[0]).unwrap(), theirs, "{how}");
        assert!(paths[1].exists() && paths[2].exists());
        assert_eq!(bed.images.list().await.unwrap().len(), 3);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_somebody_wrote_to_while_lvp_was_down_is_not_evicted_or_deleted() {
    let server = Server::start();
    let bed = Bed::new().await;
    let paths = fill(&bed, &server, 1..=2).await;
    let theirs: Vec<_> = paths.iter().map(|path| change(path, 2)).collect();
    let bed = bed.restart_limited(Some(150 * KIB as u64)).await;
    assert_code(bed.images.delete(paths[1].file_name().unwrap().to_str().unwrap()).await, ErrorCode::FileInTheWay);
    fill(&bed, &server, [3]).await;
    assert_eq!(paths.iter().map(|path| fs::read(path).unwrap()).collect::<Vec<_>>(), theirs);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_somebody_wrote_to_is_not_deleted_and_it_is_said_why() {
    let server = Server::start();
    for how in 1..3 {
        let bed = Bed::new().await;
        let path = fill(&bed, &server, [1]).await.remove(0);
        let theirs = change(&path, how);
        let name = path.file_name().unwrap().to_str().unwrap();
        let error = assert_code(bed.images.delete(name).await, ErrorCode::FileInTheWay);
        assert!(error.to_string().contains("somebody wrote to it") && !error.retryable(), "{error:?}");
        assert!(error.to_body().hint.unwrap().contains(path.to_str().unwrap()));
        assert_eq!(fs::read(&path).unwrap(), theirs);
        assert_code(bed.images.delete(name).await, ErrorCode::ImageNotFound);
        assert_eq!(bed.files(), [name], "what is remembered of it is still there");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cache_that_was_copied_with_its_times_is_lvps_after_a_start() {
    let server = Server::start();
    let bed = Bed::new().await;
    let path = fill(&bed, &server, [1]).await.remove(0);
    // As `cp -a` and `rsync -a` do it.
    let (copy, modified) = (path.with_extension("copy"), path.metadata().unwrap().modified().unwrap());
    fs::copy(&path, &copy).unwrap();
    OpenOptions::new().write(true).open(&copy).unwrap().set_modified(modified).unwrap();
    fs::rename(&copy, &path).unwrap();
    let bed = bed.restart().await;
    bed.images.delete(path.file_name().unwrap().to_str().unwrap()).await.unwrap();
    bed.assert_empty();
}
