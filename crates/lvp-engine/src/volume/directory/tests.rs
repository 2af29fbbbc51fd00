//! Directories on real file systems. Those on loop devices need root, and `mkfs` of each.

use e2e::images::{self, MountedFileSystem};
use lvp_api::MIB;

use super::*;
use crate::{
    host::block::OpenTarget,
    volume::{
        base::short,
        conformance::{self, SIZE, base_of, clone_of, content, digest, expect, job, write},
    },
};

const EXT4: &[&str] = &["mkfs.ext4", "-q"];
const XFS: &[&str] = &["mkfs.xfs", "-q", "-m", "reflink=1"];
const XFS_WITHOUT_REFLINKS: &[&str] = &["mkfs.xfs", "-q", "-m", "reflink=0"];
const BTRFS: &[&str] = &["mkfs.btrfs", "-q"];

#[test]
fn conforms_with_bases_where_the_file_system_shares_blocks() {
    for (command, shares) in [(EXT4, false), (XFS, true), (XFS_WITHOUT_REFLINKS, false), (BTRFS, true)] {
        let mounted = MountedFileSystem::make(512 << 20, command).unwrap();
        let path = mounted.path.join("srv/volumes");
        let backend = Directory::new(path.clone(), DiskFormat::Raw);
        // It is asked of the parent, and nothing is made for that.
        assert_eq!(backend.bases().unwrap().is_some(), shares, "{command:?}");
        assert!(!mounted.path.join("srv").exists());
        assert_eq!(conformance::run(&backend), shares, "{command:?}");
        // Nothing is left behind, not even the private folder.
        assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    }
}

#[test]
fn files_in_memory_share_no_blocks() {
    // /dev/shm is a tmpfs.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    assert!(Directory::new(directory.path().to_owned(), DiskFormat::Raw).bases().unwrap().is_none());
    let file = directory.path().join("file");
    fs::write(&file, b"x").unwrap();
    let error = Directory::new(file, DiskFormat::Raw).bases().err().unwrap();
    assert_eq!(error.code(), ErrorCode::TargetUnavailable);
}

/// A directory on XFS, with bases.
fn on_xfs() -> (MountedFileSystem, Directory) {
    let mounted = MountedFileSystem::make(512 << 20, XFS).unwrap();
    let backend = Directory::new(mounted.path.clone(), DiskFormat::Raw);
    (mounted, backend)
}

#[test]
fn a_clone_takes_no_space() {
    let (_mounted, backend) = on_xfs();
    let store = backend.bases().unwrap().unwrap();
    let job = job();
    let target = store.create(64 * MIB, job).unwrap();
    (0..64).for_each(|at| write(&target.path, at * MIB, 1));
    let base = store.seal(job, &digest("a0"), &content(1)).unwrap();
    assert!((64 * MIB..70 * MIB).contains(&base.used_bytes.unwrap()), "{base:?}");
    let before = backend.space().unwrap().free;
    clone_of(&*store, &base, "web-1", 256 * MIB);
    clone_of(&*store, &base, "web-2", 256 * MIB);
    let taken = before - backend.space().unwrap().free;
    assert!(taken < MIB, "two clones of 64 MiB took {taken} bytes");
}

/// Root writes to any file: who is held off is everybody else, and a root without that power.
#[test]
fn a_base_cannot_be_opened_for_writing() {
    let (mounted, backend) = on_xfs();
    let store = backend.bases().unwrap().unwrap();
    let base = base_of(&*store, &digest("a0"), 1);
    let writes = |name: &str| {
        let file = format!("of={}", mounted.path.join(name).display());
        images::run("setpriv", &["--bounding-set=-all", "dd", "if=/dev/null", &file, "conv=nocreat,notrunc"]).is_ok()
    };
    assert!(!writes(&base.name));
    let volume = clone_of(&*store, &base, "web-1", SIZE);
    assert!(writes(volume.path.file_name().unwrap().to_str().unwrap()), "a clone is written");
}

#[test]
fn a_crash_while_sealing_leaves_what_is_no_base_and_can_be_sealed() {
    let (mounted, backend) = on_xfs();
    let store = FileBases::of(&backend).unwrap().unwrap();
    let (job, digest, content) = (job(), digest("a0"), content(1));
    write(&store.create(SIZE, job).unwrap().path, 0, 1);
    store.mark(&store.unsealed_file(job), &digest, &content).unwrap();
    assert_eq!((store.find(&digest).unwrap(), store.list().unwrap()), (None, Vec::new()));
    assert_eq!(store.unsealed().unwrap(), [job]);
    // Sealed under another digest than it was marked with: the last word counts.
    let other = conformance::digest("b0");
    let base = store.seal(job, &other, &content).unwrap();
    assert_eq!((&base.digest, store.list().unwrap().len()), (&other, 1));
    expect(&mounted.path.join(&base.name), SIZE, &[(0, 1)]);
}

#[test]
fn what_is_not_complete_is_not_found() {
    let (mounted, backend) = on_xfs();
    let store = backend.bases().unwrap().unwrap();
    let digest = digest("a0");
    let path = mounted.path.join(format!(".lvp-{}.base", short(&digest)));
    // Somebody's file of that name.
    fs::write(&path, b"precious").unwrap();
    assert_eq!((store.find(&digest).unwrap(), store.list().unwrap()), (None, Vec::new()));
    let job = job();
    store.create(SIZE, job).unwrap();
    assert_eq!(store.seal(job, &digest, &content(1)).unwrap_err().code(), ErrorCode::FileInTheWay);
    store.remove(&digest).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    fs::remove_file(&path).unwrap();
    let base = store.seal(job, &digest, &content(1)).unwrap();
    // In place of the base, after it was found.
    let new = NewVolume { name: &"web-1".parse().unwrap(), size: SIZE, job };
    let aside = mounted.path.join("aside");
    fs::rename(&path, &aside).unwrap();
    fs::write(&path, b"precious").unwrap();
    store.clone_base(&base, &new).unwrap_err();
    fs::rename(&aside, &path).unwrap();
    // A base under another's name, a second name, one that can be written, one that is a link.
    let other = mounted.path.join(format!(".lvp-{}.base", "b".repeat(16)));
    fs::copy(&path, &other).unwrap();
    assert_eq!(store.list().unwrap(), std::slice::from_ref(&base));
    fs::remove_file(&other).unwrap();
    fs::hard_link(&path, &other).unwrap();
    assert_eq!(store.list().unwrap(), Vec::new());
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&other, &path).unwrap();
    assert_eq!(store.list().unwrap(), Vec::new());
    store.clone_base(&base, &new).unwrap_err();
    fs::rename(&other, &path).unwrap();
    assert_eq!(store.list().unwrap(), [base]);
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(store.list().unwrap(), Vec::new());
}

#[test]
fn conforms() {
    let directory = tempfile::tempdir().unwrap();
    // Whether there are bases here is this machine's affair.
    let _ = conformance::run(&Directory::new(directory.path().join("volumes"), DiskFormat::Raw));
    assert_eq!(fs::read_dir(directory.path().join("volumes")).unwrap().count(), 0);
}

/// A file system gives the number of a removed file to the next one: who made it must not hang on that.
#[test]
fn a_file_in_place_of_ours_is_not_ours() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Directory::new(directory.path().to_owned(), DiskFormat::Raw);
    let name: VolumeName = "web-1".parse().unwrap();
    for _ in 0..20 {
        let volume = backend.create(&NewVolume { name: &name, size: 1 << 20, job: job() }).unwrap();
        assert!(volume.tags.made_by_lvp);
        fs::remove_file(&volume.path).unwrap();
        fs::write(&volume.path, b"precious").unwrap();
        assert!(!backend.find(&name).unwrap().unwrap().tags.made_by_lvp);
        assert_eq!(backend.remove(&name).unwrap_err().code(), ErrorCode::VolumeNotOurs);
        fs::remove_file(&volume.path).unwrap();
    }
}

#[test]
fn a_file_with_two_names_is_not_written() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Directory::new(directory.path().to_owned(), DiskFormat::Raw);
    fs::write(directory.path().join("a.raw"), b"x").unwrap();
    fs::hard_link(directory.path().join("a.raw"), directory.path().join("b.raw")).unwrap();
    assert!(backend.find(&"a".parse().unwrap()).unwrap().unwrap().unsuitable.is_some());
}

/// Names that lvp gives, or once gave, are anybody's to give.
#[test]
fn a_file_is_not_removed_for_its_name() {
    let (mounted, backend) = on_xfs();
    let store = backend.bases().unwrap().unwrap();
    let (name, of_job): (VolumeName, _) = ("web-1".parse().unwrap(), job());
    let unsealed = format!(".lvp-{of_job}.base-new");
    let others = [".lvp-web-1.new", unsealed.as_str()].map(|name| mounted.path.join(name));
    let new = NewVolume { name: &name, size: 5000, job: of_job };
    // Nobody's tags, and those of another job.
    for tags in [None, Some(Record::of_new(job(), None))] {
        for other in &others {
            fs::write(other, b"precious").unwrap();
            tags.iter()
                .for_each(|tags| write_record(&OpenOptions::new().write(true).open(other).unwrap(), tags).unwrap());
        }
        assert_eq!(backend.create(&new).unwrap().size, 8192);
        backend.remove(&name).unwrap();
        backend.remove(&name).unwrap();
        assert_eq!(store.unsealed().unwrap(), []);
        store.discard(of_job).unwrap();
        assert_eq!(store.create(SIZE, of_job).unwrap_err().code(), ErrorCode::FileInTheWay);
        assert_eq!(store.seal(of_job, &digest("a0"), &content(1)).unwrap_err().code(), ErrorCode::Internal);
        for other in &others {
            assert_eq!(fs::read(other).unwrap(), b"precious");
            fs::remove_file(other).unwrap();
        }
    }
}

#[test]
fn an_unsealed_base_that_is_held_is_not_removed() {
    let (mounted, backend) = on_xfs();
    let store = backend.bases().unwrap().unwrap();
    let job = job();
    // As another daemon holds it while it writes.
    let held = OpenTarget::open(&store.create(SIZE, job).unwrap()).unwrap();
    let error = store.discard(job).unwrap_err();
    assert_eq!((error.code(), error.retryable()), (ErrorCode::ImageInUse, true), "{error:?}");
    store.create(SIZE, job).unwrap_err();
    assert_eq!(store.unsealed().unwrap(), [job]);
    drop(held);
    store.discard(job).unwrap();
    assert_eq!(fs::read_dir(&mounted.path).unwrap().count(), 0);
}

/// A file has its tags before it has a name.
#[test]
fn what_is_made_has_no_name_until_it_is_whole() {
    let directory = tempfile::tempdir().unwrap();
    let backend = Directory::new(directory.path().to_owned(), DiskFormat::Raw);
    let path = directory.path().join("web-1.raw");
    let file = backend.make(&path, SIZE, &Record::of_new(job(), None), &Holds::Nothing).unwrap();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    backend.name(&file, &path).unwrap();
    let volume = backend.find(&"web-1".parse().unwrap()).unwrap().unwrap();
    assert!(volume.size == SIZE && volume.tags.made_by_lvp && volume.tags.incomplete);
    assert_eq!(backend.name(&file, &path).unwrap_err().code(), ErrorCode::FileInTheWay);
}

#[test]
fn links_are_not_followed() {
    let directory = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/etc/passwd", directory.path().join("web-1.raw")).unwrap();
    let backend = Directory::new(directory.path().to_owned(), DiskFormat::Raw);
    let volume = backend.find(&"web-1".parse().unwrap()).unwrap().unwrap();
    assert_eq!(volume.unsuitable, Some("it is not a regular file"));
}
