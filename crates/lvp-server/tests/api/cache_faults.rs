//! What people do to the files of the image cache by hand, before and in the middle of a job that reads them: part of the
//! row "People" of docs/reference/faults.md.
//!
//! It leaves out a cache that is full or cannot be written.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command},
};

use e2e::server::Page;
use serde_json::{Value, json};

use crate::{
    auditor::{Audit, Failed},
    bed::{Bed, MIB},
    people_faults::{assert_runs, complete, forget_images, ready, serve_held, slow_order, writing},
    source_faults::{order, raw_image, somebodys_volume},
};

/// What is done to a cached file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Deed {
    Deleted,
    Flipped,
    Truncated,
    Grown,
    Replaced,
    /// As a disk does it that loses what is on it: nobody wrote. Only by its bytes is it found out.
    Rotten,
}

const BY_SOMEBODY: [Deed; 5] = [Deed::Deleted, Deed::Flipped, Deed::Truncated, Deed::Grown, Deed::Replaced];

impl Deed {
    /// Whether the file is there after it, and whose it is by then: who writes to one takes it over.
    fn takes_over(self) -> bool {
        !matches!(self, Self::Deleted | Self::Rotten)
    }

    /// Does it: near the end, which a slow job has not read yet.
    fn do_to(self, file: &Path) {
        let opened = || OpenOptions::new().read(true).write(true).open(file).unwrap();
        match self {
            Self::Deleted => fs::remove_file(file).unwrap(),
            Self::Flipped => {
                let mut byte = [0];
                opened().read_exact_at(&mut byte, 9 * MIB).unwrap();
                opened().write_all_at(&[byte[0] ^ 1], 9 * MIB).unwrap();
            }
            Self::Rotten => {
                let modified = file.metadata().unwrap().modified().unwrap();
                Self::Flipped.do_to(file);
                opened().set_modified(modified).unwrap();
            }
            Self::Truncated => opened().set_len(5 * MIB).unwrap(),
            Self::Grown => opened().set_len(file.metadata().unwrap().len() + MIB).unwrap(),
            Self::Replaced => {
                let (other, size) = (file.with_extension("other"), file.metadata().unwrap().len());
                fs::write(&other, vec![9; size as usize]).unwrap();
                fs::rename(other, file).unwrap();
            }
        }
    }
}

fn cached(job: &Value) -> PathBuf {
    PathBuf::from(job["image_path"].as_str().unwrap())
}

/// As the audit names it.
fn shown(file: &Path) -> String {
    format!("cache/{}", file.file_name().unwrap().to_str().unwrap())
}

/// Where an image is put that is found damaged, until the next start.
fn aside(file: &Path) -> String {
    format!("cache/.lvp/{}.corrupt", file.file_name().unwrap().to_str().unwrap())
}

async fn empty_cache(bed: &mut Bed) {
    bed.restart().await;
    forget_images(bed).await;
    for entry in fs::read_dir(bed.path("cache")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::remove_file(path).unwrap();
        }
    }
    let left: Vec<String> = bed.listing().into_iter().filter(|name| name.starts_with("cache/.lvp/")).collect();
    assert_eq!(left, ["cache/.lvp/lock"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cached_file_touched_before_a_job_is_fetched_anew() {
    let (mut bed, web, image) = ready().await;
    for deed in BY_SOMEBODY.into_iter().chain([Deed::Rotten]) {
        for volume in ["web-1", "old"] {
            println!("{deed:?} before {volume}");
            somebodys_volume(&bed, "old");
            let first = bed.provision(&order(&web.url("/x.raw"), "first")).await;
            let file = cached(&first);
            deed.do_to(&file);
            let mut audit = Audit::begin(&bed);
            if deed.takes_over() {
                // It stays as it is, and the image gets another name.
                audit = audit.forgets(&file);
            } else if deed == Deed::Rotten {
                audit = audit.but_for(aside(&file));
            }
            let job = {
                let id = bed.submit(&order(&web.url("/x.raw"), volume)).await;
                audit.complete(&id, &complete(volume, &image)).await
            };
            assert_eq!(job["cache_hit"], false, "{job:#}");
            assert_eq!(cached(&job) != file, deed.takes_over());
            assert_eq!(bed.path(&aside(&file)).exists(), deed == Deed::Rotten);
            for name in [volume, "first"] {
                fs::remove_file(bed.volume(name)).unwrap();
            }
            empty_cache(&mut bed).await;
        }
    }
}

/// A cached file that is removed is read to its end by the job that has it open; any other deed is found out, and the
/// image is fetched and written anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cached_file_touched_while_a_job_reads_it_leaves_the_right_volume() {
    let (mut bed, web, image) = ready().await;
    for deed in BY_SOMEBODY {
        for volume in ["web-1", "old"] {
            println!("{deed:?} under {volume}");
            somebodys_volume(&bed, "old");
            let file = cached(&bed.provision(&order(&web.url("/x.raw"), "first")).await);
            let audit = Audit::begin(&bed).forgets(&file).but_for(shown(&file));
            let id = bed.submit(&slow_order(&web.url("/x.raw"), volume)).await;
            writing(&bed, &id).await;
            deed.do_to(&file);
            let theirs = fs::read(&file).ok();
            assert_runs(&bed, &id).await;
            let job = bed.ended(&id).await;
            if deed == Deed::Deleted {
                assert_eq!((&job["status"], &job["cache_hit"]), (&json!("completed"), &json!(true)), "{job:#}");
                bed.assert_holds(&bed.volume(volume), &image, "raw", 11 * MIB);
                assert_eq!(
                    bed.tcp().get("/api/v1/images").await.expect(200),
                    json!([]),
                    "a file that is gone is shown"
                );
            } else {
                audit.complete(&id, &complete(volume, &image)).await;
                assert_eq!(job["cache_hit"], false, "{job:#}");
                assert_eq!(fs::read(&file).ok(), theirs, "somebody's file was touched");
            }
            for name in [volume, "first"] {
                fs::remove_file(bed.volume(name)).unwrap();
            }
            empty_cache(&mut bed).await;
        }
    }
}

/// With the source gone there is nothing to fetch anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cached_file_edited_while_its_source_is_gone_fails_the_job_and_keeps_the_old_volume() {
    let (bed, web, _) = ready().await;
    let file = cached(&bed.provision(&order(&web.url("/x.raw"), "first")).await);
    let sidecar = format!("cache/.lvp/{}.json", file.file_name().unwrap().to_str().unwrap());
    somebodys_volume(&bed, "old");
    Deed::Flipped.do_to(&file);
    let theirs = fs::read(&file).unwrap();
    let audit = Audit::begin(&bed).but_for(sidecar);
    // It answers the look before, and nothing after it.
    let page = Page::new(fs::read(bed.path("images/disk-1.raw")).unwrap());
    web.serve("/x.raw", page.clone().then(1, page.fail(99, 404)));
    let id = bed.submit(&order(&web.url("/x.raw"), "old")).await;
    audit.failed(&id, &Failed { code: "source_not_found", retryable: false, says: &["/x.raw"] }).await;
    assert_eq!(bed.tcp().get("/api/v1/images").await.expect(200), json!([]), "a damaged image is still in the cache");
    assert_eq!(fs::read(&file).unwrap(), theirs);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_removed_under_its_job_fails_it_and_leaves_nothing() {
    let (bed, web, image) = ready().await;
    somebodys_volume(&bed, "old");
    for volume in ["web-1", "old"] {
        let gate = serve_held(&web, &image);
        let audit = Audit::begin(&bed);
        let id = bed.submit(&order(&web.url("/x.raw"), volume)).await;
        gate.reached().await;
        let partials = || {
            let files = fs::read_dir(bed.path("cache/.lvp")).unwrap().map(|entry| entry.unwrap().path());
            files.filter(|path| path.to_string_lossy().ends_with(".partial")).collect::<Vec<_>>()
        };
        bed.job_when(&id, |_| !partials().is_empty()).await;
        fs::remove_file(&partials()[0]).unwrap();
        gate.open();
        audit.failed(&id, &Failed { code: "input_output", retryable: true, says: &[".partial"] }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_remembered_of_a_file_that_is_gone_goes_with_it() {
    let (bed, web, image) = ready().await;
    let file = cached(&bed.provision(&order(&web.url("/x.raw"), "first")).await);
    fs::remove_file(&file).unwrap();
    let name = file.file_name().unwrap().to_str().unwrap();
    bed.tcp().get(&format!("/api/v1/images/{name}")).await.refusal("image_not_found");
    // Another image is there by now.
    let other = raw_image(&bed, 2);
    web.serve("/x.raw", Page::new(fs::read(&other).unwrap()));
    let audit = Audit::begin(&bed);
    audit.complete(&bed.submit(&order(&web.url("/x.raw"), "web-1")).await, &complete("web-1", &other)).await;
    let left: Vec<String> = bed.listing().into_iter().filter(|name| name.ends_with(".json")).collect();
    assert_eq!(left.len(), 1, "{left:?}");
    drop(image);
}

/// A program that has a file open for a minute at most, as qemu has the disks of its guest.
struct Holder(Child);

impl Holder {
    fn of(file: &Path) -> Self {
        Self(Command::new("sleep").arg("60").stdin(File::open(file).unwrap()).spawn().unwrap())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cached_image_that_a_guest_has_as_its_disk_is_not_deleted_from_under_it() {
    let (mut bed, web, image) = ready().await;
    let file = cached(&bed.provision(&order(&web.url("/x.raw"), "first")).await);
    let at = format!("/api/v1/images/{}", file.file_name().unwrap().to_str().unwrap());
    // As its guest writes to it.
    let holder = Holder::of(&file);
    let refused = bed.tcp().delete(&at).await;
    assert_eq!(refused.status, 409);
    let said = format!("process {} (sleep) has it open", holder.0.id());
    assert!(refused.refusal("image_in_use")["message"].as_str().unwrap().contains(&said), "{refused:?}");
    Deed::Rotten.do_to(&file);
    let theirs = fs::read(&file).unwrap();
    let job = bed.provision(&order(&web.url("/x.raw"), "web-1")).await;
    assert_ne!(cached(&job), file);
    bed.assert_holds(&bed.volume("web-1"), &image, "raw", 11 * MIB);
    bed.restart().await;
    assert_eq!(fs::read(&file).unwrap(), theirs);
    drop(holder);
}
