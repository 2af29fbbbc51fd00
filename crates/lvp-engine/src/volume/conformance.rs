//! What every backend must do, as one test that each of them runs. It needs a backend that is empty and has 64 MiB free,
//! and leaves it empty.

use lvp_api::{Digest, DigestAlgorithm, ErrorCode, JobId, MIB, VolumeName};
use uuid::Uuid;

use super::{NewVolume, VolumeBackend};

const SIZE: u64 = 16 * MIB;

/// Runs the whole suite.
pub fn run(backend: &dyn VolumeBackend) {
    an_absent_volume_is_absent(backend);
    a_new_volume_has_its_size_and_tags(backend);
    the_image_tag_follows_the_image(backend);
    a_name_is_taken_once(backend);
    removing_twice_is_no_error(backend);
    a_size_is_rounded_up(backend);
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
        backend.set_image(&volume, Some(&digest)).unwrap();
        let tagged = backend.find(&volume.name).unwrap().unwrap();
        assert_eq!(tagged.tags.image, Some(digest));
        assert_eq!(tagged.tags.job, volume.tags.job, "the maker stays");
    }
    let tagged = backend.find(&volume.name).unwrap().unwrap();
    backend.set_image(&tagged, None).unwrap();
    assert_eq!(backend.find(&volume.name).unwrap().unwrap().tags.image, None);
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
