//! Who uses a block device or a raw file now, as sentences for a person.
//!
//! All of it is read from /proc and /sys. What vanishes while it is looked at was not a user. It leaves out other
//! hosts, and processes that this one may not look into (when it does not run as root).

use std::{
    collections::{BTreeSet, HashSet},
    fs,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    fs::{AtFlags, CWD, FileType, OFlags, StatxFlags, major, makedev, minor, statx},
    io::Errno,
};

use super::locks;
use crate::error::{Error, Result};

/// A process that has the target open is looked for so many times more, so far apart.
const LOOKS: u32 = 5;
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// What is looked for: a device by its number, a file by its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    Device(u64),
    File { device: u64, inode: u64 },
}

impl Subject {
    fn of(metadata: &fs::Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self::Device(metadata.rdev())
        } else {
            Self::File { device: metadata.dev(), inode: metadata.ino() }
        }
    }

    /// Asks for what the kernel knows by itself: a server of files that does not answer, of whom any process has one open, must
    /// not stop the question (statx(2), AT_STATX_DONT_SYNC).
    fn is_at(self, path: &Path) -> bool {
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let Ok(there) = statx(CWD, path, flags, StatxFlags::TYPE | StatxFlags::INO) else { return false };
        let seen = if FileType::from_raw_mode(there.stx_mode.into()) == FileType::BlockDevice {
            Self::Device(makedev(there.stx_rdev_major, there.stx_rdev_minor))
        } else {
            Self::File { device: makedev(there.stx_dev_major, there.stx_dev_minor), inode: there.stx_ino }
        };
        seen == self
    }
}

/// Who uses the device or file at `path` now: mounts, swap, devices stacked on it (device-mapper, RAID, bcache, loop),
/// its partitions' users, processes that hold it open (other than this one), for a device any exclusive claim, and qemu's
/// locks. Empty when nobody does.
///
/// # Errors
/// `input_output` when `path` is not there.
pub fn users_of(path: &Path) -> Result<Vec<String>> {
    let (subject, mut users) = seen(path)?;
    if users.is_empty() && matches!(subject, Subject::Device(_)) && lasts(|| claimed(path)) {
        users.insert("the kernel or a program holds it exclusively".to_owned());
    }
    if users.is_empty() && lasts(|| locks::is_locked(path)) {
        users.insert("a program has locked it, as qemu locks the disks of its guests".to_owned());
    }
    Ok(users.into_iter().collect())
}

/// The same beside this process, which holds it itself: claims and locks are its own.
///
/// # Errors
/// As [`users_of`].
pub fn users_beside(path: &Path) -> Result<Vec<String>> {
    Ok(seen(path)?.1.into_iter().collect())
}

/// Who is seen to use it, without trying to take it.
fn seen(path: &Path) -> Result<(Subject, BTreeSet<String>)> {
    let metadata = path.metadata().map_err(|error| Error::io("examining", path, error))?;
    let subject = Subject::of(&metadata);
    let mut users = BTreeSet::new();
    if let Subject::Device(number) = subject {
        let directory = PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)));
        stacked(&directory, "it", &mut users);
        partitions(&directory, &mut users);
        mounts(number, "it", &mut users);
    }
    loops(subject, &mut users);
    swap(subject, &mut users);
    processes(subject, &mut users);
    Ok((subject, users))
}

fn names_in(directory: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(directory).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok())
}

/// Devices built on this one.
fn stacked(directory: &Path, what: &str, users: &mut BTreeSet<String>) {
    for holder in names_in(&directory.join("holders")) {
        let mapped = fs::read_to_string(format!("/sys/block/{holder}/dm/name")).unwrap_or_default();
        let name = if mapped.trim().is_empty() { holder } else { format!("{holder} ({})", mapped.trim()) };
        users.insert(format!("the device {name} is built on {what}"));
    }
}

fn partitions(directory: &Path, users: &mut BTreeSet<String>) {
    for name in names_in(directory) {
        let partition = directory.join(&name);
        let Ok(number) = fs::read_to_string(partition.join("dev")) else { continue };
        if !partition.join("partition").exists() {
            continue;
        }
        let what = format!("its partition {name}");
        stacked(&partition, &what, users);
        if let Some((major, minor)) = number.trim().split_once(':')
            && let (Ok(major), Ok(minor)) = (major.parse(), minor.parse())
        {
            let number = makedev(major, minor);
            mounts(number, &what, users);
            swap(Subject::Device(number), users);
        }
    }
}

/// Mounts of a device in every mount namespace that a process is in.
fn mounts(device: u64, what: &str, users: &mut BTreeSet<String>) {
    let mut seen = HashSet::new();
    let number = format!("{}:{}", major(device), minor(device));
    for process in names_in(Path::new("/proc")).filter(|name| name.parse::<u32>().is_ok()) {
        let namespace = fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
        if namespace.as_ref().is_some_and(|namespace| !seen.insert(namespace.clone())) {
            continue;
        }
        let table = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default();
        for line in table.lines() {
            if let Some(place) = mounted_at(line, &number, device) {
                users.insert(format!("{what} is mounted at {place}"));
            }
        }
    }
}

/// The mount point, if this line of mountinfo (proc(5)) is a mount of the device.
fn mounted_at(line: &str, number: &str, device: u64) -> Option<String> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(2);
    let same_number = fields.next()? == number;
    let place = fields.nth(1)?;
    // Btrfs has numbers of its own: there only the source names the device.
    let source = file_system.split(' ').nth(1)?;
    let same = same_number || (source.starts_with("/dev/") && Subject::Device(device).is_at(Path::new(source)));
    same.then(|| unescaped(place))
}

/// The kernel writes blanks and backslashes in these tables as octal numbers.
fn unescaped(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Loop devices backed by the file or device.
fn loops(subject: Subject, users: &mut BTreeSet<String>) {
    for name in names_in(Path::new("/sys/block")).filter(|name| name.starts_with("loop")) {
        let Ok(mut file) = fs::read(format!("/sys/block/{name}/loop/backing_file")) else { continue };
        while file.last() == Some(&b'\n') {
            file.pop();
        }
        if subject.is_at(Path::new(std::ffi::OsStr::from_bytes(&file))) {
            users.insert(format!("the loop device /dev/{name} is backed by it"));
        }
    }
}

fn swap(subject: Subject, users: &mut BTreeSet<String>) {
    let table = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for place in table.lines().skip(1).filter_map(|line| line.split_whitespace().next()) {
        if subject.is_at(Path::new(&unescaped(place))) {
            users.insert("it is used as swap".to_owned());
        }
    }
}

/// Processes, other than this one, that have the file or device open and keep it open. Who only looks at a new device for
/// a moment, as udev does, is gone when looked for again.
fn processes(subject: Subject, users: &mut BTreeSet<String>) {
    let mut found = openers(subject);
    for _ in 0..LOOKS {
        if found.is_empty() {
            return;
        }
        thread::sleep(BETWEEN_LOOKS);
        let now = openers(subject);
        found.retain(|user| now.contains(user));
    }
    users.extend(found);
}

fn openers(subject: Subject) -> BTreeSet<String> {
    let own = std::process::id();
    let processes = names_in(Path::new("/proc")).filter_map(|name| name.parse::<u32>().ok()).filter(|id| *id != own);
    processes
        .filter(|process| {
            let directory = PathBuf::from(format!("/proc/{process}/fd"));
            names_in(&directory).any(|descriptor| subject.is_at(&directory.join(descriptor)))
        })
        .map(|process| {
            let name = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            format!("process {process} ({}) has it open", name.trim())
        })
        .collect()
}

/// Whether someone holds the device exclusively: a mount that we cannot see, or a program.
fn claimed(path: &Path) -> bool {
    let opened = fs::OpenOptions::new().read(true).custom_flags(OFlags::EXCL.bits().cast_signed()).open(path);
    opened.is_err_and(|error| error.raw_os_error() == Some(Errno::BUSY.raw_os_error()))
}

/// Whether it is so, and still so when looked at again.
fn lasts(is_so: impl Fn() -> bool) -> bool {
    (0..LOOKS).all(|_| {
        let now = is_so();
        if now {
            thread::sleep(BETWEEN_LOOKS);
        }
        now
    })
}
