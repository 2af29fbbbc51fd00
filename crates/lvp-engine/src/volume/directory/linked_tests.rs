//! Linked directories, where no file system need share blocks: what an overlay is, and when its base may go.

use std::{process::Command, sync::Barrier, thread};

use e2e::images;
use lvp_api::MIB;

use super::*;
use crate::volume::{
    Base, Link,
    base::short,
    conformance::{self, SIZE, base_of, clone_of, content, digest, expect, job, write},
};

/// A linked directory in a place without reflinks.
fn linked() -> (tempfile::TempDir, Directory) {
    let directory = tempfile::tempdir().unwrap();
    let backend = Directory::linked(directory.path().join("volumes"));
    (directory, backend)
}

/// What a guest would read, by qemu-img.
fn disk(volume: &Volume) -> PathBuf {
    let checked = images::run("qemu-img", &["check", "-f", "qcow2", volume.path.to_str().unwrap()]).unwrap();
    assert!(checked.contains("No errors were found"), "{checked}");
    let raw = volume.path.parent().unwrap().parent().unwrap().join("disk.raw");
    images::raw_from(&volume.path, "qcow2", &raw).unwrap();
    raw
}

#[track_caller]
fn assert_needed(store: &dyn BaseStore, base: &Base, number: usize, one: &str) {
    let error = store.remove(&base.digest).unwrap_err();
    assert_eq!((error.code(), error.retryable()), (ErrorCode::ImageInUse, false), "{error:?}");
    let said = error.to_string();
    let number = if number == 1 { "by 1 volume ".to_owned() } else { format!("by {number} volumes ") };
    assert!(said.contains(&base.name) && said.contains(&number) && said.contains(one), "{said}");
    assert_eq!(store.find(&base.digest).unwrap().as_ref(), Some(base));
}

#[test]
fn conforms_wherever_files_can_be() {
    let (_directory, backend) = linked();
    // It is asked before the directory is there, and nothing is made for that.
    assert!(backend.bases().unwrap().is_some() && !backend.path.exists());
    conformance::run_linked(&backend);
    assert_eq!(fs::read_dir(&backend.path).unwrap().count(), 0);
    let file = backend.path.join("file");
    fs::write(&file, b"x").unwrap();
    assert_eq!(Directory::linked(file).bases().err().unwrap().code(), ErrorCode::TargetUnavailable);
}

#[test]
fn an_overlay_holds_the_base_takes_no_space_and_changes_nothing_but_itself() {
    let (_directory, backend) = linked();
    let store = backend.bases().unwrap().unwrap();
    let base = base_of(&*store, &digest("a0"), 1);
    let one = clone_of(&*store, &base, "web-1", SIZE);
    let larger = clone_of(&*store, &base, "web-2", 2 * SIZE + 1);
    assert_eq!((one.size, larger.size), (SIZE, 2 * SIZE + QCOW2_GRANULARITY));
    assert!(one.tags.made_by_lvp && one.tags.job.is_some() && one.unsuitable.is_some());
    let link = Link { name: base.name.clone(), base: Some((base.clone(), backend.path.join(&base.name))) };
    assert_eq!((one.link.as_ref(), larger.link.as_ref()), (Some(&link), Some(&link)));
    assert_eq!(backend.list().unwrap(), [one.clone(), larger.clone()]);
    let filled = [(0, 1), (SIZE - MIB, 1)];
    for volume in [&one, &larger] {
        let metadata = fs::metadata(&volume.path).unwrap();
        assert!(metadata.blocks() * 512 < MIB && metadata.mode() & 0o777 == 0o600, "{metadata:?}");
        expect(&disk(volume), volume.size, &filled);
    }
    // It is named by its own name only, so that the directory can be moved as a whole.
    let info = images::run("qemu-img", &["info", "--output=json", one.path.to_str().unwrap()]).unwrap();
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(
        (&info["backing-filename"], &info["backing-filename-format"]),
        (&base.name.clone().into(), &"raw".into())
    );

    images::qemu_io(&larger.path, &["write -P 9 0 1M", "write -P 8 31M 1M"]).unwrap();
    expect(&disk(&larger), larger.size, &[(0, 9), (SIZE - MIB, 1), (31 * MIB, 8)]);
    expect(&disk(&one), SIZE, &filled);
    expect(&backend.path.join(&base.name), SIZE, &filled);
}

#[test]
fn a_base_stays_as_long_as_a_file_stands_on_it() {
    let (directory, backend) = linked();
    let store = backend.bases().unwrap().unwrap();
    let (base, other) = (base_of(&*store, &digest("a0"), 1), base_of(&*store, &digest("b0"), 2));
    let [one, two] = ["web-1", "web-2"].map(|name| clone_of(&*store, &base, name, SIZE));
    assert_eq!(store.needed_by(&base).unwrap(), ["web-1", "web-2"]);
    assert_needed(&*store, &base, 2, "web-1");
    store.remove(&other.digest).unwrap();
    backend.remove(&one.name).unwrap();
    assert_needed(&*store, &base, 1, "web-2");

    // A copy by hand has no tags of ours; a link leads to one; somebody's own overlay names the base in full.
    let at = |name: &str| backend.path.join(name).to_str().unwrap().to_owned();
    fs::copy(&two.path, at("copy.img")).unwrap();
    std::os::unix::fs::symlink(at("copy.img"), at("link")).unwrap();
    let full = at(&base.name);
    images::run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &full, "-F", "raw", &at("own.qcow2")]).unwrap();
    assert_needed(&*store, &base, 4, "copy.img");
    // One that was hidden by hand.
    fs::rename(&two.path, at(".hidden")).unwrap();
    assert_eq!(store.needed_by(&base).unwrap(), [".hidden", "copy.img", "link", "own"]);
    [".hidden", "copy.img", "link"].iter().for_each(|name| fs::remove_file(at(name)).unwrap());
    assert_needed(&*store, &base, 1, "own");
    // What was made to stand alone needs it no more.
    images::run("qemu-img", &["rebase", "-f", "qcow2", "-b", "", &at("own.qcow2")]).unwrap();
    expect(&disk(&backend.find(&"own".parse().unwrap()).unwrap().unwrap()), SIZE, &[(0, 1), (SIZE - MIB, 1)]);

    // A guest's raw disk may look like an overlay of anything.
    fs::write(at("guest.raw"), fs::read(at("own.qcow2")).unwrap()).unwrap();
    let words = ["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", &base.name, &at("guest.raw")];
    images::run("qemu-img", &words).unwrap();
    // One in another place is seen as long as it is open.
    let elsewhere = directory.path().join("elsewhere.qcow2").to_str().unwrap().to_owned();
    images::run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &full, "-F", "raw", &elsewhere]).unwrap();
    let mut user = Command::new("sleep").arg("60").stdin(File::open(&full).unwrap()).spawn().unwrap();
    let refusal = store.remove(&base.digest);
    user.kill().and_then(|()| user.wait()).unwrap();
    let error = refusal.unwrap_err();
    assert!(error.code() == ErrorCode::ImageInUse && error.to_string().contains("(sleep)"), "{error:?}");
    store.remove(&base.digest).unwrap();
    assert_eq!(store.list().unwrap(), Vec::new());
}

#[test]
fn deleting_the_last_volume_leaves_the_base() {
    let (_directory, backend) = linked();
    let store = backend.bases().unwrap().unwrap();
    let base = base_of(&*store, &digest("a0"), 1);
    let volume = clone_of(&*store, &base, "web-1", SIZE);
    backend.remove(&volume.name).unwrap();
    assert_eq!(store.list().unwrap(), std::slice::from_ref(&base));
    store.remove(&base.digest).unwrap();
    assert_eq!(fs::read_dir(&backend.path).unwrap().count(), 0);
}

/// Whoever is first: an overlay has its base, and a base that is gone has no overlay.
#[test]
fn linking_and_removing_at_once_leave_no_overlay_without_its_base() {
    let (_directory, backend) = linked();
    for round in 0..40 {
        let store = FileBases { directory: &backend };
        let base = base_of(&store, &digest("a0"), 1);
        let (both, name) = (Barrier::new(2), "web-1".parse().unwrap());
        let (made, gone) = thread::scope(|scope| {
            let make = scope.spawn(|| {
                both.wait();
                FileBases { directory: &backend }
                    .clone_base(&base, &NewVolume { name: &name, size: SIZE, job: job() })
                    .is_ok()
            });
            both.wait();
            let gone = store.remove(&base.digest).is_ok();
            (make.join().unwrap(), gone)
        });
        assert!(!(made && gone), "an overlay without a base, in round {round}");
        backend.remove(&name).unwrap();
        store.remove(&base.digest).unwrap();
    }
}

#[test]
fn a_base_that_is_being_linked_to_is_not_removed_and_the_other_way_round() {
    let (_directory, backend) = linked();
    let store = FileBases { directory: &backend };
    let base = base_of(&store, &digest("a0"), 1);
    let path = backend.path.join(&base.name);
    let new = NewVolume { name: &"web-1".parse().unwrap(), size: SIZE, job: job() };
    let held = store.hold(&base).unwrap();
    let error = store.remove(&base.digest).unwrap_err();
    assert_eq!((error.code(), error.retryable()), (ErrorCode::ImageInUse, true), "{error:?}");
    // Two may link to it at once.
    store.clone_base(&base, &new).unwrap();
    backend.remove(new.name).unwrap();
    drop(held);
    let removing = File::open(&path).unwrap();
    rustix::fs::flock(&removing, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert_eq!(store.clone_base(&base, &new).unwrap_err().code(), ErrorCode::ImageInUse);
    // It goes while it is held to be removed: whoever waited finds none.
    fs::remove_file(&path).unwrap();
    drop(removing);
    let error = store.clone_base(&base, &new).unwrap_err();
    assert!(error.to_string().contains("is gone"), "{error:?}");
    assert_eq!(backend.list().unwrap(), Vec::new());
}

#[test]
fn a_link_is_to_a_complete_base_of_the_same_directory_or_to_nothing() {
    let (_directory, backend) = linked();
    let store = backend.bases().unwrap().unwrap();
    let base = base_of(&*store, &digest("a0"), 1);
    let volume = clone_of(&*store, &base, "web-1", SIZE);
    let link = || backend.find(&volume.name).unwrap().unwrap().link;
    let path = backend.path.join(&base.name);
    // Another file in its place, one that can be written, none.
    let lost = Some(Link { name: base.name.clone(), base: None });
    let aside = backend.path.join("aside");
    fs::rename(&path, &aside).unwrap();
    assert_eq!(link(), lost);
    fs::write(&path, b"somebody's").unwrap();
    assert_eq!(link(), lost);
    std::os::unix::fs::symlink("/etc/passwd", backend.path.join("link")).unwrap();
    fs::rename(backend.path.join("link"), &path).unwrap();
    assert_eq!(link(), lost);
    fs::rename(&aside, &path).unwrap();
    assert!(link().unwrap().base.is_some());
    // A header that names what is no base of ours is no link, and nothing is looked for by it.
    let digits = short(&base.digest);
    for name in [
        "/etc/passwd".to_owned(),
        format!("../.lvp-{digits}.base"),
        format!("/.lvp-{digits}.base"),
        format!(".lvp-../{digits}.base"),
        format!(".lvp-{digits}.base-new"),
        ".lvp-.base".to_owned(),
    ] {
        let words = ["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", &name, volume.path.to_str().unwrap()];
        images::run("qemu-img", &words).unwrap();
        assert_eq!(link(), None, "{name}");
    }
}

#[test]
fn a_crash_at_any_point_leaves_at_most_a_good_base() {
    let (_directory, backend) = linked();
    let store = FileBases { directory: &backend };
    let (job, digest) = (job(), digest("a0"));
    let new = NewVolume { name: &"web-1".parse().unwrap(), size: SIZE, job };
    // While it was written, while it was sealed: no base.
    write(&store.create(SIZE, job).unwrap().path, 0, 1);
    assert_eq!((store.list().unwrap(), store.unsealed().unwrap()), (Vec::new(), vec![job]));
    store.mark(&store.unsealed_file(job), &digest, &content(1)).unwrap();
    assert_eq!((store.list().unwrap(), store.unsealed().unwrap()), (Vec::new(), vec![job]));
    // After it: a base that the job finds again.
    let base = store.seal(job, &digest, &content(1)).unwrap();
    assert_eq!(store.find(&digest).unwrap().as_ref(), Some(&base));
    // An overlay has no name until it is whole.
    let path = backend.file(new.name);
    let record = Record::of_new(job, Some(SIZE));
    drop(backend.make(&path, 0, &record, &Holds::OverlayOn(&base.name)).unwrap());
    assert_eq!((backend.find(new.name).unwrap(), backend.list().unwrap()), (None, Vec::new()));
    let volume = store.clone_base(&base, &new).unwrap();
    expect(&disk(&volume), SIZE, &[(0, 1)]);
    backend.remove(new.name).unwrap();
    assert_eq!(fs::read_dir(&backend.path).unwrap().count(), 1, "the base");
}
