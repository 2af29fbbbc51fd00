//! Disk images for tests, made by the tools that users make them with: `qemu-img`, `qemu-io`, `mke2fs`; and loop
//! devices and file systems to write them to.
//!
//! Everything is seeded: the same arguments give the same bytes. It leaves out checking what lvp makes of them.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

/// Runs a program; its stdout, or an error with its stderr.
///
/// # Errors
/// When it cannot be started or fails.
pub fn run(program: &str, arguments: &[impl AsRef<OsStr>]) -> Result<String> {
    let output = Command::new(program).args(arguments).env("LC_ALL", "C").output().context(program.to_owned())?;
    let words: Vec<_> = arguments.iter().map(|word| word.as_ref().to_string_lossy()).collect();
    ensure!(
        output.status.success(),
        "{program} {} failed: {}",
        words.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// How a qcow2 image is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Qcow2Options {
    /// `compat`: 2 for 0.10, else 1.1.
    pub version: Option<u32>,
    /// Bytes of a cluster.
    pub cluster_size: Option<u64>,
    /// Whether to compress, and how: `zlib` or `zstd`.
    pub compression: Option<&'static str>,
    /// Whether L2 entries have subclusters.
    pub extended_l2: bool,
    /// `off`, `metadata`, `falloc` or `full`.
    pub preallocation: Option<&'static str>,
    /// Width of refcounts.
    pub refcount_bits: Option<u32>,
}

impl Qcow2Options {
    /// As `qemu-img -o` takes them.
    fn list(&self) -> String {
        let mut list = vec![format!("compat={}", if self.version == Some(2) { "0.10" } else { "1.1" })];
        list.extend(self.cluster_size.map(|size| format!("cluster_size={size}")));
        list.extend(self.compression.filter(|name| *name != "zlib").map(|name| format!("compression_type={name}")));
        list.extend(self.extended_l2.then(|| "extended_l2=on".to_owned()));
        list.extend(self.preallocation.map(|mode| format!("preallocation={mode}")));
        list.extend(self.refcount_bits.map(|bits| format!("refcount_bits={bits}")));
        list.join(",")
    }
}

/// Makes a qcow2 image of a raw one.
///
/// # Errors
/// When `qemu-img` fails.
pub fn qcow2_from(raw: &Path, image: &Path, options: &Qcow2Options) -> Result<()> {
    let list = options.list();
    let mut arguments: Vec<&OsStr> =
        ["convert", "-f", "raw", "-O", "qcow2", "-o", &list].into_iter().map(OsStr::new).collect();
    if options.compression.is_some() {
        arguments.push(OsStr::new("-c"));
    }
    arguments.extend([raw.as_os_str(), image.as_os_str()]);
    run("qemu-img", &arguments).map(drop)
}

/// Makes an empty qcow2 image of so many bytes.
///
/// # Errors
/// When `qemu-img` fails.
pub fn qcow2_empty(image: &Path, size: u64, options: &Qcow2Options) -> Result<()> {
    let (list, size) = (options.list(), size.to_string());
    let arguments = ["create", "-q", "-f", "qcow2", "-o", &list].map(OsStr::new);
    run("qemu-img", &[&arguments[..], &[image.as_os_str(), OsStr::new(&size)]].concat()).map(drop)
}

/// Gives a qcow2 image these commands of `qemu-io`, such as `write -P 7 0 64k` or `write -z 64k 64k`.
///
/// # Errors
/// When `qemu-io` fails.
pub fn qemu_io(image: &Path, commands: &[&str]) -> Result<()> {
    let mut arguments: Vec<&OsStr> = ["-f", "qcow2"].into_iter().map(OsStr::new).collect();
    for command in commands {
        arguments.extend([OsStr::new("-c"), OsStr::new(command)]);
    }
    arguments.push(image.as_os_str());
    run("qemu-io", &arguments).map(drop)
}

/// A qcow2 image that takes a while to write: `mib` MiB of the byte 7, which compress to little. It is made once and kept
/// in `folder`, because to make it takes longer than most tests.
///
/// # Errors
/// When `qemu-img` or `qemu-io` fails.
pub fn qcow2_of_sevens(folder: &Path, mib: u64) -> Result<PathBuf> {
    let kept = folder.join(format!("sevens-{mib}.qcow2"));
    if kept.exists() {
        return Ok(kept);
    }
    // A name of its own: another test may be making it too, and the last one wins.
    let place = tempfile::tempdir_in(folder)?;
    let (plain, packed) = (place.path().join("plain"), place.path().join("packed"));
    qcow2_empty(&plain, mib << 20, &Qcow2Options::default())?;
    // qemu-io takes less than 2 GiB at once.
    let pieces: Vec<String> =
        (0..mib).step_by(1024).map(|at| format!("write -q -P 7 {at}M {}M", (mib - at).min(1024))).collect();
    qemu_io(&plain, &pieces.iter().map(String::as_str).collect::<Vec<_>>())?;
    let arguments = ["convert", "-c", "-f", "qcow2", "-O", "qcow2"].map(OsStr::new);
    run("qemu-img", &[&arguments[..], &[plain.as_os_str(), packed.as_os_str()]].concat())?;
    fs::rename(packed, &kept)?;
    Ok(kept)
}

/// Compresses a file as `gzip`, `zstd` or `xz` do with these options; `ending` says with which (`gz`, `zst`, `xz`).
/// Gives the new file, which has it behind its name.
///
/// # Errors
/// When the program fails.
pub fn compressed(file: &Path, ending: &str, options: &[&str]) -> Result<PathBuf> {
    let program = match ending {
        "gz" => "gzip",
        "zst" => "zstd",
        _ => ending,
    };
    let words = ["--keep", "--force", "--quiet"].iter().chain(options).map(OsStr::new);
    run(program, &words.chain([file.as_os_str()]).collect::<Vec<_>>())?;
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{ending}"));
    Ok(PathBuf::from(name))
}

/// What `qemu-img convert` makes of an image: a raw file.
///
/// # Errors
/// When `qemu-img` fails.
pub fn raw_from(image: &Path, format: &str, raw: &Path) -> Result<()> {
    let arguments = ["convert", "-f", format, "-O", "raw"].map(OsStr::new);
    run("qemu-img", &[&arguments[..], &[image.as_os_str(), raw.as_os_str()]].concat()).map(drop)
}

/// Makes a sparse raw file with `share` percent of its 4 KiB blocks filled: half of those compress well, half not.
/// Filled blocks come in runs, as in a file system.
///
/// # Errors
/// When it cannot be written.
pub fn raw_with_data(raw: &Path, size: u64, share: u8, seed: u64) -> Result<()> {
    const BLOCK: usize = 4096;
    let mut random = fastrand::Rng::with_seed(seed);
    let file = File::create(raw)?;
    file.set_len(size)?;
    let mut at = 0;
    while at < size {
        let run = (random.u64(1..=16) * BLOCK as u64).min(size - at);
        if random.u8(0..100) < share {
            let mut bytes = vec![0; run as usize];
            if random.bool() {
                random.fill(&mut bytes);
            } else {
                bytes.iter_mut().enumerate().for_each(|(index, byte)| *byte = 1 + (index / 100 % 100) as u8);
            }
            file.write_all_at(&bytes, at)?;
        }
        at += run;
    }
    Ok(())
}

/// Makes a raw ext4 file system of `size` bytes with directories and `files` files in it, and gives it the label.
/// No mount and no root is needed.
///
/// # Errors
/// When `mke2fs` fails.
pub fn ext4_with_files(raw: &Path, size: u64, files: usize, label: &str, seed: u64) -> Result<()> {
    let tree = tempfile::tempdir()?;
    let mut random = fastrand::Rng::with_seed(seed);
    for index in 0..files {
        let directory = tree.path().join(format!("etc/{:02}", index % 20));
        fs::create_dir_all(&directory)?;
        let mut bytes = vec![b'a' + (index % 26) as u8; random.usize(0..100_000)];
        let half = bytes.len() / 2;
        random.fill(&mut bytes[half..]);
        fs::write(directory.join(format!("file-{index}")), bytes)?;
    }
    ext4_from(raw, size, tree.path(), label)
}

/// Makes a raw ext4 file system of `size` bytes with a copy of the directory `tree` in it.
///
/// # Errors
/// When `mke2fs` fails.
pub fn ext4_from(raw: &Path, size: u64, tree: &Path, label: &str) -> Result<()> {
    File::create(raw)?.set_len(size)?;
    let words = ["-q", "-F", "-t", "ext4", "-L", label, "-E", "hash_seed=6c76702d-7465-7374-0000-000000000000", "-d"];
    let mut arguments: Vec<&OsStr> = words.into_iter().map(OsStr::new).collect();
    arguments.extend([tree.as_os_str(), raw.as_os_str()]);
    run("mke2fs", &arguments).map(drop)
}

/// A loop device, detached when dropped. Needs root.
pub struct LoopDevice {
    /// The device, such as `/dev/loop3`.
    pub path: PathBuf,
}

impl LoopDevice {
    /// Attaches a file with logical blocks of 512 or 4096 bytes.
    ///
    /// # Errors
    /// When no device is free, or without root.
    pub fn attach(file: &Path, sector_size: u32) -> Result<Self> {
        let sectors = sector_size.to_string();
        let words = ["--find", "--show", "--direct-io=on", "--sector-size", &sectors].map(OsStr::new);
        let buffered = [words[0], words[1], words[3], words[4]];
        // A file system without direct I/O can carry a loop device as well.
        let path = run("losetup", &[&words[..], &[file.as_os_str()]].concat())
            .or_else(|_| run("losetup", &[&buffered[..], &[file.as_os_str()]].concat()))?;
        Ok(Self { path: PathBuf::from(path.trim()) })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Udev and blkid may look at a new device for a moment.
        for _ in 0..50 {
            if run("losetup", &[OsStr::new("--detach"), self.path.as_os_str()]).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// An empty file system on a loop device, unmounted and gone when dropped. Needs root.
pub struct MountedFileSystem {
    /// Where it is mounted.
    pub path: PathBuf,
    _device: LoopDevice,
    _directory: tempfile::TempDir,
}

impl MountedFileSystem {
    /// Makes one of so many bytes, sparse, by this command (`mkfs.xfs -q -m reflink=1`), and mounts it.
    ///
    /// # Errors
    /// When the program is missing, the kernel has no such file system, or without root.
    pub fn make(size: u64, command: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let (image, path) = (directory.path().join("image"), directory.path().join("mounted"));
        File::create(&image)?.set_len(size)?;
        fs::create_dir(&path)?;
        let (program, options) = command.split_first().context("no command")?;
        let arguments: Vec<&OsStr> = options.iter().map(OsStr::new).chain([image.as_os_str()]).collect();
        run(program, &arguments)?;
        let device = LoopDevice::attach(&image, 512)?;
        run("mount", &[&device.path, &path])?;
        Ok(Self { path, _device: device, _directory: directory })
    }
}

impl Drop for MountedFileSystem {
    fn drop(&mut self) {
        // A failed test may have left a program that stands in it.
        let _ = run("umount", &[OsStr::new("--lazy"), self.path.as_os_str()]);
    }
}
