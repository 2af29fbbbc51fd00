//! Real files and loop devices: what is written, zeroed and refused, and who is found to use them. Loop devices and
//! mounts need root.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Read, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    process::{Child, Command, Stdio},
};

use e2e::images::{self, LoopDevice};
use lvp_api::ErrorCode;
use rustix::fs::OFlags;

use super::{AlignedBuffer, BLOCK, BlockTarget, OpenTarget, locks, physical_volume, users_of};
use crate::error::{Error, Result};

const MIB: u64 = 1 << 20;

fn used_file(path: &Path, size: u64) {
    fs::write(path, vec![0xaa; size as usize]).unwrap();
}

fn target(path: &Path, size: u64) -> BlockTarget {
    BlockTarget { path: path.to_owned(), offset: 0, size, reads_zero: false }
}

fn goes_on(_: u64) -> Result<()> {
    Ok(())
}

/// A program that does nothing but hold the file open.
struct Holder(Child);

impl Holder {
    fn of(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        Self(Command::new("sleep").arg("60").stdin(Stdio::from(file)).spawn().unwrap())
    }
}

/// A guest of qemu's that does not run yet, with this as its disk. It answers when it has everything open.
fn guest(disk: &str) -> Holder {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-machine", "pc,accel=tcg", "-m", "32", "-S", "-display", "none", "-nodefaults", "-qmp", "stdio"])
        .args(["-blockdev", &format!("node-name=disk,{disk}"), "-device", "virtio-blk-pci,drive=disk"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It greets when its monitor is there, and answers when everything is.
    qemu.stdin.as_mut().unwrap().write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
    let mut lines = BufReader::new(qemu.stdout.as_mut().unwrap()).lines();
    if !lines.any(|line| line.unwrap().contains("return")) {
        let mut said = String::new();
        qemu.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
        qemu.wait().unwrap();
        panic!("{said}");
    }
    Holder(qemu)
}

/// What qemu-io says when it is to open this image for writing; nothing when it does so.
fn opened_by_qemu(path: &Path) -> String {
    let asked = Command::new("qemu-io").args(["-f", "raw", "-c", "quit"]).arg(path).output().unwrap();
    if asked.status.success() { String::new() } else { String::from_utf8_lossy(&asked.stderr).into_owned() }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn writes_and_zeroes_only_what_it_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let size = 8 * MIB + 700;
    used_file(&path, size);
    let open = OpenTarget::open(&target(&path, size)).unwrap();
    let mut buffer = AlignedBuffer::new(2 * BLOCK);
    buffer.fill(1);
    open.write_at(&buffer, MIB).unwrap();
    open.zero(3 * MIB, MIB, &mut goes_on).unwrap();
    // The last partial block, once written and once zeroed.
    open.write_at(&buffer[..700], 8 * MIB).unwrap();
    open.sync().unwrap();
    let mut expected = vec![0xaa; size as usize];
    expected[MIB as usize..][..2 * BLOCK].fill(1);
    expected[3 * MIB as usize..4 * MIB as usize].fill(0);
    expected[8 * MIB as usize..].fill(1);
    assert!(fs::read(&path).unwrap() == expected);
    open.zero(8 * MIB, 700, &mut goes_on).unwrap();
    expected[8 * MIB as usize..].fill(0);
    assert!(fs::read(&path).unwrap() == expected);
}

#[test]
fn a_file_in_memory_is_written_as_well() {
    // /dev/shm is a tmpfs.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("file");
    used_file(&path, 2 * MIB + 512);
    let open = OpenTarget::open(&target(&path, 2 * MIB + 512)).unwrap();
    open.zero(0, MIB, &mut goes_on).unwrap();
    let mut buffer = AlignedBuffer::new(BLOCK);
    buffer.fill(3);
    open.write_at(&buffer, 0).unwrap();
    let content = fs::read(&path).unwrap();
    assert!(content[..BLOCK].iter().all(|byte| *byte == 3));
    assert!(content[BLOCK..MIB as usize].iter().all(|byte| *byte == 0));
    assert!(content[MIB as usize..].iter().all(|byte| *byte == 0xaa));
}

#[test]
fn zeroing_stops_when_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    File::create(&path).unwrap().set_len(256 * MIB).unwrap();
    let device = LoopDevice::attach(&path, 512).unwrap();
    let open = OpenTarget::open(&target(&device.path, 256 * MIB)).unwrap();
    let mut asked = 0;
    let error = open.zero(0, 256 * MIB, &mut |_| {
        asked += 1;
        if asked > 2 { Err(Error::new(ErrorCode::Cancelled, "the job was cancelled")) } else { Ok(()) }
    });
    assert_eq!(error.unwrap_err().code(), ErrorCode::Cancelled);
    assert_eq!(asked, 3);
}

#[test]
fn what_does_not_fit_or_is_not_aligned_is_never_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    used_file(&path, MIB);
    let open = OpenTarget::open(&target(&path, MIB)).unwrap();
    let buffer = AlignedBuffer::new(2 * BLOCK);
    for (offset, length) in
        [(MIB, BLOCK), (MIB - BLOCK as u64, 2 * BLOCK), (512, BLOCK), (0, 512), (u64::MAX - 4095, BLOCK)]
    {
        assert_eq!(open.write_at(&buffer[..length], offset).unwrap_err().code(), ErrorCode::Internal);
        assert!(open.zero(offset, length as u64, &mut goes_on).is_err());
    }
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0xaa));
}

#[test]
fn only_what_is_there_with_its_size_is_opened() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let refused = |path: &Path, size| OpenTarget::open(&target(path, size)).err().unwrap().code();
    assert_eq!(refused(&path, MIB), ErrorCode::InputOutput);
    assert!(!path.exists());
    used_file(&path, MIB);
    assert_eq!(refused(&path, MIB + 512), ErrorCode::VolumeIncompatible);
    assert_eq!(refused(&path, MIB - 512), ErrorCode::VolumeIncompatible);
    assert_eq!(refused(directory.path(), 4096), ErrorCode::InputOutput);
    assert_eq!(refused(Path::new("/dev/null"), 0), ErrorCode::InputOutput);
}

#[test]
fn a_file_nobody_uses_has_no_users() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    used_file(&path, MIB);
    // This process does not count.
    let _open = File::open(&path).unwrap();
    assert_eq!(users_of(&path).unwrap(), Vec::<String>::new());
    assert!(users_of(&directory.path().join("missing")).is_err());
}

#[test]
fn a_process_that_has_the_file_open_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    used_file(&path, MIB);
    let holder = Holder::of(&path);
    assert_eq!(users_of(&path).unwrap(), [format!("process {} (sleep) has it open", holder.0.id())]);
}

#[test]
fn a_device_is_used_by_its_processes_and_its_file_by_the_device() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    used_file(&path, MIB);
    let device = LoopDevice::attach(&path, 512).unwrap();
    let name = device.path.display();
    assert_eq!(users_of(&device.path).unwrap(), Vec::<String>::new());
    assert_eq!(users_of(&path).unwrap(), [format!("the loop device {name} is backed by it")]);
    let holder = Holder::of(&device.path);
    assert_eq!(users_of(&device.path).unwrap(), [format!("process {} (sleep) has it open", holder.0.id())]);
}

#[test]
fn a_mounted_device_is_in_use_and_not_opened() {
    let directory = tempfile::tempdir().unwrap();
    let (path, place) = (directory.path().join("file"), directory.path().join("mount point"));
    fs::create_dir(&place).unwrap();
    images::ext4_with_files(&path, 16 * MIB, 3, "used", 1).unwrap();
    let device = LoopDevice::attach(&path, 512).unwrap();
    images::run("mount", &[&device.path, &place]).unwrap();
    let place_now = place.canonicalize().unwrap();
    let users = users_of(&device.path);
    let opened = OpenTarget::open(&target(&device.path, 16 * MIB)).err();
    images::run("umount", &[&place]).unwrap();
    assert_eq!(users.unwrap(), [format!("it is mounted at {}", place_now.display())]);
    let error = opened.unwrap();
    assert_eq!(error.code(), ErrorCode::VolumeInUse);
    assert!(error.to_string().contains("is in use: it is mounted at"), "{error:?}");
    OpenTarget::open(&target(&device.path, 16 * MIB)).unwrap();
}

#[test]
fn a_device_used_as_swap_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    used_file(&path, 16 * MIB);
    let device = LoopDevice::attach(&path, 4096).unwrap();
    images::run("mkswap", &[&device.path]).unwrap();
    images::run("swapon", &[&device.path]).unwrap();
    let users = users_of(&device.path);
    images::run("swapoff", &[&device.path]).unwrap();
    assert!(users.unwrap().contains(&"it is used as swap".to_owned()));
}

#[test]
fn a_device_that_is_claimed_is_not_opened() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    used_file(&path, MIB);
    let device = LoopDevice::attach(&path, 4096).unwrap();
    let claim =
        OpenOptions::new().read(true).custom_flags(OFlags::EXCL.bits().cast_signed()).open(&device.path).unwrap();
    assert_eq!(users_of(&device.path).unwrap(), ["the kernel or a program holds it exclusively"]);
    let error = OpenTarget::open(&target(&device.path, MIB)).err().unwrap();
    assert_eq!(error.code(), ErrorCode::VolumeInUse);
    drop(claim);
    let open = OpenTarget::open(&target(&device.path, MIB)).unwrap();
    // While we write, the next one is refused.
    assert_eq!(OpenTarget::open(&target(&device.path, MIB)).err().unwrap().code(), ErrorCode::VolumeInUse);
    open.zero(0, MIB, &mut goes_on).unwrap();
    let file = File::open(&device.path).unwrap();
    let mut content = vec![1; MIB as usize];
    file.read_exact_at(&mut content, 0).unwrap();
    assert!(content.iter().all(|byte| *byte == 0));
}

#[test]
fn a_disk_of_a_guest_of_qemus_is_in_use_and_not_opened() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    used_file(&path, MIB);
    let device = LoopDevice::attach(&path, 512).unwrap();
    for (driver, path) in [("host_device", &device.path), ("file", &path)] {
        for (rights, access) in [("read-write", "off"), ("read-only", "on")] {
            println!("{driver}, {rights}");
            let name = path.display();
            let guest = guest(&format!("driver={driver},filename={name},read-only={access}"));
            assert!(locks::is_locked(path), "qemu holds its locks");
            let users = users_of(path).unwrap();
            assert!(users.contains(&format!("process {} (qemu-system-x86) has it open", guest.0.id())), "{users:?}");
            let error = OpenTarget::open(&target(path, MIB)).unwrap_err();
            assert_eq!(error.code(), ErrorCode::VolumeInUse);
            assert!(error.to_string().contains("is in use: "), "{error:?}");
            drop(guest);
            drop(OpenTarget::open(&target(path, MIB)).unwrap());
            assert!(!locks::is_locked(path));
        }
    }
}

#[test]
fn what_we_hold_is_not_opened_by_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    used_file(&path, MIB);
    let device = LoopDevice::attach(&path, 512).unwrap();
    for path in [&device.path, &path] {
        assert_eq!(opened_by_qemu(path), "");
        let open = OpenTarget::open(&target(path, MIB)).unwrap();
        let said = opened_by_qemu(path);
        assert!(said.contains("lock"), "{said}");
        // A program that we start takes nothing along.
        let child = Command::new("sleep").arg("60").spawn().map(Holder).unwrap();
        drop(open);
        assert_eq!(opened_by_qemu(path), "");
        drop(child);
    }
}

#[test]
fn a_lock_of_qemus_is_seen_without_its_program() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    used_file(&path, MIB);
    // By this process, which is none that is looked for: as on a host whose processes cannot be looked into.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    locks::take(&file).unwrap();
    assert_eq!(users_of(&path).unwrap(), ["a program has locked it, as qemu locks the disks of its guests"]);
    assert_eq!(OpenTarget::open(&target(&path, MIB)).unwrap_err().code(), ErrorCode::VolumeInUse);
    drop(file);
    let open = OpenTarget::open(&target(&path, MIB)).unwrap();
    assert_eq!(open.users().unwrap(), Vec::<String>::new());
}

#[test]
fn who_comes_in_beside_us_is_seen() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    used_file(&path, MIB);
    let device = LoopDevice::attach(&path, 512).unwrap();
    let open = OpenTarget::open(&target(&device.path, MIB)).unwrap();
    assert_eq!(open.users().unwrap(), Vec::<String>::new());
    // A guest that does not lock, or not this file of the device.
    let name = device.path.display();
    let guest = guest(&format!("driver=host_device,filename={name},locking=off"));
    assert_eq!(open.users().unwrap(), [format!("process {} (qemu-system-x86) has it open", guest.0.id())]);
}

#[test]
fn a_device_mounted_in_another_namespace_is_in_use() {
    let directory = tempfile::tempdir().unwrap();
    let (path, place) = (directory.path().join("file"), directory.path().join("place"));
    fs::create_dir(&place).unwrap();
    images::ext4_with_files(&path, 16 * MIB, 3, "used", 1).unwrap();
    let device = LoopDevice::attach(&path, 512).unwrap();
    let script = format!("mount {} {} && echo mounted && exec sleep 60", device.path.display(), place.display());
    let mut apart = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .stdout(Stdio::piped())
        .spawn()
        .map(Holder)
        .unwrap();
    let mut said = String::new();
    BufReader::new(apart.0.stdout.as_mut().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "mounted\n");
    let here = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!here.contains(&*place.to_string_lossy()), "it is mounted elsewhere only");
    let place = place.canonicalize().unwrap();
    assert_eq!(users_of(&device.path).unwrap(), [format!("it is mounted at {}", place.display())]);
    assert_eq!(OpenTarget::open(&target(&device.path, 16 * MIB)).unwrap_err().code(), ErrorCode::VolumeInUse);
}

#[test]
fn a_physical_volume_is_known_by_its_label_in_each_of_the_first_sectors() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    let label = |sector: usize| {
        let mut content = vec![0xaa; MIB as usize];
        let begin = sector * 512;
        content[begin..begin + 8].copy_from_slice(b"LABELONE");
        content[begin + 20..begin + 24].copy_from_slice(&32_u32.to_le_bytes());
        content[begin + 24..begin + 32].copy_from_slice(b"LVM2 001");
        content[begin + 32..begin + 64].copy_from_slice(b"AbcdefGhijKlmnOpqrStuvWxyz012345");
        fs::write(&path, content).unwrap();
        physical_volume(&path).unwrap()
    };
    for sector in 0..4 {
        assert_eq!(label(sector).as_deref(), Some("Abcdef-Ghij-Klmn-Opqr-Stuv-Wxyz-012345"), "sector {sector}");
    }
    assert_eq!(label(4), None);
    // Cut off behind its type, without its type, and with nothing.
    for (content, expected) in
        [(&b"LABELONE0123456789abcdefLVM2 001"[..], Some("")), (b"LABELONE0123456789abcdef", None), (b"", None)]
    {
        fs::write(&path, content).unwrap();
        assert_eq!(physical_volume(&path).unwrap().as_deref(), expected);
    }
}
