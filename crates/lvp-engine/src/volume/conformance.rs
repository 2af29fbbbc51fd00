//! What every backend must do, and every store of bases, as one test that each of them runs. It needs a backend that is
//! empty and has 128 MiB free, and leaves it empty.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
    thread,
};

use lvp_api::{ContentDigest, Digest, DigestAlgorithm, ErrorCode, JobId, MIB, VolumeName};
use uuid::Uuid;

use super::{BaseStore, NewVolume, Tags, Volume, VolumeBackend, base::Base};

pub const SIZE: u64 = 16 * MIB;

/// Runs the whole suite, and says whether the backend has a store of bases, so that nobody takes what was left out for
/// passed.
#[must_use]
pub fn run(backend: &dyn VolumeBackend) -> bool {
    an_absent_volume_is_absent(backend);
    a_new_volume_has_its_size_and_tags(backend);
    the_image_tag_follows_the_image(backend);
    a_volume_is_released_and_adopted(backend);
    a_name_is_taken_once(backend);
    removing_twice_is_no_error(backend);
    a_size_is_rounded_up(backend);
    let Some(store) = backend.bases().unwrap() else { return false };
    a_base_is_found_once_it_is_sealed(backend, &*store);
    a_base_is_no_volume(backend, &*store);
    clones_hold_the_base_and_change_nothing_but_themselves(backend, &*store);
    a_clone_that_cannot_be_is_refused(backend, &*store);
    clones_outlive_their_base(backend, &*store);
    what_is_discarded_or_begun_anew_is_gone(&*store);
    of_two_jobs_with_one_digest_one_makes_the_base(backend, &*store);
    assert_eq!((store.list().unwrap(), store.unsealed().unwrap()), (Vec::new(), Vec::new()));
    assert_eq!(backend.list().unwrap(), Vec::new());
    true
}

/// The part of the suite that holds where volumes are qcow2 files and clones are overlays, which read in another way and need
/// their base.
pub fn run_linked(backend: &dyn VolumeBackend) {
    an_absent_volume_is_absent(backend);
    a_name_is_taken_once_and_left(backend);
    a_size_is_rounded_up(backend);
    let store = backend.bases().unwrap().expect("a linked directory has bases");
    a_base_is_found_once_it_is_sealed(backend, &*store);
    a_base_is_no_volume(backend, &*store);
    let base = store.find(&digest("a0")).unwrap().unwrap();
    clone_of(&*store, &base, "conformance-1", SIZE);
    the_image_tag_follows_the_image(backend);
    a_volume_is_released_and_adopted(backend);
    a_clone_that_cannot_be_is_refused(backend, &*store);
    removing_twice_is_no_error(backend);
    store.remove(&base.digest).unwrap();
    what_is_discarded_or_begun_anew_is_gone(&*store);
    assert_eq!((store.list().unwrap(), store.unsealed().unwrap()), (Vec::new(), Vec::new()));
    assert_eq!(backend.list().unwrap(), Vec::new());
}

fn a_name_is_taken_once_and_left(backend: &dyn VolumeBackend) {
    backend.create(&NewVolume { name: &name("conformance-1"), size: SIZE, job: job() }).unwrap();
    a_name_is_taken_once(backend);
    removing_twice_is_no_error(backend);
}

fn name(text: &str) -> VolumeName {
    text.parse().unwrap()
}

fn an_absent_volume_is_absent(backend: &dyn VolumeBackend) {
    assert_eq!(backend.find(&name("absent")).unwrap(), None);
    backend.remove(&name("absent")).unwrap();
    let space = backend.space().unwrap();
    assert!(space.free > 0 && space.free <= space.total);
}

fn a_new_volume_has_its_size_and_tags(backend: &dyn VolumeBackend) {
    let (name, job) = (name("conformance-1"), JobId(Uuid::now_v7()));
    let made = backend.create(&NewVolume { name: &name, size: SIZE, job }).unwrap();
    assert_eq!(made.size, SIZE);
    assert!(made.tags.made_by_lvp && made.tags.job == Some(job) && made.tags.image.is_none());
    assert!(made.tags.incomplete);
    assert_eq!((made.open, made.unsuitable), (false, None));
    assert_eq!(backend.find(&name).unwrap().as_ref(), Some(&made));
    assert!(backend.list().unwrap().contains(&made));
    let target = backend.target(&made, true).unwrap();
    assert_eq!(target.size, SIZE);
    if target.reads_zero {
        let bytes = std::fs::read(&target.path).unwrap();
        assert!(bytes.len() as u64 == SIZE && bytes.iter().all(|byte| *byte == 0), "a new volume reads zero");
    }
    assert!(!backend.target(&made, false).unwrap().reads_zero, "a volume that was there before promises nothing");
}

fn the_image_tag_follows_the_image(backend: &dyn VolumeBackend) {
    let volume = backend.find(&name("conformance-1")).unwrap().unwrap();
    for fill in ["a", "b"] {
        let digest = Digest::new(DigestAlgorithm::Sha256, &fill.repeat(64)).unwrap();
        let volume = backend.find(&volume.name).unwrap().unwrap();
        let tags = Tags { image: Some(digest.clone()), incomplete: false, ..volume.tags.clone() };
        backend.set_tags(&volume, &tags).unwrap();
        let tagged = backend.find(&volume.name).unwrap().unwrap();
        assert_eq!(tagged.tags, tags, "the maker stays");
    }
    let tagged = backend.find(&volume.name).unwrap().unwrap();
    backend.set_tags(&tagged, &Tags { image: None, ..tagged.tags.clone() }).unwrap();
    let untagged = backend.find(&volume.name).unwrap().unwrap();
    assert!(untagged.tags.image.is_none() && !untagged.tags.incomplete);
}

fn a_volume_is_released_and_adopted(backend: &dyn VolumeBackend) {
    let volume = backend.find(&name("conformance-1")).unwrap().unwrap();
    backend.set_tags(&volume, &Tags::default()).unwrap();
    let released = backend.find(&volume.name).unwrap().unwrap();
    assert_eq!((&released.tags, released.size), (&Tags::default(), volume.size));
    assert_eq!(backend.remove(&volume.name).unwrap_err().code(), ErrorCode::VolumeNotOurs);
    backend.set_tags(&released, &Tags { made_by_lvp: true, ..Tags::default() }).unwrap();
    let adopted = backend.find(&volume.name).unwrap().unwrap();
    assert!(adopted.tags.made_by_lvp && adopted.tags.job.is_none());
}

fn a_name_is_taken_once(backend: &dyn VolumeBackend) {
    let name = name("conformance-1");
    let error = backend.create(&NewVolume { name: &name, size: SIZE, job: JobId(Uuid::now_v7()) }).unwrap_err();
    assert_eq!(error.code(), ErrorCode::FileInTheWay, "{error:?}");
    assert!(backend.find(&name).unwrap().is_some(), "the first one stays");
}

fn removing_twice_is_no_error(backend: &dyn VolumeBackend) {
    let name = name("conformance-1");
    backend.remove(&name).unwrap();
    assert_eq!(backend.find(&name).unwrap(), None);
    backend.remove(&name).unwrap();
}

fn a_size_is_rounded_up(backend: &dyn VolumeBackend) {
    let name = name("conformance.2+x_");
    let made = backend.create(&NewVolume { name: &name, size: SIZE + 1, job: JobId(Uuid::now_v7()) }).unwrap();
    let granularity = backend.capabilities().unwrap().granularity;
    assert_eq!(made.size, (SIZE + 1).next_multiple_of(granularity));
    backend.remove(&name).unwrap();
}

pub fn job() -> JobId {
    JobId(Uuid::now_v7())
}

/// A digest whose first digits are these.
pub fn digest(beginning: &str) -> Digest {
    Digest::new(DigestAlgorithm::Sha256, &format!("{beginning:e<64}")).unwrap()
}

pub fn content(fill: u8) -> ContentDigest {
    ContentDigest::from_bytes(&[fill; 32])
}

/// Writes a MiB of this byte and syncs it.
pub fn write(path: &Path, at: u64, fill: u8) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[fill; MIB as usize], at).unwrap();
    file.sync_all().unwrap();
}

/// Checks every byte: each MiB is full of the byte that is given for it; what is not given is zero.
pub fn expect(path: &Path, size: u64, filled: &[(u64, u8)]) {
    let bytes = fs::read(path).unwrap();
    assert_eq!(bytes.len() as u64, size, "{}", path.display());
    for (index, piece) in bytes.chunks(MIB as usize).enumerate() {
        let at = index as u64 * MIB;
        let fill = filled.iter().find(|(offset, _)| *offset == at).map_or(0, |(_, fill)| *fill);
        assert!(piece.iter().all(|byte| *byte == fill), "{} at {at} is not {fill}", path.display());
    }
}

/// A base with a MiB of this byte at its beginning and at its end.
pub fn base_of(store: &dyn BaseStore, digest: &Digest, fill: u8) -> Base {
    let job = job();
    let target = store.create(SIZE, job).unwrap();
    write(&target.path, 0, fill);
    write(&target.path, SIZE - MIB, fill);
    store.seal(job, digest, &content(fill)).unwrap()
}

pub fn clone_of(store: &dyn BaseStore, base: &Base, volume: &str, size: u64) -> Volume {
    store.clone_base(base, &NewVolume { name: &name(volume), size, job: job() }).unwrap()
}

fn a_base_is_found_once_it_is_sealed(backend: &dyn VolumeBackend, store: &dyn BaseStore) {
    let (maker, digest, content) = (job(), digest("a0"), content(1));
    assert_eq!(store.find(&digest).unwrap(), None);
    let granularity = backend.capabilities().unwrap().granularity;
    let target = store.create(SIZE - 1, maker).unwrap();
    assert_eq!(target.size, (SIZE - 1).next_multiple_of(granularity));
    assert!(target.reads_zero);
    expect(&target.path, SIZE, &[]);
    write(&target.path, 4 * MIB, 1);
    assert_eq!((store.find(&digest).unwrap(), store.list().unwrap()), (None, Vec::new()), "it is not sealed");
    assert_eq!(store.unsealed().unwrap(), [maker]);
    assert_eq!(backend.list().unwrap(), Vec::new(), "it is no volume");
    assert_eq!(store.seal(job(), &digest, &content).unwrap_err().code(), ErrorCode::Internal, "of another job");

    let base = store.seal(maker, &digest, &content).unwrap();
    assert_eq!((&base.digest, &base.content, base.size), (&digest, &content, SIZE));
    let used = base.used_bytes.expect("known of a base that was active or is a file");
    assert!((MIB / 2..SIZE / 2).contains(&used), "a MiB was written, {used} bytes are used");
    assert_eq!(store.find(&digest).unwrap().as_ref(), Some(&base));
    assert_eq!(store.find(&self::digest("a1")).unwrap(), None);
    assert_eq!(store.list().unwrap(), std::slice::from_ref(&base));
    assert_eq!(store.unsealed().unwrap(), Vec::new());
    assert_eq!(store.seal(maker, &digest, &content).unwrap(), base, "sealed twice is sealed");
    store.discard(maker).unwrap();
    assert_eq!(store.list().unwrap(), [base], "a base is no longer its job's to discard");
}

fn a_base_is_no_volume(backend: &dyn VolumeBackend, store: &dyn BaseStore) {
    let base = store.find(&digest("a0")).unwrap().unwrap();
    assert_eq!(backend.list().unwrap(), Vec::new());
    let as_volume = name(&base.name);
    // Where volumes and bases have one space of names, the base stands in it and says what it is.
    if let Some(volume) = backend.find(&as_volume).unwrap() {
        assert!(volume.unsuitable.unwrap().contains("base"), "{volume:?}");
        assert_eq!(backend.remove(&as_volume).unwrap_err().code(), ErrorCode::VolumeInUse);
        let new = NewVolume { name: &as_volume, size: SIZE, job: job() };
        assert_eq!(backend.create(&new).unwrap_err().code(), ErrorCode::InvalidVolumeName);
        assert_eq!(store.clone_base(&base, &new).unwrap_err().code(), ErrorCode::InvalidVolumeName);
    }
    assert_eq!(store.find(&base.digest).unwrap(), Some(base));
}

fn clones_hold_the_base_and_change_nothing_but_themselves(backend: &dyn VolumeBackend, store: &dyn BaseStore) {
    let base = store.find(&digest("a0")).unwrap().unwrap();
    let granularity = backend.capabilities().unwrap().granularity;
    let (name, job) = (name("conformance-1"), job());
    let one = store.clone_base(&base, &NewVolume { name: &name, size: SIZE, job }).unwrap();
    assert_eq!((&one.name, one.size, one.open, one.unsuitable), (&name, SIZE, false, None));
    assert!(one.tags.made_by_lvp && one.tags.job == Some(job) && one.tags.image.is_none());
    assert_eq!(backend.find(&name).unwrap().as_ref(), Some(&one));
    let larger = clone_of(store, &base, "conformance-2", 2 * SIZE + 1);
    let size = (2 * SIZE + 1).next_multiple_of(granularity);
    assert_eq!(larger.size, size);
    assert_eq!(backend.list().unwrap(), [one.clone(), larger.clone()]);
    let written = (4 * MIB, 1);
    expect(&one.path, SIZE, &[written]);
    expect(&larger.path, size, &[written]);

    write(&one.path, 4 * MIB, 2);
    write(&larger.path, 0, 3);
    write(&larger.path, 2 * SIZE - MIB, 3);
    expect(&one.path, SIZE, &[(4 * MIB, 2)]);
    expect(&larger.path, size, &[(0, 3), written, (2 * SIZE - MIB, 3)]);
    let late = clone_of(store, &base, "conformance-3", SIZE);
    expect(&late.path, SIZE, &[written]);
    assert_eq!(store.find(&base.digest).unwrap(), Some(base));
}

fn a_clone_that_cannot_be_is_refused(backend: &dyn VolumeBackend, store: &dyn BaseStore) {
    let base = store.find(&digest("a0")).unwrap().unwrap();
    let before = backend.list().unwrap();
    let refused = |volume: &str, size| {
        let new = NewVolume { name: &name(volume), size, job: job() };
        store.clone_base(&base, &new).unwrap_err().code()
    };
    assert_eq!(refused("conformance-1", SIZE), ErrorCode::FileInTheWay);
    assert_eq!(refused("conformance-4", SIZE / 2), ErrorCode::ImageTooLarge);
    assert_eq!(backend.list().unwrap(), before);
}

fn clones_outlive_their_base(backend: &dyn VolumeBackend, store: &dyn BaseStore) {
    let (base, other) = (store.find(&digest("a0")).unwrap().unwrap(), base_of(store, &digest("b0"), 9));
    store.remove(&base.digest).unwrap();
    assert_eq!(store.list().unwrap(), std::slice::from_ref(&other));
    store.remove(&base.digest).unwrap();
    let path = |volume| backend.find(&name(volume)).unwrap().unwrap().path;
    expect(&path("conformance-1"), SIZE, &[(4 * MIB, 2)]);
    expect(&path("conformance-3"), SIZE, &[(4 * MIB, 1)]);
    let new = NewVolume { name: &name("conformance-4"), size: SIZE, job: job() };
    store.clone_base(&base, &new).unwrap_err();
    for volume in backend.list().unwrap() {
        backend.remove(&volume.name).unwrap();
    }
    assert_eq!(store.list().unwrap(), std::slice::from_ref(&other), "a base outlives its clones");
    store.remove(&other.digest).unwrap();
}

fn what_is_discarded_or_begun_anew_is_gone(store: &dyn BaseStore) {
    let (first, second) = (job(), job());
    store.discard(first).unwrap();
    let target = store.create(SIZE, first).unwrap();
    write(&target.path, 0, 5);
    store.create(SIZE, second).unwrap();
    let again = store.create(2 * SIZE, first).unwrap();
    expect(&again.path, 2 * SIZE, &[]);
    let mut unsealed = store.unsealed().unwrap();
    unsealed.sort();
    assert_eq!(unsealed, [first, second]);
    store.discard(first).unwrap();
    store.discard(first).unwrap();
    assert_eq!(store.unsealed().unwrap(), [second]);
    store.discard(second).unwrap();
}

fn of_two_jobs_with_one_digest_one_makes_the_base(backend: &dyn VolumeBackend, store: &dyn BaseStore) {
    let digest = digest("c0");
    // One after the other: the second gives the first's.
    let first = base_of(store, &digest, 6);
    assert_eq!(base_of(store, &digest, 7), first);
    // One that was interrupted while it made its own, and finds the first's: nothing of its own stays.
    let (maker, other) = (job(), job());
    store.create(SIZE, maker).unwrap();
    store.create(SIZE, other).unwrap();
    assert_eq!(store.find_for(maker, &self::digest("c1")).unwrap(), None);
    assert!(store.unsealed().unwrap().contains(&maker), "it may still be written");
    assert_eq!(store.find_for(maker, &digest).unwrap().as_ref(), Some(&first));
    assert_eq!(store.unsealed().unwrap(), [other]);
    store.discard(other).unwrap();
    let volume = clone_of(store, &first, "conformance-1", SIZE);
    expect(&volume.path, SIZE, &[(0, 6), (SIZE - MIB, 6)]);
    backend.remove(&volume.name).unwrap();
    store.remove(&digest).unwrap();
    // Both at once: whichever, there is one.
    let jobs = [job(), job()];
    jobs.iter().for_each(|job| write(&store.create(SIZE, *job).unwrap().path, 0, 8));
    let sealed = thread::scope(|scope| {
        let seal = |job| store.seal(job, &digest, &content(8)).unwrap();
        jobs.map(|job| scope.spawn(move || seal(job))).map(|thread| thread.join().unwrap())
    });
    assert_eq!(sealed[0], sealed[1]);
    assert_eq!(store.list().unwrap(), sealed[..1]);
    assert_eq!(store.unsealed().unwrap(), Vec::new());
    store.remove(&digest).unwrap();
}
