//! Real files and loop devices, and domains of libvirt's test driver. Loop devices need root.

use std::fs;

use e2e::{
    holder::Holder,
    images::{self, LoopDevice},
};

use super::*;
use crate::{host::block::BlockTarget, volume::Tags};

const SIZE: u64 = 8 << 20;

fn volume(path: &Path) -> Volume {
    Volume {
        name: "web".parse().unwrap(),
        path: path.to_owned(),
        size: SIZE,
        allocated: None,
        open: false,
        pool: None,
        unsuitable: None,
        link: None,
        tags: Tags::default(),
    }
}

/// A file of zeros.
fn file(directory: &Path, name: &str) -> PathBuf {
    let path = directory.join(name);
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    path
}

/// libvirt's test driver with one domain, `guest`, in this state, with these disks.
fn libvirt(directory: &Path, state: u8, disks: &str) -> Libvirt {
    libvirt_with(directory, state, "", disks)
}

/// The same, where the domain has a managed save.
fn libvirt_that_saved(directory: &Path, disks: &str) -> Libvirt {
    libvirt_with(directory, SHUT_OFF, "<test:hasmanagedsave/>", disks)
}

fn libvirt_with(directory: &Path, state: u8, saved: &str, disks: &str) -> Libvirt {
    let node = directory.join("node.xml");
    let domain = format!(
        "<node xmlns:test='http://libvirt.org/schemas/domain/test/1.0'><domain type='test'>
         <name>guest</name><memory>8192</memory><os><type>hvm</type></os>
         <test:runstate>{state}</test:runstate>{saved}<devices>{disks}</devices></domain></node>"
    );
    // It reads the element's own namespace.
    let domain = domain.replace(
        "<domain type='test'>",
        "<domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>",
    );
    fs::write(&node, domain).unwrap();
    Libvirt::new(format!("test://{}", node.display()))
}

/// States of libvirt's `virDomainState`.
const RUNNING: u8 = 1;
const PAUSED: u8 = 3;
const SHUT_OFF: u8 = 5;

fn disk(kind: &str, attribute: &str, path: &Path, format: &str) -> String {
    let path = path.display();
    format!(
        "<disk type='{kind}' device='disk'><driver name='qemu' type='{format}'/><source {attribute}='{path}'/>
         <target dev='vda' bus='virtio'/></disk>"
    )
}

/// That the only user is the domain.
fn assert_attached(volume: &Volume, libvirt: &Libvirt) {
    assert_eq!(users(volume, Some(libvirt)).unwrap(), [User::Active("guest".to_owned())]);
    let error = refuse_in_use(volume, Some(libvirt)).unwrap_err();
    assert_eq!((error.code(), error.retryable()), (ErrorCode::VolumeInUse, true));
    assert_eq!(error.to_string(), "volume web is in use: attached to the active domain guest");
}

#[test]
fn one_file_under_two_names_is_one_file() {
    let directory = tempfile::tempdir().unwrap();
    let (file, link) = (directory.path().join("a"), directory.path().join("b"));
    fs::write(&file, b"x").unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    assert!(is_same_file(&file, &link));
    assert!(!is_same_file(&file, directory.path()));
    assert!(is_same_file(Path::new("/absent"), Path::new("/absent")));
}

#[test]
fn a_disk_of_a_domain_is_in_use_unless_the_domain_is_shut_off() {
    let directory = tempfile::tempdir().unwrap();
    let volume = volume(&file(directory.path(), "web.raw"));
    let disk = disk("file", "file", &volume.path, "raw");
    for state in [RUNNING, PAUSED] {
        assert_attached(&volume, &libvirt(directory.path(), state, &disk));
    }
    refuse_overwriting(&volume, false, Some(&libvirt(directory.path(), SHUT_OFF, &disk))).unwrap();
}

#[test]
fn a_disk_of_a_domain_that_is_suspended_to_disk_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let volume = volume(&file(directory.path(), "web.raw"));
    let libvirt = libvirt_that_saved(directory.path(), &disk("file", "file", &volume.path, "raw"));
    assert_eq!(users(&volume, Some(&libvirt)).unwrap(), [User::Saved("guest".to_owned())]);
    for refused in [refuse_in_use(&volume, Some(&libvirt)), refuse_overwriting(&volume, false, Some(&libvirt))] {
        let error = refused.unwrap_err();
        assert_eq!((error.code(), error.retryable()), (ErrorCode::VolumeInUse, true));
        let said = "volume web is in use: attached to the domain guest, which is suspended to disk (managed save)";
        assert_eq!(error.to_string(), said);
        let hint = error.to_body().hint.unwrap();
        assert!(hint.contains("start the domain guest") && hint.contains("`virsh managedsave-remove guest`"), "{hint}");
    }
}

#[test]
fn a_device_under_another_name_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let device = LoopDevice::attach(&file(directory.path(), "disk"), 512).unwrap();
    let number = device.path.metadata().unwrap().rdev();
    // Another node of the same device, as in a guest's own /dev, and a link to it, as in /dev/disk/by-id.
    let (node, link) = (directory.path().join("node"), directory.path().join("by-id"));
    let numbers = [rustix::fs::major(number).to_string(), rustix::fs::minor(number).to_string()];
    images::run("mknod", &[node.to_str().unwrap(), "b", &numbers[0], &numbers[1]]).unwrap();
    std::os::unix::fs::symlink(&node, &link).unwrap();
    for path in [&device.path, &node, &link] {
        assert_attached(&volume(&device.path), &libvirt(directory.path(), PAUSED, &disk("block", "dev", path, "raw")));
    }
    // The other names of the volume are no other volume either.
    assert_attached(&volume(&link), &libvirt(directory.path(), PAUSED, &disk("block", "dev", &device.path, "raw")));
}

/// Makes an overlay in the directory on what this name means there.
fn overlay(directory: &Path, name: &str, below: &str, format: &str) -> PathBuf {
    let path = directory.join(name);
    let words = ["create", "-q", "-u", "-f", "qcow2", "-b", below, "-F", format, path.to_str().unwrap(), "8M"];
    images::run("qemu-img", &words).unwrap();
    path
}

#[test]
fn what_a_domain_shows_below_its_disk_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let room = directory.path();
    let web = volume(&file(room, "web.raw"));
    let whole = web.path.to_str().unwrap();
    // Said by libvirt.
    let top = overlay(room, "nothing.qcow2", "/nowhere", "raw");
    let said = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>
         <backingStore type='file'><format type='raw'/><source file='{whole}'/><backingStore/></backingStore>
         <target dev='vda' bus='virtio'/></disk>",
        top.display()
    );
    assert_attached(&web, &libvirt(room, RUNNING, &said));
    // Said by the files alone: by name, from the overlay's directory, as JSON, and two files down.
    let json = format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{whole}"}}}}"#);
    let short = format!(r#"json:{{"driver":"raw","file.filename":"{whole}"}}"#);
    for name in [whole, "web.raw", &format!("file:{whole}"), &json, &short] {
        println!("{name}");
        let middle = overlay(room, "middle.qcow2", name, "raw");
        assert_attached(&web, &libvirt(room, RUNNING, &disk("file", "file", &middle, "qcow2")));
        let top = overlay(room, "top.qcow2", "middle.qcow2", "qcow2");
        assert_attached(&web, &libvirt(room, RUNNING, &disk("file", "file", &top, "qcow2")));
        refuse_in_use(&web, Some(&libvirt(room, SHUT_OFF, &disk("file", "file", &top, "qcow2")))).unwrap();
    }
    // On a raw disk a guest writes what it likes: that names nothing.
    let forged = overlay(room, "forged.raw", whole, "raw");
    refuse_in_use(&web, Some(&libvirt(room, RUNNING, &disk("file", "file", &forged, "raw")))).unwrap();
    let top = overlay(room, "top.qcow2", "forged.raw", "raw");
    refuse_in_use(&web, Some(&libvirt(room, RUNNING, &disk("file", "file", &top, "qcow2")))).unwrap();
    // A chain that bites its tail ends.
    let tail = overlay(room, "tail.qcow2", "tail.qcow2", "qcow2");
    refuse_in_use(&web, Some(&libvirt(room, RUNNING, &disk("file", "file", &tail, "qcow2")))).unwrap();
}

#[test]
fn a_physical_volume_that_somebody_made_is_not_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let device = LoopDevice::attach(&file(directory.path(), "disk"), 512).unwrap();
    let name = device.path.to_str().unwrap();
    let mut volume = volume(&device.path);
    refuse_overwriting(&volume, false, None).unwrap();
    images::run("pvcreate", &["-qq", "--yes", "--devices", name, name]).unwrap();
    let identifier = images::run("pvs", &["--devices", name, "--noheadings", "-o", "pv_uuid", name]).unwrap();
    let error = refuse_overwriting(&volume, false, None).unwrap_err();
    assert_eq!((error.code(), error.retryable()), (ErrorCode::VolumeInUse, false));
    let said = format!("volume web is a physical volume of LVM ({})", identifier.trim());
    assert!(error.to_string().starts_with(&said), "{error:?}");
    assert!(error.to_body().hint.is_some_and(|hint| hint.contains(&format!("pvremove {name}"))), "{error:?}");
    // Nobody uses it: it can be read.
    refuse_in_use(&volume, None).unwrap();
    // What an attempt of the same job has begun, what lvp made, and what holds an image of lvp's.
    refuse_overwriting(&volume, true, None).unwrap();
    volume.tags = Tags { made_by_lvp: true, ..Tags::default() };
    refuse_overwriting(&volume, false, None).unwrap();
    volume.tags = Tags { image: Some(format!("sha256:{}", "5".repeat(64)).parse().unwrap()), ..Tags::default() };
    refuse_overwriting(&volume, false, None).unwrap();
    // The way out that the hint names.
    volume.tags = Tags::default();
    images::run("wipefs", &["--all", "--quiet", name]).unwrap();
    refuse_overwriting(&volume, false, None).unwrap();
}

#[test]
fn who_comes_to_a_volume_that_is_held_is_found_at_the_end() {
    let directory = tempfile::tempdir().unwrap();
    let device = LoopDevice::attach(&file(directory.path(), "disk"), 512).unwrap();
    let volume = volume(&device.path);
    let target = BlockTarget { path: device.path.clone(), offset: 0, size: SIZE, reads_zero: false };
    let held = OpenTarget::open(&target).unwrap();
    let disk = disk("block", "dev", &device.path, "raw");
    let (off, on) = (libvirt(directory.path(), SHUT_OFF, &disk), directory.path().join("on"));
    fs::create_dir(&on).unwrap();
    let on = libvirt(&on, PAUSED, &disk);
    let gone = Libvirt::new("test:///nonexistent/node.xml");
    // Our own hold is no use, and a libvirt that is gone is none at the end.
    refuse_beside(&volume, &held, Some(&off)).unwrap();
    refuse_late_users(&volume, &held, Some(&off)).unwrap();
    refuse_late_users(&volume, &held, Some(&gone)).unwrap();
    assert_eq!(refuse_beside(&volume, &held, Some(&gone)).unwrap_err().code(), ErrorCode::LibvirtUnavailable);
    for refused in [refuse_beside(&volume, &held, Some(&on)), refuse_late_users(&volume, &held, Some(&on))] {
        let error = refused.unwrap_err();
        assert_eq!((error.code(), error.retryable()), (ErrorCode::VolumeInUse, true));
        assert!(error.to_string().ends_with("attached to the active domain guest"), "{error:?}");
    }
    let opened = File::open(&device.path).unwrap();
    let holder = Holder::of(opened);
    let error = refuse_late_users(&volume, &held, Some(&gone)).unwrap_err();
    let said =
        format!("came into use while it was written, and is not noted as holding the image: process {}", holder.id());
    assert!(error.to_string().contains(&said), "{error:?}");
}

#[test]
fn without_libvirt_a_job_removes_only_what_it_has_not_finished_and_the_kernel_sees_nobody_use() {
    let directory = tempfile::tempdir().unwrap();
    let gone = Libvirt::new("test:///nonexistent/node.xml");
    let (job, other) = (JobId(uuid::Uuid::now_v7()), JobId(uuid::Uuid::now_v7()));
    let mut volume = volume(&file(directory.path(), "web.raw"));
    volume.tags = Tags { made_by_lvp: true, job: Some(job), image: None, incomplete: true };
    refuse_unfinished(&volume, job, Some(&gone)).unwrap();
    let unknown = |volume: &Volume, job| refuse_unfinished(volume, job, Some(&gone)).unwrap_err().code();
    assert_eq!(unknown(&volume, other), ErrorCode::LibvirtUnavailable);
    let complete = Volume { tags: Tags { incomplete: false, ..volume.tags.clone() }, ..volume.clone() };
    assert_eq!(unknown(&complete, job), ErrorCode::LibvirtUnavailable);
    // A libvirt that is there is asked, and so is the kernel without it.
    let on = libvirt(directory.path(), PAUSED, &disk("file", "file", &volume.path, "raw"));
    assert_eq!(refuse_unfinished(&volume, job, Some(&on)).unwrap_err().code(), ErrorCode::VolumeInUse);
    let opened = File::open(&volume.path).unwrap();
    let _holder = Holder::of(opened);
    assert_eq!(unknown(&volume, job), ErrorCode::VolumeInUse);
}
